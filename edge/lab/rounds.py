"""Aggregator and gateways of a simulation, joined by function calls: their real state machines, codec and messages."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from broker import federation, messages, topics
from broker import round as rounds
from broker.aggregate import load_state, next_model
from broker.downlink import plan_of
from broker.mask import ring_for
from broker.rate import Rate
from edge import events
from edge import participant as p
from edge.choose import Start, average, whose
from edge.config import Policy
from edge.lab.down import Down
from edge.lab.judge import Judge
from edge.lab.workers import Workers
from edge.update import encode
from models import codec
from models.delta import Vector, weights_digest
from models.ringcode import Ring
from models.width import cut, slices


@dataclass
class Gateway:
    """One plant's half: its number, width, state machine, key, and the error that its last updates left.

    `quality` is the share of good values in its windows, in millionths.
    """

    index: int
    windows: int
    path: str
    signer: messages.Signer
    machine: p.Participant
    residual: Vector
    width: float = 1
    quality: int = 1_000_000
    steps: int = 0
    sent: list[int] = field(default_factory=list)


class Fleet:
    """Aggregator and gateways joined by function calls; a plant whose width is 0 takes no part."""

    def __init__(
        self, down: Down, judge: Judge, count: int, seed: int, stale: int = 0, widths: Sequence[float] = ()
    ) -> None:
        self.down, self.judge, self.seed, self.stale = down, judge, seed, stale
        task, layout, sites = judge.task, judge.layout, judge.sites
        self.task = task
        self.vector = vector = codec.decode(down.rows[0].weights, layout.size)
        self.shared = layout.mask(task.personal)
        self.slices = slices(task, layout)
        self.widths = widths = widths or [1.0] * len(sites)
        self.rate = Rate.first(int(self.shared.sum()))
        self.losses: dict[str, tuple[float, int]] = {}
        self.personal = [vector.copy() for _ in sites]
        self.began: dict[int, tuple[str, ...]] = {}
        self.average: Vector | None = None
        self.random = np.random.default_rng(seed)
        self.now, self.version, self.state = 0, 0, b""
        self.payloads: dict[tuple[str, int], tuple[bytes, int, int]] = {}
        self.offers: deque[tuple[messages.Plan, Vector]] = deque(maxlen=stale + 1)
        self.gateways = {
            path: Gateway(
                i,
                len(site.train),
                path,
                messages.Signer.from_bytes(bytes([i % 256, i // 256]) * 16),
                p.Participant(Policy(), 1, windows=len(site.train)),
                np.zeros(int(self.shared.sum()) if widths[i] == 1 else self.slices[widths[i]].size, np.float32),
                widths[i],
                max(1, round(1e6 * np.isfinite(site.train.x).mean())),
            )
            for i, site in enumerate(sites)
            if widths[i]
            for path in [f"lab/site{i}/a/l/c"]
        }
        self.ring = self._next_ring()
        full = None if task.round.full is None else task.round.buffer or len(self.gateways)
        rules = federation.Rules(1, 1000, 0, count, full)
        self.federation = federation.Federation(rules, version=0, past=None)

    def _next_ring(self) -> Ring | None:
        return (
            ring_for(self.task, self.judge.layout, load_state(self.state)) if self.task.round.codec == "ring" else None
        )

    def at(self, i: int) -> Vector:
        """The global model as plant `i` holds it: its part, with its own values where it has some that are better."""
        return self._start(self.vector, i).vector

    def averaged(self, i: int) -> Vector:
        """The running mean of the global models, as plant `i` holds it."""
        return self._start(self._mean, i).vector

    def tuned_from(self, i: int) -> Vector:
        """The same, with what was its own when its last training began."""
        return self._held(self._mean, i, self.began.get(i, self.task.personal))

    @property
    def _mean(self) -> Vector:
        return self.vector if self.average is None else self.average

    def _held(self, vector: Vector, i: int, own: tuple[str, ...]) -> Vector:
        held = np.where(self.judge.layout.mask(own), vector, self.personal[i]) if own else vector
        return cut(self.judge.layout, self.widths[i] or 1, held)

    def _start(self, vector: Vector, i: int) -> Start:
        if i not in self.began or not len(self.judge.sites[i].holdout):
            return Start(self._held(vector, i, self.task.personal), self.task.personal)
        return whose(self.task, partial(self._held, vector, i), partial(self.judge.loss, i=i))

    def run(self, workers: Workers, dropout: float, after: Callable[[int], None]) -> None:
        """Run every round; `after(number)` is called when each new model is there."""
        rules, actions = self.federation.rules, list[rounds.Action]()
        for path in self.gateways:
            # The first round waits until everybody is there.
            there = len(self.federation.gateways) + 1 == len(self.gateways)
            self.federation.rules = rules if there else replace(rules, min_gateways=len(self.gateways))
            actions += self.federation.handle(federation.Born(path, 1), self.now)
        while actions:
            action, *actions = actions
            match action:
                case federation.Open():
                    actions += self._round(action, workers, dropout)
                case rounds.Close(number, _):
                    self._close()
                    after(number)
                    self.now += 1
                    actions += self.federation.handle(federation.Aggregated(self.version), self.now)
                case rounds.Extend() | rounds.Outcome() | federation.Finish():
                    pass

    def _round(self, opened: federation.Open, workers: Workers, dropout: float) -> list[rounds.Action]:
        """Let every gateway that is there answer the plan, train, and send."""
        keep = self.rate.keep if self.task.round.keep is None else self.task.round.keep
        digest, deadline_ms = weights_digest(self.vector), opened.deadline_ms
        text = self.down.row.text
        plan = plan_of(
            self.task, text, self.federation, base_digest=digest, deadline_ms=deadline_ms, keep=keep, ring=self.ring
        )
        self.offers.append((plan, self.vector))
        actions: list[rounds.Action] = []
        training: list[tuple[Gateway, messages.Plan, events.StartTraining, Vector, Future[tuple[Vector, int]]]] = []
        for gateway in self._there(dropout):
            plan, base = self.offers[-1 - self._behind(gateway)]
            said = gateway.machine.handle(events.ModelStored(plan.base, plan.base_digest))
            said += gateway.machine.handle(events.PlanSeen(plan))
            for one in said:
                if isinstance(one, events.StartTraining):
                    i, (start, own) = gateway.index, self._start(base, gateway.index)
                    self.began[i] = own
                    pull, width = self.task.training.proximal, gateway.width
                    job = workers.fit(i, start, self._seed(one.round, i), proximal=pull, width=width)
                    training.append((gateway, plan, one, start, job))
                elif isinstance(one, events.Answer):
                    event = federation.Answered(gateway.path, one.round, one.verdict == "joined")
                    actions += self.federation.handle(event, self.now)
        for gateway, plan, one, start, job in training:
            vector, steps = job.result()
            gateway.steps += steps
            loss = self.judge.loss(start, gateway.index)
            self.personal[gateway.index] = vector
            actions += self._send(gateway, plan, one, vector - start, loss)
        if len(training) < len(self.gateways):
            self.now = opened.deadline_ms
            actions += self.federation.handle(federation.Tick(), self.now)
        return actions

    def _behind(self, gateway: Gateway) -> int:
        """How many versions late a plan reaches a plant."""
        return gateway.index % (self.stale + 1)

    def _there(self, dropout: float) -> list[Gateway]:
        """Draw who hears of a plan, of those whom one has reached yet; never nobody, or no round would come after."""
        told = [gateway for gateway in self.gateways.values() if self._behind(gateway) < len(self.offers)]
        there = [gateway for gateway in told if self.random.random() >= dropout]
        return there or [told[self.random.integers(len(told))]]

    def _seed(self, number: int, i: int) -> int:
        return (self.seed * 1_000_003 + number * 1009 + i) % 2**31

    def _send(
        self, gateway: Gateway, plan: messages.Plan, action: events.StartTraining, learnt: Vector, loss: float
    ) -> list[rounds.Action]:
        """Encode with error feedback, seal as the gateway does, and hand the update over; `loss` is the base's."""
        delta = learnt[self.shared][self.slices.get(gateway.width, slice(None))] + gateway.residual
        count = gateway.windows
        encoded = encode(action, delta, count)
        gateway.residual = delta - encoded.decoded
        loss_said = loss if np.isfinite(loss) else None
        update = messages.Update(
            messages.VERSION,
            action.round,
            action.base,
            count,
            None,
            encoded.data,
            loss_said,
            round(4 * gateway.width),
            gateway.quality,
            plan.base_digest[: messages.BASE_DIGEST],
        )
        topic = topics.Uplink(topics.GatewayPath.parse(gateway.path), self.task.name, "update").topic
        envelope = gateway.signer.seal(update, topic)
        gateway.sent.append(len(envelope))
        gateway.machine.handle(events.Trained(action.round))
        event = federation.Submitted(gateway.path, action.round, action.base, update.payload[:32])
        actions = self.federation.handle(event, self.now)
        for one in actions:
            if isinstance(one, rounds.Outcome):
                gateway.machine.handle(events.Settled(one.round, one.word))
                if one.word == rounds.COUNTED:
                    late = self.federation.number - action.round
                    weight = self.task.round.weight(count, gateway.quality)
                    self.payloads[gateway.path, action.round] = (encoded.data, weight, late)
                    self.losses[gateway.path] = loss, weight
        return actions

    def _close(self) -> None:
        r, updates = self.task.round, [self.payloads[key] for key in sorted(self.payloads)]
        samples = [count for _, count, _ in updates]
        age = sum(count * late for _, count, late in updates) / sum(samples)
        self.state, goal = next_model(
            r.strategy,
            self.state,
            self.vector,
            self.shared,
            iter(updates),
            momentum=r.momentum,
            age=age,
            ring=self.ring,
            slices=self.slices,
        )
        self.ring = self._next_ring()
        self.version += 1
        self.vector = self.down.publish(goal, self.shared, r.down_in(self.version), samples)
        self.average = average(self.average, self.vector)
        self.payloads.clear()
        self.rate = self.rate.after(self.losses)
        self.losses.clear()
