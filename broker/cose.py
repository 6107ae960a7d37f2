"""The bytes of an envelope, taken apart before anybody has shown who signed them.

Done by hand: a CBOR library does much more than this shape asks for.
"""

import io

import cbor2

from models.errors import PeerError

# Tag 18, an array of four: the protected header {1: -8} (EdDSA) as bytes, an empty unprotected one, then the payload …
_HEAD = bytes.fromhex("d28443a10127a0")
# … and the signature, 64 bytes.
_SIGNATURE_HEAD = bytes.fromhex("5840")
_SIGNATURE_BYTES = 64
# The terms of the largest layout have fewer CBOR items than this.
_MAX_ITEMS = 65_536
_BYTES, _TEXT, _MAP, _TAG = 2, 3, 5, 6  # CBOR's major types
_ONE_BYTE, _EIGHT_BYTES, _INDEFINITE = 24, 27, 31  # additional information: how the argument follows


def take_apart(data: bytes, most: int) -> tuple[bytes, bytes]:
    """Return (signature, payload) of an envelope of at most `most` bytes that has our exact shape and nothing after it.

    PeerError `size` or `envelope`.
    """
    if len(data) > most:
        raise PeerError("size", f"{len(data)} bytes, at most {most}")
    end = len(data) - _SIGNATURE_BYTES
    middle = end - len(_SIGNATURE_HEAD)
    if data.startswith(_HEAD) and data[max(0, middle) : max(0, end)] == _SIGNATURE_HEAD:
        major, info, length, start = _item(data, len(_HEAD), "envelope")
        if major == _BYTES and info != _INDEFINITE and length == middle - start:
            return data[end:], data[start:middle]
    raise PeerError("envelope", "not a COSE_Sign1 with EdDSA and no further header")


def _item(data: bytes, at: int, reason: str) -> tuple[int, int, int, int]:
    """Read the head of the CBOR item at `at`: (major type, additional information, argument, where it ends)."""
    if at >= len(data):
        raise PeerError(reason, "not CBOR: it ends too early")
    major, info = data[at] >> 5, data[at] & 31
    at += 1
    if info < _ONE_BYTE:
        return major, info, info, at
    if info == _INDEFINITE:
        return major, info, 0, at
    if info > _EIGHT_BYTES:
        raise PeerError(reason, "not CBOR: a reserved length")
    end = at + (1 << info - _ONE_BYTE)
    if end > len(data):
        raise PeerError(reason, "not CBOR: it ends too early")
    return major, info, int.from_bytes(data[at:end]), end


def _check_plain(data: bytes, reason: str) -> None:
    """Refuse tags, which make a decoder compute (dates, big numbers, patterns), and maps: no message has either.

    The items of CBOR stand one after the other however they nest, so one loop sees each of them.
    """
    at = 0
    for _ in range(_MAX_ITEMS):
        if at == len(data):
            return
        major, _info, argument, at = _item(data, at, reason)
        if major in {_MAP, _TAG}:
            raise PeerError(reason, "a tag or a map, which no message has")
        if major in {_BYTES, _TEXT}:
            at += argument
    raise PeerError(reason, f"more than {_MAX_ITEMS} CBOR items")


def read_plain(data: bytes, reason: str) -> object:
    """Decode CBOR without tags and maps, and nothing after it; PeerError with that reason."""
    _check_plain(data, reason)
    stream = io.BytesIO(data)
    try:
        value: object = cbor2.CBORDecoder(stream).decode()
    except (
        cbor2.CBORDecodeError,
        ValueError,
        OverflowError,
        TypeError,
        RecursionError,
        MemoryError,
    ) as error:
        raise PeerError(reason, f"not CBOR: {type(error).__name__}") from error
    if stream.tell() != len(data):
        raise PeerError(reason, f"{len(data) - stream.tell()} bytes follow it")
    return value
