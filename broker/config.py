"""`federation.toml` -> frozen typed values; every mistake, in the task files too, as file, line, key and remedy."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from broker.aggregate import check_strategy
from broker.charter import Named
from broker.charters import check_tasks, load_charter
from broker.est import is_host, listen_address
from broker.settings import MqttSettings, check_mqtt
from broker.topics import GatewayPath, segment
from models.errors import PeerError
from models.spec import Task, load_task
from models.tomlfile import TomlFile, read_toml

_MOST_KEYS = 16
_MADE_BY = "; tundish broker init makes ca, cert and key, and prints these lines: leave them out until then"


class FederationTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[federation]`: `roots` are the enterprises whose gateways may take part.

    `join` "enrolled" takes keys from the roster only; "first-seen" pins a gateway's key when it is first seen.
    `charter` is a file, relative to this one.
    """

    name: str
    roots: tuple[str, ...]
    join: Literal["enrolled", "first-seen"] = "enrolled"
    charter: str | None = None


class TaskTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[task]]`: `file` is relative to the federation file."""

    file: str


class EnrolmentTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[enrolment]`: `listen` is address and port of the listener for enrolment over the network.

    `host` is the name or address by which gateways reach it (default: the first of the MQTT broker's certificate).
    """

    listen: str
    host: str | None = None


class ReleaseTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[release]`: gateways score with what was released, in two steps.

    `canary` are the paths that get a model first; `keys` the public keys (hex) of those who release to all others, of
    whom `threshold` must sign.
    """

    keys: tuple[str, ...]
    threshold: int = 1
    canary: tuple[str, ...] = ()


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    federation: FederationTable
    mqtt: MqttSettings
    task: tuple[TaskTable, ...]
    enrolment: EnrolmentTable | None = None
    release: ReleaseTable | None = None


@dataclass(frozen=True)
class TaskFile:
    """One task with its published text and the file it came from."""

    task: Task
    text: str
    path: Path


@dataclass(frozen=True)
class FederationConfig:
    """A whole federation; `mqtt` holds absolute file names."""

    name: str
    roots: tuple[str, ...]
    join: Literal["enrolled", "first-seen"]
    mqtt: MqttSettings
    tasks: tuple[TaskFile, ...]
    enrolment: EnrolmentTable | None = None
    release: ReleaseTable | None = None
    charter: Named | None = None


def load_federation(path: Path) -> FederationConfig:
    """Read `federation.toml` and its task files; UserError."""
    file = read_toml(path)
    raw = file.convert(_File)
    _check_name(file, ["federation", "name"], raw.federation.name)
    if not raw.federation.roots:
        raise file.error(["federation", "roots"], "empty", 'write the enterprises that take part: roots = ["acme"]')
    for root in raw.federation.roots:
        _check_name(file, ["federation", "roots"], root)
        if root.startswith("_"):
            raise file.error(["federation", "roots"], f"{root!r} begins with _", "that marks functional segments")
    mqtt = check_mqtt(file, raw.mqtt, _MADE_BY)
    if not raw.task:
        raise file.error(["task"], "no task", 'add [[task]] with file = "task.toml"')
    if raw.enrolment is not None:
        _check_enrolment(file, raw.enrolment)
    if raw.release is not None:
        _check_release(file, raw.release)
    tasks = _tasks(file, raw.task, path)
    return FederationConfig(
        raw.federation.name,
        raw.federation.roots,
        raw.federation.join,
        mqtt,
        tasks,
        raw.enrolment,
        raw.release,
        _charter(file, raw.federation, tasks, path),
    )


def _charter(file: TomlFile, table: FederationTable, tasks: tuple[TaskFile, ...], path: Path) -> Named | None:
    if table.charter is None:
        return None
    where = path.absolute().parent / table.charter
    if not where.is_file():
        raise file.error(["federation", "charter"], f"no file {where}", "write a path relative to this file")
    named = load_charter(where)
    check_tasks(str(where), named, [one.task for one in tasks], table.roots)
    return named


def _check_enrolment(file: TomlFile, table: EnrolmentTable) -> None:
    try:
        listen_address(table.listen)
    except ValueError as error:
        raise file.error(["enrolment", "listen"], str(error), 'write "0.0.0.0:8443"') from None
    if table.host is not None and not is_host(table.host):
        raise file.error(["enrolment", "host"], f"{table.host!r} is no host", "write a name or an address") from None


def _check_release(file: TomlFile, table: ReleaseTable) -> None:
    many = len(table.keys)
    for key in table.keys:
        if not re.fullmatch(r"[0-9a-f]{64}", key):
            remedy = "write what tundish broker release --new-key prints, 64 hex digits"
            raise file.error(["release", "keys"], f"{key!r} is no key", remedy)
    if not 0 < many == len(set(table.keys)) <= _MOST_KEYS:
        problem = f"{many} keys, or one twice"
        raise file.error(["release", "keys"], problem, f"write 1 to {_MOST_KEYS}, each once")
    if not 1 <= table.threshold <= many:
        raise file.error(["release", "threshold"], "out of range", f"write 1 to {many}, the number of keys")
    for path in table.canary:
        try:
            GatewayPath.parse(path)
        except PeerError as error:
            raise file.error(["release", "canary"], error.detail, 'write ["acme/lyon/press/line4/cell2"]') from None


def _tasks(file: TomlFile, tables: tuple[TaskTable, ...], path: Path) -> tuple[TaskFile, ...]:
    tasks: list[TaskFile] = []
    for i, table in enumerate(tables):
        where = path.absolute().parent / table.file
        if not where.is_file():
            raise file.error(["task", i, "file"], f"no file {where}", "write a path relative to this file")
        task, text = load_task(where)
        if any(task.name == other.task.name for other in tasks):
            raise file.error(["task", i, "file"], f"a second task {task.name!r}", "give each task its own name")
        check_strategy(task, str(where), text)
        if task.round.deadline_s <= 0:
            task_file = TomlFile(str(where), text)
            raise task_file.error(["round", "deadline"], "out of range", 'write more than nothing, such as "2h"')
        tasks.append(TaskFile(task, text, where))
    return tuple(tasks)


def _check_name(file: TomlFile, key: list[str | int], name: str) -> None:
    try:
        segment(name)
    except PeerError:
        raise file.error(key, f"{name!r} can't be a topic level", "use A-Z a-z 0-9 _ - (at most 64)") from None
