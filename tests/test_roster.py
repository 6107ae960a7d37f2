"""The roster: who is in, with which keys; what the aggregator says of it, and what a gateway makes of that."""

import json
from contextlib import closing
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from edge.identity import own_agreement_key
from edge.store import State

# -- a gateway's own key -------------------------------------------------------------------------------------------


def test_a_gateways_agreement_key_is_made_once_and_kept(tmp_path: Path) -> None:
    with closing(State(tmp_path)) as state:
        public = own_agreement_key(state)
    with closing(State(tmp_path)) as state:
        assert own_agreement_key(state) == public
        lines = [json.loads(line) for line in state.ledger()]
        private = state.get("agreement-key") or b""
    assert [(line["kind"], line["body"]) for line in lines] == [("key-made", {"agreement_key": public.hex()})]
    assert X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw() == public
    assert private.hex() not in str(lines)
    assert (tmp_path / "state.db").stat().st_mode & 0o777 == 0o600
