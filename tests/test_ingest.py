"""`tundish bench ingest` measures real servers, and says what a user got wrong."""

import json

import pytest

from edge.cli import main
from edge.lab import ingest


def test_a_short_run_gives_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ingest", "--seconds", "0.3", "--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = {"values_per_cpu_s", "raw_values_per_cpu_s", "ratio"}
    assert {what: set(figures) for what, figures in found.items()} == {
        "opcua": wanted,
        "modbus": wanted,
        "store": {"bytes_per_sample", "samples_per_cpu_s"},
    }
    assert all(value > 0 for figures in found.values() for value in figures.values())
    assert found["store"]["bytes_per_sample"] < 4.5  # float32 noise; deterministic, whatever the machine


def test_a_short_soak(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "_WARM_S", 0.5)
    assert main(["bench", "ingest", "--soak", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["soak"]
    assert found["values"] > 0
    assert found["first_rss_mb"] > 0
    assert found["last_rss_mb"] > 0


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--rounds", "0"], ["--seconds", "1e9"]])
def test_what_cannot_be_meant(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ingest", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err
