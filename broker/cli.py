"""`tundish broker VERB`: options in, an exit code out; what a command needs it imports itself."""

import argparse
import asyncio
import importlib
import json
import logging
import signal
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from broker.config import FederationConfig, load_federation
from broker.database import forbidden
from broker.folder import check_authority, check_state, is_state
from broker.status import STATUS_FILE, is_running
from models.commandline import Parser, counted
from models.errors import LocalError, TundishError, UserError

if TYPE_CHECKING:
    from broker.service import Service

STALE_S = 10
_CHANNELS = "canary", "stable"
Command = Callable[[argparse.Namespace], int]


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to the sub-parsers of `tundish broker`; each sets `run` to its function.

    The function takes the parsed arguments and returns an exit code; it may raise TundishError, which the caller
    prints in one line and turns into exit code 2.
    """
    run = _command(subparsers, "run", run_command, "run the aggregator beside an MQTT broker", "-c federation.toml")
    run.add_argument("-v", "--verbose", action="store_true", help="log more to standard error")
    status = _command(subparsers, "status", status_command, "show rounds, gateways and refusals", "-c federation.toml")
    status.add_argument("--json", action="store_true", help="one JSON object on standard output")
    init = _command(
        subparsers, "init", _identity("init"), "make the federation's certificate authority", "--host mqtt.acme.example"
    )
    init.add_argument("--host", action="append", default=[], help="name or address that the broker is reached by")
    example = "-c federation.toml --path acme/lyon/press/line4/cell2 --request cell2.request --out cell2.admission"
    text = "let a gateway take part, or no more; with --path alone, print a token by which it enrols over the network"
    enrol = _command(subparsers, "enrol", _identity("enrol"), text, example)
    enrol.add_argument("--path", required=True, help="enterprise/site/area/line/cell")
    what = enrol.add_mutually_exclusive_group()
    what.add_argument("--key", help="the gateway's Ed25519 public key, 64 hex digits")
    what.add_argument("--request", type=Path, metavar="FILE", help="what tundish edge export wrote on the gateway")
    what.add_argument("--revoke", action="store_true", help="take the gateway out, and its certificate back")
    text = "(with --revoke, once the MQTT broker has reloaded) close its connection"
    enrol.add_argument("--end-connection", action="store_true", help=text)
    enrol.add_argument("--out", type=Path, metavar="FILE", help="(with --request) the admission for the gateway")
    acl = _command(
        subparsers,
        "acl",
        _identity("acl"),
        "write the MQTT broker's configuration and access list",
        "--out /etc/mosquitto/tundish",
    )
    acl.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder that the broker reads")
    acl.add_argument("--revoke-operator", action="append", default=[], metavar="NAME", help="take such a person out")
    acl.add_argument("--port", type=int, help="port of the broker (that of DIR/mosquitto.conf, else of [mqtt] url)")
    acl.add_argument(
        "--operator",
        action="append",
        default=[],
        metavar="NAME",
        help="certify a person who reads scores and gives feedback",
    )
    text = "certify a site's MQTT broker that forwards its gateways' federation traffic"
    acl.add_argument("--bridge", action="append", default=[], metavar="SITE", help=text)
    acl.add_argument("--revoke-bridge", action="append", default=[], metavar="SITE", help="take such a broker out")
    _add_release(subparsers)
    _add_stick(subparsers)


def _add_release(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "give a model to the canary gateways, or to all gateways, to score with"
    example = "-c federation.toml --task spindle-wear --to stable --key /media/stick/release.key"
    give = _command(subparsers, "release", _module("release_command", "release"), text, example)
    give.add_argument("--version", type=int, metavar="V", help="version (the canaries', else the newest that is kept)")
    give.add_argument("--to", choices=_CHANNELS, help="who gets it")
    give.add_argument("--new-key", type=Path, metavar="FILE", help="instead: make a key that may release to all")
    text = "instead: sign by another online key, where the one before was stolen or its journal restored"
    give.add_argument("--new-online-key", action="store_true", help=text)
    example = "-c federation.toml --task spindle-wear --key /media/stick/release.key"
    text = "give gateways an earlier model again"
    back = _command(subparsers, "rollback", _module("release_command", "rollback"), text, example)
    back.add_argument("--to", type=_version, metavar="V", help="version (the one released before)")
    back.add_argument("--channel", choices=_CHANNELS, default="stable", help="whose (stable)")
    for one in (give, back):
        one.add_argument("--task", metavar="T", help="task (the only one)")
        one.add_argument("--key", type=Path, action="append", default=[], metavar="FILE", help="a key of [release]")


def _version(text: str) -> int:
    if text in _CHANNELS:
        raise argparse.ArgumentTypeError(f"{text!r} is a channel: write --channel {text}; --to takes a version")
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no version: write a number, as tundish broker status shows it")
    return int(text)


def _add_stick(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text, example = "take what a gateway without a network sends", "-c federation.toml /media/stick/cell2.updates"
    take = _command(subparsers, "import", _module("stick_command", "import_file"), text, example)
    take.add_argument("file", type=Path, metavar="FILE", help="what tundish edge export --updates wrote")
    text = "write what goes back to a gateway without a network: plans, models, releases, receipts"
    example = "-c federation.toml --path acme/lyon/press/line4/cell2 /media/stick/cell2.models"
    give = _command(subparsers, "export", _module("stick_command", "export_file"), text, example)
    give.add_argument("file", type=Path, metavar="FILE", help="the file to write")
    give.add_argument("--path", required=True, help="enterprise/site/area/line/cell")


def _module(module: str, verb: str) -> Command:
    """The commands about keys, whose libraries no other command loads."""

    def run(args: argparse.Namespace) -> int:
        config = load_federation(_config_path(args))
        state = _state(args, config)
        if not getattr(args, "new_key", None):  # which goes into no state
            check_state(state, config, new=verb == "init")
        function: Callable[..., int] = getattr(importlib.import_module(f"broker.{module}"), verb)
        return function(args, config, state)

    return run


def _identity(verb: str) -> Command:
    return _module("identity", verb)


def run_command(args: argparse.Namespace) -> int:
    """Run until SIGTERM or SIGINT."""
    config = load_federation(_config_path(args))
    level = logging.DEBUG if args.verbose else logging.INFO
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if args.verbose:
        logging.getLogger().setLevel(level)  # whoever called may have set logging up already
    state = _state(args, config)
    check_state(state, config, new=True)
    check_authority(config, state)
    from broker.service import Service  # noqa: PLC0415 - the other commands need none of it

    asyncio.run(_serve(Service(config, state)))
    return 0


def status_command(args: argparse.Namespace) -> int:
    """Show the status file of the state folder; exit code 1 when the aggregator does not run."""
    folder = args.state or _state(args, load_federation(_config_path(args)))
    path = folder / STATUS_FILE
    running = False
    try:
        running = is_running(folder)
        status: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise forbidden(folder, error) from error
    except (OSError, ValueError) as error:
        if running:
            raise LocalError(f"the aggregator of {folder} is starting; its log says what it waits for") from error
        if is_state(folder):
            raise LocalError(
                f"no aggregator has run yet with its state in {folder}; start it: tundish broker run"
            ) from error
        problem, remedy = (
            f"no aggregator ever ran with its state in {folder}",
            "write the --state of tundish broker run",
        )
        raise UserError("--state", 0, "", problem, remedy) from error
    age_s = max(0.0, time.time() - status["time_ms"] / 1000)
    if args.json:
        print(json.dumps({**status, "running": running, "age_s": round(age_s, 1)}))
    else:
        print("\n".join(_report(status, age_s, running=running)))
    return 0 if running else 1


def default_state(federation: str) -> Path:
    """Where a federation's memory is when `--state` does not say."""
    return platformdirs.user_state_path("tundish") / "broker" / federation


def main(argv: list[str] | None = None) -> int:
    """Run `python -m broker.cli`: the aggregator's commands alone, for hosts that are no gateway."""
    parser: argparse.ArgumentParser = Parser(prog="tundish broker", description=__doc__)
    add_commands(parser.add_subparsers(required=True, metavar="COMMAND"))
    args = parser.parse_args(argv)
    command: Command = args.run
    try:
        return command(args)
    except TundishError as error:
        print(f"tundish: {error}", file=sys.stderr)
        return 1 if isinstance(error, LocalError) else 2


def _command(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    function: Command,
    text: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=f"example: tundish broker {name} {example}"
    )
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="federation.toml")
    parser.add_argument("--state", type=Path, metavar="DIR", help="the aggregator's memory (default: per user)")
    parser.set_defaults(run=function)
    return parser


def _config_path(args: argparse.Namespace) -> Path:
    if args.config is None:
        raise UserError("-c", 0, "", "missing", "write -c federation.toml")
    path: Path = args.config
    return path


def _state(args: argparse.Namespace, config: FederationConfig) -> Path:
    return args.state or default_state(config.name)


async def _serve(service: "Service") -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.stop)
    await service.run()


def _report(status: dict[str, Any], age_s: float, *, running: bool) -> list[str]:
    link = "connected" if status["connected"] else status["mqtt"]["error"] or "not connected"
    silent = f", BUT SILENT for {age_s:.0f} s" if age_s >= STALE_S else ""
    how = f"running{silent}, {link}" if running else f"NOT RUNNING; what it said last, {age_s:.0f} s ago:"
    lines = [f"{status['federation']}: {how}"]
    lines.append(f"  public key {status['public_key']}")
    if charter := status.get("charter"):
        lines.append(f"  charter {charter['title']!r} {charter['digest']}, accepted by {len(charter['accepted'])}")
        lines += [f"    NOT ACCEPTED by {path}" for path in charter["not_accepted"]]
    for name, task in status["tasks"].items():
        lines += _of_task(name, task, status)
    for path, one in status.get("unseen", {}).items():
        how = "offline, not seen since this aggregator started" if one["seen"] else "never seen online"
        lines.append(f"  {path}: {how}; enrolled {_clock(one['since_ms'])}")
    for name, channels in status.get("released", {}).items():
        for channel, one in sorted(channels.items()):
            than = "" if one.get("in_force", True) else "; its gateways go by stable, whose release is higher"
            lines.append(f"  {name}: {channel} has release {one['release']}, version {one['version']}{than}")
    for path, key in status["not_enrolled"].items():
        lines.append(f"  NOT ENROLLED {path}: tundish broker enrol -c federation.toml --path {path} --key {key}")
    for path, asks in status.get("revoked", {}).items():
        which = "the key that was revoked" if asks["same_key"] else f"another key, {asks['key']}"
        lines.append(f"  REVOKED {path} since {_clock(asks['since_ms'])}; it asks with {which}")
    lines += [f"  refused {count} ({reason})" for reason, count in sorted(status["refused"].items())]
    return lines


def _of_task(name: str, task: dict[str, Any], status: dict[str, Any]) -> list[str]:
    lines = [f"  {name}: round {task['round']} {task['state']}, model version {task['version']}"]
    if (rounds := task.get("rounds")) and (last := rounds["last_voted_down"]):
        said = f"{counted(rounds['closed'], 'round')}, {rounds['voted_down']} voted down"
        whom = f"version {last['version']}, by {last['against']} of {counted(last['votes'], 'gateway')}"
        lines.append(f"    {said}; last: {whom}")
    there = sum(gateway["online"] for gateway in task["gateways"].values())
    if task["state"] == "waiting" and there < task["min_gateways"]:
        lines.append(f"    begins with {task['min_gateways']} gateways online (min_gateways); now {there}")
    if task["state"] == "open":
        due = _clock(task["deadline_ms"])
        lines.append(f"    counted {len(task['counted'])} of at least {task['min_gateways']}, deadline {due}")
    if vote := task["vote"]:
        lines.append(f"    votes on version {vote['version']}: {vote['for']} for, {vote['against']} against")
    for path, gateway in task["gateways"].items():
        word = "online" if gateway["online"] else "offline"
        if since_ms := status.get("taken_out", {}).get(path):
            word = f"REVOKED since {_clock(since_ms)}"
        said = f", round {gateway['round']} {gateway['verdict']}" if gateway["verdict"] else ""
        why = f" ({gateway['code']}: {_plain(gateway['reason'])})" if gateway["reason"] else ""
        if has := status.get("installed", {}).get(path, {}).get(name):
            word += f", has release {has['release']} (version {has['version']})"
        lines.append(f"    {path}: {word}{said}{why}")
    return lines


def _plain(text: str) -> str:
    """Take control characters out: a gateway wrote this, and a terminal obeys some of them."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _clock(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


if __name__ == "__main__":
    sys.exit(main())
