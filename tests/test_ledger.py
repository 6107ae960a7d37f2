"""The hash chain: any change is found, and at the right entry."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.ledger import GENESIS, LedgerError, append, verify

VECTOR = (
    '{"body":{"path":"a/b/c/d/e"},"hash":"HASH","kind":"pinned",'
    '"prev":"0000000000000000000000000000000000000000000000000000000000000000","seq":1,"time_ms":1700000000000}'
)


def chain(count: int) -> list[str]:
    lines, prev = [], GENESIS
    for seq in range(1, count + 1):
        entry = append(prev, seq, 1000 + seq, "update", {"n": seq, "text": "é", "real": 0.1})
        prev = entry.hash
        lines.append(entry.line)
    return lines


def test_good_chains_verify() -> None:
    verify([])
    verify(chain(20))
    verify(line + "\n" for line in chain(3))


def test_vector() -> None:
    entry = append(GENESIS, 1, 1_700_000_000_000, "pinned", {"path": "a/b/c/d/e"})
    assert entry.line == VECTOR.replace("HASH", entry.hash)
    assert entry.hash == "abfc3dd79b7b6aa1b67188bbeb0eb34e0075aabb7ee91369b762fd2faf911572"


@given(st.data())
def test_any_changed_character_is_found(data: st.DataObject) -> None:
    lines = chain(5)
    seq = data.draw(st.integers(1, 5))
    line = lines[seq - 1]
    at = data.draw(st.integers(0, len(line) - 1))
    other = data.draw(st.characters(codec="utf-8").filter(lambda c: c != line[at] and c != "\n"))
    lines[seq - 1] = line[:at] + other + line[at + 1 :]
    with pytest.raises(LedgerError) as caught:
        verify(lines)
    assert caught.value.seq == seq


def test_removed_and_swapped_entries_are_found() -> None:
    lines = chain(5)
    for bad, seq in [(lines[1:], 1), (lines[:2] + lines[3:], 3), ([lines[0], lines[2], lines[1]], 2)]:
        with pytest.raises(LedgerError) as caught:
            verify(bad)
        assert caught.value.seq == seq


@pytest.mark.parametrize("change", ["space", "key", "twice", "list", "nan"])
def test_only_the_canonical_line_counts(change: str) -> None:
    line = chain(1)[0]
    entry = json.loads(line)
    bad = {
        "space": line.replace(":", ": ", 1),
        "key": json.dumps({**entry, "more": 1}, sort_keys=True, separators=(",", ":")),
        "twice": line[:-1] + ',"time_ms":1001}',
        "list": "[]",
        "nan": line.replace("0.1", "NaN"),
    }[change]
    with pytest.raises(LedgerError):
        verify([bad])


def test_a_body_must_be_json() -> None:
    with pytest.raises(ValueError, match="not JSON serializable"):
        append(GENESIS, 1, 0, "x", {"bytes": b""})
    with pytest.raises(ValueError, match="JSON"):
        append(GENESIS, 1, 0, "x", {"nan": float("nan")})
