"""What MQTT would carry, in a file: for a line with no way out. The messages are the same, and so are all checks.

    "TUNDISH STICK 1" and a newline, then for each message, big endian: the topic's length (2 bytes), the topic, the
    payload's length (4 bytes), the payload; nothing after the last

Each payload is signed and bound to its topic, or named by its digest in one that is, so the file needs no signature.
Whoever runs takes it from a folder of the state, where `import` puts it whole; what was taken before changes nothing.
"""

import os
import struct
import time
from collections.abc import Iterable
from pathlib import Path

from broker.messages import MAX_PAYLOAD
from models.errors import UserError

MAGIC = b"TUNDISH STICK 1\n"
MOST_BYTES = 64 * 1024 * 1024
# Below the state's folder: files that wait to be taken.
INBOX = "inbox"
_MOST_TOPIC = 1024
_TOPIC, _PAYLOAD = struct.Struct(">H"), struct.Struct(">I")
Messages = list[tuple[str, bytes]]


def is_stick(path: Path) -> bool:
    """Say whether a file begins like one."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def write(path: Path, messages: Iterable[tuple[str, bytes]]) -> int:
    """Write a file whole, and return how many messages are in it; UserError."""
    parts, count = [MAGIC], 0
    for topic, payload in messages:
        name = topic.encode()
        parts += [_TOPIC.pack(len(name)), name, _PAYLOAD.pack(len(payload)), payload]
        count += 1
    data = b"".join(parts)
    if len(data) > MOST_BYTES:
        raise UserError(
            str(path), 0, "", f"{len(data)} bytes, at most {MOST_BYTES}", "have fewer tasks in a federation"
        )
    try:
        put(path, data)
    except OSError as error:
        raise UserError(str(path), 0, "", f"can't be written: {error.strerror}", "name another file") from error
    return count


def put(path: Path, data: bytes) -> None:
    """Replace a file whole, and let it be on the disk."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read(path: Path) -> Messages:
    """Read a file; UserError if it can't be, or is not all of one."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(str(path), 0, "", f"can't be read: {error.strerror}", "check the name") from error
    if len(data) > MOST_BYTES or not data.startswith(MAGIC):
        raise UserError(str(path), 0, "", "is no file of messages", "give what export wrote")
    found, at = Messages(), len(MAGIC)
    try:
        while at < len(data):
            topic, at = _piece(data, at, _TOPIC, _MOST_TOPIC)
            payload, at = _piece(data, at, _PAYLOAD, MAX_PAYLOAD)
            found.append((topic.decode("ascii"), payload))
    except (struct.error, ValueError) as error:
        raise UserError(str(path), 0, "", "is damaged, or not all there", "copy it again") from error
    return found


def _piece(data: bytes, at: int, head: struct.Struct, most: int) -> tuple[bytes, int]:
    (length,) = head.unpack_from(data, at)
    end = at + head.size + length
    if length > most or end > len(data):
        raise ValueError
    return data[at + head.size : end], end


def leave(state: Path, path: Path) -> Messages:
    """Check a file, and leave it where whoever runs with that state takes it; UserError."""
    messages, folder = read(path), state / INBOX
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        put(folder / f"{time.time_ns()}-{path.name}", path.read_bytes())
    except OSError as error:
        raise UserError(str(folder), 0, "", f"can't be written: {error.strerror}", "check its owner") from error
    return messages


def waiting(state: Path) -> list[Path]:
    """Files that were left, by name; a part of one is none."""
    try:
        return sorted(path for path in (state / INBOX).iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError:
        return []
