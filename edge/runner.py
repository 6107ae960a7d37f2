"""One task on this gateway: the shell around its participant. Fetches models, trains, sends, and hands back.

The participant decides, this carries out. Scoring is `edge.live` and never waits for anything here.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec

from broker import messages as m
from broker.topics import Local, Uplink
from edge import participant as p
from edge.candidates import after_training, build, stored
from edge.choose import GLOBAL
from edge.config import TaskTable
from edge.handback import Fetch, Model, probe
from edge.infer import Scorer, contest, elect
from edge.live import Live
from edge.memory import Memory
from edge.shop import Shop
from edge.store import Outgoing
from edge.tags import Sample
from edge.train import NotEnoughError, Result, Trainer, job_for
from edge.update import seal_update
from edge.verdicts import Ear
from edge.wiring import wire
from models.errors import LocalError, PeerError, UserError
from models.scale import Scale
from models.tomlfile import seconds

log = logging.getLogger(__name__)

_RETRY_S = 5.0


class Runner:
    """One configured task, from its plan to its update and from a manifest to a new scorer."""

    def __init__(self, name: str, table: TaskTable, shop: Shop) -> None:
        self.name, self.table, self.shop = name, table, shop
        self.memory = Memory(shop.state, name)
        self._ear = Ear(shop, self.memory)
        self.live: Live | None = None
        self.model: Model | None = None
        self.fetch: Fetch | None = None
        self.problem, self._envelope = "", b""
        self.kept: dict[str, Any] = {}
        self._wanted_ms, self._stored_before = -1, 0
        self._installing = asyncio.Lock()
        self._jobs: set[asyncio.Task[None]] = set()
        self._trainer = Trainer()
        self._training: asyncio.Task[None] | None = None
        # What the memory holds, at hand for the event loop.
        self.scale, self.holdout = self.memory.scale(), self.memory.holdout()
        self.personal, self.own = self.memory.vector("personal"), self.memory.vector("own")
        self.average = self.memory.vector("average")
        self.participant = p.Participant(shop.config.policy, 1, handled=self.memory.handled())

    def start(self) -> None:
        """Score at once with what is stored from before."""
        stored = self.memory.model()
        if stored is not None:
            self._wire(stored)
            # Of what an earlier run stored the child alone knows how much is good; it says so if it is too little.
            self._stored_before = stored.task.training.min_windows
            self._adopt_stored(stored)

    def reconfigure(self, *, rewire: bool) -> None:
        """Take up a new configuration; with `rewire` the windows begin again."""
        self._do(self.participant.handle(p.PolicyChanged(self.shop.config.policy)))
        if not rewire:
            return
        self.table = self.shop.config.tasks[self.name]
        before, self.live = self.live, None
        live = self._wire(self.model) if self.model else None
        if live and before and before.fits(live.task, before.wiring):
            live.go_on(before)
        elif live and self.model:
            self._spawn(self._offer(self.model, changed=True))

    async def stop(self) -> None:
        """End scoring, training and fetching; nothing of it is lost that a restart would not do again."""
        if self.live and self.live.last:
            self._publish_inference(self.live.farewell())
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        await self._trainer.stop()

    # -- samples ----------------------------------------------------------------------------------------------------

    def feed(self, samples: Sequence[Sample]) -> None:
        """Score what is complete."""
        if self.live:
            self.live.feed(samples)

    def guard(self, what: str, work: Callable[[], None]) -> None:
        """Do this task's part of something that all share: a mistake in it must stop no driver and no other task."""
        try:
            work()
        except Exception as error:
            if self.problem != (problem := f"{what}: {type(error).__name__}: {error}"):
                self.problem = problem
                log.exception("%s: %s", self.name, problem)

    def tick(self) -> None:
        """Once in a while: let held values count, and tell the participant how much there is to train on."""
        if self.live:
            self.live.tick()
            self._do(self.participant.handle(p.WindowsReady(self._stored_before + self.live.stats.trainable)))

    # -- messages, already verified ----------------------------------------------------------------------------------

    def on_plan(self, plan: m.Plan) -> None:
        """Take a plan of this task."""
        self._do(self.participant.handle(p.PlanSeen(plan)))

    def on_manifest(self, manifest: m.ModelManifest, envelope: bytes) -> None:
        """Begin to fetch a newer model; PeerError if what it declares can't be."""
        # The newest by its signed time, not by its number: an aggregator restored from a backup counts lower again.
        if manifest.created_ms <= self._wanted_ms:
            return
        self._begin(Fetch(self.shop.federation, self.name, manifest, self.model), envelope)

    def _begin(self, fetch: Fetch, envelope: bytes) -> None:
        self.shop.unsubscribe(*(self.fetch.topics if self.fetch else ()))
        self.fetch, self._envelope, self._wanted_ms = fetch, envelope, fetch.manifest.created_ms
        self.shop.subscribe(*fetch.topics)
        self._complete()

    def on_chunk(self, topic: str, payload: bytes) -> None:
        """Take a piece of the model being fetched; the last one completes it."""
        fetch = self.fetch
        due = fetch.topics if fetch else []
        if fetch is None or not fetch.take(topic, payload):
            return
        self.shop.unsubscribe(topic)
        self.shop.subscribe(*(one for one in fetch.topics if one not in due))
        self._complete()

    def _complete(self) -> None:
        fetch = self.fetch
        if fetch and not fetch.topics:
            self.fetch = None
            self._spawn(self._install(fetch, self._envelope))

    def on_feedback(self, payload: bytes) -> None:
        """Take what an operator said of a window."""
        if self._ear.take(self.model, payload):
            self._spawn(self._ear.drain())

    def on_receipt(self, receipt: m.Receipt) -> None:
        """Let the outbox go of what the aggregator has answered for."""
        if any(out.digest == receipt.digest for out in self.shop.state.waiting):
            self._spawn(self._settle(receipt))

    async def _settle(self, receipt: m.Receipt) -> None:
        body: dict[str, object] = {"task": self.name, "round": receipt.round, "digest": receipt.digest.hex()}
        body |= {"outcome": receipt.outcome, "detail": receipt.detail}

        def work() -> bool:
            if not self.shop.state.settle(receipt.digest):
                return False
            self.shop.state.put("answered/receipt", b"1")
            self.shop.state.record("receipt", body)
            return True

        if await self.shop.state.commit(work):
            log.info("%s: round %d: %s %s", self.name, receipt.round, receipt.outcome, receipt.detail)
            self._do(self.participant.handle(p.Settled(receipt.round, receipt.outcome)))

    def reconnected(self) -> None:
        """Say again what the aggregator may have missed, and ask again for missing chunks."""
        self._do(self.participant.handle(p.Reconnected()))
        if self.live and self.live.last:
            self._publish_inference(msgspec.json.encode(self.live.last))

    # -- actions ----------------------------------------------------------------------------------------------------

    def _do(self, actions: list[p.Action]) -> None:
        for action in actions:
            match action:
                case p.Answer():
                    self._answer(action)
                case p.StartTraining():
                    self._training = self._spawn(self._train(action, self._training))
                case p.StopTraining() if self._training:
                    self._training.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        job = asyncio.get_running_loop().create_task(work)
        self._jobs.add(job)
        job.add_done_callback(self._done)
        return job

    def _done(self, job: asyncio.Task[None]) -> None:
        self._jobs.discard(job)
        if not job.cancelled() and (error := job.exception()):
            self.problem = f"{type(error).__name__}: {error}"
            log.error("%s: %s", self.name, self.problem, exc_info=error)

    def _note(self, kind: str, body: dict[str, object]) -> None:
        """Write to the ledger, soon."""
        self._spawn(self.shop.state.commit(lambda: self.shop.state.record(kind, body)))

    def _answer(self, answer: p.Answer) -> None:
        if answer.verdict == "declined":
            log.warning("%s: round %d declined: %s", self.name, answer.round, answer.reason)
            self._note("declined", {"task": self.name, "round": answer.round, "reason": answer.reason})
        topic = Uplink(self.shop.config.path, self.name, "answer").topic
        word = m.Answer(
            m.VERSION, answer.round, answer.verdict, answer.code, answer.reason[:512], int(time.time() * 1000)
        )
        self.shop.publish(topic, self.shop.signer.seal(word, topic))

    def _publish_inference(self, payload: bytes) -> None:
        self.shop.publish(Local(self.shop.config.path, "inference", self.name).topic, payload, qos=0, retain=True)

    # -- training ---------------------------------------------------------------------------------------------------

    async def _train(self, action: p.StartTraining, before: asyncio.Task[None] | None) -> None:
        if before:
            await asyncio.wait([before])  # a stopped child's folder is the next one's too
        model, live = self.model, self.live
        if model is None or live is None:
            return
        try:
            await asyncio.to_thread(self.shop.samples.flush)
            said, home = await self.shop.state.commit(self.memory.corrections), self.shop.folder
            job = job_for(self.shop.config, home, model.terms.task_text, live.wiring, model.layout, action.round, said)
            base = model.personalised(self.personal)
            result = await self._trainer.train(job, base, home / f"training-{self.name}", self.own)
            await self._send(action, model, result)
        except NotEnoughError as error:
            log.info("%s: round %d waits for data: %s", self.name, action.round, error)
            self._stored_before = error.count - live.stats.trainable
            self._do(self.participant.handle(p.WindowsReady(error.count)))
            more = max(1, model.task.training.min_windows - error.count)
            self._do(self.participant.handle(p.TrainingFailed(action.round, str(error), more)))
        except Exception as error:  # noqa: BLE001
            # Whatever it was (a cap, a disk, a runtime's own error): this round is tried again, then declined.
            self.problem = f"training: {error}"
            log.error("%s: round %d: %s", self.name, action.round, self.problem)
            await asyncio.sleep(_RETRY_S)
            self._do(self.participant.handle(p.TrainingFailed(action.round, str(error)[:400])))

    async def _send(self, action: p.StartTraining, model: Model, result: Result) -> None:
        """Put what was learnt into the outbox, with the state that belongs to it, in one commit; then send it."""
        residual = await self.shop.state.commit(lambda: self.memory.vector("residual"))
        out = await asyncio.to_thread(seal_update, self.shop, action, model, result, residual, self.personal)
        personal = not model.layout.mask(model.task.personal).all()

        def work() -> None:
            self.shop.state.send(Outgoing(out.digest, self.name, action.round, out.envelope))
            self.memory.keep_handled(action.round, action.opened_ms)
            self.memory.keep_result(result, out.residual, personal=personal)
            self.shop.state.record("update", out.body)

        await self.shop.state.commit(work)
        self.problem = ""
        self.scale, self.holdout, self.own = result.scale, result.holdout, result.own
        if personal:
            self.personal = result.vector
        log.info("%s: round %d: %d windows, %d bytes", self.name, action.round, result.samples, len(out.envelope))
        self._do(self.participant.handle(p.Trained(action.round)))
        self.shop.publish(out.topic, out.envelope)
        await self._elect(model, result)

    async def _elect(self, model: Model, result: Result) -> None:
        """After a training: choose by the holdout what scores here; the global model is one of the candidates."""
        async with self._installing:
            # Without the lock, or in step and with a newer model here already, this would undo a choice made since.
            newest = self.model
            if self.live is None or newest is None or not len(result.holdout):
                return
            if newest is not model and (model.task.round.full is None or newest.graph != model.graph):
                return
            model, vector = newest, newest.personalised(self.personal, self.average)
            found = await asyncio.to_thread(after_training, self.shop.config.scoring, model, vector, result)
            chosen, body = await asyncio.to_thread(elect, found.scorers, result.holdout)
            self._swap(chosen, model)
            self.kept = body | {"task": self.name, "version": chosen.version}
            parts = [(share, found.weights[kind]) for kind, share in body["shares"].items()]

            def work() -> None:
                self.memory.keep_scoring(chosen.version, chosen.kind, parts)
                self.shop.state.record("model-chosen", self.kept)

            await self.shop.state.commit(work)
            log.info("%s: scores with %s of version %d", self.name, chosen.kind, chosen.version)

    # -- models -----------------------------------------------------------------------------------------------------

    def _wire(self, model: Model) -> Live | None:
        """Match the published task to this gateway's tags; a mismatch (None) is said, and stops this task alone."""
        task = model.task
        try:
            wiring = wire(task, self.table, self.shop.config.tags, self.shop.config.file)
        except UserError as error:
            self.problem = str(error)
            self._do(self.participant.handle(p.Unable(str(error)[:400])))
            log.error("%s: %s", self.name, error)
            return None
        self.problem = ""
        self.participant.min_windows = task.training.min_windows
        unable = "" if wiring.target or task.kind == "anomaly" else "no target tag is wired"
        self._do(self.participant.handle(p.Unable(unable)))
        if self.live and self.live.fits(task, wiring):
            self.live.task = task
        else:
            lag = int(seconds(self.table.max_lag) * 1e9)
            self.live = Live(task, wiring, lag, self._publish_inference, self.shop.samples.score, self._first_scale)
            self.live.feed(self.shop.latest.samples())
        return self.live

    def _first_scale(self, scale: Scale) -> None:
        """Keep a normalisation that was learnt before any training."""
        self.scale = scale
        self._spawn(self.shop.state.commit(lambda: self.memory.keep_scale(scale)))

    def _adopt_stored(self, model: Model) -> None:
        """At start: the model that scored when the gateway went down."""
        self.model, self._wanted_ms = model, model.manifest.created_ms
        self.participant.handle(p.ModelStored(model.manifest.version, model.manifest.digest))
        scorer = stored(self.shop.config.scoring, self.memory, model, model.personalised(self.personal), self.scale)
        if self.holdout is not None and scorer.scale.mean:
            scorer.metric(self.holdout)
        self._swap(scorer, model)

    def _swap(self, scorer: Scorer, model: Model) -> None:
        """Between two windows (this is the event loop, and so is scoring): the next window meets the new model."""
        if self.live:
            self.live.scorer = scorer
            self.live.learnt = scorer.learnt
            # Of a model that was kept in place of a newer one, the age is not known after a restart.
            self.live.made_ms = model.manifest.created_ms if scorer.version == model.manifest.version else 0

    async def _install(self, fetch: Fetch, envelope: bytes) -> None:
        """One model after the other: a fault of this machine is tried again, a fault of the model is not."""
        async with self._installing:
            try:
                await self._take(fetch, envelope)
            except PeerError as error:
                self.refuse(error, f"model {fetch.manifest.version}")
                if fetch.manifest.created_ms == self._wanted_ms and fetch.fall_back():
                    self._begin(fetch, envelope)
            except (LocalError, OSError) as error:
                self.problem = f"model {fetch.manifest.version} can't be stored: {error}"
                log.error("%s: %s", self.name, self.problem)
                await asyncio.sleep(_RETRY_S)
                if self._wanted_ms == fetch.manifest.created_ms:
                    self._wanted_ms = -1
                    self.on_manifest(fetch.manifest, envelope)

    async def _take(self, fetch: Fetch, envelope: bytes) -> None:
        """A model is complete: verify it, try it, keep it as the base, and let it score if it is no worse."""
        if fetch.manifest.created_ms < self._wanted_ms:
            return  # a newer one is on its way
        model = await asyncio.to_thread(fetch.model)
        if self.model is None or model.graph != self.model.graph:
            await probe(model, self.shop.folder)
        changed = self.model is None or self.model.layout != model.layout
        self.average = await self.shop.state.commit(lambda: self.memory.keep_model(model, envelope))
        self.model = model
        self._wire(model)
        if changed:
            self.kept = {}
        self._do(self.participant.handle(p.ModelStored(model.manifest.version, model.manifest.digest)))
        await self._offer(model, changed=changed)

    async def _offer(self, model: Model, *, changed: bool) -> None:
        live, holdout = self.live, self.holdout
        if live is None:
            return
        vector = model.personalised(self.personal)
        new = await asyncio.to_thread(build, self.shop.config.scoring, model, vector, self.scale)
        old = live.scorer
        adopt, body = await asyncio.to_thread(contest, new, None if changed else old, holdout)
        body |= {"task": self.name, "version": model.manifest.version}
        if adopt:
            self._swap(new, model)
        self.kept = body | {"adopted": adopt}

        def work() -> None:
            if adopt:
                self.memory.keep_scoring(new.version, GLOBAL, [(1.0, vector)])
            self.shop.state.record("model-adopted" if adopt else "model-kept", body)

        await self.shop.state.commit(work)
        word = "scores now" if adopt else f"is not clearly better here; version {old.version if old else 0} goes on"
        worth = f"{body['metric']} {body.get('new')}, was {body.get('old')}"
        log.info("%s: model %d %s (%s)", self.name, model.manifest.version, word, worth)

    def refuse(self, error: PeerError, what: str) -> None:
        """Count and log a peer's bytes that were refused; nothing stops because of them."""
        self.shop.refused[error.reason] += 1
        log.warning("%s: %s refused: %s", self.name, what, error)
