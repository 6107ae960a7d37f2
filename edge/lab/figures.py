"""The demo's figures, read from what the processes left behind: stores, journal and ledgers."""

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import msgspec
import numpy as np

from broker import ledger
from broker.journal import Journal
from broker.topics import GatewayPath
from edge.config import load_config
from edge.history import SampleReader
from edge.lab.processes import python
from edge.lab.stage import Stage, gateway_path, test_set
from edge.store import State
from edge.train import Job, job_for
from edge.wiring import wire
from models import codec
from models.delta import Layout
from models.errors import LocalError
from models.evaluate import metric_name
from models.spec import Task, parse_task


class Outage(NamedTuple):
    """When the aggregator was killed and the broker stopped: in which round, with how many updates counted."""

    round: int
    counted: int
    killed_ms: int
    back_ms: int
    scored: tuple[int, ...]


class Plant(msgspec.Struct, frozen=True, kw_only=True):
    """One plant: its gateway's training job, the optimiser steps that it made in all, and its test set (npz: x, y)."""

    name: str
    job: Job
    steps: int
    test: str


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What to compare: the plants, and the global models (npz: graph, versions, vectors)."""

    plants: tuple[Plant, ...]
    models: str
    seed: int


def figures(stage: Stage, outage: Outage | None) -> dict[str, Any]:
    """Everything that report.json holds. The processes have ended."""
    scenario, count = stage.scenario, range(stage.scenario.gateways)
    journal = Journal(stage.aggregator_state)
    row = journal.task(scenario.task)
    if row is None:
        raise LocalError("the aggregator has no task")
    task = parse_task(row.text)
    layout = Layout.from_json(row.layout)
    lines = list(journal.ledger_lines())
    aggregator = _export(stage, "aggregator", lines)
    gateways = []
    for i in count:
        state = State(stage.gateway_state(i))
        gateways.append(_export(stage, f"gateway-{i + 1}", list(state.ledger())))
        state.close()
    steps = [sum(e["body"]["steps"] for e in entries if e["kind"] == "update") for entries in gateways]
    compared = _compare(stage, journal, task, layout, steps)
    journal.close()
    sent = [e["body"] for entries in gateways for e in entries if e["kind"] == "update"]
    counts = account(sent, gateways, aggregator)
    gaps = [_gaps(stage, i, scenario.task, outage) for i in count]
    float_bytes = 4 * int(layout.mask(task.personal).sum())
    message = mean(body["message_bytes"] for body in sent)
    names = [GatewayPath.parse(gateway_path(i)).site for i in count]
    return {
        "task": task.name,
        "metric": "auroc" if task.kind == "anomaly" else metric_name(task),
        "rounds": sum(e["kind"] == "model" and e["body"]["round"] > 0 for e in aggregator),
        "gateways": scenario.gateways,
        "federated": mean(compared["federated"]),
        "federated_by_plant": dict(zip(names, compared["federated"], strict=True)),
        "silo": dict(zip(names, compared["silo"], strict=True)),
        "silo_mean": mean(compared["silo"]),
        "centralised": mean(compared["centralised"]),
        "centralised_by_plant": dict(zip(names, compared["centralised"], strict=True)),
        "curve": [{"version": c["version"], "metric": mean(c["metric"])} for c in compared["curve"]],
        "train_windows": dict(zip(names, compared["windows"], strict=True)),
        "optimiser_steps": dict(zip(names, steps, strict=True)),
        "test_windows": dict(zip(names, compared["test_windows"], strict=True)),
        **counts,
        "bytes_per_update": round(message),
        "payload_bytes_per_update": round(mean(body["bytes"] for body in sent)),
        "float32_bytes": float_bytes,
        "ratio": round(float_bytes / message, 2),
        "updates": [{"gateway": names[i], "round": e["body"]["round"], "bytes": e["body"]["message_bytes"]}
                    for i in count for e in gateways[i] if e["kind"] == "update"],
        "windows_scored": dict(zip(names, [g["scored"] for g in gaps], strict=True)),
        "max_score_gap_s": max(g["all"] for g in gaps),
        "outage_max_score_gap_s": max(g["outage"] for g in gaps) if outage else None,
        "outage": _outage(outage, min(g["first_ms"] for g in gaps)),
        "scores_per_second": [g["per_second"] for g in gaps],
        "speedup": scenario.speedup,
        "broker": scenario.broker,
        "data": scenario.data.name if scenario.data else "simulated spindles",
        "seed": scenario.seed,
    }  # fmt: skip


def _outage(outage: Outage | None, first_ms: int) -> dict[str, Any] | None:
    if outage is None:
        return None
    seconds = {"from_s": (outage.killed_ms - first_ms) / 1000, "seconds": (outage.back_ms - outage.killed_ms) / 1000}
    return outage._asdict() | seconds


def _compare(stage: Stage, journal: Journal, task: Task, layout: Layout, steps: list[int]) -> dict[str, Any]:
    """Judge the global models and train the baselines, in a child that may import torch."""
    folder, name = stage.folder, task.name
    row = journal.task(name)
    newest = journal.model(name)
    if row is None or newest is None:
        raise LocalError("the aggregator has no model")
    models = [m for v in range(newest.version + 1) if (m := journal.model(name, v)) and m.weights]
    versions = [m.version for m in models]
    vectors = np.stack([codec.decode(m.weights, layout.size) for m in models])
    graph = np.frombuffer(codec.inflate(row.graph, row.graph_size), np.uint8)
    np.savez(folder / "models.npz", graph=graph, versions=np.array(versions), vectors=vectors)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        tests = list(pool.map(partial(test_set, stage.scenario, stage.folder), range(len(steps))))
    plants = tuple(_plant(stage, i, task, row.text, layout, steps[i], tests[i]) for i in range(len(steps)))
    job = Comparison(plants=plants, models=str(folder / "models.npz"), seed=stage.scenario.seed)
    (folder / "comparison.json").write_bytes(msgspec.json.encode(job))
    out = folder / "compared.json"
    done = subprocess.run(
        python("edge.lab.baseline", folder / "comparison.json", out), capture_output=True, check=False, text=True
    )
    if done.returncode:
        raise LocalError(f"the baselines failed: {done.stderr.strip().rpartition(chr(10))[2]}")
    compared: dict[str, Any] = json.loads(out.read_text())
    return compared


def _plant(stage: Stage, i: int, task: Task, text: str, layout: Layout, steps: int, test: Path) -> Plant:
    """One plant as the baselines see it: the training job that its gateway ran, on all that it stored."""
    config = load_config(stage.folder / f"plant{i + 1}" / "gateway.toml")
    wiring = wire(task, config.tasks[task.name], config.tags, config.file)
    job = job_for(config, stage.gateway_state(i), text, wiring, layout, 0, {})
    return Plant(name=gateway_path(i), job=job, steps=steps, test=str(test))


def _export(stage: Stage, name: str, lines: list[str]) -> list[dict[str, Any]]:
    """Verify a ledger, write it beside the report, and return its entries."""
    ledger.verify(lines)
    path: Path = stage.folder.parent / f"{name}-ledger.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return [json.loads(line) for line in lines]


def account(
    sent: list[dict[str, Any]], gateways: list[list[dict[str, Any]]], aggregator: list[dict[str, Any]]
) -> dict[str, int]:
    """Hold the gateways' ledgers against the aggregator's: what was sent, counted, refused with a reason, or lost."""
    counted = [e["body"] for e in aggregator if e["kind"] == "update"]
    digests = {body["digest"] for body in counted}
    receipts = [e["body"] for entries in gateways for e in entries if e["kind"] == "receipt"]
    refused = {r["digest"] for r in receipts if r["outcome"] not in ("counted", "duplicate")} - digests
    seats = Counter((body["path"], body["round"]) for body in counted)
    return {
        "updates_sent": len({body["digest"] for body in sent}),
        "updates_counted": len(counted),
        "updates_refused": len(refused),
        "lost": len({body["digest"] for body in sent} - digests - refused),
        "duplicated": sum(many - 1 for many in seats.values()),
    }


def _gaps(stage: Stage, i: int, task: str, outage: Outage | None) -> dict[str, Any]:
    """The longest gap between two scores of a gateway, in all and while the outage lasted, in seconds."""
    reader = SampleReader(stage.gateway_state(i))
    times = [score.scored_ms for score in reader.scores(task)]
    reader.close()
    if not times:
        raise LocalError(f"{gateway_path(i)} has scored nothing")

    def longest(pairs: Iterable[tuple[int, int]]) -> float:
        return max((b - a for a, b in pairs), default=0) / 1000

    inside = [(a, b) for a, b in pairwise(times) if outage and b > outage.killed_ms and a < outage.back_ms]
    seconds = Counter((t - times[0]) // 1000 for t in times)
    return {
        "scored": len(times),
        "all": longest(pairwise(times)),
        "outage": longest(inside),
        "per_second": [seconds.get(s, 0) for s in range(max(seconds) + 1)],
        "first_ms": times[0],
    }
