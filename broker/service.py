"""The aggregator: wires link, intake, federations, journal and downlink together, and owns the clock.

One step takes a batch of messages, verifies and decodes them, lets the federations decide, and writes everything in
one transaction. Only after the commit are the messages acknowledged and receipts and plans sent, so a receipt never
promises what a crash could take back. If the journal can't be written, the service stops: what it knows in memory is
then ahead of the disk, and a restart begins again from the disk.
"""

import asyncio
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from broker import alone, ballot, federation, intake, stick, topics
from broker import round as rounds
from broker.charters import Charters
from broker.closing import close_round, end_vote
from broker.config import FederationConfig
from broker.downlink import Downlink
from broker.folder import owned
from broker.genesis import ensure_model
from broker.job import Job, load_job
from broker.link import Inbound, Link
from broker.messages import VERSION, Receipt
from broker.presence import Presence
from broker.publish import put_model, put_plan
from broker.refusals import LOUD, Refusals
from broker.releasing import releases_of
from broker.roster import Rosters
from broker.status import write_status
from models.errors import LocalError, PeerError

log = logging.getLogger(__name__)

TICK_S = 0.25
BATCH = 256
FILED = 64  # of a file, between two such batches
STATUS_S = 1.0
_FROM_ALL = topics.ALL_STATUS, topics.ALL_ACCEPTED


def wall_ms() -> int:
    """Milliseconds since 1970 UTC."""
    return time.time_ns() // 1_000_000


class Service:
    """One federation; `run` returns after `stop`. `state` is the folder that is the aggregator's memory."""

    def __init__(self, config: FederationConfig, state: Path, *, clock: Callable[[], int] = wall_ms) -> None:
        self._config = config
        self._state = state
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._inbox: deque[Inbound] = deque()
        self._wake = asyncio.Event()
        self._stopping = False
        self._refusals = Refusals()
        self._outcomes: Counter[str] = Counter()
        self._receipts: list[tuple[str, bytes]] = []
        # The file that is being taken, and what is left of it.
        self._files, self._filed = stick.Inbox(state), deque[Inbound]()
        self._file: Path | None = None
        # Whether what is heard came by file, and its receipts are to be kept for one.
        self._by_file = False
        # What became of the connection since the last step, in its order.
        self._connection: list[rounds.Event] = []

    def stop(self) -> None:
        """Make `run` end cleanly."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Serve until stopped; UserError for a task that can't be served, LocalError when the disk refuses."""
        with owned(self._state) as self._journal:
            for file in self._config.tasks:
                await ensure_model(self._journal, file, self._clock())
                self._jobs[file.task.name] = load_job(self._journal, file)
            await self._serve()

    async def _serve(self) -> None:
        signer = self._journal.signer()
        self._signer, self._public_key = signer, signer.public_key.hex()
        log.info("federation %s, public key %s", self._config.name, self._public_key)
        self._downlink = Downlink(self._config.name, signer, self._clock())
        table = self._config.release
        self._releasing = releases_of(self._journal, self._downlink, table)
        self._rosters = Rosters(self._journal, self._downlink)
        self._charters = Charters(self._config.charter, self._journal, self._clock())
        self._charters.enter()
        wanted = {name: job.wanted for name, job in self._jobs.items()}
        self._intake = intake.Intake(self._config, self._journal, wanted, self._charters.covers)
        self._presence = Presence(self._journal, self._intake.revocation)
        for job in self._jobs.values():
            self._put_model(job)  # also proves, before anybody connects, that the manifest fits into a message
        self._link = Link(
            self._config.mqtt,
            client_id=f"tundish-broker-{self._config.name}",
            will=(self._downlink.status_topic, self._downlink.status("down")),
            on_message=self._on_message,
            on_up=self._on_up,
            on_down=self._on_down,
            manual_ack=True,
        )
        self._link.subscribe(*_FROM_ALL, *(topics.uplink_filter(name) for name in self._jobs))
        # Not a word goes to the MQTT broker before it is clear that nobody else has this federation.
        look = alone.look(self._config, self._journal, lambda: self._stopping, self._link.start)
        self._looking = asyncio.create_task(look)
        try:
            async with self._enrolment():
                await self._loop()
            self._link.publish(self._downlink.status_topic, self._downlink.status("down"), retain=True)
        finally:
            self._looking.cancel()
            (started,) = await asyncio.gather(self._looking, return_exceptions=True)
            if started is True:
                await self._link.stop()
            write_status(self._state, self.status())

    def _enrolment(self) -> AbstractAsyncContextManager[None]:
        """Enrolment over the network, where it was asked for; without it, no port is open and no X.509 is loaded."""
        if self._config.enrolment is None:
            return nullcontext()
        from broker.listener import listening  # noqa: PLC0415

        return listening(self._config, self._config.enrolment, self._state, self._refusals)

    async def _loop(self) -> None:
        status_at, seen = 0.0, self._journal.data_version()
        while not self._stopping:
            self._wake.clear()
            if self._looking.done():
                self._looking.result()  # somebody else has it, or a file of [mqtt] can't be used
            self._step()
            await self._take_files()
            if time.monotonic() >= status_at:
                status_at = time.monotonic() + STATUS_S
                write_status(self._state, self.status())
                if seen != (seen := self._journal.data_version()):
                    # Somebody was enrolled: subscribing again brings what is retained and was refused.
                    self._link.unsubscribe(*_FROM_ALL)
                    self._link.subscribe(*_FROM_ALL)
                    if self._releasing:
                        self._releasing.refresh(self._jobs)  # or something was released
                if self._releasing:
                    self._releasing.freshen(self._jobs, self._clock())
            if self._inbox or self._file:
                await asyncio.sleep(0)
                continue
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), TICK_S)

    def _on_message(self, inbound: Inbound) -> None:
        self._inbox.append(inbound)
        self._wake.set()

    def _on_up(self) -> None:
        self._connection.append(federation.Connected())
        self._downlink.forget()
        self._downlink.put(self._downlink.status_topic, self._downlink.status("up"))
        if said := self._charters.message(self._config.name, self._signer):
            self._downlink.put(*said)
        self._rosters.put()  # before the plans, which name it
        for job in self._jobs.values():
            self._put_model(job)
            put_plan(self._downlink, job, self._charters.digest)
        if self._releasing:
            self._releasing.put(self._jobs)
        self._wake.set()

    def _on_down(self, _reason: str) -> None:  # the link has logged it
        self._connection.append(federation.Disconnected())
        self._wake.set()

    def _step(self) -> None:
        now_ms = self._clock()
        batch = [self._inbox.popleft() for _ in range(min(BATCH, len(self._inbox)))]
        with self._journal.transaction():
            for event in self._connection:
                self._tell_all(event, now_ms)
            self._connection.clear()
            for path, session in self._presence.gone():
                log.info("%s was taken out, or has another key", path)
                self._tell_all(federation.Died(path, session), now_ms)
            for inbound in batch:
                self._hear(inbound, now_ms)
            self._tell_all(federation.Tick(), now_ms)
            self._rosters.refresh(now_ms)
        for inbound in batch:
            self._link.ack(inbound)
        for topic, payload in self._receipts:
            self._link.publish(topic, payload)
        self._receipts.clear()
        self._downlink.pump(self._link)

    async def _take_files(self) -> None:
        """Hear the next messages of what `broker import` left; a file goes once its last ones are committed."""
        if self._file is None:
            found = await asyncio.to_thread(self._files.next)
            if found is None:
                return
            self._file, messages = found
            self._filed.extend(Inbound(topic, payload, retain=False, qos=1, mid=0) for topic, payload in messages)
        self._by_file = True
        with self._journal.transaction():
            for _ in range(min(FILED, len(self._filed))):
                self._hear(self._filed.popleft(), self._clock())
        self._by_file = False
        if not self._filed:
            await asyncio.to_thread(self._files.delete, self._file)
            self._file = None

    def _tell_all(self, event: rounds.Event, now_ms: int) -> None:
        for job in self._jobs.values():
            self._tell(job, event, now_ms)

    def _read(self, inbound: Inbound, now_ms: int) -> intake.Heard | None:
        try:
            return (self._intake.read_filed if self._by_file else self._intake.read)(inbound, now_ms)
        except PeerError as error:
            self._refusals.count(inbound.topic, error.reason, error.detail)
        except LocalError:
            raise  # the disk, not the message
        except Exception as error:
            # Nobody foresaw it, yet one message must not end the service for everybody else.
            if self._refusals["internal"] < LOUD:
                log.exception("a message could not be read")
            self._refusals.count(inbound.topic, "internal", type(error).__name__)
        return None

    def _hear(self, inbound: Inbound, now_ms: int) -> None:
        if not inbound.payload:
            return  # somebody cleared a retained topic
        match heard := self._read(inbound, now_ms):
            case intake.HeardBirth():
                self._hear_birth(heard, now_ms)
            case intake.HeardDeath(path, death):
                self._tell_all(federation.Died(path, death.session), now_ms)
            case intake.HeardAcceptance(path, key, word):
                self._charters.take(path, key, word, now_ms)
            case intake.HeardAnswer(path, task, answer) if answer.verdict == "asks":
                self._tell(self._jobs[task], federation.Asked(path, answer.round), now_ms)
            case intake.HeardAnswer(path, task, answer):
                joined = answer.verdict == "joined"
                event = federation.Answered(path, answer.round, joined, answer.code, answer.reason)
                self._tell(self._jobs[task], event, now_ms)
            case intake.HeardVote():
                self._hear_vote(heard, now_ms)
            case intake.HeardUpdate():
                self._hear_update(heard, now_ms)
            case intake.Refused():
                self._hear_refused(heard, inbound.topic, now_ms)

    def _hear_birth(self, heard: intake.HeardBirth, now_ms: int) -> None:
        path, birth = heard.path, heard.birth
        self._presence.hear(path, birth)
        if heard.pinned:
            log.warning("pinned the key of %s at first sight: %s", path, birth.public_key.hex())
            self._journal.note(now_ms, "pinned", {"path": path, "key": birth.public_key.hex()})
        for name, job in self._jobs.items():
            self._tell(job, federation.Born(path, birth.session, name in birth.tasks), now_ms)

    def _hear_refused(self, heard: intake.Refused, topic: str, now_ms: int) -> None:
        self._refusals.count(topic, heard.reason, heard.detail)
        digest, reason, detail = heard.digest, heard.reason, heard.detail[:512]
        if self._refusals.enters(heard.path):
            body = {"path": heard.path, "task": heard.task, "digest": digest.hex(), "reason": reason, "detail": detail}
            self._journal.note(now_ms, "refused", body)
        if heard.round is not None:
            receipt = Receipt(VERSION, heard.round, digest, f"refused-{reason}", detail, now_ms)
            self._receipt(heard.task, heard.path, receipt)
            self._tell(self._jobs[heard.task], federation.Refused(heard.path, heard.round), now_ms)

    def _hear_vote(self, heard: intake.HeardVote, now_ms: int) -> None:
        path, task, vote = heard.path, heard.task, heard.vote
        against = vote.verdict == "against"
        if not self._journal.put_vote(task, vote.version, path, against=against):
            return  # said again
        body = {"path": path, "task": task, "version": vote.version, "verdict": vote.verdict, "than": vote.than}
        self._journal.note(now_ms, "vote", body | {"new": vote.new, "old": vote.old, "windows": vote.windows})
        self._tell(self._jobs[task], ballot.Voted(path, vote.version, against), now_ms)

    def _hear_update(self, heard: intake.HeardUpdate, now_ms: int) -> None:
        update = heard.update
        known = self._journal.was_counted(heard.task, update.round, heard.path)
        event = federation.Submitted(heard.path, update.round, update.base, heard.digest, known)
        job = self._jobs[heard.task]
        actions = job.federation.handle(event, now_ms)
        for action in actions:
            if isinstance(action, rounds.Outcome) and action.word == rounds.COUNTED:
                self._journal.count_update(
                    heard.task, update.round, heard.path, digest=heard.digest,
                    samples=job.task.round.weight(update.samples, update.quality), metric=update.metric,
                    payload=update.payload, base_loss=update.base_loss,
                    counted_in=job.federation.number, now_ms=now_ms,
                )  # fmt: skip
                self._journal.note(now_ms, "update", {
                    "path": heard.path, "task": heard.task, "round": update.round, "digest": heard.digest.hex(),
                    "outcome": action.word, "samples": update.samples, "bytes": len(update.payload),
                    "message_bytes": heard.size,
                })  # fmt: skip
        self._act(job, actions, now_ms)

    def _tell(self, job: Job, event: rounds.Event, now_ms: int) -> None:
        self._act(job, job.federation.handle(event, now_ms), now_ms)

    def _act(self, job: Job, actions: list[rounds.Action], now_ms: int) -> None:
        name = job.task.name
        for action in actions:
            match action:
                case rounds.Outcome(path, number, digest, word, detail):
                    self._outcomes[word] += 1
                    log.info("%s round %d: %s %s %s", name, number, path, word, detail)
                    self._receipt(name, path, Receipt(VERSION, number, digest, word, detail, now_ms))
                case federation.Open(number, base, opened_ms, deadline_ms, asked):
                    log.info("%s round %d: open, from version %d%s", name, number, base, asked and f", for {asked}")
                    self._refusals.opened()
                    self._rosters.refresh(now_ms)  # it goes out ahead of the plan that names it
                    job.deadline_ms, job.roster_ms = deadline_ms, self._rosters.time_ms
                    self._journal.open_round(name, number, base, opened_ms, deadline_ms, job.roster_ms)
                    more: dict[str, Any] = {"min_gateways": job.task.round.min_gateways}
                    more |= {"asked": asked} if asked else {}
                    more |= {"charter": self._charters.digest.hex()} if self._charters.named else {}
                    self._journal.note(now_ms, "opened", {"task": name, "round": number, "base": base, **more})
                    put_plan(self._downlink, job, self._charters.digest)
                case rounds.Extend(number, deadline_ms):
                    log.info("%s round %d: too few updates, the deadline moves on", name, number)
                    self._journal.extend_round(name, number, job.federation.opened_ms, deadline_ms)
                    self._journal.note(now_ms, "extended", {"task": name, "round": number, "deadline_ms": deadline_ms})
                    job.deadline_ms = deadline_ms
                    put_plan(self._downlink, job, self._charters.digest)
                case rounds.Close(number, base):
                    if close_round(self._journal, job, number, base, now_ms):
                        self._put_model(job, new=True)
                    self._journal.checkpoint(now_ms, self._signer)
                    losses = self._journal.losses(name, number)
                    job.rate = job.rate.after(losses)
                    # The last plan of the round goes out before the next round's, in the same order as it came to be.
                    follow = job.federation.handle(federation.Aggregated(job.model.version, frozenset(losses)), now_ms)
                    put_plan(self._downlink, job, self._charters.digest)
                    self._act(job, follow, now_ms)
                case ballot.Decided():
                    self._decided(job, action, now_ms)
                case federation.Finish():
                    log.info("%s: the last round is over", name)
                    self._journal.note(now_ms, "done", {"task": name, "version": job.model.version})
                    put_plan(self._downlink, job, self._charters.digest)

    def _decided(self, job: Job, vote: ballot.Decided, now_ms: int) -> None:
        """End the vote on a model; one that was voted down makes way for the one before."""
        if end_vote(self._journal, job, vote, now_ms):
            return
        self._put_model(job, new=True)
        follow = job.federation.handle(federation.Aggregated(job.model.version), now_ms)
        put_plan(self._downlink, job, self._charters.digest)
        self._act(job, follow, now_ms)

    def _receipt(self, task: str, path: str, receipt: Receipt) -> None:
        topic, envelope = self._downlink.receipt(task, path, receipt)
        self._receipts.append((topic, envelope))
        if self._by_file:
            self._journal.put_receipt(topic, receipt.digest, envelope, copy=receipt.outcome == rounds.DUPLICATE)

    def _put_model(self, job: Job, *, new: bool = False) -> None:
        retained = self._releasing.retained(job.task.name) if self._releasing else set[tuple[int, str]]()
        put_model(self._downlink, self._journal, job, new=new, retained=retained)

    def status(self) -> dict[str, Any]:
        """What `tundish broker status` shows: plain JSON values; times in milliseconds since 1970 UTC."""
        error = self._link.error or ("" if self._looking.done() else alone.LOOKS)
        return {
            "federation": self._config.name,
            "public_key": self._public_key,
            **self._intake.asking(),
            "taken_out": self._presence.revoked(),
            "unseen": self._presence.unseen(),
            "installed": self._presence.installed(),
            "time_ms": self._clock(),
            "pid": os.getpid(),
            "connected": self._link.connected,
            "mqtt": {"version": self._link.version, "error": error, "counters": dict(self._link.counters)},
            "refused": dict(self._refusals),
            "outcomes": dict(self._outcomes),
            "charter": self._charters.status(),
            "tasks": {n: job.status() | {"rounds": self._journal.tally(n)} for n, job in self._jobs.items()},
            "releasing": self._releasing is not None,
            "released": {name: self._releasing.status(name) for name in self._jobs} if self._releasing else {},
        }
