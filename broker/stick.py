"""What MQTT would carry, in a file: for a line with no way out. The messages are the same, and so are all checks.

    "TUNDISH STICK 1" and a newline, then for each message, big endian: the topic's length (2 bytes), the topic, the
    payload's length (4 bytes), the payload; nothing after the last

Each payload is signed and bound to its topic, or named by its digest in one that is, so the file needs no signature.
Whoever runs takes it from a folder of the state, where `import` puts it whole; what was taken before changes nothing.
"""

import contextlib
import hashlib
import logging
import os
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from broker.messages import MAX_PAYLOAD
from models.errors import UserError

log = logging.getLogger(__name__)

MAGIC = b"TUNDISH STICK 1\n"
MOST_BYTES = 64 * 1024 * 1024
# A message of a few bytes takes twenty times as many in memory. A model is far fewer.
MOST_MESSAGES = 10_000
# Below the state's folder: files that wait to be taken, and what turned out to be none.
INBOX = "inbox"
BAD = ".bad"
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
    messages = list(messages)
    data, count, remedy = b"".join(_parts(messages)), len(messages), "have fewer tasks in a federation"
    if len(data) > MOST_BYTES:
        raise UserError(str(path), 0, "", f"{len(data)} bytes, at most {MOST_BYTES}", remedy)
    if count > MOST_MESSAGES:
        raise UserError(str(path), 0, "", f"{count} messages, at most {MOST_MESSAGES}", remedy)
    try:
        put(path, data)
    except OSError as error:
        raise UserError(str(path), 0, "", f"can't be written: {error.strerror}", "name another file") from error
    return count


def digest(messages: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256 (hex) of the file that holds these messages."""
    made = hashlib.sha256()
    for part in _parts(messages):
        made.update(part)
    return made.hexdigest()


def _parts(messages: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    yield MAGIC
    for topic, payload in messages:
        name = topic.encode()
        yield from (_TOPIC.pack(len(name)), name, _PAYLOAD.pack(len(payload)), payload)


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
        data = _bytes(path)
    except OSError as error:
        raise UserError(str(path), 0, "", f"can't be read: {error.strerror}", "check the name") from error
    return _parse(path, data)


def _bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MOST_BYTES + 1)


def _parse(path: Path, data: bytes) -> Messages:
    if len(data) > MOST_BYTES or not data.startswith(MAGIC):
        raise UserError(str(path), 0, "", "is no file of messages", "give what export wrote")
    found, at = Messages(), len(MAGIC)
    try:
        while at < len(data):
            if len(found) == MOST_MESSAGES:
                raise UserError(str(path), 0, "", f"has more than {MOST_MESSAGES} messages", "give what export wrote")
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


def leave(state: Path, path: Path) -> Path:
    """Check a file, and leave it where whoever runs with that state takes it, which is returned; UserError.

    What root leaves belongs to the owner of the state folder, a service's own user, who must be able to delete it. That
    user may put links there at any moment, so nothing below the state folder is reached by a path.
    """
    try:
        data = _bytes(path)
    except OSError as error:
        raise UserError(str(path), 0, "", f"can't be read: {error.strerror}", "check the name") from error
    _parse(path, data)
    folder, name = state / INBOX, str(time.time_ns())
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _opened(state, os.O_DIRECTORY) as above:
            with contextlib.suppress(FileExistsError):
                os.mkdir(INBOX, 0o700, dir_fd=above)
            with _opened(INBOX, os.O_DIRECTORY | os.O_NOFOLLOW, above) as inbox:
                _give(inbox, above)
                _drop(data, name, inbox, above)
    except OSError as error:
        raise UserError(str(folder), 0, "", f"can't be written: {error.strerror}", "check its owner") from error
    return folder / name


def _drop(data: bytes, name: str, inbox: int, above: int) -> None:
    """Let a file be in an open folder, whole and on the disk."""
    part = f".{name}.part"
    with _opened(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, inbox) as made:
        _give(made, above)
        with open(made, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(made)
    os.rename(part, name, src_dir_fd=inbox, dst_dir_fd=inbox)


def _give(made: int, above: int) -> None:
    """Give what root made to the owner of the open folder above."""
    owner = os.fstat(above)
    if os.geteuid() == 0 and os.fstat(made).st_uid == 0:
        os.fchown(made, owner.st_uid, owner.st_gid)


@contextlib.contextmanager
def _opened(path: Path | str, flags: int, folder: int | None = None) -> Iterator[int]:
    opened = os.open(path, flags, 0o600, dir_fd=folder)
    try:
        yield opened
    finally:
        os.close(opened)


class Inbox:
    """The files that were left in a state folder, each given out once. It blocks: for a thread.

    Nothing about a file stops who reads it. One that is none is renamed, what the disk refuses is tried again, and
    either is logged once.
    """

    def __init__(self, state: Path) -> None:
        self._folder = state / INBOX
        self._given, self._told = set[Path](), set[str]()

    def next(self) -> tuple[Path, Messages] | None:
        """Give the oldest file that can be read and was not given yet."""
        for path in self._waiting():
            if path in self._given:
                continue
            try:
                data = _bytes(path)
            except OSError as error:  # it may pass: too many open files, a disk that fails now and then
                self._tell(f"{path} can't be read, and stays: {error.strerror}")
                continue
            try:
                messages = _parse(path, data)
            except UserError as error:
                self._tell(str(error))
                self._put_aside(path)
                continue
            self._given.add(path)
            return path, messages
        return None

    def delete(self, path: Path) -> None:
        """Be done with a file that was given."""
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._tell(f"{path} is taken, but can't be deleted: {error.strerror}; check the owner of that folder")
        else:
            self._given.discard(path)

    def _waiting(self) -> list[Path]:
        try:
            return waiting(self._folder.parent)
        except OSError as error:
            self._tell(f"{self._folder} can't be read: {error.strerror}; check its owner")
            return []

    def _put_aside(self, path: Path) -> None:
        try:
            path.rename(path.with_name(path.name + BAD))
        except OSError as error:
            self._given.add(path)
            self._tell(f"{path} can't be renamed: {error.strerror}; check the owner of that folder")

    def _tell(self, problem: str) -> None:
        if problem not in self._told:
            self._told.add(problem)
            log.error("%s", problem)


def waiting(state: Path) -> list[Path]:
    """Files that were left, by name; a part of one is none, nor is one that was put aside. OSError."""
    try:
        found = sorted((state / INBOX).iterdir())
    except FileNotFoundError:
        return []
    return [path for path in found if not path.name.startswith(".") and path.suffix != BAD and path.is_file()]
