"""Pure: what operators say of scored windows on `_feedback/{task}`, resolved to corrections that training uses.

A message is JSON, `{"timestamp_ms", "window_end_ms", "verdict": "ack"|"reject"|"label", "label"}`; `window_end_ms`
is the one that `_inference` published. Who may send one is the broker's to say, by its access list for the topic.

| kind | ack | reject | label |
|---|---|---|---|
| classification | that class is the label | of two classes the other one; else not trained on | that class |
| regression | refused | refused | that number, in the target's unit |
| anomaly | that it is one: not trained on; that it is normal: trained on | the other way round | refused |
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Literal

import msgspec

from edge.window import Win
from models.errors import PeerError
from models.spec import Task

MAX_BYTES = 4096
_NS_PER_MS = 1_000_000
_JUDGED = {"anomaly", "normal"}
_LARGEST = 1e15  # whose square a float32 still holds

Millis = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Feedback(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message."""

    timestamp_ms: Millis
    window_end_ms: Millis
    verdict: Literal["ack", "reject", "label"]
    label: Annotated[str, msgspec.Meta(max_length=64)] | float | None = None


class Correction(msgspec.Struct, frozen=True, array_like=True):
    """What one window's label is instead: a class's index or a number; None: the window is not trained on."""

    timestamp_ms: int
    label: float | None


Corrections = Mapping[int, Correction]


def parse(payload: bytes) -> Feedback:
    """Read a message; PeerError `size` or `schema`."""
    if len(payload) > MAX_BYTES:
        raise PeerError("size", f"feedback of {len(payload)} bytes, at most {MAX_BYTES}")
    try:
        return msgspec.json.decode(payload, type=Feedback)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PeerError("schema", f"feedback: {error}"[:300]) from error


def resolve(task: Task, said: Feedback, scored: str) -> float | None:
    """Say what the window's label becomes, whose verdict was `scored`; PeerError `verdict` or `label`."""
    if task.kind == "anomaly":
        if said.verdict == "label":
            raise PeerError("verdict", "an anomaly task has no labels: write ack or reject")
        if scored not in _JUDGED:
            raise PeerError("verdict", f"that window was {scored}, which says nothing of it")
        return None if (scored == "anomaly") == (said.verdict == "ack") else 0.0
    if task.kind == "regression" or task.target is None:
        if said.verdict != "label":
            raise PeerError("verdict", "of a number, the right one must be said: write label")
        if not isinstance(said.label, float) or not math.isfinite(said.label):
            raise PeerError("label", f"{said.label!r} is no number")
        low, high = (task.target.range if task.target else None) or (-_LARGEST, _LARGEST)
        if not low <= said.label <= high:
            raise PeerError("label", f"{said.label:g} is out of range: {low:g} to {high:g}")
        return said.label
    classes = task.target.classes
    name = said.label if said.verdict == "label" else scored
    if name not in classes:
        raise PeerError("label", f"{name!r} is no class of {task.name}: {', '.join(classes)}"[:300])
    index = classes.index(str(name))
    if said.verdict != "reject":
        return float(index)
    return float(1 - index) if len(classes) == 2 else None  # noqa: PLR2004 - of two, it is the other one


def corrected(windows: Iterable[Win], corrections: Corrections) -> Iterator[Win]:
    """Give windows their corrected labels, and leave out those that must not be trained on."""
    for window in windows:
        known = corrections.get(window.end_ns // _NS_PER_MS)
        if known is None:
            yield window
        elif known.label is not None:
            yield window._replace(label=known.label)
