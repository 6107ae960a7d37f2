"""One task on this gateway: the shell around its participant. Fetches models, trains, and sends.

The participant decides, this carries out. Scoring is `edge.scoring` and never waits for anything here.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from typing import Any

from broker import messages as m
from edge import events
from edge import participant as p
from edge import vote as votes
from edge.answer import Mouth
from edge.config import TaskTable
from edge.handback import Fetch, Model, newer, passed_over, same_model
from edge.infer import Scorer
from edge.installer import LONGEST_S, RETRY_S, Installer
from edge.live import Live
from edge.memory import Memory
from edge.resend import settle
from edge.scoring import Scoring
from edge.shop import Shop
from edge.store import Outgoing
from edge.tags import Sample
from edge.train import NotEnoughError, Result, Trainer, job_for
from edge.update import seal_update
from edge.verdicts import Ear
from models.delta import Vector
from models.errors import LocalError, PeerError, UserError
from models.width import unfit

log = logging.getLogger(__name__)


class Runner:
    """One configured task, from its plan to its update and from a manifest to a new scorer."""

    def __init__(self, name: str, table: TaskTable, shop: Shop) -> None:
        """Read the state: before the event loop, or in the state's own thread."""
        self.name, self.table, self.shop = name, table, shop
        self.memory = Memory(shop.state, name)
        self.scoring = Scoring(shop, self.memory, self._spawn, self._wish)
        self._ear, self._mouth, self._trainer = Ear(shop, self.memory), Mouth(shop, name), Trainer()
        self.model: Model | None = None
        self.fetch: Fetch | None = None
        self.problem, self.passed, self._envelope = "", "", b""
        self._stored: tuple[Model, Scorer | None] | None = None
        self._wanted: m.ModelManifest | None = None
        self._taking, self._stored_before = set[asyncio.Task[None]](), 0
        self._installing, self._jobs = asyncio.Lock(), set[asyncio.Task[None]]()
        self.installer = Installer(shop, self.memory, self.scoring, self._spawn, self._installing)
        self._training: asyncio.Task[None] | None = None
        handled, vote = self.memory.handled(), self.memory.vote()
        self.participant = p.Participant(shop.config.policy, 1, handled=handled, vote=vote)
        self.participant.handle(shop.rules(name))
        self.participant.handle(shop.may_train())
        self.guard("start", self._load)

    def _load(self) -> None:
        model = self.memory.model()
        if model is not None:
            self._stored = model, self.scoring.stored(model)

    def start(self) -> None:
        """Score at once with what is stored from before."""
        if self._stored is None:
            return
        (model, scorer), self._stored = self._stored, None
        self._wire(model)
        # Of what an earlier run stored the child alone knows how much is good; it says so if it is too little.
        self._stored_before = model.task.training.min_windows
        self.model, self._wanted = model, model.manifest
        self.participant.handle(events.ModelStored(model.manifest.version, model.manifest.digest))
        if scorer:
            self.scoring.swap(scorer, model)

    @property
    def busy(self) -> bool:
        """Whether pieces of a model are missing, or may be asked for soon."""
        return bool(self.fetch or self.installer.fetching or self._jobs)

    @property
    def live(self) -> Live | None:
        """What scores, once the task is wired."""
        return self.scoring.live

    def reconfigure(self, *, rewire: bool) -> None:
        """Take up a new configuration; with `rewire` the windows begin again."""
        self._do(self.participant.handle(self.shop.rules(self.name)))
        if not rewire:
            return
        self.table = self.shop.config.tasks[self.name]
        before, self.scoring.live = self.live, None
        live = self._wire(self.model) if self.model else None
        if live and before and before.fits(live.task, before.wiring):
            live.go_on(before)
        elif live:
            self._spawn(self._offer_again())

    async def stop(self) -> None:
        """End scoring, training and fetching; nothing of it is lost that a restart would not do again."""
        self.scoring.end()
        await asyncio.gather(*(job for job in self._jobs if job.cancel()), return_exceptions=True)
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
        """Once in a while: let held values count, and tell the participant whether, and on how much, it may train."""
        self._do(self.participant.handle(self.shop.may_train()))
        if self.live:
            self.live.tick()
            self._do(self.participant.handle(events.WindowsReady(self._stored_before + self.live.stats.trainable)))

    def _wish(self, why: str) -> None:
        """Let the participant wish for a round, where the task lets gateways ask for one."""
        if self.model and self.model.task.round.early is not None:
            self._do(self.participant.handle(events.Drifted(why)))

    # -- messages, already verified ----------------------------------------------------------------------------------

    def on_plan(self, plan: m.Plan) -> None:
        """Take a plan of this task."""
        self._do(self.participant.handle(events.PlanSeen(plan)))

    def on_manifest(self, manifest: m.ModelManifest, envelope: bytes, of: str = "manifest") -> None:
        """Begin to fetch a newer model, or one that was released; PeerError if what it declares can't be."""
        if of != "manifest":
            self.installer.on_manifest(of, manifest, envelope, self.model)
            return
        wanted = self._wanted
        if wanted and not newer(manifest, wanted, int(time.time() * 1000)):
            self.passed = passed_over(manifest, wanted)
            return
        there = self.fetch or self._taking or (self.model and same_model(manifest, self.model.manifest))
        if there and same_model(manifest, wanted):
            self._envelope = envelope
            self._spawn(self._renew(manifest, envelope))
        else:
            self._begin(Fetch(self.shop.federation, self.name, manifest, self.model), envelope)
        self.passed, self._wanted = "", manifest

    async def _renew(self, manifest: m.ModelManifest, envelope: bytes) -> None:
        """Keep the newer word on the model that is here: nothing is to be fetched or judged for it."""
        async with self._installing:
            if self.model and same_model(manifest, self.model.manifest):
                await self.shop.state.commit(lambda: self.memory.keep_manifest(envelope))

    def _begin(self, fetch: Fetch, envelope: bytes) -> None:
        self.shop.unsubscribe(*(self.fetch.topics if self.fetch else ()))
        self.fetch, self._envelope = fetch, envelope
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
            self._taking.add(job := self._spawn(self._install(fetch, self._envelope)))
            job.add_done_callback(self._taking.discard)

    def on_feedback(self, payload: bytes) -> None:
        """Take what an operator said of a window."""
        if self._ear.take(self.model, payload):
            self._spawn(self._ear.drain())

    def on_receipt(self, receipt: m.Receipt) -> None:
        """Let the outbox go of what the aggregator has answered for."""
        if any(out.digest == receipt.digest for out in self.shop.state.waiting):
            self._spawn(self._settle(receipt))

    async def _settle(self, receipt: m.Receipt) -> None:
        if await settle(self.shop.state, self.shop.signer, self.name, receipt):
            log.info("%s: round %d: %s %s", self.name, receipt.round, receipt.outcome, receipt.detail)
            self._do(self.participant.handle(events.Settled(receipt.round, receipt.outcome)))

    def reconnected(self) -> None:
        """Say again what the aggregator may have missed, and ask again for missing chunks."""
        self._do(self.participant.handle(events.Reconnected()))
        self.scoring.repeat()

    # -- actions ----------------------------------------------------------------------------------------------------

    def _do(self, actions: list[events.Action]) -> None:
        for action in actions:
            match action:
                case events.Answer():
                    self._answer(action)
                case events.StartTraining():
                    self._training = self._spawn(self._train(action, self._training))
                case events.CastVote(vote):
                    self.shop.publish(*votes.seal(self.shop, self.name, vote))
                case events.StopTraining() if self._training:
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

    def _answer(self, answer: events.Answer) -> None:
        if answer.verdict == "asks":
            log.info("%s: asks for a round after round %d: %s", self.name, answer.round, answer.reason)
        elif answer.verdict == "declined":
            log.warning("%s: round %d declined: %s", self.name, answer.round, answer.reason)
        self._spawn(self._mouth.say(answer, self.participant.plan))

    # -- training ---------------------------------------------------------------------------------------------------

    async def _train(self, action: events.StartTraining, before: asyncio.Task[None] | None) -> None:
        if before:
            await asyncio.wait([before])  # a stopped child's folder is the next one's too
        model, live = self.model, self.live
        if model is None or live is None:
            return
        width = self.table.width  # which a reload may change while the child trains
        try:
            await asyncio.to_thread(self.shop.samples.flush)
            said, home = await self.shop.state.commit(self.memory.corrections), self.shop.folder
            what = model.terms.task_text, live.wiring, model.layout, action.round, said
            base, own = await asyncio.to_thread(self.scoring.start, model, width=width)
            job = job_for(self.shop.config, home, *what, own=own, width=width)
            result = await self._trainer.train(job, base, home / f"training-{self.name}", *self.scoring.begin())
            await self._send(action, model, base, result, width)
        except NotEnoughError as error:
            log.info("%s: round %d waits for data: %s", self.name, action.round, error)
            self._stored_before = error.count - live.stats.trainable
            self._do(self.participant.handle(events.WindowsReady(error.count)))
            more = max(1, model.task.training.min_windows - error.count)
            self._do(self.participant.handle(events.TrainingFailed(action.round, str(error), more)))
        except Exception as error:  # noqa: BLE001
            # Whatever it was (a cap, a disk, a runtime's own error): this round is tried again, then declined.
            self.problem = f"training: {error}"
            log.error("%s: round %d: %s", self.name, action.round, self.problem)
            await asyncio.sleep(RETRY_S)
            self._do(self.participant.handle(events.TrainingFailed(action.round, str(error)[:400])))

    async def _send(
        self, action: events.StartTraining, model: Model, base: Vector, result: Result, width: float
    ) -> None:
        """Put what was learnt into the outbox, with the state that belongs to it, in one commit; then send it."""
        residual = await self.shop.state.commit(lambda: self.memory.vector("residual"))
        out = await asyncio.to_thread(seal_update, self.shop, action, model, result, residual, base, width=width)

        def work() -> None:
            self.shop.state.send(Outgoing(out.digest, self.name, action.round, out.envelope))
            self.memory.keep_handled(action.round, action.opened_ms)
            self.memory.keep_result(result, out.residual)
            self.shop.state.record("update", out.body)

        await self.shop.state.commit(work)
        self.problem = ""
        self.scoring.take_result(result)
        log.info("%s: round %d: %d windows, %d bytes", self.name, action.round, result.samples, len(out.envelope))
        self._do(self.participant.handle(events.Trained(action.round)))
        self.shop.publish(out.topic, out.envelope)
        async with self._installing:
            if self.model:
                await self.scoring.elect(model, self.model, result)

    # -- models -----------------------------------------------------------------------------------------------------

    def _wire(self, model: Model) -> Live | None:
        """Match the published task to this gateway's tags; a mismatch (None) is said, and stops this task alone."""
        task = model.task
        try:
            live = self.scoring.wire(task, self.table)
        except UserError as error:
            self.problem = str(error)
            self._do(self.participant.handle(events.Unable(str(error)[:400])))
            log.error("%s: %s", self.name, error)
            return None
        self.problem = ""
        self.participant.min_windows = task.training.min_windows
        unable = "" if live.wiring.target or task.kind == "anomaly" else "no target tag is wired"
        unable = unfit(task, self.table.width) or unable
        self._do(self.participant.handle(events.Unable(unable)))
        return live

    async def _offer_again(self) -> None:
        """Let the model that is here score with other windows than before."""
        async with self._installing:
            if model := (self.installer.model if self.shop.releases.in_force else self.model):
                await self.scoring.offer(model, changed=True)

    async def _install(self, fetch: Fetch, envelope: bytes) -> None:
        """One model after the other: a fault of this machine is tried again, a fault of the model is not."""
        version, pause = fetch.manifest.version, RETRY_S
        taken: tuple[Model, bool] | None = None
        fault = ""
        while same_model(fetch.manifest, self._wanted):
            try:
                async with self._installing:
                    if not same_model(fetch.manifest, self._wanted):
                        return  # another one is on its way
                    taken = taken or await self._take(fetch, envelope)
                    await self._let_score(*taken)
            except PeerError as error:
                if same_model(fetch.manifest, self._wanted) and fetch.fall_back():
                    log.info("%s: model %d does not follow from what is here: fetched whole", self.name, version)
                    self._begin(fetch, envelope)
                    return
                self.shop.refuse(error, f"{self.name}: model {version}")
                self.problem = f"model {version} refused: {error}"
                return
            except (LocalError, OSError) as error:
                self.problem = fault = f"model {version} can't be taken yet: {error}"
                log.error("%s: %s", self.name, fault)
            else:
                self.problem = "" if self.problem == fault else self.problem
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_S)

    async def _take(self, fetch: Fetch, envelope: bytes) -> tuple[Model, bool]:
        """Verify a complete model, try it, vote, keep it as the base; say too whether it is another net than before."""
        model = await asyncio.to_thread(fetch.model)
        if self.model is None or model.graph != self.model.graph:
            await self.shop.prober.run(model)
        changed = self.model is None or self.model.layout != model.layout
        again = self.model is not None and self.model.is_of(fetch.manifest)
        vote = None if again else await self.scoring.judge(model, self.model)

        def work() -> Vector:
            if vote:
                votes.keep(self.shop, self.memory, vote)
            return self.memory.keep_model(model, envelope, again=again)

        self.scoring.average = await self.shop.state.commit(work)
        self.model = model
        if vote:
            self._do(self.participant.handle(events.Judged(vote)))
        self._wire(model)
        self._do(self.participant.handle(events.ModelStored(model.manifest.version, model.manifest.digest)))
        return model, changed

    async def _let_score(self, model: Model, changed: bool) -> None:  # noqa: FBT001 - what `_take` gives
        if not self.shop.releases.in_force:
            await self.scoring.offer(model, changed=changed)
        self.installer.begin(model)

    # -- status -----------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, object]:
        """How the task is; plain JSON types."""
        plan, answer, live = self.participant.plan, self.participant.answer, self.live
        return {
            "state": self.participant.state.name.lower(),
            "round": plan.round if plan else None,
            "answer": f"{answer.verdict}: {answer.reason}".rstrip(": ") if answer else "",
            "model": self.model.manifest.version if self.model else None,
            "scoring_model": live.scorer.version if live and live.scorer else None,
            "scoring_kind": live.scorer.kind if live and live.scorer else None,
            "last_model": self.scoring.kept,
            **self.installer.status,
            "training_waits_for": self.participant.may_train.unless,
            "windows": {"trainable": self.participant.windows, "wanted": self.participant.least},
            "drift": self.scoring.drift.last,
            "problem": self.problem or self.installer.problem or self.passed,
            "last": live.last if live else {},
            **(asdict(live.stats) if live else {}),
        }
