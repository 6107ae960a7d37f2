"""A model that the aggregator signs anew, at each of its starts, is the same, whatever the gateway does just then."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from broker import messages as m
from broker.topics import Status
from edge.birth import Herald
from edge.handback import Fetch, Model
from edge.ring import Samples
from edge.runner import Runner
from edge.store import State
from models.delta import weights_digest
from models.errors import LocalError
from tests.test_drift import Floor

WAIT_S = 30
DAY_MS = 86_400_000


@pytest.fixture
def floor(tmp_path: Path) -> Iterator[Floor]:
    with closing(State(tmp_path)) as state, closing(Samples(tmp_path, 1 << 26)) as samples:
        yield Floor(tmp_path, state, samples)


class Come(Fetch):
    """A model whose pieces have all come."""

    def __init__(self, model: Model) -> None:
        self.manifest, self.held, self.since, self._model = model.manifest, None, None, model

    @property
    def topics(self) -> list[str]:
        return []

    def model(self) -> Model:
        return self._model


def signed(model: Model, at_ms: int, **changes: Any) -> m.ModelManifest:
    return msgspec.structs.replace(model.manifest, signed_ms=at_ms, **changes)


def next_of(model: Model, at_ms: int) -> Model:
    """The version that follows."""
    vector = model.vector * np.float32(0.9)
    digest, version = weights_digest(vector), model.manifest.version + 1
    manifest = signed(model, at_ms, version=version, digest=digest, steps=(bytes(16),) * version)
    return replace(model, manifest=manifest, vector=vector)


def hear(floor: Floor, runner: Runner, manifest: m.ModelManifest) -> None:
    runner.on_manifest(manifest, floor.signer.seal(manifest, "x"))


def wanted(floor: Floor, runner: Runner, model: Model) -> None:
    """Let a newer model have come whole."""
    runner._wanted = model.manifest
    runner._begin(Come(model), floor.signer.seal(model.manifest, "x"))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is other tasks' work
            await asyncio.sleep(0.01)


async def test_where_nothing_else_happens_the_newer_word_alone_is_kept(floor: Floor) -> None:
    runner = floor.runner()
    model, lines = runner.model, len(list(floor.shop.state.ledger()))
    assert model
    hear(floor, runner, signed(model, 50))
    await until(lambda: not runner.busy)
    assert runner.model is model
    assert len(list(floor.shop.state.ledger())) == lines
    stored = floor.memory.model()
    assert stored
    assert stored.manifest.signed_ms == 50
    await runner.stop()
    # After a restart, an older word is known to be one.
    again = Runner("wear", floor.shop.config.tasks["wear"], floor.shop)
    again.start()
    hear(floor, again, signed(model, 40, version=0))
    assert "passed over model 0" in str(again.status()["problem"])
    await again.stop()


async def test_what_was_tuned_meanwhile_is_chosen_all_the_same(floor: Floor) -> None:
    runner = floor.runner()
    model, result = runner.model, floor.trained()
    assert model
    hear(floor, runner, signed(model, 50))
    await until(lambda: not runner.busy)
    assert runner.model
    await runner.scoring.elect(model, runner.model, result)
    assert runner.scoring.kept
    await runner.stop()


async def test_an_older_version_signed_later_follows_one_that_is_being_installed(floor: Floor) -> None:
    runner = floor.runner()
    old = runner.model
    assert old
    wanted(floor, runner, next_of(old, 10))
    for _ in range(3):
        await asyncio.sleep(0)
    assert runner.busy
    hear(floor, runner, signed(old, 20))  # of an aggregator that was restored
    await until(lambda: not runner.busy)
    assert runner.model
    assert runner.model.manifest.version == old.manifest.version
    assert runner.participant.stored == (old.manifest.version, old.manifest.digest)
    await runner.stop()


async def test_a_model_that_could_not_score_yet_is_tried_on(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.runner.RETRY_S", 0.05)
    runner = floor.runner()
    old, offer, tries = runner.model, runner.scoring.offer, list[int]()
    assert old

    async def full(*args: Any, **more: Any) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise LocalError("database or disk is full")
        await offer(*args, **more)

    monkeypatch.setattr(runner.scoring, "offer", full)
    new = next_of(old, 10)
    wanted(floor, runner, new)
    await until(lambda: tries)
    before = runner.scoring.average
    hear(floor, runner, signed(new, 20))
    await until(lambda: not runner.busy)
    assert len(tries) == 2
    assert runner.problem == ""
    assert np.array_equal(runner.scoring.average, before)  # type: ignore[arg-type]
    await runner.stop()


async def test_what_is_passed_over_hides_no_problem_and_is_forgotten(floor: Floor) -> None:
    runner = floor.runner()
    model = runner.model
    assert model
    hear(floor, runner, signed(model, 50))
    hear(floor, runner, signed(model, 40))
    assert "is the aggregator's clock right?" in str(runner.status()["problem"])
    runner.problem = "training: no space"
    assert runner.status()["problem"] == "training: no space"
    runner.problem = ""
    hear(floor, runner, signed(model, 50))
    assert runner.status()["problem"] == ""
    await until(lambda: not runner.busy)
    await runner.stop()


@pytest.mark.parametrize("far_ms", [4_000_000_000_000, 2**53])
async def test_a_clock_that_was_wrong_once_shuts_nothing_out(floor: Floor, far_ms: int) -> None:
    runner = floor.runner()
    model = runner.model
    assert model
    hear(floor, runner, signed(model, far_ms))
    await until(lambda: not runner.busy)
    hear(floor, runner, signed(model, far_ms - 1))
    assert "passed over" in str(runner.status()["problem"])
    hear(floor, runner, signed(model, DAY_MS))
    assert runner.status()["problem"] == ""
    assert runner._wanted
    assert runner._wanted.signed_ms == DAY_MS
    await until(lambda: not runner.busy)
    await runner.stop()


async def test_a_manifest_of_before_such_times_counts_by_when_its_model_was_made(floor: Floor) -> None:
    runner = floor.runner()
    model = runner.model
    assert model
    assert model.manifest.signed_ms == 0
    hear(floor, runner, signed(model, 0, created_ms=model.manifest.created_ms))
    assert runner.status()["problem"] == ""
    wanted(floor, runner, next_of(model, 0))
    await until(lambda: not runner.busy)
    assert runner.model
    assert runner.model.manifest.version == model.manifest.version + 1
    await runner.stop()


async def test_a_birth_that_a_full_disk_stopped_is_said_later(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.birth._AGAIN_S", 0.0)
    commit, installed, refused = floor.shop.state.commit, list[m.Installed](), list[int]()

    async def nothing() -> None:
        pass

    async def full(work: Callable[[], Any]) -> Any:
        if not refused:
            refused.append(1)
            raise LocalError("database or disk is full")
        return await commit(work)

    def births() -> int:
        return len(floor.said.get(Status(floor.shop.config.path).topic, []))

    floor.runner()
    monkeypatch.setattr(floor.shop.state, "commit", full)
    herald = Herald(floor.shop, 1, bytes(32), lambda: tuple(installed), nothing)
    herald.tick()
    assert births() == 0  # nobody is connected yet
    herald.announce()
    for number in (1, 2):

        def said(number: int = number) -> bool:
            herald.tick()
            return births() == number

        await until(said)
        installed.append(m.Installed("wear", number, 1))
        refused.clear()
    assert len(floor.ledger("birth")) == 2
