"""Topics: format and parse are inverse of each other, and nothing else parses."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import topics
from broker.topics import (
    Accepted,
    CharterInForce,
    Chunk,
    FederationStatus,
    GatewayPath,
    Local,
    Manifest,
    ReceiptFor,
    RosterOf,
    RoundPlan,
    Status,
    Topic,
    Uplink,
    parse,
)
from models.errors import PeerError

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"
segments = st.text(ALPHABET, min_size=1, max_size=64)
levels = segments.filter(lambda s: not s.startswith("_"))
paths = st.builds(GatewayPath, levels, levels, levels, levels, levels)
any_topic: st.SearchStrategy[Topic] = st.one_of(
    st.builds(Status, paths),
    st.builds(Uplink, paths, segments, segments),
    st.builds(Local, paths, st.sampled_from(["raw", "inference", "drift", "feedback", "health"]), segments),
    st.builds(FederationStatus, segments),
    st.builds(CharterInForce, segments),
    st.builds(RosterOf, segments, st.integers(0, 999_999)),
    st.builds(Accepted, paths),
    st.builds(RoundPlan, segments, segments),
    st.builds(Manifest, segments, segments),
    st.builds(Chunk, segments, segments, st.integers(0, 10**18 - 1), segments),
    st.builds(ReceiptFor, segments, segments, paths),
)


@given(any_topic)
def test_parse_inverts_topic(topic: Topic) -> None:
    assert parse(topic.topic) == topic


@given(paths)
def test_path_round_trip(path: GatewayPath) -> None:
    assert GatewayPath.parse(str(path)) == path


@given(st.text(max_size=80))
def test_text_parses_to_itself_or_is_refused(text: str) -> None:
    try:
        topic = parse(text)
    except PeerError:
        return
    assert topic.topic == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a/b/c/d/e",
        "a/b/c/d/_fl/status",
        "a/b/c/d/e/f/_fl/status",
        "_a/b/c/d/e/_fl/status",
        "a/b/c/d/e/_fl/status/",
        "a/b/c/d/é/_fl/status",
        "a/b/c/d/+/_fl/status",
        "a/b/c/d/e\n/_fl/status",
        "a/b/c/d/" + "e" * 65 + "/_fl/status",
        "_fl/f/t/model/01/c0",
        "_fl/f/roster/0",
        "_fl/f/roster/01",
        "_fl/f/roster/1/2",
        "_fl/f/t/model/-1/c0",
        "_fl/f/t/receipt/a/b/c/d",
        "_fl/f/t/receipt/a/b/c/d/_e",
    ],
)
def test_refuses(text: str) -> None:
    with pytest.raises(PeerError, match="topic"):
        parse(text)


def test_filters_match_what_they_are_for() -> None:
    path = GatewayPath.parse("a/b/c/d/e")
    assert topics.uplink_filter("t").replace("+", "x") == "x/x/x/x/x/_fl/t/x"
    assert topics.ALL_STATUS.replace("+/+/+/+/+", str(path)) == Status(path).topic
    assert ReceiptFor("f", "t", path).topic in topics.downlink_filters("f", "t", path)


def test_doctests() -> None:
    assert doctest.testmod(topics).failed == 0
