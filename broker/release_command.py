"""`tundish broker release` and `rollback`: which model gateways score with, in two steps and one back."""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from tuf.api.metadata import TargetFile

from broker.channels import Channel, Custom, model_digest, target_of
from broker.config import FederationConfig, ReleaseTable
from broker.journal import Journal, ModelRow, ReleaseRow
from broker.release import Repository, load_key, new_key
from broker.status import is_running, read_status
from models.delta import Layout
from models.errors import LocalError, UserError
from models.spec import parse_task

_FLOAT = 4


def release(args: argparse.Namespace, config: FederationConfig, state: Path) -> int:
    """Give a model to the canary gateways, or to all; or make a key, or another online one."""
    if args.new_key is not None:
        key = new_key(args.new_key)
        print(f'{args.new_key} is made; keep it offline. [release] of federation.toml: keys = ["{key}"]')
        return 0
    if args.new_online_key:
        return _renew(args, config, state)
    if args.to is None:
        raise UserError("--to", 0, "", "missing", "write --to canary or --to stable")
    task = _task(args.task, config)
    with closing(Journal(state)) as journal:
        choose = partial(_newest, journal, task, args.to, args.version)
        done = _release(journal, config, task, args.to, choose, args.key)
    _warn_of_running(state)
    return done


def _newest(journal: Journal, task: str, channel: Channel, version: int | None) -> int:
    rows, may = journal.releases(task), journal.releasable(task)
    if version is None:
        # What the canaries have proven comes first.
        tried = [row.version for row in rows if row.channel == "canary"] if channel == "stable" else []
        version = next(iter(tried or may), None)
    if version is None:
        raise LocalError(f"no model of {task} may be released yet: none is learnt, and kept by a vote")
    if version not in may:
        some = ", ".join(map(str, may[:5])) or "none"
        raise UserError("--version", 0, "", f"{version} can't be released", f"newest that can be: {some}")
    return version


def rollback(args: argparse.Namespace, config: FederationConfig, state: Path) -> int:
    """Give gateways an earlier model again, by a higher release."""
    task, channel = _task(args.task, config), args.channel
    with closing(Journal(state)) as journal:
        choose = partial(_earlier, journal, task, channel, args.to)
        done = _release(journal, config, task, channel, choose, args.key)
    _warn_of_running(state)
    return done


def _warn_of_running(state: Path) -> None:
    """Say of an aggregator that runs, and was started without `[release]`, that it publishes nothing of it."""
    said = read_status(state) if is_running(state) else None
    if said is not None and not said.get("releasing", True):
        print("the aggregator that runs was started without [release] and publishes none of this: restart it")


def _warn_of_strangers(journal: Journal, table: ReleaseTable) -> None:
    """Name each canary that no gateway is: a word mistyped would leave the channel without one."""
    roster = journal.roster()
    for path in table.canary:
        if path not in roster:
            print(f"[release] canary {path} is not in the roster: write the path as tundish broker status shows it")


def _earlier(journal: Journal, task: str, channel: Channel, version: int | None) -> int:
    of = [row.version for row in journal.releases(task) if row.channel == channel]
    if not of:
        raise UserError("--task", 0, "", f"nothing of {task} is released to {channel}", "release a model first")
    if version is None:
        version = max((one for one in of if one < of[0]), default=None)
    if version is None or version not in of:
        problem = f"nothing older than version {of[0]} was released to {channel}"
        if version is not None:
            problem = f"version {version} was never released to {channel}"
        released = ", ".join(str(one) for one in sorted(set(of)))
        remedy = f"released were: {released}; any other that is there is for tundish broker release --version"
        raise UserError("--to", 0, "", problem, remedy)
    return version


def _task(name: str | None, config: FederationConfig) -> str:
    names = [file.task.name for file in config.tasks]
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        raise UserError("--task", 0, "", f"no task {name!r}", f"write one of: {', '.join(names)}")
    return name


def _renew(args: argparse.Namespace, config: FederationConfig, state: Path) -> int:
    if (args.to, args.version, args.task) != (None, None, None):
        raise UserError("--new-online-key", 0, "", "is for all tasks", "leave out --to, --version and --task")
    now_ms = time.time_ns() // 1_000_000
    with closing(Journal(state)) as journal:
        repository = _repository(journal, _table(config), now_ms, args.key)
        with journal.transaction():
            key = repository.renew()
            journal.note(now_ms, "release-key", {"key": key})
    print(f"the online key is {key} from now on; gateways that have the new root take nothing from the one before")
    return 0


def _table(config: FederationConfig) -> ReleaseTable:
    if config.release is None:
        remedy = "add it, with keys from tundish broker release --new-key FILE"
        raise UserError("federation.toml", 0, "release", "missing", remedy)
    return config.release


def _repository(journal: Journal, table: ReleaseTable, now_ms: int, keys: Sequence[Path]) -> Repository:
    """The repository, with these keys at hand; UserError for one that may sign nothing of it."""
    signers = {path: load_key(path) for path in keys}
    repository = Repository(journal, table, now_ms, list(signers.values()))
    may = repository.operators()
    for path, signer in signers.items():
        public = str(signer.public_key.keyval["public"])
        if public not in may:
            problem = f"{path} is none of [release] keys: its public key is {public}"
            raise UserError("--key", 0, "", problem, f"write it there, or give the file of: {', '.join(sorted(may))}")
    return repository


def _release(
    journal: Journal,
    config: FederationConfig,
    task: str,
    channel: Channel,
    choose: Callable[[], int],
    keys: Sequence[Path],
) -> int:
    table = _table(config)
    if channel == "canary" and not table.canary:
        raise UserError("federation.toml", 0, "release.canary", "names no gateway", "write their paths")
    now_ms = time.time_ns() // 1_000_000
    repository = _repository(journal, table, now_ms, keys)
    with journal.transaction():
        version = choose()  # in here, as a running aggregator may end a vote
        rows, model, row = journal.releases(task), journal.model(task, version), journal.task(task)
        if model is None or row is None:
            raise LocalError(f"{journal.path}: version {version} of {task} is missing; restore a backup")
        number = rows[0].release + 1 if rows else 1
        layout = Layout.from_json(row.layout)
        digest = model_digest(parse_task(row.text, task), layout, row.graph_digest)
        files = _files(table, task, channel, model, layout.size, Custom(number, version, digest))
        repository.release(channel, task, files)
        journal.add_release(task, ReleaseRow(number, channel, version))
        body: dict[str, Any] = {"task": task, "release": number, "channel": channel, "version": version}
        journal.note(now_ms, "release", body | {"digest": model.digest.hex()})
    whom = "all gateways" if channel == "stable" else ", ".join(table.canary)
    print(f"release {number} of {task}: version {version} for {whom}")
    before = next((row.version for row in rows if row.channel == channel), None)
    if before not in (None, version):
        canaries = ", canaries too" if channel == "stable" and table.canary else ""
        print(f"{channel} goes {'back ' if version < before else ''}from version {before} to {version}{canaries}")
    if before == version:
        newer = "; what is newer goes to canaries first: --to canary" if channel == "stable" and table.canary else ""
        print(f"{channel} had version {version} before{newer}")
    if channel == "canary":
        _warn_of_strangers(journal, table)
    if channel == "stable" and not any(row.version == version for row in rows):
        first = "--to canary lets some try it first" if table.canary else "[release] canary names none"
        print(f"no canary was given version {version}: all gateways get it at once ({first})")
    return 0


def _files(
    table: ReleaseTable, task: str, channel: Channel, model: ModelRow, count: int, custom: Custom
) -> dict[str, TargetFile]:
    names = [target_of(channel, task, path) for path in (table.canary if channel == "canary" else [""])]
    said = {"custom": msgspec.to_builtins(custom)}
    return {name: TargetFile(_FLOAT * count, {"sha256": model.digest.hex()}, name, said) for name in names}
