"""The training child for real: a store of good samples in, weights out; and whatever kills it leaves nothing behind."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge.ring import Samples
from edge.tags import Quality, Sample
from edge.train import Job, NotEnoughError, Trainer, TrainingError
from edge.window import Wiring
from models.delta import Layout, Vector
from models.spec import Task, parse_task
from models.width import narrow

WAIT_S = 120
SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND
TASK = """
name = "wear"
kind = "regression"
net = "mlp"
[window]
length = 4
[[signal]]
name = "a"
[[signal]]
name = "b"
[target]
name = "rul"
[training]
epochs = {epochs}
batch = 16
lr = 5e-3
min_windows = 100
"""
LAYOUT = Layout(
    (
        "body.1.weight", "body.1.bias", "body.2.weight", "body.2.bias", "body.4.weight", "body.4.bias", "body.5.weight",
        "body.5.bias", "head.weight", "head.bias",
    ),
    ((96, 8), (96,), (96,), (96,), (64, 96), (64,), (64,), (64,), (1, 64), (1,)),
)  # fmt: skip


def fill(folder: Path, seconds: int = 400, bad: Callable[[str, int], bool] = lambda *_: False) -> None:
    """The target is the sum of two signals that move by themselves; a segment lasts 20 s."""
    store, random = Samples(folder, 1 << 30), np.random.default_rng(0)
    for at in range(seconds):
        a, b = random.normal(size=2).tolist()
        values = {"p/a": a, "p/b": 10 * b, "p/rul": a + b, "p/part": float(at // 20), "p/run": 1.0}
        quality = {tag: Quality.BAD if bad(tag, at) else Quality.GOOD for tag in values}
        store.append([Sample(tag, START + at * SECOND, value, quality[tag]) for tag, value in values.items()])
    store.close()


def base() -> Vector:
    vector = np.random.default_rng(1).normal(0, 0.1, LAYOUT.size).astype(np.float32)
    arrays = LAYOUT.split(vector)
    for norm in ("body.2.weight", "body.5.weight"):
        arrays[norm][:] = 1
    return vector


def job(folder: Path, *, epochs: int = 20, **more: Any) -> Job:
    wiring = Wiring(task(epochs).window, ("p/a", "p/b"), target="p/rul", segment="p/part")
    usual: dict[str, Any] = {"memory": 2 << 30, "cpu_seconds": 100, "nice": 1, "threads": 1, "seed": 7}
    text = TASK.format(epochs=epochs)
    return Job(task_text=text, wiring=wiring, layout=LAYOUT.to_wire(), store=str(folder), **usual | more)


def task(epochs: int = 20) -> Task:
    return parse_task(TASK.format(epochs=epochs))


async def run(one: Job, folder: Path) -> Any:
    trainer = Trainer()
    try:
        return await asyncio.wait_for(trainer.train(one, base(), folder), WAIT_S)
    finally:
        await trainer.stop()


def find_child(parent: int) -> int:
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            words = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(words[1]) == parent and b"edge.trainer" in (entry / "cmdline").read_bytes():
                return int(entry.name)
    return 0


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is another process
            await asyncio.sleep(0.05)


async def child_of(parent: int) -> int:
    """The training child's process id, once it has begun to work."""
    await until(lambda: find_child(parent))
    return find_child(parent)


def nice(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[16])


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


async def test_a_child_learns_from_the_store(tmp_path: Path) -> None:
    fill(tmp_path)
    result = await run(job(tmp_path), tmp_path / "job")
    assert result.vector.shape == (LAYOUT.size,)
    assert np.isfinite(result.vector).all()
    assert not np.array_equal(result.vector, base())
    assert (
        result.samples + len(result.holdout) == 20 * 17 - 1
    )  # the last row is not closed, no window spans two segments
    assert result.samples >= 200
    assert result.steps == 20 * (result.samples // 16)
    assert result.loss < 0.1
    assert result.quality == 1
    assert result.scale.mean == pytest.approx((0, 0), abs=1)
    assert result.scale.std == pytest.approx((1, 10), rel=0.2)
    x, y = result.holdout.x, result.holdout.y
    np.testing.assert_allclose(y, x[:, 0, -1] + x[:, 1, -1] / 10, rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "job").exists()
    again = await run(job(tmp_path), tmp_path / "job")
    assert np.array_equal(again.vector, result.vector)


async def test_a_result_says_what_share_of_its_values_was_good(tmp_path: Path) -> None:
    fill(tmp_path, bad=lambda tag, at: tag == "p/b" and at % 8 == 3)
    result = await run(job(tmp_path, epochs=1), tmp_path / "job")
    assert result.quality == pytest.approx(1 - 1 / 16, abs=0.01)


async def test_half_a_net_trains_its_half_and_grows_when_it_may(tmp_path: Path) -> None:
    fill(tmp_path)
    trainer, inside = Trainer(), narrow(LAYOUT, 0.5)[1]
    half = await trainer.train(job(tmp_path, epochs=2, width=0.5), base(), tmp_path / "job")
    assert half.own is not None
    for vector in (half.vector, half.tuned, half.own):
        assert set(np.flatnonzero(vector).tolist()) <= set(inside.tolist())
    assert not np.array_equal(half.vector[inside], base()[inside])
    # The gateway's file says 1 from now on: what is outside of the half learns too.
    whole = await trainer.train(job(tmp_path, epochs=2), base(), tmp_path / "job", half.own)
    await trainer.stop()
    assert whole.own is not None
    assert whole.own.all()
    assert np.abs(whole.own - half.own)[inside].max() < np.abs(whole.own - base()).max()


async def test_a_net_that_learns_alone_never_sees_the_base_and_goes_on_where_it_stood(tmp_path: Path) -> None:
    fill(tmp_path)
    trainer = Trainer()
    first = await trainer.train(job(tmp_path, epochs=2), base(), tmp_path / "job")
    other = await trainer.train(job(tmp_path, epochs=2), base() + 1, tmp_path / "job")
    assert first.own is not None
    assert other.own is not None
    assert np.array_equal(first.own, other.own)
    assert not np.array_equal(first.own, first.vector)
    more = await trainer.train(job(tmp_path, epochs=2), base(), tmp_path / "job", first.own)
    assert more.own is not None
    assert np.abs(more.own - first.own).max() < np.abs(more.own - base()).max()
    assert not np.array_equal(more.own, first.own)
    without = job(tmp_path, epochs=1)
    text = without.task_text.replace("batch = 16", "batch = 16\nalone = false")
    assert (await trainer.train(msgspec.structs.replace(without, task_text=text), base(), tmp_path / "job")).own is None
    await trainer.stop()


async def test_the_tuned_model_starts_from_the_mean_of_the_global_ones_and_the_update_from_the_last(
    tmp_path: Path,
) -> None:
    fill(tmp_path)
    trainer = Trainer()
    last = await trainer.train(job(tmp_path, epochs=1), base(), tmp_path / "job")
    mean = await trainer.train(job(tmp_path, epochs=1), base(), tmp_path / "job", average=base() + 1)
    other = await trainer.train(job(tmp_path, epochs=1), base(), tmp_path / "job", average=np.zeros(3, np.float32))
    await trainer.stop()
    assert np.array_equal(mean.vector, last.vector)
    assert np.abs(mean.tuned - base() - 1).mean() < np.abs(last.tuned - base() - 1).mean() / 2
    assert np.array_equal(other.tuned, last.tuned)  # of another layout: not taken


async def test_too_little_is_not_an_error_of_anybody(tmp_path: Path) -> None:
    fill(tmp_path, 60)
    with pytest.raises(NotEnoughError, match=r"\d+ good windows are stored, training wants 100"):
        await run(job(tmp_path), tmp_path / "job")
    assert not (tmp_path / "job").exists()


async def test_a_child_over_its_memory_cap_is_killed(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(TrainingError, match=r"went over its memory cap \(\d+ of 60 MiB\); raise training.memory"):
        await run(job(tmp_path, memory=60 << 20), tmp_path / "job")
    assert not (tmp_path / "job").exists()


async def test_a_child_over_its_processor_time_is_killed(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(TrainingError, match=f"ended with -{signal.SIGXCPU.value}"):
        await run(job(tmp_path, cpu_seconds=1, epochs=1000), tmp_path / "job")


async def test_a_layout_of_another_net_fails_in_the_child(tmp_path: Path) -> None:
    fill(tmp_path)
    wrong = msgspec.structs.replace(job(tmp_path), layout=(("head.weight", (LAYOUT.size,)),))
    with pytest.raises(TrainingError, match="the training process ended with 1: "):
        await run(wrong, tmp_path / "job")


async def test_kill_9_leaves_nothing_and_a_cancelled_child_dies(tmp_path: Path) -> None:
    fill(tmp_path)
    endless = job(tmp_path, epochs=1000)
    trainer = Trainer()
    running = asyncio.create_task(trainer.train(endless, base(), tmp_path / "job"))
    pid = await child_of(os.getpid())
    await asyncio.sleep(1)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(TrainingError, match="ended with -9"):
        await asyncio.wait_for(running, WAIT_S)
    assert not (tmp_path / "job").exists()
    running = asyncio.create_task(trainer.train(endless, base(), tmp_path / "job"))
    pid = await child_of(os.getpid())
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not (tmp_path / "job").exists()
    await until(lambda: is_gone(pid))
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "result.npz").write_bytes(b"what a killed agent left")
    result = await run(job(tmp_path, epochs=1), tmp_path / "job")
    assert result.samples >= 200


async def test_one_child_serves_rounds_that_follow_and_leaves_after_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    trainer = Trainer()
    text = TASK.format(epochs=1).replace("min_windows = 100", "min_windows = 1000")
    wants_more = msgspec.structs.replace(job(tmp_path), task_text=text)
    with pytest.raises(NotEnoughError, match="training wants 1000"):
        await trainer.train(wants_more, base(), tmp_path / "job")
    pid = find_child(os.getpid())
    first = await trainer.train(job(tmp_path, epochs=1), base(), tmp_path / "job")
    second = await trainer.train(job(tmp_path, epochs=1), base(), tmp_path / "job")
    assert np.array_equal(first.vector, second.vector)
    assert find_child(os.getpid()) == pid != 0
    assert nice(pid) == os.nice(0) + 1
    os.kill(pid, signal.SIGKILL)
    await until(lambda: is_gone(pid))
    monkeypatch.setattr("edge.train._LINGER_S", 0.1)
    try:
        third = await trainer.train(job(tmp_path, epochs=1), base(), tmp_path / "job")
    except TrainingError:  # it died between two looks; the participant tries again, and so does this test
        third = await trainer.train(job(tmp_path, epochs=1), base(), tmp_path / "job")
    assert np.array_equal(first.vector, third.vector)
    other = find_child(os.getpid())
    assert other not in {0, pid}
    await until(lambda: is_gone(other))


PARENT = """
import asyncio, sys
from pathlib import Path
from tests.test_train import base, job
from edge.train import Trainer
folder = Path(sys.argv[1])
asyncio.run(Trainer().train(job(folder, epochs=1000), base(), folder / "job"))
"""


async def test_a_child_does_not_outlive_the_agent(tmp_path: Path) -> None:
    fill(tmp_path)
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, str(tmp_path))
    pid = await child_of(parent.pid)
    # It asks for the signal once it runs, so wait until it has lowered its priority, which it does just after.
    await until(lambda: nice(pid) > 0)
    parent.kill()
    await parent.wait()
    await until(lambda: is_gone(pid))


def test_the_resident_process_never_loads_torch_nor_onnx() -> None:
    code = (
        "import sys, edge.agent, edge.cli, edge.drivers.opcua, edge.drivers.modbus; edge.cli.build_parser();"
        "print([m for m in ('torch', 'onnx') if m in sys.modules], 'onnxruntime' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=WAIT_S)
    assert done.stdout == "[] True\n"
