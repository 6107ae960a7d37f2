"""What a simulation found, for people: lines for the terminal, and a self-contained HTML file with the curve."""

import html
from pathlib import Path
from typing import Any

from edge.lab.report import STYLE, Line, number, plot
from models.evaluate import LOWER_IS_BETTER, not_worse

_COLUMNS = {
    "plant": "plant",
    "windows": "trains on",
    "test_windows": "tested on",
    "silo_own": "alone",
    "centralised": "all in one place",
    "final": "final",
    "final_vs_alone": "final / alone",
    "model": "scores with",
}


_ALARMS = ("normal_windows", "false_alarms", "found")
# A smaller difference is none at a figure of one digit.
_LEVEL = 0.0005


def _gain(ratio: float | None, what: str) -> str:
    """Say a ratio of which more is better as a difference in per cent."""
    if ratio is None:
        return "no figure"
    if abs(ratio - 1) < _LEVEL:
        return f"as good as {what}"
    return f"{abs(ratio - 1):.1%} {'better' if ratio > 1 else 'worse'} than {what}"


def _noise(metric: str, worth: float, other: float, tested: int) -> str:
    """Say so where a difference is less than the noise of the windows that it was tested on."""
    both = worth != other and not_worse(metric, worth, other, tested) and not_worse(metric, other, worth, tested)
    return f", within the noise of {tested} test windows" if both else ""


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the figures that a person reads first, the verdict on top."""
    plants = [row for row in found["plants"] if row["final_vs_alone"] is not None]
    worst = min(plants, key=lambda row: row["final_vs_alone"], default=None)
    metric = found["metric"]
    level = _noise(metric, found["final"], found["silo_own"], sum(row["test_windows"] for row in plants))
    least = _noise(metric, worst["final"], worst["silo_own"], worst["test_windows"]) if worst else ""
    less = "less" if metric in LOWER_IS_BETTER else "more"
    update, float32 = found["bytes_up_per_update"], found["float32_bytes"]
    return [
        ("federation, for a plant", _gain(found["final_vs_alone"], "alone") + (level if plants else "")),
        (
            "  for the worst off",
            f"{_gain(worst['final_vs_alone'], 'alone')} ({worst['plant']}){least}" if worst else "-",
        ),
        ("  against all data or alone", _gain(found["final_vs_best"], "the better of both")),
        (f"{metric} ({less} is better)", f"mean over {len(plants)} plants' own tests"),
        ("  final: with federation", number(found["final"])),
        ("  each plant alone", number(found["silo_own"])),
        ("  all data in one place", number(found["centralised"])),
        ("  global model by itself", number(found["federated"])),
        ("  tuned at each plant", number(found["personalised"])),
        ("  alone, on all tests", number(found["silo_all"])),
        ("update", f"{update:,.0f} bytes, float32 {float32:,}: {found['ratio_up']:g} x"),
        ("model step down", f"{found['bytes_down_per_round']:,.0f} bytes: {found['ratio_down']:g} x"),
        ("kind, net, window", f"{found['kind']}, {found['net']}, {' x '.join(map(str, found['window']))}"),
        ("rounds, parameters, seed", f"{found['rounds']}, {found['parameters']:,}, {found['seed']}"),
        ("took", f"{found['seconds']} s"),
    ]


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{kind} {share:.0%}" for kind, share in value.items())
    return number(value) if value is None or isinstance(value, float) else str(value)


def _plants(found: dict[str, Any]) -> list[list[str]]:
    """One row a plant, worst gain first; the first row names the columns."""
    columns = _COLUMNS | {key: key.replace("_", " ") for key in found["plants"][0] if key in _ALARMS}
    ordered = sorted(found["plants"], key=lambda row: (row["final_vs_alone"] is None, row["final_vs_alone"] or 0))
    return [list(columns.values()), *([_cell(row[key]) for key in columns] for row in ordered)]


def told(found: dict[str, Any]) -> str:
    """Write the figures for a terminal."""
    figures, plants = rows(found), _plants(found)
    width = max(len(name) for name, _ in figures)
    wide = [max(len(row[i]) for row in plants) for i in range(len(plants[0]))]
    lines = [f"{name:<{width}}  {value}" for name, value in figures]
    lines += ["", *("  ".join(cell.ljust(n) for cell, n in zip(row, wide, strict=True)).rstrip() for row in plants)]
    return "\n".join(lines)


def write_simulation(found: dict[str, Any], path: Path) -> None:
    """Write a simulation's figures, plants and curve as one HTML file; OSError if it can't be written."""
    head, *plants = [[html.escape(cell) for cell in row] for row in _plants(found)]
    table = "".join(f"<th>{cell}" for cell in head)
    table += "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in plants)
    figures = "".join(f"<tr><td>{html.escape(name)}<td>{html.escape(value)}" for name, value in rows(found))
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in found["notes"])
    curve = [(float(n), float(v)) for n, v in enumerate(found["curve"], 1) if v is not None]
    lines = [Line("global model", curve)] if curve else []
    levels = {"all in one place": "centralised", "each alone": "silo_own", "final": "final"}
    last = float(found["rounds"])
    lines += [
        Line(name, [(1.0, found[key]), (last, found[key])], dashed=True)
        for name, key in levels.items()
        if found[key] is not None
    ]
    drawn = plot(f"{found['metric']} by round", "rounds", found["metric"], lines) if lines else ""
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Simulation</title><style>{STYLE}</style>'
        f"<h1>Simulation</h1><table>{figures}</table>{notes}<h2>By round</h2>{drawn}"
        f"<h2>Plants, the worst off first</h2><table><tr>{table}</table></html>\n",
        encoding="utf-8",
    )
