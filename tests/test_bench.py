"""The benches measure what runs here; what is held is what does not depend on how fast the machine is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.cli import main
from edge.lab import bench_aggregate
from edge.lab.bench_codec import Way, ways
from tests.test_simulate import rows


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bench", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_aggregate() -> None:
    found = bench_aggregate.measure(60)
    assert found.keys() >= {"ms_per_1000", "plain_ms_per_1000", "ratio", "growth_mb", "verify_us"}
    assert found["verify_us"] > 0
    assert found["ratio"] == pytest.approx(found["ms_per_1000"] / found["plain_ms_per_1000"], rel=0.1)
    assert found["bytes_per_update"] < 4 * found["parameters"] / 100


def test_infer(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "infer", "--windows", "200")
    assert found.keys() >= {"p50_us", "p99_us", "raw_p50_us", "p50_ratio", "p99_training_ratio", "missed"}
    assert (found["windows"], found["missed"]) == (600, 0)
    assert 0 < found["raw_p50_us"] < found["p99_us"]


def test_codec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "codec", "--data", str(rows(tmp_path)), "--rounds", "4")
    codecs = {row["name"]: row for row in found["codecs"]}
    keys = {"name", "bytes", "ratio", "loss_points", "encode_us_per_100k", "decode_us_per_100k"}
    assert all(row.keys() == keys for row in codecs.values())
    assert codecs["float32"]["bytes"] == 4 * found["parameters"]
    assert codecs["float32"]["loss_points"] == 0
    assert codecs["sparse, keep 1 %"]["ratio"] > 100
    # A bit a value, padded to whole blocks, and a scale for each of them.
    assert codecs["EDEN 1 bit"]["bytes"] == -(-found["parameters"] // 4096) * (4096 // 8 + 4)


@pytest.mark.parametrize("way", ways(), ids=lambda way: way.name)
def test_what_is_decoded_is_what_was_measured(way: Way) -> None:
    vector = np.random.default_rng(0).normal(size=9_000).astype(np.float32)
    data, decoded = way.encode(vector, 1)
    assert np.array_equal(way.decode(data, vector.size), decoded)
    assert decoded.shape == vector.shape


def test_eden_is_unbiased_and_as_far_off_as_its_paper_says() -> None:
    vector = np.random.default_rng(1).normal(size=3 * 4096).astype(np.float32) ** 3
    (eden,) = (way for way in ways() if way.name == "EDEN 1 bit")
    decoded = eden.decode(eden.encode(vector, 1)[0], vector.size)
    assert decoded @ vector / (vector @ vector) == pytest.approx(1, rel=0.01)
    assert ((decoded - vector) ** 2).sum() / (vector**2).sum() == pytest.approx(np.pi / 2 - 1, rel=0.05)


@pytest.mark.parametrize(
    "arguments", [("infer", "--windows", "1"), ("codec", "--rounds", "1"), ("codec", "--seeds", "0")]
)
def test_a_wrong_option_is_one_line(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert "out of range" in capsys.readouterr().err
