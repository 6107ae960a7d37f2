"""What operators say of windows: refused or resolved, and what the next training makes of it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.feedback import MAX_BYTES, Correction, Feedback, corrected, parse, resolve
from edge.history import LAST_NS, SampleReader, Score
from edge.ring import Samples
from edge.trainer import stored_dataset
from edge.window import Win
from models.errors import PeerError
from models.spec import Task, parse_task
from tests.test_train import SECOND, START, fill, job

END_MS = START // 1_000_000


def of(kind: str, classes: int = 2) -> Task:
    target = {
        "anomaly": "",
        "regression": '[target]\nname = "t"',
        "classification": f'[target]\nname = "t"\nclasses = {json.dumps([f"c{i}" for i in range(classes)])}',
    }[kind]
    net = "autoencoder" if kind == "anomaly" else "mlp"
    return parse_task(
        f'name = "t"\nkind = "{kind}"\nnet = "{net}"\n[window]\nlength = 4\n[[signal]]\nname = "a"\n{target}'
    )


def said(verdict: str, label: str | float | None = None, **more: Any) -> Feedback:
    body = {"timestamp_ms": 5, "window_end_ms": END_MS, "verdict": verdict} | more
    return parse(json.dumps(body | ({} if label is None else {"label": label})).encode())


@pytest.mark.parametrize(
    ("task", "words", "scored", "label"),
    [
        (of("classification"), ("ack",), "c1", 1.0),
        (of("classification"), ("reject",), "c1", 0.0),
        (of("classification", 3), ("reject",), "c1", None),
        (of("classification", 3), ("label", "c2"), "inactive", 2.0),
        (of("regression"), ("label", 3), "ok", 3.0),
        (of("anomaly"), ("ack",), "anomaly", None),
        (of("anomaly"), ("reject",), "anomaly", 0.0),
        (of("anomaly"), ("ack",), "normal", 0.0),
        (of("anomaly"), ("reject",), "normal", None),
    ],
)
def test_what_is_said_becomes_a_label(
    task: Task, words: tuple[str, *tuple[str | float, ...]], scored: str, label: float | None
) -> None:
    assert resolve(task, said(*words), scored) == label


@pytest.mark.parametrize(
    ("task", "words", "scored", "reason"),
    [
        (of("classification"), ("label", "worn"), "c1", "label"),
        (of("classification"), ("label", 1), "c1", "label"),
        (of("classification"), ("label",), "c1", "label"),
        (of("classification"), ("ack",), "learning", "label"),
        (of("regression"), ("ack",), "ok", "verdict"),
        (of("regression"), ("label", "3"), "ok", "label"),
        (of("anomaly"), ("label", "normal"), "anomaly", "verdict"),
        (of("anomaly"), ("ack",), "learning", "verdict"),
        (of("regression"), ("label", 1e39), "ok", "label"),
    ],
)
def test_what_can_not_be_used_is_refused(
    task: Task, words: tuple[str, *tuple[str | float, ...]], scored: str, reason: str
) -> None:
    with pytest.raises(PeerError) as caught:
        resolve(task, said(*words), scored)
    assert caught.value.reason == reason


GOOD = b'{"timestamp_ms":1,"window_end_ms":2,"verdict":"label","label":"c1"}'


@given(st.one_of(st.binary(max_size=200), st.integers(0, len(GOOD) - 1).map(lambda cut: GOOD[:cut])))
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        parse(data)
    assert caught.value.reason == "schema"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"verdict": "maybe"}, "schema"),
        ({"window_end_ms": -1}, "schema"),
        ({"window_end_ms": 2**60}, "schema"),
        ({"timestamp_ms": True}, "schema"),
        ({"more": 1}, "schema"),
        ({"label": "x" * 65}, "schema"),
        ({"label": "x" * MAX_BYTES}, "size"),
        ({"label": ["c1"]}, "schema"),
    ],
)
def test_a_message_of_another_shape_is_refused(change: dict[str, Any], reason: str) -> None:
    assert parse(GOOD) == Feedback(1, 2, "label", "c1")
    with pytest.raises(PeerError) as caught:
        parse(json.dumps(json.loads(GOOD) | change).encode())
    assert caught.value.reason == reason


def test_windows_are_corrected_or_left_out() -> None:
    x = np.zeros((1, 4), np.float32)
    windows = [Win(START + i * SECOND, x, 1.0, active=True, segment=math.nan, label=math.nan) for i in range(3)]
    known = {END_MS: Correction(1, 7.0), END_MS + 1000: Correction(1, None)}
    assert [w.label for w in corrected(windows, known)][:1] == [7.0]
    assert [w.end_ns for w in corrected(windows, known)] == [START, START + 2 * SECOND]


def test_the_next_training_learns_what_was_said(tmp_path: Path) -> None:
    """Through the store, as the training child reads it; each correction of a window that is trained on shows."""
    fill(tmp_path, 100)
    one = job(tmp_path)
    task = parse_task(one.task_text)
    before = [part.y for part in stored_dataset(task, one)]
    wrong = {END_MS + i * 1000: Correction(1, 100.0 if i % 2 else None) for i in range(24, 36)}
    after = [part.y for part in stored_dataset(task, job(tmp_path, corrections=wrong))]
    counts = [[0 if y is None else len(y) for y in parts] for parts in (before, after)]
    assert sum(counts[0]) - sum(counts[1]) == 6
    assert sum(int((y == 100).sum()) for y in after if y is not None) == 6


def test_the_window_is_looked_up_where_scores_are_kept(tmp_path: Path) -> None:
    store = Samples(tmp_path, 1 << 30)
    for end_ns, verdict in ((START, "c0"), (START + 999_999, "c1"), (START + 1_000_000, "c2")):
        store.score(Score("t", 1, end_ns, 0.5, verdict, 1))
    store.close()
    reader = SampleReader(tmp_path)
    assert reader.verdict("t", START, START + 1_000_000) == "c1"
    assert reader.verdict("t", START - 1_000_000, START) is None
    assert reader.verdict("other", START, START + 1_000_000) is None
    assert reader.verdict("t", 2**53 * 1_000_000, (2**53 + 1) * 1_000_000) is None
    assert reader.verdict("t", START + 1_000_000, LAST_NS) == "c2"
    reader.close()
