"""How a gateway comes to take part: its request to the operator, the admission back; as files, or over the network.

Either is one signed envelope (`broker.messages`); a file is that in base64 between two lines that say what it is. The
request is signed with the gateway's own key, and proves with the certificate request inside that it holds a second
one, for TLS; the admission is signed with the aggregator's. What binds either to a path is the operator, who names it.
"""

import base64
import binascii
import textwrap
from pathlib import Path
from typing import TypeVar

from broker import messages as m
from broker.topics import FL, GatewayPath
from models.errors import PeerError, UserError

M = TypeVar("M", m.Request, m.Admission)

_MOST_BYTES = 128 * 1024
_KIND = {m.Request: "REQUEST", m.Admission: "ADMISSION"}


def seal(signer: m.Signer, message: m.Request | m.Admission) -> bytes:
    """Sign a message."""
    return signer.seal(message, _topic(message.path))


def unseal(envelope: bytes, type_: type[M]) -> M:
    """Read an envelope, and check that it is signed with the key that it names; PeerError."""
    claimed = m.peek(envelope, type_)
    return m.open_envelope(envelope, _topic(str(GatewayPath.parse(claimed.path))), claimed.public_key, type_)


def write(path: Path, signer: m.Signer, message: m.Request | m.Admission) -> None:
    """Sign a message and write its file; UserError where that can't be written."""
    kind = _KIND[type(message)]
    text = "\n".join(textwrap.wrap(base64.b64encode(seal(signer, message)).decode(), 76))
    try:
        path.write_text(f"-----BEGIN TUNDISH {kind}-----\n{text}\n-----END TUNDISH {kind}-----\n", encoding="ascii")
    except OSError as error:
        raise UserError(str(path), 0, "", f"can't be written: {error.strerror}", "name another file") from error


def read(path: Path, type_: type[M]) -> M:
    """Read a file, and check that it is signed with the key that it names; UserError for anything else."""
    kind = _KIND[type_]
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UserError(str(path), 0, "", f"can't be read: {error.strerror}", "check the name") from error
    head, tail = f"-----BEGIN TUNDISH {kind}-----".encode(), f"-----END TUNDISH {kind}-----".encode()
    lines = text.split()
    if len(text) > _MOST_BYTES or b" ".join(lines[:3]) != head or b" ".join(lines[-3:]) != tail:
        raise UserError(
            str(path), 0, "", f"is no {kind.lower()} of a gateway", f"give the file that holds {head.decode()}"
        )
    try:
        envelope = base64.b64decode(b"".join(lines[3:-3]), validate=True)
        return unseal(envelope, type_)
    except (binascii.Error, PeerError) as error:
        raise UserError(str(path), 0, "", f"is damaged, or not what it says: {error}", "make it again") from error


def _topic(path: str) -> str:
    """What the signature is bound to: no topic of the tree, so that neither can be said over MQTT."""
    return f"{path}/{FL}/admission"
