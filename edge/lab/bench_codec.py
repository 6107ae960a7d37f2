"""`tundish bench codec`: every way to send an update, each in a federation of its own on the same data and seeds.

Bytes are those of the payload without its envelope, the mean of all rounds. The loss is against raw float32 in the same
run, in points: hundredths of an accuracy, or per cent of an error; the mean of the last quarter of the rounds, of each
plant's own test. What a codec of ours leaves out waits at the gateway (error feedback); the others send and forget.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import msgspec
import numpy as np

from broker.aggregate import load_state, next_model, strategy
from broker.mask import BITS, ring_for
from broker.rate import NARROWER, Rate
from broker.strategies._mean import State
from edge.infer import Scorer
from edge.lab.physics import test_windows
from edge.lab.sites import Site, complete_task, load_sites
from edge.lab.workers import Workers
from models import codec, evaluate, ringcode
from models.delta import Vector
from models.errors import UserError
from models.ringcode import Ring, turn
from models.spec import Task, parse_task

_TASK = 'name = "bench"\n[training]\nepochs = 2\nbatch = 32\nlr = 2e-3\n'
_MOMENTUM = 0.5
_BLOCK = 4096
_ROUNDS, _SEEDS = (4, 1000), (1, 100)
_TIMED = 5
_SUMS = "ring, only sums are seen"
_PLANTS, _HZ, _LENGTH, _COUNT = 3, 50.0, 32, 400

Coded = tuple[bytes, Vector]


@dataclass(frozen=True)
class Way:
    """One way to send: `encode(vector, round)` gives bytes and what a receiver makes of them, `decode` does that."""

    name: str
    encode: Callable[[Vector, int], Coded]
    decode: Callable[[bytes, int], Vector]
    feedback: bool


def ways() -> list[Way]:
    """Every codec, raw float32 first: the others are held against it."""
    ours = [
        Way("int8 + zstd", partial(_ours, 8, None), codec.decode, feedback=True),
        Way("int4 + zstd", partial(_ours, 4, None), codec.decode, feedback=True),
        Way("int2 + zstd, keep 2 %", partial(_ours, 2, 0.02), codec.decode, feedback=True),
        Way("sparse, the default", partial(_ours, codec.SPARSE, None), codec.decode, feedback=True),
        Way("sparse, keep 1 %", partial(_ours, codec.SPARSE, 0.01), codec.decode, feedback=True),
    ]
    return [
        Way("float32", lambda v, _: (v.tobytes(), v), lambda d, _: np.frombuffer(d, np.float32), feedback=False),
        Way("fp16 + zstd", _half, _unhalf, feedback=False),
        *ours,
        Way("EDEN 1 bit", _eden, _uneden, feedback=False),
        Way(_SUMS, _summed, _unsummed, feedback=True),
    ]


def _ours(bits: int, keep: float | None, vector: Vector, number: int) -> Coded:
    if keep is None:  # as the share narrows while no holdout objects
        first = Rate.first(vector.size)
        keep = max(first.floor, first.keep * NARROWER ** (number - 1))
    encoded = codec.encode(vector, bits, keep)
    return encoded.data, encoded.decoded


def _ring(count: int) -> Ring:
    """A ring as good as any other to time: the federation's own follow its sums."""
    sent = max(1, int(BITS / 5 * count))
    return Ring(7, _PLANTS, count, ringcode.step_for(0.01, 7), 0, 0, np.linspace(0, count - 1, sent).astype(np.int64))


def _summed(vector: Vector, _: int) -> Coded:
    encoded = ringcode.encode(vector, _ring(vector.size), 1)
    return encoded.data, encoded.decoded


def _unsummed(data: bytes, count: int) -> Vector:
    ring = _ring(count)
    values, _ = ringcode.decode(ringcode.unpack(data, ring), ring, 1)
    return ringcode.spread_out(values, ring).dense()


def _half(vector: Vector, _: int) -> Coded:
    half = vector.astype(np.float16)
    return codec.deflate(half.tobytes()), half.astype(np.float32)


def _unhalf(data: bytes, count: int) -> Vector:
    return np.frombuffer(codec.inflate(data, 2 * count), np.float16).astype(np.float32)


def _signs(blocks: int) -> Vector:
    return np.random.default_rng(blocks).choice(np.array([-1, 1], np.float32), (blocks, _BLOCK))


def _eden(vector: Vector, _: int) -> Coded:
    """One bit a value after a random rotation, and a scale a block that makes it unbiased.

    Vargaftik et al. 2021, DRIVE, arXiv:2105.08339; 2022, EDEN, arXiv:2108.08842.
    """
    count = -(-vector.size // _BLOCK)
    padded = np.zeros((count, _BLOCK), np.float32)
    padded.ravel()[: vector.size] = vector
    turned = turn(padded * _signs(count))
    scale = (padded**2).sum(1) / np.maximum(np.abs(turned).sum(1), np.finfo(np.float32).tiny)
    data = scale.astype(np.float32).tobytes() + np.packbits(turned > 0).tobytes()
    return data, _uneden(data, vector.size)


def _uneden(data: bytes, size: int) -> Vector:
    count = -(-size // _BLOCK)
    scale = np.frombuffer(data[: 4 * count], np.float32)[:, None]
    bits = np.unpackbits(np.frombuffer(data[4 * count :], np.uint8)).reshape(count, _BLOCK)
    signs = bits.astype(np.float32) * 2 - 1
    return (turn(signs * scale) * _signs(count)).ravel()[:size]


def measure(data: Path | None, rounds: int, seeds: int) -> dict[str, Any]:
    """Run every federation; one row a codec."""
    for option, value, (least, most) in (("--rounds", rounds, _ROUNDS), ("--seeds", seeds, _SEEDS)):
        if not least <= value <= most:
            raise UserError(option, 0, "", f"{value} is out of range", f"write {least} to {most}")
    with tempfile.TemporaryDirectory(prefix="tundish-") as name:
        path = data or _simulated(Path(name) / "spindles.npz")
        text = complete_task(_TASK, path)
        task = parse_task(text, str(path))
        bench = _Bench(task, text, load_sites(task, path), rounds)
        found = bench.run(seeds)
    return {"codecs": found, "parameters": bench.layout.size, "metric": bench.metric, "rounds": rounds, "seeds": seeds}


def _simulated(path: Path) -> Path:
    """Write the simulated spindles as a recorded set."""
    parts: dict[str, list[Any]] = {}
    for part, seed in (("train", 0), ("test", 1)):
        for plant in range(_PLANTS):
            x, y = test_windows(seed, plant, _HZ, _COUNT, _LENGTH)
            for key, value in (("x", x), ("y", y), ("client", np.full(len(y), plant))):
                parts.setdefault(f"{key}_{part}", []).append(value)
    arrays: dict[str, Any] = {key: np.concatenate(values) for key, values in parts.items()}
    for part in ("train", "test"):
        arrays[f"y_{part}"] = arrays[f"y_{part}"].astype(np.int64)
    np.savez(path, **arrays)
    return path


class _Bench:
    """The federations of one data set."""

    def __init__(self, task: Task, text: str, sites: list[Site], rounds: int) -> None:
        from models.export import export  # noqa: PLC0415 - reaches torch

        self.task = msgspec.structs.replace(task, personal=())
        self.text, self.sites, self.rounds = text, sites, rounds
        self.graph, self.layout, _ = export(self.task, 0)
        self.metric = evaluate.metric_name(task)
        self.export = export

    def run(self, seeds: int) -> list[dict[str, Any]]:
        """Every codec on every seed."""
        rows, floor = list[dict[str, Any]](), 0.0
        with Workers(self.text, self.layout, self.sites) as workers:
            for way in ways():
                runs = [self._federation(way, workers, seed) for seed in range(seeds)]
                worth, size = mean(worth for worth, _, _ in runs), mean(size for _, size, _ in runs)
                floor = worth if not rows else floor
                lost = worth / floor - 1 if self.metric in evaluate.LOWER_IS_BETTER else floor - worth
                rows.append(
                    {
                        "name": way.name,
                        "bytes": round(size, 1),
                        "ratio": round(4 * self.layout.size / size, 1),
                        "loss_points": round(100 * lost, 2),
                        **_timed(way, runs[0][2], self.rounds),
                    }
                )
        return rows

    def _federation(self, way: Way, workers: Workers, seed: int) -> tuple[float, float, Vector]:
        """Return the metric of the last rounds, the mean bytes of an update, and one update."""
        _, _, vector = self.export(self.task, seed)
        if way.name == _SUMS:
            return self._ring_federation(workers, vector, seed)
        state: State = {}
        residuals = [np.zeros_like(vector) for _ in self.sites]
        sizes, worths, last = list[int](), list[float](), vector
        for number in range(1, self.rounds + 1):
            jobs = [workers.fit(i, vector, seed * 100_003 + number * 101 + i) for i in range(len(self.sites))]
            updates = list[tuple[Vector, int]]()
            for i, job in enumerate(jobs):
                last = job.result()[0] - vector + residuals[i]
                data, decoded = way.encode(last, number)
                if way.feedback:
                    residuals[i] = last - decoded
                sizes.append(len(data))
                updates.append((decoded, len(self.sites[i].train)))
            state, delta = strategy("fedavg")(state, iter(updates), momentum=_MOMENTUM)
            vector = vector + delta
            if number > self.rounds - max(1, self.rounds // 4):
                worths.append(mean(self._tests(vector)))
        return mean(worths), mean(sizes), last

    def _ring_federation(self, workers: Workers, vector: Vector, seed: int) -> tuple[float, float, Vector]:
        """The same for the coding of which the aggregator needs no update alone."""
        state, every = b"", np.ones(vector.size, np.bool_)
        residuals = [np.zeros_like(vector) for _ in self.sites]
        sizes, worths, last = list[int](), list[float](), vector
        for number in range(1, self.rounds + 1):
            jobs = [workers.fit(i, vector, seed * 100_003 + number * 101 + i) for i in range(len(self.sites))]
            ring, payloads = ring_for(self.task, self.layout, load_state(state)), list[tuple[bytes, int, int]]()
            for i, job in enumerate(jobs):
                last, count = job.result()[0] - vector + residuals[i], len(self.sites[i].train)
                encoded = ringcode.encode(last, ring, count)
                residuals[i] = last - encoded.decoded
                sizes.append(len(encoded.data))
                payloads.append((encoded.data, count, 0))
            state, vector = next_model("fedavg", state, vector, every, iter(payloads), momentum=0.0, ring=ring)
            if number > self.rounds - max(1, self.rounds // 4):
                worths.append(mean(self._tests(vector)))
        return mean(worths), mean(sizes), last

    def _tests(self, vector: Vector) -> Iterator[float]:
        for site in self.sites:
            scorer = Scorer.build(self.task, 1, self.graph, self.layout, vector, site.scale)
            yield scorer.metric(site.test)


def _timed(way: Way, vector: Vector, number: int) -> dict[str, float]:
    """Median microseconds to encode and decode one update, for 100,000 values."""
    data, _ = way.encode(vector, number)
    per = 1e5 / vector.size

    def times(work: Callable[[], object]) -> float:
        found = []
        for _ in range(_TIMED):
            begin = time.perf_counter()
            work()
            found.append(time.perf_counter() - begin)
        return round(median(found) * 1e6 * per, 1)

    return {
        "encode_us_per_100k": times(lambda: way.encode(vector, number)),
        "decode_us_per_100k": times(lambda: way.decode(data, vector.size)),
    }
