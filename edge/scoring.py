"""What one task scores with: its live half, and the choice of a model by this gateway's own holdout.

A new model is built beside the one that scores, in a thread, and swapped in the event loop, where scoring is.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from broker.messages import Vote
from broker.topics import Local
from edge.candidates import after_training, build, start, stored
from edge.choose import GLOBAL, OWN, Start
from edge.config import TaskTable
from edge.drift import Drift
from edge.handback import Model
from edge.infer import Scorer, contest, elect
from edge.live import Live
from edge.memory import Memory
from edge.shop import Shop
from edge.train import Result
from edge.vote import judge
from edge.wiring import wire
from models.delta import Vector
from models.scale import Scale
from models.spec import Task
from models.tomlfile import seconds

log = logging.getLogger(__name__)


class Scoring:
    """The models of one task. `offer` and `elect` are called one at a time; `kept` is what the last of them decided.

    `live` is None before a first model is wired. `spawn` runs what need not be waited for, `wish` is told why a round
    would help.
    """

    def __init__(
        self,
        shop: Shop,
        memory: Memory,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        wish: Callable[[str], object],
    ) -> None:
        self._shop, self._memory, self._spawn = shop, memory, spawn
        self.drift = Drift(shop, memory, spawn, wish)
        # The signals that had drifted until the last training.
        self._learnt_from = list[str]()
        self.live: Live | None = None
        self.kept: dict[str, Any] = {}
        # What the memory holds, at hand for the event loop.
        self.scale, self.holdout = memory.scale(), memory.holdout()
        self.personal, self.own = memory.vector("personal"), memory.vector("own")
        self.average = memory.vector("average")
        # What was released, where the federation releases by stages: nothing else of the federation's scores then.
        self.released: Model | None = None
        self._tuned_from: Model | None = None

    @property
    def origin(self) -> Vector | None:
        """Weights from which this gateway tunes: the running mean of the models, or what was released."""
        if not self._shop.releases.in_force:
            return self.average
        return self.released.vector if self.released else None

    def begin(self) -> tuple[Vector | None, Vector | None]:
        """Begin a training: the net that learns alone, and the weights to tune from."""
        self._tuned_from = self.released
        return self.own, self.origin

    async def release(self, model: Model, *, anew: bool) -> None:
        """Let a released model score if it is no worse; the first one, and one that takes another back, in any case.

        With `anew`, the one before may have been anybody's, and is not compared.
        """
        before = self.released
        newer = not anew and before is not None and model.manifest.version >= before.manifest.version
        await self.offer(model, changed=not newer)
        self.released = model  # not before: what fails is tried again, and must then be compared with the same

    @property
    def _width(self) -> float:
        return self._shop.config.tasks[self._memory.task].width

    def wire(self, task: Task, table: TaskTable) -> Live:
        """Match the published task to this gateway's tags, and go on where the windows stay as they are; UserError."""
        config = self._shop.config
        wiring = wire(task, table, config.tags, config.file)
        if self.live and self.live.fits(task, wiring):
            self.live.task = task
        else:
            lag_ns = int(seconds(table.max_lag) * 1e9)
            keep, watch = self._shop.samples.score, self.drift.take
            self.live = Live(task, wiring, lag_ns, self._publish, keep, self._first_scale, watch=watch)
            self.drift.begin()
            self.live.feed(self._shop.latest.samples())
        return self.live

    def stored(self, model: Model) -> Scorer | None:
        """Build what scored when the gateway went down; blocks, and reads the memory. None where nothing may score."""
        if self._shop.releases.in_force and self._memory.scoring(model.layout.size) is None:
            if self.released is None:
                return None
            model = self.released
        vector = model.personalised(self.personal, width=self._width)
        scorer = stored(self._shop.config.scoring, self._memory, model, vector, self.scale)
        if self.holdout is not None and scorer.scale.mean:
            scorer.metric(self.holdout)
        return scorer

    def swap(self, scorer: Scorer, model: Model) -> None:
        """Between two windows (this is the event loop, and so is scoring): the next window meets the new model."""
        if self.live:
            self.live.scorer = scorer
            self.live.learnt = scorer.learnt
            # Of a model that was kept in place of a newer one, the age is not known after a restart.
            self.live.made_ms = model.manifest.created_ms if scorer.version == model.manifest.version else 0

    def take_result(self, result: Result) -> None:
        """Go by what a training left here."""
        self.scale, self.holdout, self.own = result.scale, result.holdout, result.own
        self._learnt_from = self.drift.drifted
        self.drift.learnt(result.reference)
        self.personal = result.vector

    def start(self, model: Model, *, width: float, average: Vector | None = None) -> Start:
        """Where this gateway goes on from a model, or from an average of them; blocks."""
        here = self.personal, self.holdout, self.scale
        return start(self._shop.config.scoring, model, average, *here, width=width)

    async def judge(self, new: Model, before: Model | None) -> Vote | None:
        """This gateway's vote on a new model; None where it can't judge."""
        here = self.holdout, self.scale, self.personal, self._width
        return await asyncio.to_thread(judge, self._shop.config.scoring, new, before, *here)

    async def offer(self, model: Model, *, changed: bool) -> None:
        """Let a global model score if it is no worse; with `changed` nothing that scored before can be compared."""
        live, holdout = self.live, self.holdout
        if changed:
            self.kept = {}
        if live is None:
            return
        vector = (await asyncio.to_thread(self.start, model, width=self._width)).vector
        new = await asyncio.to_thread(build, self._shop.config.scoring, model, vector, self.scale)
        old = live.scorer
        adopt, body = await asyncio.to_thread(contest, new, None if changed else old, holdout)
        body |= {"task": self._memory.task, "version": model.manifest.version}
        if adopt:
            self.swap(new, model)
        self.kept = body | {"adopted": adopt}

        def work() -> None:
            if adopt:
                self._memory.keep_scoring(new.version, GLOBAL, [(1.0, vector)])
            self._shop.state.record("model-adopted" if adopt else "model-kept", body)

        await self._shop.state.commit(work)
        word = "scores now" if adopt else f"is not clearly better here; version {old.version if old else 0} goes on"
        worth = f"{body['metric']} {body.get('new')}, was {body.get('old')}"
        log.info("%s: model %d %s (%s)", self._memory.task, model.manifest.version, word, worth)

    async def elect(self, trained: Model, newest: Model, result: Result) -> None:
        """After a training from one model: choose by the holdout what scores here; the newest is a candidate.

        What was tuned from a release that was replaced meanwhile, perhaps because it was bad, is not chosen.
        """
        if self.live is None or not len(result.holdout) or self._tuned_from is not self.released:
            return
        # In step and with a newer model here already, this would undo a choice made since.
        federated = True
        if self._shop.releases.in_force:
            federated = self.released is not None
            trained = newest = self.released or newest
            if not federated and self.live.scorer and self.live.scorer.kind != OWN:
                return  # what scored before releases began goes on until the first one
        if newest is not trained and (trained.task.round.full is None or newest.graph != trained.graph):
            return
        table = self._shop.config.scoring
        vector = (await asyncio.to_thread(self.start, newest, width=self._width, average=self.origin)).vector
        found = await asyncio.to_thread(after_training, table, newest, vector, result, federated=federated)
        if not found.scorers:
            return
        chosen, body = await asyncio.to_thread(elect, found.scorers, result.holdout)
        body |= self._moved(self.live.scorer, chosen)
        self.swap(chosen, newest)
        self.kept = body | {"task": self._memory.task, "version": chosen.version}
        parts = [(share, found.weights[kind]) for kind, share in body["shares"].items()]

        def work() -> None:
            self._memory.keep_scoring(chosen.version, chosen.kind, parts)
            self._shop.state.record("model-chosen", self.kept)

        await self._shop.state.commit(work)
        log.info("%s: scores with %s of version %d", self._memory.task, chosen.kind, chosen.version)

    def _moved(self, old: Scorer | None, new: Scorer) -> dict[str, Any]:
        """What a training made of data that had drifted, for the ledger: what was unusual may be normal from now on."""
        found: dict[str, Any] = {"drifted": self._learnt_from} if self._learnt_from else {}
        if new.task.kind == "anomaly":
            found["threshold"] = new.threshold
            if old is not None and old.learnt:
                found["threshold_before"] = old.threshold
                if self._learnt_from and new.threshold > old.threshold:
                    change = f"{old.threshold:.3g} to {new.threshold:.3g}"
                    text = "%s: trained on what had drifted: the alarm's threshold rose from %s"
                    log.warning(text, self._memory.task, change)
        return found

    def repeat(self) -> None:
        """Publish the last verdict and drift again: a broker may have come back empty."""
        self.drift.repeat()
        if self.live and self.live.last:
            self._publish(msgspec.json.encode(self.live.last))

    def end(self) -> None:
        """Let what the broker retains say that nothing is scored any more."""
        if self.live and self.live.last:
            self._publish(self.live.farewell())

    def _publish(self, payload: bytes) -> None:
        topic = Local(self._shop.config.path, "inference", self._memory.task).topic
        self._shop.publish(topic, payload, qos=0, retain=True)

    def _first_scale(self, scale: Scale) -> None:
        """Keep a normalisation that was learnt before any training."""
        self.scale = scale
        self._spawn(self._shop.state.commit(lambda: self._memory.keep_scale(scale)))
