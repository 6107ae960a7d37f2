"""A task as published, matched to this gateway's tags: names, units, shapes."""

import difflib
from collections.abc import Iterable

from edge.config import TaskTable
from edge.tags import NO_BOUND, Source, Tag
from edge.units import SAME, Conversion, UnitError, conversion, known
from edge.window import Wiring
from models.errors import UserError
from models.spec import Task


def wire(task: Task, table: TaskTable, tags: dict[str, Tag], place: str) -> Wiring:
    """Match a task as published to this gateway's wiring; UserError names the signal that doesn't fit."""
    conversions: list[Conversion] = []
    for signal in task.signal:
        if signal.name not in table.signals:
            remedy = f'add {signal.name} = "source/tag" (in {signal.unit or "1"}) under [task.{task.name}] signals'
            if near := difflib.get_close_matches(signal.name, _extra(task, table), n=1):
                remedy = f"{near[0]!r} is wired, which the task does not have: did you mean that?"
            raise UserError(place, 0, f"task.{task.name}.signals", f"signal {signal.name!r} is not wired", remedy)
        tag = tags[table.signals[signal.name]]
        _number(tag, signal.name)
        conversions.append(_convert(task, tag, signal.name, signal.unit))
        if task.window.waveform != bool(tag.width) or (tag.width and tag.width != task.window.length):
            due = f"float32[{task.window.length}]" if task.window.waveform else "a scalar"
            problem = f"{tag.ref} is {tag.type or 'a scalar'}, and {task.name} wants {due}"
            remedy = f"write type {due}" if task.window.waveform else "wire a tag of one number"
            raise UserError(tag.file, tag.line, "type", problem, f"{remedy}, or another tag as {signal.name}")
    target = table.target if task.target else None
    if task.target and target:
        _number(tags[target], task.target.name)
        # Classes and counts have no unit, whatever the tag's column says.
        unit = "" if task.target.classes or task.target.unit == "1" else task.target.unit
        conversions.append(_convert(task, tags[target], task.target.name, unit))
    same = all(c == SAME for c in conversions)
    ranges = tuple((tag.low, tag.high) for tag in (tags[table.signals[s.name]] for s in task.signal))
    return Wiring(
        window=task.window,
        signals=tuple(table.signals[s.name] for s in task.signal),
        target=target,
        gains=() if same else tuple(c.gain for c in conversions),
        ranges=() if all(r == (-NO_BOUND, NO_BOUND) for r in ranges) else ranges,
        offsets=() if same else tuple(c.offset for c in conversions),
        gate=table.gate,
        segment=table.segment,
    )


def _number(tag: Tag, name: str) -> None:
    """Refuse a text where a number is needed: its checksum would be scored."""
    if tag.type == "string":
        remedy = "wire it as segment, or another tag here"
        raise UserError(tag.file, tag.line, "type", f"{tag.ref} is a text, {name} a number", remedy)


def _convert(task: Task, tag: Tag, name: str, unit: str) -> Conversion:
    """Return how a tag's values become the task's; where either names no unit, they are taken as they are."""
    try:
        return conversion(tag.unit, unit) if tag.unit and unit else SAME
    except UnitError as error:
        if not known(unit):
            remedy = "the operator mends it in task.toml: as UCUM or pint writes it, such as degC, or nothing"
            raise UserError(f"task {task.name}", 0, name, f"unit {unit!r} is none that is known", remedy) from None
        problem = f"{tag.ref} can't be {name}: {error}"
        raise UserError(tag.file, tag.line, "unit", problem, "wire another tag, or mend its unit") from None


def _extra(task: Task, table: TaskTable) -> list[str]:
    return sorted(set(table.signals) - {signal.name for signal in task.signal})


def wiring_notes(task: Task, table: TaskTable, tags: dict[str, Tag], sources: Iterable[Source]) -> list[str]:
    """Say what is allowed, and seldom meant."""
    here, notes = f"task {task.name}", []
    if extra := _extra(task, table):
        notes.append(f"{here}: wired, and none of its signals: {', '.join(extra)}")
    if task.target and not table.target:
        notes.append(f"{here}: no target is wired, so this gateway scores and does not train")
    if task.target and task.target.classes and task.kind != "classification":
        notes.append(f"{here}: its target has classes, and its kind is {task.kind}: numbers are learnt")
    if table.segment and (unit := tags[table.segment].unit):
        notes.append(f"{here}: segment {table.segment} is in {unit}; a window ends whenever it changes")
    used = {tags[ref].source for ref in table.signals.values()}
    for source in sources:
        speed = source.options.get("speed", 1)
        if source.name in used and speed != 1 and source.options.get("times") != "recorded":
            text = f"its times pass {speed:g} times faster, too, and windows are not as recorded"
            notes.append(f"source {source.name}: {text}; leave speed out")
    return notes


def unit_notes(task: Task, wiring: Wiring, tags: dict[str, Tag]) -> list[str]:
    """Say which signals are converted, and which tags were taken at their word for want of a unit."""
    notes = []
    for i, signal in enumerate(task.signal):
        tag = tags[wiring.signals[i]]
        if signal.unit and not tag.unit:
            notes.append(f"{tag.ref}: no unit in {tag.file}:{tag.line}; taken to be in {signal.unit} ({signal.name})")
        elif wiring.gains and (wiring.gains[i], wiring.offsets[i]) != SAME:
            plus = f" {wiring.offsets[i]:+.6g}" if wiring.offsets[i] else ""
            notes.append(f"{tag.ref}: {tag.unit} to {signal.unit}, x {wiring.gains[i]:.6g}{plus}")
    return notes


def unknown_units(tags: Iterable[Tag]) -> list[str]:
    """Say which tags have a unit that nobody knows, wired or not: a later task would refuse them."""
    wrong = [tag for tag in tags if tag.unit and not known(tag.unit)]
    remedy = "write it as UCUM or pint does, or nothing"
    return [f"{tag.file}:{tag.line}: unit: {tag.unit!r} of {tag.ref} is none that is known; {remedy}" for tag in wrong]
