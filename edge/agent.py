"""The gateway's resident process: wires drivers, tasks and the MQTT link together, and owns the clock.

It holds numpy, ONNX Runtime and the protocol stacks; torch lives in the training child alone.
"""

import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from broker import messages as m
from broker.link import Inbound, Link
from broker.topics import (
    CharterInForce,
    Chunk,
    FederationStatus,
    Local,
    Manifest,
    ReceiptFor,
    ReleaseFile,
    RosterOf,
    RoundPlan,
    Status,
    common_filters,
    downlink_filters,
    parse,
)
from edge import SOFTWARE
from edge.birth import Herald
from edge.charter import CharterKeeper
from edge.config import Config, Policy
from edge.health import Watch
from edge.identity import own_agreement_key, own_signer, with_own_tls
from edge.reload import Plan, plan
from edge.renewal import Renewal
from edge.resend import Resender
from edge.ring import Samples
from edge.roster import RosterKeeper
from edge.runner import Runner
from edge.shop import Shop
from edge.sources import Sources
from edge.status import health_message, sources_status, write_status
from edge.stick import Stick
from edge.store import State
from edge.tags import Health, Quality, Sample
from edge.train import resident_bytes
from edge.trust import Trust
from edge.wiring import wire
from models.errors import PeerError, UserError

log = logging.getLogger(__name__)

_TICK_S = 0.5
_HEALTH_S = 10.0


class Agent:
    """One gateway. `run` returns when it is told to stop (SIGTERM, SIGINT, or `stop`).

    `read` reads the files again, on SIGHUP; UserError leaves everything as it is.
    """

    def __init__(self, config: Config, folder: Path, read: Callable[[], Config]) -> None:
        self.config, self.folder, self._read = config, folder, read
        self.state = State(folder)
        self.state.claim()
        self.watch = Watch(config.tags)
        self.samples = Samples(folder, config.store_bytes, config.store_days, self.watch.take)
        self.samples.retag(config.meanings)
        self.stopped, self._hangup = asyncio.Event(), asyncio.Event()
        signer, agreement_key = own_signer(self.state), own_agreement_key(self.state)
        self.session = self.state.next_session()
        self._enter(signer)
        self.status = Status(config.path).topic
        will = signer.seal(m.Death(m.VERSION, self.session), self.status)
        client = f"tundish-{signer.public_key.hex()[:16]}"
        self.link = Link(
            with_own_tls(config.mqtt, folder), client_id=client, will=(self.status, will),
            on_message=self._message, on_up=self._up, on_down=self._down,
        )  # fmt: skip
        self.stick = Stick(folder, self.state, self.link.subscribe, self._message)
        self.shop = Shop(
            config, folder, self.state, self.samples, signer,
            self.link.publish, self.stick.subscribe, self.link.unsubscribe,
        )  # fmt: skip
        self.trust = Trust(self.shop)
        self.charter = CharterKeeper(self.shop, partial(self._bound_anew, "charter"))
        self.roster = RosterKeeper(self.shop, partial(self._bound_anew, "roster"))
        self.runners = {name: Runner(name, table, self.shop) for name, table in config.tasks.items()}
        self.herald = Herald(self.shop, self.session, agreement_key, self._installed, self.charter.say)
        self.renewal = Renewal(self.shop)
        self.sources = Sources(folder / "pki", self._sink)
        self._unread, self._restart = "", tuple[str, ...]()
        self._health_at, self._tags = 0.0, dict[str, dict[str, dict[str, object]]]()
        self.resender = Resender(self.state, self.link, config.path)

    def _enter(self, signer: m.Signer) -> None:
        """Let the ledger say who begins here."""
        with self.state.transaction():
            self.state.record("session", {
                "path": str(self.config.path), "session": self.session, "software": SOFTWARE,
                "public_key": signer.public_key.hex(), "tasks": list(self.config.tasks),
                "policy": msgspec.to_builtins(self.config.policy),
            })  # fmt: skip
            self.state.checkpoint(signer)

    # -- life -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Score, train and federate until told to stop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stopped.set)
        loop.add_signal_handler(signal.SIGHUP, self._hangup.set)
        for runner in self.runners.values():
            runner.guard("start", runner.start)
        feedback = Local(self.config.path, "feedback", "+").topic
        self.link.subscribe(FederationStatus(self.config.federation.name or "+").topic, feedback)
        if self.shop.federation:
            self._follow(self.config.tasks)
        self.link.start()
        for source in self.config.sources:
            self.sources.start(source)
        works = self._tick(), self._reload(), self.renewal.run(), self.charter.run()
        jobs = [asyncio.create_task(work) for work in works]
        log.info("gateway %s: %d sources, %d tasks", self.config.path, len(self.config.sources), len(self.runners))
        await self.stopped.wait()
        await asyncio.gather(*(job for job in jobs if job.cancel()), return_exceptions=True)
        last = self.snapshot()
        await self._stop_sources(source.name for source in self.config.sources)
        await asyncio.gather(*(runner.stop() for runner in self.runners.values()))
        self.link.publish(
            self.status, self.shop.signer.seal(m.Death(m.VERSION, self.session), self.status), retain=True
        )
        await self.link.stop()
        write_status(self.folder, self.snapshot() | {"running": False, "sources": last["sources"]})
        self.samples.close()
        # After what a job that was just cancelled has begun in the state's thread.
        await self.state.commit(lambda: self.state.checkpoint(self.shop.signer))
        self.state.close()

    def stop(self) -> None:
        """End `run`."""
        self.stopped.set()

    async def _reload(self) -> None:
        """On each SIGHUP, read the files again and do what follows of it; what they say wrongly changes nothing."""
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            try:
                config = await asyncio.to_thread(self._read)
                for name, runner in self.runners.items():
                    if name in config.tasks and runner.model:
                        wire(runner.model.task, config.tasks[name], config.tags, config.file)
                drivers = self.sources.drivers
                well = {name for name, driver in drivers.items() if driver.health.connected}
                offline = frozenset(source.name for source in self.config.sources) - well
                await self._carry_out(plan(self.config, config, offline))
                self._unread = ""
            except UserError as error:
                self._unread = f"the files are not taken, what ran goes on: {error}"
                log.error("reload: %s", self._unread)
            except Exception as error:
                # Whatever it was, the next SIGHUP must find somebody.
                self._unread = f"reload: {type(error).__name__}: {error}; restart the gateway"
                log.exception("%s", self._unread)

    async def _carry_out(self, new: Plan) -> None:
        """Change what runs to a new configuration; whatever stays the same is not touched."""
        await self._stop_sources(new.stop)
        await self._note_policy(new.config.policy)
        self.config = self.shop.config = new.config
        self.watch.retag(new.config.tags, new.changed)
        await asyncio.to_thread(self.samples.flush)
        self.samples.retag(new.config.meanings)
        for ref in new.changed:
            self.shop.latest.forget(ref)
        for source in new.config.sources:
            if source.name in new.start:
                self.sources.start(source)
        for name in new.leave:
            runner = self.runners.pop(name)
            self.link.unsubscribe(*downlink_filters(self.shop.federation, name, self.config.path))
            await runner.stop()
        for name in new.join:
            # The state file is its thread's own.
            runner = await self.state.commit(partial(Runner, name, new.config.tasks[name], self.shop))
            self.runners[name] = runner
            runner.guard("start", runner.start)
        await self.charter.say()
        for name, runner in self.runners.items():
            runner.reconfigure(rewire=name in new.rewire)
        if self.shop.federation:
            self._follow(new.join)
        if new.leave or new.join:
            self.herald.announce()
        self._restart = new.restart
        log.info("reload: %s", new.summary)
        for key in new.restart:
            log.warning("reload: %s has changed, which takes a restart: systemctl restart tundish-edge", key)

    async def _note_policy(self, policy: Policy) -> None:
        """Let the ledger say what holds from now on."""
        if policy != self.config.policy:
            body: dict[str, object] = {"policy": msgspec.to_builtins(policy)}
            log.info("reload: the policy from now on: %s", body["policy"])
            await self.state.commit(lambda: self.state.record("policy", body))

    def _bound_anew(self, what: str) -> None:
        """Let every task's participant look at its plan anew: another charter or roster is here."""
        for runner in self.runners.values():
            runner.guard(what, partial(runner.reconfigure, rewire=False))

    def _sink(self, samples: Sequence[Sample], /) -> None:
        """Every batch of every driver: to the store's queue, and at once to the windows."""
        self.samples.append(samples)
        self.shop.latest.take(samples)
        for runner in self.runners.values():
            runner.guard("scoring", partial(runner.feed, samples))
        if self.config.publish_raw:
            self._publish_raw(samples)

    def _publish_raw(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            name = self.config.publish_raw.get(sample.tag)
            if name and isinstance(sample.value, float):
                value = sample.value if sample.quality is Quality.GOOD else None
                body = {"timestamp_ms": sample.time_ns // 1_000_000, "value": value}
                self.link.publish(Local(self.config.path, "raw", name).topic, json.dumps(body).encode(), qos=0)

    async def _look(self) -> None:
        """Every ten seconds: how the tags are, on each source's own clock as its newest sample tells it."""
        if time.monotonic() < self._health_at:
            return
        self._health_at = time.monotonic() + _HEALTH_S
        for name, driver in list(self.sources.drivers.items()):
            now_ns = time.time_ns() + int((driver.health.clock_skew_s or 0.0) * 1e9)
            self._tags[name] = await asyncio.to_thread(self.watch.snapshot, name, now_ns)
            self._say_health(name, driver.health, self._tags[name])

    def _say_health(self, name: str, health: Health, tags: dict[str, dict[str, object]]) -> None:
        topic = Local(self.config.path, "health", name).topic
        self.link.publish(topic, health_message(health, tags), qos=0, retain=True)

    async def _stop_sources(self, names: Iterable[str]) -> None:
        """Read some sources no more, and let what the broker keeps of them say so."""
        for name, health in (await self.sources.stop(names)).items():
            self._say_health(name, health, {})

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            await self._look()
            busy = any(runner.busy for runner in self.runners.values())
            await self.stick.tick(busy=busy or self.shop.releases.changed)
            for task, release in (await self.shop.releases.news(list(self.runners))).items():
                if runner := self.runners.get(task):
                    runner.guard("release", partial(runner.installer.on_release, release, runner.model))
            for runner in self.runners.values():
                runner.guard("scoring", runner.tick)
            self.resender.tick(self.runners)
            self.herald.tick()
            await asyncio.to_thread(write_status, self.folder, self.snapshot() | {"running": True})

    # -- the link ---------------------------------------------------------------------------------------------------

    def _up(self) -> None:
        """Say everything again: a broker may have come back empty."""
        self.herald.announce()
        for runner in self.runners.values():
            runner.reconnected()
        self.resender.hurry()

    def _installed(self) -> tuple[m.Installed, ...]:
        return tuple(has for runner in self.runners.values() if (has := runner.installer.installed))

    def _down(self, _reason: str) -> None:
        """Scoring goes on, updates wait in the outbox; the link has logged it."""

    def _follow(self, tasks: Iterable[str]) -> None:
        """Read what the pinned federation says to all, and of our tasks."""
        self.link.subscribe(*common_filters(self.shop.federation))
        for task in tasks:
            self.link.subscribe(*downlink_filters(self.shop.federation, task, self.config.path))

    def _message(self, inbound: Inbound) -> None:
        """One message of a peer: hostile until verified, and never fatal."""
        try:
            self._route(inbound)
        except PeerError as error:
            self.shop.refuse(error, f"message on {inbound.topic[:200]}")
        except Exception:
            # A peer's bytes found a mistake of ours: say all of it, and go on.
            self.shop.refused["internal"] += 1
            log.exception("message on %s", inbound.topic[:200])

    def _route(self, inbound: Inbound) -> None:
        topic = parse(inbound.topic)
        if isinstance(topic, FederationStatus):
            self._federation(topic, inbound)
            return
        if isinstance(topic, CharterInForce | RosterOf | ReleaseFile) and topic.federation == self.shop.federation:
            self._to_all(topic, inbound)
            return
        if isinstance(topic, Local) and topic.what == "feedback" and topic.name in self.runners:
            self.runners[topic.name].on_feedback(inbound.payload)
            return
        if not isinstance(topic, Chunk | Manifest | RoundPlan | ReceiptFor) or topic.task not in self.runners:
            raise PeerError("topic", "is none that this gateway asked for")
        runner, key = self.runners[topic.task], self.shop.federation_key
        if topic.federation != self.shop.federation:
            raise PeerError("federation", f"{topic.federation!r} is not the pinned one")
        match topic:
            case Chunk():
                runner.installer.on_chunk(inbound.topic, inbound.payload)
                runner.on_chunk(inbound.topic, inbound.payload)
            case Manifest() if inbound.payload:
                manifest = m.open_envelope(inbound.payload, inbound.topic, key, m.ModelManifest)
                self.shop.releases.tell(manifest)
                runner.on_manifest(manifest, inbound.payload, topic.of)
            case RoundPlan() if inbound.payload:
                runner.on_plan(m.open_envelope(inbound.payload, inbound.topic, key, m.Plan))
            case ReceiptFor():
                runner.on_receipt(m.open_envelope(inbound.payload, inbound.topic, key, m.Receipt))

    def _to_all(self, topic: CharterInForce | RosterOf | ReleaseFile, inbound: Inbound) -> None:
        """What the pinned federation says to all of its gateways."""
        if isinstance(topic, ReleaseFile):
            self.shop.releases.hear(topic.name, inbound, self.shop.federation_key)
        elif isinstance(topic, RosterOf):
            self.roster.hear(topic.part, inbound)
        else:
            self.charter.hear(inbound)

    def _federation(self, topic: FederationStatus, inbound: Inbound) -> None:
        """The aggregator's birth or death. The first one seen is pinned; a later one must have the same key."""
        if not inbound.payload:
            return
        if not self.shop.federation:
            self.trust.first_seen(topic.federation, inbound)
            self._follow(self.config.tasks)
        elif topic.federation != self.shop.federation:
            return
        if self.trust.birth(inbound):
            self.charter.repeat()
            for runner in self.runners.values():
                runner.reconnected()
            self.resender.hurry()

    # -- status -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, object]:
        """What `tundish edge status` shows; plain JSON types."""
        return {
            "path": str(self.config.path),
            "public_key": self.shop.signer.public_key.hex(),
            "pid": os.getpid(),
            "time_ms": int(time.time() * 1000),
            "resident_mb": round(resident_bytes(os.getpid()) / 2**20, 1),
            "mqtt": self.link.status,
            "certificate": self.renewal.status(),
            "problem": self._unread or self.trust.problem or self.shop.releases.problem,
            "restart": self._restart,
            "federation": {"name": self.shop.federation, "key": self.shop.federation_key.hex()},
            "charter": self.charter.status(),
            "roster": self.roster.status,
            "sources": sources_status(self.sources.drivers, self._tags),
            "tasks": {name: runner.status() for name, runner in self.runners.items()},
            "outbox": len(self.state.waiting),
            "answered": not self.shop.federation or self.state.answered,
            "samples_dropped": self.samples.dropped,
            "store_error": self.samples.error,
            "store_notice": self.samples.notice,
            "refused": dict(self.shop.refused),
            "link": dict(self.link.counters),
        }
