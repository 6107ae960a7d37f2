"""Write docs/learning.md: what a federation is worth on recorded data, set by set, and the commands that show it.

    python -m tests.learning --data DIR [--seeds 0,1,2] [--only SET,SET] [--rounds N]

Runs `tundish simulate` on tests/tasks/SET.toml for every set that lies in DIR (DIR/SET/SET.npz), and draws the curves
into docs/learning-SET.svg. About an hour on two busy cores for eight sets.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from edge.lab.report import Line, plot

ROOT = Path(__file__).parent.parent
TASKS = Path(__file__).parent / "tasks"
KEYS = (
    "centralised", "silo_own", "silo_all", "federated", "personalised", "final", "final_vs_best",
    "worst_plant_vs_alone", "bytes_up_per_update", "ratio_up", "bytes_down_per_round",
)  # fmt: skip


def run(name: str, data: Path, seed: int, rounds: int) -> dict[str, Any]:
    """One simulation, as anybody would run it."""
    command = [sys.executable, "-P", "-m", "edge.cli", *_arguments(name, str(data), seed, rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{name}, seed {seed}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    sys.stderr.write(f"{name} seed {seed}: {found['final_vs_best']} in {found['seconds']} s\n")
    return found


def _arguments(name: str, data: str, seed: int | str, rounds: int) -> list[str]:
    options = ["--data", data, "--rounds", str(rounds), "--seed", str(seed), "--json"]
    return ["simulate", f"tests/tasks/{name}.toml", *options]


def section(name: str, runs: list[dict[str, Any]]) -> str:
    """One set: its figures, mean and spread over the seeds, what misses, and the command."""
    first, rounds = runs[0], runs[0]["rounds"]
    lines = [f"## {name}", "", f"`tundish {' '.join(_arguments(name, f'{name}.npz', 'SEED', rounds))}`", ""]
    plants = len(first["plants"])
    lines += [f"{plants} plants, {first['parameters']:,} parameters, {rounds} rounds, metric {first['metric']}.", ""]
    lines += ["| key | mean | spread | by seed |", "|---|---|---|---|"]
    for key in KEYS:
        values = [run[key] for run in runs if run[key] is not None]
        spread = f"{stdev(values):.4g}" if len(values) > 1 else "-"
        told = ", ".join(f"{value:.4g}" for value in values)
        lines.append(f"| `{key}` | {mean(values):.4g} | {spread} | {told} |" if values else f"| `{key}` | - | - | - |")
    reached = [", ".join(f"{part}: {n or '-'}" for part, n in run["rounds_to"].items()) for run in runs]
    lines += [f"| `rounds_to` | | | {'; '.join(reached)} |", ""]
    return "\n".join([*lines, verdict(runs), "", f"![metric by round]({_picture(name).name})", ""])


def verdict(runs: list[dict[str, Any]]) -> str:
    """Say whether the set reaches its figure, and where it misses, by how much and whose model is better."""
    worth = mean(run["final_vs_best"] for run in runs)
    if worth >= 1:
        return f"`final` is {worth:.3f} of the better of all data in one place and each plant alone."
    lower = runs[0]["metric"] == "rmse"
    together, alone = (mean(run[key] for run in runs) for key in ("centralised", "silo_own"))
    better = "all data in one place" if (together < alone) == lower else "each plant alone"
    weakest = min(runs, key=lambda run: run["final_vs_best"])
    lost = [row["plant"] for row in weakest["plants"] if row["final"] is not None and _loses(row, better, lower=lower)]
    where = f" In the weakest run it loses at {', '.join(lost)}." if lost else ""
    return f"**Misses by {1 - worth:.3f}**: {better} is better.{where}"


def _loses(row: dict[str, Any], better: str, *, lower: bool) -> bool:
    other = row["centralised" if better.startswith("all") else "silo_own"]
    return other is not None and (row["final"] > other if lower else row["final"] < other)


def _picture(name: str) -> Path:
    return ROOT / "docs" / f"learning-{name}.svg"


def draw(name: str, runs: list[dict[str, Any]]) -> None:
    """The federated model's metric by round and seed, between the two that it is measured against."""
    last = float(runs[0]["rounds"])
    lines = [
        Line(f"seed {run['seed']}", [(float(n), v) for n, v in enumerate(run["curve"], 1) if v is not None])
        for run in runs
    ]
    for label, key in (("all in one place", "centralised"), ("each alone", "silo_own"), ("final", "final")):
        level = mean(run[key] for run in runs)
        lines.append(Line(label, [(1.0, level), (last, level)], dashed=True))
    svg = plot(f"{name}: {runs[0]['metric']} by round", "rounds", runs[0]["metric"], lines)
    _picture(name).write_text(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ') + "\n")


def page(found: dict[str, list[dict[str, Any]]]) -> str:
    """The whole page."""
    head = [
        "# What a federation learns", "",
        "Made by `python -m tests.learning`; keys as in [reference.md](reference.md). The data is recorded, each",
        "plant a machine, a condition or a year of its own; it is not part of this project. A run looks at a",
        "test once, after each plant has decided on its own holdout. But the defaults were chosen while looking at",
        "some of these sets' tests, the last ones (`tune`, and from where) at seed 0 of steel_plates, ai4i2020, skab",
        "and hydraulic: take the figures as somewhat flattered.", "",
        "| set | metric | all in one place | each alone | final | `final_vs_best` | worst plant | bytes an update |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, runs in found.items():
        figures = (mean(run[key] for run in runs) for key in ("centralised", "silo_own", "final", "final_vs_best"))
        worst, sent = min(run["worst_plant_vs_alone"] for run in runs), mean(run["bytes_up_per_update"] for run in runs)
        cells = " | ".join(f"{value:.4g}" for value in figures)
        head.append(f"| [{name}](#{name}) | {runs[0]['metric']} | {cells} | {worst:.3f} | {sent:.0f} |")
    whole = mean(run["final_vs_best"] for runs in found.values() for run in runs)
    head += ["", f"Mean of `final_vs_best` over sets and seeds: **{whole:.3f}**.", ""]
    return "\n".join([*head, *(section(name, runs) for name, runs in found.items())])


def main() -> int:
    """Run everything that is asked for, and write page and curves."""
    parser = argparse.ArgumentParser(prog="python -m tests.learning", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with SET/SET.npz")
    parser.add_argument("--seeds", default="0,1,2", help="seeds (0,1,2)")
    parser.add_argument("--only", default="", help="sets, else all")
    parser.add_argument("--rounds", type=int, default=24, help="rounds (24)")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else sorted(path.stem for path in TASKS.glob("*.toml"))
    found: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        data = args.data / name / f"{name}.npz"
        if not data.exists():
            sys.stderr.write(f"{name} is left out: no {data}\n")
            continue
        found[name] = [run(name, data, int(seed), args.rounds) for seed in args.seeds.split(",")]
        draw(name, found[name])
    if not found:
        raise SystemExit(f"no recorded data in {args.data}")
    (ROOT / "docs" / "learning.md").write_text(page(found).rstrip() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
