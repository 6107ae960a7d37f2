"""`tundish edge doctor`: every step from this machine to the first good values, each with what to do if it fails.

What a protocol needs is its driver's `diagnose`; here are this machine, the federation's broker, and the report.
Nothing is written to a machine, and a gateway that runs is not disturbed.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec

from broker.diagnose import Step, fail, look, note, ok
from broker.topics import FederationStatus, downlink_filters
from edge.config import Config
from edge.drivers import registry
from edge.identity import with_own_tls
from edge.status import is_alive, read_status, taken_out
from edge.tags import Source
from models.errors import LocalError, UserError

GATEWAY, BROKER = "gateway", "broker"
_SOURCE_S = 60.0  # for all steps of one source, whatever happens
_LEAST_FREE = 256 << 20
_YEARS = (2025, 2100)
# A serial line has one master: a second one garbles what the gateway reads.
_ALONE = "modbus+rtu://"


def main(args: argparse.Namespace, config: Config, state: Path) -> int:
    """Look, print a line a step, and return 1 if something fails; UserError for a source that isn't there."""
    names = [source.name for source in config.sources]
    if args.source is not None and args.source not in names:
        raise UserError("--source", 0, "", f"no source {args.source!r}", f"write one of: {', '.join(names) or 'none'}")
    with handed_over(state):
        found = asyncio.run(_run(config, state, args.source, quiet=args.json))
    if args.json:
        print(json.dumps({"ok": not _failed(found), "steps": [{"of": of, **step._asdict()} for of, step in found]}))
    elif failed := _failed(found):
        print(f"{failed} of {len(found)} steps failed", file=sys.stderr)
    return 1 if _failed(found) else 0


def _failed(found: list[tuple[str, Step]]) -> int:
    return sum(step.ok is False for _, step in found)


async def _run(config: Config, state: Path, only: str | None, *, quiet: bool) -> list[tuple[str, Step]]:
    """Look at everything at once; the steps come in the order of the file, whoever is done first."""
    looks: dict[str, AsyncIterator[Step]] = {}
    if only is None:
        looks[GATEWAY] = _local(config, state, running=_runs(state))
    for source in config.sources:
        if only in (None, source.name):
            source = msgspec.structs.replace(source, pki=str(state / "pki"))  # noqa: PLW2901
            looks[source.name] = _source(source, state)
    if only is None:
        looks[BROKER] = federation(config, state)
    jobs = {of: asyncio.create_task(_collect(steps)) for of, steps in looks.items()}
    found = []
    for of, job in jobs.items():
        for step in await job:
            found.append((of, step))
            if not quiet:
                word = {True: "ok", False: "FAIL", None: "note"}[step.ok]
                print(f"{word:<5} {of:<12} {step.name:<12} {step.text}", flush=True)
    return found


async def _collect(steps: AsyncIterator[Step]) -> list[Step]:
    """Take all steps, within a bound; what nobody foresaw is a failed step too."""
    found: list[Step] = []
    try:
        async with asyncio.timeout(_SOURCE_S):
            async for step in steps:
                found.append(step)  # noqa: PERF401 - at a timeout, what there is must not be lost
    except TimeoutError:
        found.append(fail("time", f"not done within {_SOURCE_S:g} s; check the network"))
    except (LocalError, UserError) as error:
        found.append(fail("file", str(error)))
    except Exception as error:  # noqa: BLE001 - a mistake of ours must not hide what the others found
        found.append(fail("doctor", f"{type(error).__name__}: {error}; report this, and see tundish edge status"))
    return found


def left_alone(source: Source, state: Path) -> bool:
    """Whether a source must not be read by anybody else now: a serial line of a gateway that runs."""
    return source.url.startswith(_ALONE) and _runs(state)


async def _source(source: Source, state: Path) -> AsyncIterator[Step]:
    if left_alone(source, state):
        yield note("port", "the running gateway has the line; see tundish edge status, or stop it and look again")
        return
    async for step in registry.load(source.driver).diagnose(source):
        yield step


# -- this machine ------------------------------------------------------------------------------------------------------


async def _local(config: Config, state: Path, *, running: bool) -> AsyncIterator[Step]:
    for step in await asyncio.to_thread(local, config, state, running=running):
        yield step


def local(config: Config, state: Path, *, running: bool) -> list[Step]:
    """Look at the state folder, the disk, the clock, and what is installed."""
    now, torch = time.gmtime(), importlib.util.find_spec("torch") is not None
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", now)
    sane = _YEARS[0] <= now.tm_year < _YEARS[1]
    alone = (
        note("running", f"a gateway runs with its state in {state}") if running else ok("running", "no gateway runs")
    )
    return [
        _writable(state),
        _disk(config, state),
        ok("clock", shown) if sane else fail("clock", f"{shown} can't be; set it, by NTP or at the board's clock"),
        ok("torch", "is installed") if torch else note("torch", "not installed: this gateway scores, and can't train"),
        alone,
    ]


def _disk(config: Config, state: Path) -> Step:
    place = next(path for path in (state, *state.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    used = (state / "samples.db").stat().st_size if (state / "samples.db").exists() else 0
    shown = f"{free / 2**30:.1f} GiB free on the disk of {place}"
    if free < _LEAST_FREE:
        return fail("disk", f"{shown}; make room, or name another --state")
    if free + used < config.store_bytes:
        return note("disk", f"{shown}, less than [store] max_bytes: the oldest samples will go early")
    return ok("disk", shown)


def _writable(state: Path) -> Step:
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = state / ".doctor"
        probe.unlink(missing_ok=True)
        # Root must not follow a link that the folder's owner put here.
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
        probe.unlink()
    except OSError as error:
        remedy = "name a folder that this user may write with --state, or mend its owner"
        return fail("state", f"{state} can't be written ({error.strerror}); {remedy}")
    return ok("state", f"{state} can be written")


def _runs(state: Path) -> bool:
    """Whether another process holds the state folder; False, too, where this user may not know."""
    with contextlib.suppress(LocalError):
        return is_alive(state)
    return False


@contextlib.contextmanager
def handed_over(state: Path | None) -> Iterator[None]:
    """Give what root makes meanwhile in pki/ of the state folder to the folder's owner: a service's own user.

    That user may put links there, at any moment. So nothing is reached by a path, and only plain files and folders that
    are root's are given away: no link, and no file that has another name elsewhere.
    """
    if state is None or os.geteuid() != 0 or not state.is_dir():
        yield
        return
    folder = os.open(state, os.O_RDONLY | os.O_DIRECTORY)
    try:
        before = {path for path, _, _ in _certificates(folder)}
        try:
            yield
        finally:
            owner = os.fstat(folder)
            for path, name, parent in _certificates(folder):
                if path not in before:
                    _give(name, parent, owner)
    finally:
        os.close(folder)


def _certificates(folder: int) -> Iterator[tuple[str, str, int]]:
    """Give pki/ and all in it, if it is there: the path, the name, and the open folder that the name is in."""
    with contextlib.suppress(OSError):
        os.stat("pki", dir_fd=folder, follow_symlinks=False)
        yield "pki", "pki", folder
        for path, folders, files, parent in os.fwalk("pki", dir_fd=folder):
            yield from ((f"{path}/{name}", name, parent) for name in (*folders, *files))


def _give(name: str, parent: int, owner: os.stat_result) -> None:
    with contextlib.suppress(OSError):  # a link, or gone
        opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)
        try:
            found = os.fstat(opened)
            plain = stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1)
            if plain and found.st_uid == 0:
                os.fchown(opened, owner.st_uid, owner.st_gid)
        finally:
            os.close(opened)


# -- the federation ----------------------------------------------------------------------------------------------------


async def federation(config: Config, state: Path) -> AsyncIterator[Step]:
    """Go to the broker, and see whether what the gateway needs there is allowed."""
    said = read_status(state)
    name = config.federation.name or (said["federation"]["name"] if said else "") or "+"
    filters = [FederationStatus(name).topic]
    for task in config.tasks:
        filters += downlink_filters(name, task, config.path)
    if said and (out := taken_out(said)):
        yield fail("roster", f"{out}; ask the operator, who can enrol it again")
    settings = with_own_tls(config.mqtt, state)
    if settings.cert and said and is_alive(state):
        # A broker may let each certificate in once: a second client would throw the gateway out.
        mqtt = said["mqtt"]
        how = "is connected" if mqtt["connected"] else f"is not connected: {mqtt['error']}"
        yield note("connection", f"the gateway runs and {how}; stop it, or ask again then, to go through each step")
        return
    # Under the gateway's own area, and no topic that an aggregator reads.
    async for step in look(settings, filters, f"{config.path}/_fl/doctor/probe"):
        yield step
