"""Which federation a gateway believes, over real envelopes and a real state file."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from broker import messages as m
from broker.link import Inbound
from broker.messages import Signer
from broker.topics import FederationStatus, ReleaseFile
from edge.config import FederationTable, load_config
from edge.ring import Samples
from edge.shop import Shop
from edge.store import State
from edge.trust import Trust
from models.errors import PeerError

FIRST, OTHER = Signer.generate(), Signer.generate()


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    file = tmp_path / "gateway.toml"
    file.write_text('[gateway]\npath = "a/b/c/d/e"\n[mqtt]\nurl = "mqtt://127.0.0.1"\n')
    with closing(State(tmp_path)) as state, closing(Samples(tmp_path, 1 << 26)) as samples:
        yield Shop(load_config(file), tmp_path, state, samples, Signer.generate(), bool, print, print)


def birth(signer: Signer, session: int) -> Inbound:
    topic = FederationStatus("north").topic
    said = m.FederationBirth(m.VERSION, session, signer.public_key, "up")
    return Inbound(topic, signer.seal(said, topic), retain=True, qos=1, mid=1)


async def test_the_first_federation_is_pinned_and_another_key_is_not_believed(shop: Shop) -> None:
    trust = Trust(shop)
    trust.first_seen("north", birth(FIRST, 5))
    assert trust.birth(birth(FIRST, 5))
    assert not trust.birth(birth(FIRST, 5))
    assert trust.birth(birth(FIRST, 6))
    assert trust._pinning is not None
    await trust._pinning
    assert shop.state.pinned() == ("north", FIRST.public_key)
    assert [json.loads(line)["kind"] for line in shop.state.ledger()] == ["federation-pinned"]
    with pytest.raises(PeerError):
        trust.birth(birth(OTHER, 7))
    assert f"north now signs with key {OTHER.public_key.hex()}" in trust.problem
    again = Trust(shop)
    assert (shop.federation, shop.federation_key, again.problem) == ("north", FIRST.public_key, "")


async def test_a_federation_that_the_disk_does_not_take_is_told(shop: Shop) -> None:
    trust = Trust(shop)
    shop.state._db.execute("PRAGMA query_only = ON")  # SQLite refuses to write, as on a disk that is read-only
    trust.first_seen("north", birth(FIRST, 5))
    assert trust._pinning is not None
    await trust._pinning
    assert trust.problem.startswith("federation north is not pinned: state can't be stored: ")
    assert (shop.federation, shop.state.pinned()) == ("north", None)


async def test_another_federations_root_of_releases_is_forgotten(shop: Shop) -> None:
    with shop.state.transaction():
        shop.state.pin("north", FIRST.public_key, "first seen")
    topic = ReleaseFile("north", "first").topic
    for root in (b"{}", b"{1}"):  # the first one stays
        said = FIRST.seal(m.FirstRoot(m.VERSION, root), topic)
        shop.releases.hear("first", Inbound(topic, said, retain=True, qos=1, mid=1), FIRST.public_key)
        await shop.releases._pinning
    assert shop.state.get("release-root/pinned") == b"{}"
    wanted = FederationTable(name="south", key=OTHER.public_key.hex())
    shop.config = msgspec.structs.replace(shop.config, federation=wanted)
    assert shop.releases.in_force
    Trust(shop)
    assert not shop.releases.in_force
