"""The report of a demo: a table for the terminal, and a self-contained HTML file with plots in SVG."""

import html
from pathlib import Path
from typing import Any, NamedTuple

_COLOURS = ("#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce", "#a16207", "#be185d")
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1f2937}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse}
td,th{padding:.3rem .8rem;border-bottom:1px solid #e5e7eb;text-align:left}td.n{text-align:right}
svg{max-width:100%;height:auto}.note{color:#6b7280}
"""


class Line(NamedTuple):
    """One line of a plot: its name and its points (x, y)."""

    name: str
    points: list[tuple[float, float]]
    dashed: bool = False


def number(value: float | None) -> str:
    """Write a figure for people."""
    return "-" if value is None else f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"  # noqa: PLR2004


def rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures that a person reads first."""
    outage = report["outage"]
    alone = ", ".join(f"{name} {number(v)}" for name, v in report["silo"].items())
    scored = ", ".join(f"{name} {n:,}" for name, n in report["windows_scored"].items())
    survived = (
        f"round {outage['round']} was open with {outage['counted']} of {report['gateways']}; it completed"
        if outage
        else "no round could be caught half done"
    )
    return [
        ("plants, data", f"{report['gateways']}, {report['data']} ({report['speedup']:g} x wall clock)"),
        ("rounds", str(report["rounds"])),
        ("windows scored", scored),
        (f"{report['metric']}: federated", f"{number(report['federated'])} (mean over the plants' own tests)"),
        (f"{report['metric']}: each plant alone", f"{number(report['silo_mean'])} ({alone})"),
        (f"{report['metric']}: all data in one place", number(report["centralised"])),
        ("update", f"{report['bytes_per_update']:,} bytes, float32 {report['float32_bytes']:,}: {report['ratio']} x"),
        ("updates sent, counted", f"{report['updates_sent']}, {report['updates_counted']}"),
        ("lost, counted twice", f"{report['lost']}, {report['duplicated']}"),
        ("aggregator kill -9, broker stopped", survived),
        ("longest gap between two scores", f"{number(report['max_score_gap_s'])} s"),
        ("  of these in the outage", f"{number(report['outage_max_score_gap_s'])} s"),
        ("took", f"{report['seconds']} s, broker {report['broker']}, seed {report['seed']}"),
    ]


def table(report: dict[str, Any]) -> str:
    """The same for the terminal."""
    found = rows(report)
    width = max(len(name) for name, _ in found)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in found)


def plot(title: str, x_name: str, y_name: str, lines: list[Line], *, shade: tuple[float, float] | None = None) -> str:
    """Draw lines as one SVG; `shade` marks a stretch of x."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    left, right, low, high = min(xs), max(xs) or 1, min(0, *ys), max(ys) * 1.05 or 1
    wide, tall, margin = 760, 300, 56
    counts = all(x == round(x) for x in xs)  # rounds, or seconds

    def at(x: float, y: float) -> tuple[float, float]:
        across = margin + (x - left) / ((right - left) or 1) * (wide - margin - 20)
        return across, tall - 40 - (y - low) / ((high - low) or 1) * (tall - 70)

    out = [f'<svg viewBox="0 0 {wide} {tall + 24}" role="img" aria-label="{html.escape(title)}">']
    if shade:
        a, b = at(shade[0], low)[0], at(shade[1], low)[0]
        out.append(f'<rect x="{a:.1f}" y="20" width="{max(b - a, 1):.1f}" height="{tall - 60}" fill="#fde68a"/>')
    for k in range(5):
        y = low + (high - low) * k / 4
        across, down = at(left, y)
        out.append(f'<line x1="{across}" y1="{down:.1f}" x2="{wide - 20}" y2="{down:.1f}" stroke="#e5e7eb"/>')
        out.append(f'<text x="{across - 6}" y="{down + 4:.1f}" font-size="11" text-anchor="end">{y:.3g}</text>')
        x = left + (right - left) * k / 4
        if counts:
            x = float(round(x))
        out.append(f'<text x="{at(x, low)[0]:.1f}" y="{tall - 22}" font-size="11" text-anchor="middle">{x:.3g}</text>')
    for i, line in enumerate(lines):
        colour, dash = _COLOURS[i % len(_COLOURS)], ' stroke-dasharray="6 4"' if line.dashed else ""
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(x, y) for x, y in line.points))
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        name = html.escape(line.name)
        out.append(f'<text x="{margin + i * 170}" y="{tall + 16}" font-size="12" fill="{colour}">{name}</text>')
    out.append(f'<text x="{wide / 2}" y="{tall - 4}" font-size="12" text-anchor="middle">{html.escape(x_name)}</text>')
    out.append(f'<text x="4" y="14" font-size="12">{html.escape(y_name)}</text></svg>')
    return "".join(out)


def _plots(report: dict[str, Any]) -> str:
    curve = [(float(c["version"]), c["metric"]) for c in report["curve"]]
    last = curve[-1][0]
    metric = plot(
        "metric by round", "rounds closed", report["metric"],
        [
            Line("federated", curve),
            Line("all data in one place", [(0, report["centralised"]), (last, report["centralised"])], dashed=True),
            Line("each plant alone", [(0, report["silo_mean"]), (last, report["silo_mean"])], dashed=True),
        ],
    )  # fmt: skip
    by_gateway: dict[str, list[tuple[float, float]]] = {}
    for update in report["updates"]:
        by_gateway.setdefault(update["gateway"], []).append((update["round"], update["bytes"]))
    sizes = [Line(name, sorted(points)) for name, points in by_gateway.items()]
    rounds = [x for line in sizes for x, _ in line.points]
    whole = Line("float32", [(r, report["float32_bytes"]) for r in (min(rounds), max(rounds))], dashed=True)
    scores = [
        Line(name, [(float(s), float(n)) for s, n in enumerate(per_second)])
        for name, per_second in zip(report["windows_scored"], report["scores_per_second"], strict=True)
    ]
    outage = report["outage"]
    shade = None
    if outage:
        shade = (outage["from_s"], outage["from_s"] + outage["seconds"])
    return "".join((
        "<h2>What the model is worth</h2>", metric,
        "<h2>What goes up: bytes of each signed update</h2>",
        plot("bytes of each update", "round", "bytes", [*sizes, whole]),
        "<h2>Scoring never stops</h2><p class=note>Yellow: the aggregator is killed and the broker is gone.</p>",
        plot("windows scored per second", "seconds since the first score", "windows/s", scores, shade=shade),
    ))  # fmt: skip


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the HTML file; it loads nothing from anywhere."""
    cells = "".join(f"<tr><td>{html.escape(n)}<td>{html.escape(v)}</tr>" for n, v in rows(report))
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Tundish demo</title><style>{STYLE}</style>'
        f"<h1>Tundish demo: {html.escape(report['task'])}</h1><table>{cells}</table>{_plots(report)}"
        "<p class=note>Every figure is in report.json; the ledgers of the aggregator and of each gateway lie beside "
        "it.</p></html>\n",
        encoding="utf-8",
    )
