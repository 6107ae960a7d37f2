"""`tundish edge wire`: a proposal of which tag is which signal of a task; what an engineer accepts of it is written."""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge.config import Config, TaskTable, load_config
from edge.doctor import handed_over, left_alone
from edge.drivers import registry
from edge.propose import Guess, Proposal, propose
from edge.tags import Driver, Quality, Sample, Source
from edge.tomledit import put_table
from edge.wiring import wire
from models.errors import LocalError, UserError
from models.spec import Task, load_task

_READ_S = 5.0
_LEAST_TOP = 2  # a proposal is never shown without what stands against it
_KEPT = ("active_when", "segment", "max_lag", "width")  # of a table that is replaced


def main(args: argparse.Namespace, config: Config, state: Path) -> int:
    """Propose; write only what is accepted. 0, or 1 if nothing was written although it was to be."""
    task, _ = load_task(args.task)
    sources = _sources(config, args.source)
    if task.name in config.tasks and args.accept and not args.replace:
        where = f"task.{task.name}"
        raise UserError(config.file, 0, where, "is wired already", "add --replace, or edit it by hand")
    if args.top < _LEAST_TOP:
        raise UserError("--top", 0, "", f"{args.top} is out of range", f"write {_LEAST_TOP} or more")
    with handed_over(state):
        values = {} if args.offline else asyncio.run(_read(sources, state))
    found = propose(task, [tag for source in sources for tag in source.tags], values, args.top)
    chosen = {name: guess.tag.ref for name, guess in found.guesses.items() if guess is not None}
    asks = not args.accept and not args.json and sys.stdin.isatty() and sys.stdout.isatty()
    if asks:
        chosen = _ask(task, found)
    block = _block(task, found, chosen, config.tasks.get(task.name))
    if args.json:
        print(json.dumps(_as_json(task, found)))
    elif not asks:
        print(block, end="")
    if not (args.accept or asks):
        return 0
    if missing := [signal.name for signal in task.signal if signal.name not in chosen]:
        raise LocalError(f"nothing is written: no tag for {', '.join(missing)}; wire by hand under [task.{task.name}]")
    verb = "replace" if task.name in config.tasks else "write"
    if args.accept and (level := [f"{name}: {_text(g.tag.ref)}" for name in chosen if (g := found.rival(name))]):
        remedy = "accept it on a terminal, or wire it by hand"
        raise LocalError(f"nothing is written: as likely as the first is for {', '.join(level)}; {remedy}")
    if asks and not _yes(f"{verb} [task.{task.name}] in {config.file}?"):
        print("nothing is written")
        return 0
    _write(Path(config.file), task, block, replace=args.replace or asks)
    print(
        f"[task.{task.name}] is written to {config.file}; what was there before is in {config.file}.bak",
        file=sys.stderr,
    )
    return 0


def _sources(config: Config, names: Sequence[str]) -> list[Source]:
    known = {source.name: source for source in config.sources}
    for name in names:
        if name not in known:
            raise UserError("--source", 0, "", f"no source {name!r}", f"write one of: {', '.join(known) or 'none'}")
    return [known[name] for name in names] if names else list(known.values())


# -- values --------------------------------------------------------------------------------------------------------


async def _read(sources: Sequence[Source], state: Path) -> dict[str, Sample]:
    """Read every source that answers, five seconds at most; return the last sample of each tag by its ref."""
    values: dict[str, Sample] = {}

    def take(samples: list[Sample], /) -> None:
        values.update((sample.tag, sample) for sample in samples)

    async def one(source: Source) -> None:
        source = msgspec.structs.replace(source, pki=str(state / "pki"))
        driver: Driver = registry.load(source.driver).Driver(source, take)
        work = asyncio.create_task(driver.run())
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_READ_S):
                    while not driver.health.error and not all(  # noqa: ASYNC110 - a driver sets no event
                        tag.ref in values or tag.ref in driver.health.quarantined for tag in source.tags
                    ):
                        await asyncio.sleep(0.05)
            for ref in driver.health.quarantined:
                values[ref] = Sample(ref, 0, 0.0, Quality.BAD)
        finally:
            work.cancel()
            await asyncio.wait([work])

    await asyncio.gather(*(one(source) for source in sources if not left_alone(source, state)))
    return values


# -- the proposal --------------------------------------------------------------------------------------------------


def _block(task: Task, found: Proposal, chosen: dict[str, str], before: TaskTable | None) -> str:
    """Write the table: one line a signal, with its score, its reasons and its runners-up as comments."""
    lines = [f"[task.{task.name}]"]
    names = [signal.name for signal in task.signal]
    for name in [*names, *([task.target.name] if task.target else [])]:
        key = f"signals.{name}" if name in names else "target"
        guesses = {guess.tag.ref: guess for guess in found.ranked[name]}
        if name in chosen:
            mine = guesses.get(chosen[name]) or found.guesses[name]
            level = "; ANOTHER IS AS LIKELY" if found.rival(name) else ""
            lines.append(f"{key} = {_text(chosen[name])}  # {_said(mine)}{level}")
        elif name in names:
            lines.append(f"# {key} = no likely tag; write one by hand")
        elif before is not None and before.target:
            lines.append(f"{key} = {_text(before.target)}")
        lines += [f"#   or {_text(ref)}  {_said(guess)}" for ref, guess in guesses.items() if ref != chosen.get(name)]
    for key in _KEPT if before else ():
        value = getattr(before, key)
        if value is not None and value != msgspec.structs.asdict(TaskTable(signals={}))[key]:
            lines.append(f"{key} = {_text(value)}")
    return "\n".join([*lines, ""])


def _said(guess: Guess | None) -> str:
    """Score and reasons as a comment: one line, whatever stands in a tags file."""
    text = f"{guess.score:.2f}: {', '.join(guess.reasons)}" if guess else ""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _text(value: str) -> str:
    """Write a TOML basic string."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _as_json(task: Task, found: Proposal) -> dict[str, Any]:
    def one(guess: Guess) -> dict[str, Any]:
        return {"tag": guess.tag.ref, "score": guess.score, "reasons": guess.reasons}

    return {
        "task": task.name,
        "proposed": {name: one(guess) if guess else None for name, guess in found.guesses.items()},
        "ranked": {name: [one(guess) for guess in guesses] for name, guesses in found.ranked.items()},
        "excluded": {name: [{"tag": ref, "reason": why} for ref, why in out] for name, out in found.excluded.items()},
    }


# -- acceptance ----------------------------------------------------------------------------------------------------


def _ask(task: Task, found: Proposal) -> dict[str, str]:
    """Ask for each signal on the terminal; return what was accepted."""
    chosen: dict[str, str] = {}
    for name, guess in found.guesses.items():
        ranked = [*([guess] if guess else []), *(other for other in found.ranked[name] if other is not guess)]
        if not ranked:
            print(f"{name}: no likely tag")
            continue
        print(f"{name} ({'target' if task.target and name == task.target.name else 'signal'}):")
        for number, other in enumerate(ranked, 1):
            print(f"  {number}  {_text(other.tag.ref)}  {_said(other)}")
        answer = _answer(f"{name} = {_text(ranked[0].tag.ref)}? [y/N{f'/2-{len(ranked)}' if len(ranked) > 1 else ''}] ")
        if answer in {"y", "yes"}:
            answer = "1"
        if answer.isdecimal() and 1 <= int(answer) <= len(ranked):
            chosen[name] = ranked[int(answer) - 1].tag.ref
    return chosen


def _yes(question: str) -> bool:
    return _answer(f"{question} [y/N] ") in {"y", "yes"}


def _answer(question: str) -> str:
    try:
        return input(question).strip().lower()
    except EOFError:
        return ""


def _write(path: Path, task: Task, block: str, *, replace: bool) -> None:
    """Put the block into gateway.toml, whole or not at all, after the result was checked; the old file becomes .bak."""
    text = path.read_bytes().decode("utf-8")
    name = f"task.{task.name}"
    if task.name in load_config(path).tasks and not replace:
        raise UserError(str(path), 0, name, "is wired already", "add --replace, or edit it by hand")
    out = put_table(text, ("task", task.name), block)
    if out is None:
        raise UserError(str(path), 0, name, "can't be replaced safely", "edit it by hand")
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(out.encode())
        shutil.copymode(path, part)
        config = load_config(part)
        wire(task, config.tasks[task.name], config.tags, str(path))
        shutil.copy2(path, path.with_name(f"{path.name}.bak"))
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UserError(str(path), 0, "", f"can't be written: {error.strerror}", "check the folder's owner") from error
    finally:
        part.unlink(missing_ok=True)
