"""The command `tundish`. What a subcommand needs is imported when it runs, so that each loads no more than its own."""

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from edge import SOFTWARE
from models.commandline import Parser, counted
from models.errors import PeerError, TundishError, UserError

_SIGPIPE = 128 + 13
CODECS = ("sparse", "int2", "int4", "int8", "float32", "ring")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Make the command line. `command` is the one that will run (None: all of them, for the documentation test).

    The aggregator's verbs are mounted only for it, so that a gateway loads none of its code and the other way round.
    """
    parser: argparse.ArgumentParser = Parser(
        prog="tundish",
        description="Federated learning on factory gateways: OPC UA, Modbus in; scores out; weight deltas over MQTT.",
        epilog="start here: tundish demo",
    )
    parser.add_argument("--version", action="version", version=SOFTWARE)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_simulate(commands)
    _add_bench(commands)
    _add_edge(commands)
    _add_audit(commands)
    broker = commands.add_parser("broker", help="the aggregator beside an MQTT broker: run it, enrol gateways, status")
    if command in (None, "broker"):
        from broker.cli import add_commands  # noqa: PLC0415

        add_commands(broker.add_subparsers(metavar="VERB", required=True))
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="run a whole federation on this machine and report on it",
        description="Three simulated plants, three gateways, one aggregator, one broker; about three minutes.",
        epilog="example: tundish demo --rounds 6 --out my-demo",
    )
    demo.add_argument("--rounds", type=int, default=20, help="rounds to run (default 20)")
    demo.add_argument("--gateways", type=int, default=3, help="plants, each with its own gateway (default 3)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the simulated plants (default 0)")
    demo.add_argument("--out", type=Path, default=Path("tundish-demo"), help="report folder (default tundish-demo)")
    demo.add_argument("--broker", choices=("embedded", "mosquitto"), default="embedded", help="MQTT broker to use")
    demo.add_argument("--data", type=Path, help="play this recorded data (.npz) instead of the simulated spindles")
    demo.add_argument("--json", action="store_true", help="print the figures as one JSON object on standard output")
    demo.set_defaults(run=_demo)


def _add_simulate(commands: Any) -> None:
    simulate = commands.add_parser(
        "simulate",
        help="run a federation on recorded data in one process, and compare it with plants that learn alone",
        description="One gateway for each plant of the file; the same figures every time for the same seed.",
        epilog="example: tundish simulate task.toml --data plants.npz --rounds 24 --json",
    )
    simulate.add_argument("task", type=Path, help="task.toml; what it leaves out comes from the data")
    simulate.add_argument("--data", type=Path, required=True, help="recorded data (.npz): x, y, client of train, test")
    simulate.add_argument("--rounds", type=int, default=24, help="rounds to run (default 24)")
    simulate.add_argument("--seed", type=int, default=0, help="seed of first weights and batches (default 0)")
    simulate.add_argument("--codec", choices=CODECS, help="codec of updates instead of the task's")
    simulate.add_argument("--keep", type=float, help="share of values that a sparse update keeps")
    simulate.add_argument("--downlink", choices=("sparse", "float32"), help="how models go down instead of the task's")
    simulate.add_argument("--strategy", help="a file of broker/strategies instead of the task's")
    simulate.add_argument("--mode", choices=("sync", "async"), help="in step or not, instead of the task's")
    simulate.add_argument("--stale", type=int, default=0, help="async: versions that plants lag behind at most (0)")
    simulate.add_argument("--dropout", type=float, default=0.0, help="chance that a plant misses a round (default 0)")
    simulate.add_argument("--width", default="1", help="part of the net that plants have: 0.5, or PLANT=0.5,PLANT=0.25")
    simulate.add_argument("--privacy", choices=("plain", "secure-aggregation"), help="the latter: --codec ring")
    simulate.add_argument("--plot", type=Path, help="also write figures and curve into this HTML file")
    simulate.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    simulate.set_defaults(run=_simulate)


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure this machine against a floor, in one run")
    kinds = bench.add_subparsers(metavar="WHAT", required=True)

    from edge.lab.bench import add_kinds  # noqa: PLC0415 - the kinds and their options; no kind's own imports

    add_kinds(kinds)


def _add_audit(commands: Any) -> None:
    audit = commands.add_parser("audit", help="prove what a gateway or an aggregator did: check its ledger, report it")
    verbs = audit.add_subparsers(metavar="VERB", required=True)
    verify = verbs.add_parser(
        "verify",
        help="check a ledger: no entry changed, missing or reordered; exit code 1 if one is",
        epilog="example: tundish audit verify /var/lib/tundish --head 5f0c…",
    )
    verify.add_argument("--head", default="", metavar="HASH", help="a head noted earlier, which must still be in it")
    verify.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    report = verbs.add_parser(
        "report",
        help="write what left a gateway's site, or what an aggregator did and received, as one HTML page and one CSV",
        epilog="example: tundish audit report /var/lib/tundish --out what-left",
    )
    report.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for report.html and the CSV")
    export = verbs.add_parser(
        "export",
        help="write a ledger into one file, by which an auditor checks it without this machine",
        epilog="example: tundish audit export /var/lib/tundish --out cell2-ledger.jsonl",
    )
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")
    for name, verb in (("verify", verify), ("report", report), ("export", export)):
        verb.add_argument("place", type=Path, metavar="PLACE", help="state folder, or an exported ledger")
        verb.set_defaults(run=_audit(name))
    for verb in (verify, report):
        verb.add_argument("--key", default="", metavar="HEX", help="public key that must have signed it")


def _audit(verb: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        from edge import audit  # noqa: PLC0415

        work: Callable[[argparse.Namespace], int] = getattr(audit, verb)
        return work(args)

    return run


# Verbs of `tundish edge`: what each does, and the arguments of an example.
_EDGE = {
    "run": ("read, score, train and federate until stopped", "-c gateway.toml --profile generic-arm64"),
    "check": (
        "check gateway.toml, its tags files and (with --task) the wiring of a task",
        "-c gateway.toml --task spindle-wear.toml",
    ),
    "status": ("show what a running gateway is doing; exit code 1 if none runs", "-c gateway.toml --json"),
    "doctor": (
        "go every step from this machine to the first good values and to the broker, and explain what fails",
        "-c gateway.toml --source plc1",
    ),
    "wire": (
        "propose which tags are the signals of a task; written only when you accept it",
        "spindle-wear.toml -c gateway.toml --source plc1",
    ),
    "export": (
        "write the request by which the operator enrols this gateway, or its updates, to go by file",
        "-c gateway.toml --request /media/stick/cell2.request",
    ),
    "import": (
        "take up what the operator gave, a file or a token: certificate and federation, or models and receipts",
        "/media/stick/cell2.admission -c gateway.toml",
    ),
}


def _add_edge(commands: Any) -> None:
    edge = commands.add_parser("edge", help="the gateway: run it, check its files, ask how it is")
    verbs = edge.add_subparsers(metavar="VERB", required=True)
    made: dict[str, argparse.ArgumentParser] = {}
    for name, (what, example) in _EDGE.items():
        made[name] = verb = verbs.add_parser(name, help=what, epilog=f"example: tundish edge {name} {example}")
        verb.add_argument("-c", "--config", type=Path, required=name not in {"check", "status"}, help="gateway.toml")
        verb.add_argument("--profile", help="board in firmware-configs/ whose caps apply where the file says nothing")
        if name != "check":
            verb.add_argument("--state", type=Path, help="state folder (default: the platform's state directory)")
        if name in {"check", "status", "doctor", "wire"}:
            verb.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    _add_browse(verbs)
    _add_wire(made["wire"])
    made["run"].set_defaults(run=_run)
    made["status"].add_argument("--tags", action="store_true", help="also show every tag's last good value")
    made["status"].set_defaults(run=_status)
    check = made["check"]
    check.add_argument("--task", type=Path, action="append", default=[], help="task.toml to check the wiring of")
    check.add_argument("--schema", action="store_true", help="print the JSON Schema of gateway.toml, for editors")
    check.set_defaults(run=_check)
    made["doctor"].add_argument("--source", metavar="NAME", help="look at this source alone")
    made["doctor"].set_defaults(run=_doctor)
    group = made["export"].add_mutually_exclusive_group(required=True)
    group.add_argument("--request", type=Path, metavar="FILE", help="where to write the request for enrolment")
    group.add_argument("--updates", type=Path, metavar="FILE", help="where to write what has no receipt yet")
    made["export"].set_defaults(run=_identity("export"))
    help_ = "what tundish broker enrol wrote or printed, or tundish broker export wrote"
    made["import"].add_argument("file", metavar="FILE|TOKEN", help=help_)
    made["import"].set_defaults(run=_identity("import_any"))


def _add_wire(wire: argparse.ArgumentParser) -> None:
    wire.add_argument("task", type=Path, metavar="TASK", help="task.toml")
    wire.add_argument(
        "--source", action="append", default=[], metavar="NAME", help="take tags of this source (default: all)"
    )
    wire.add_argument("--top", type=int, default=3, metavar="N", help="tags to show for each signal (default 3)")
    wire.add_argument("--offline", action="store_true", help="do not read values of the sources")
    wire.add_argument("--accept", action="store_true", help="write the first tag of each signal into gateway.toml")
    wire.add_argument("--replace", action="store_true", help="with --accept: replace what is wired now")
    wire.set_defaults(run=_wire)


def _add_browse(verbs: Any) -> None:
    browse = verbs.add_parser(
        "browse",
        help="show what an OPC UA server has, and write a tags CSV to begin with",
        epilog="example: tundish edge browse opc.tcp://10.0.0.10:4840 --filter 'Line1.*' --write plc1.csv",
    )
    browse.add_argument("url", metavar="URL", help="opc.tcp://HOST[:4840]")
    browse.add_argument("--node", default="", help="where to begin (default: the Objects folder)")
    browse.add_argument(
        "--depth", type=int, default=10, help="levels to open; 1 lists what lies in the node (default 10)"
    )
    browse.add_argument("--filter", default="*", metavar="GLOB", help="names to show, such as 'Line1.*'")
    browse.add_argument("--write", type=Path, metavar="FILE", help="write the tags to this CSV")
    browse.add_argument("--force", action="store_true", help="replace FILE if it exists")
    browse.add_argument("--security", help="policy and mode, as in gateway.toml")
    browse.add_argument("--user", help="user name")
    browse.add_argument("--password-file", type=Path, help="file that holds the password")
    browse.add_argument("--user-certificate", type=Path, help="certificate of a user, instead of --user")
    browse.add_argument("--user-key", type=Path, help="its key")
    browse.add_argument(
        "--state", type=Path, metavar="DIR", help="the gateway's state folder, which has the certificates"
    )
    browse.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    browse.set_defaults(run=_browse)


def _browse(args: argparse.Namespace) -> int:
    from edge.browse import main as browse  # noqa: PLC0415

    return browse(args)


def _load(args: argparse.Namespace) -> Any:
    from edge.config import load_config, profile_path  # noqa: PLC0415

    return load_config(args.config, profile_path(args.profile) if args.profile else None)


def _state(args: argparse.Namespace) -> Path:
    """Where the state is; where that is said, a gateway.toml that is being edited need not be right."""
    from edge.config import said_folder, state_folder  # noqa: PLC0415

    said = said_folder(args.state)
    if said is not None:
        return said
    if args.config is None:
        raise UserError("--config", 0, "", "missing", "write -c gateway.toml, or --state DIR")
    return state_folder(_load(args), None)


def _run(args: argparse.Namespace) -> int:
    from edge.agent import Agent  # noqa: PLC0415
    from edge.config import state_folder  # noqa: PLC0415
    from edge.heap import share_one_heap  # noqa: PLC0415

    share_one_heap()
    config = _load(args)

    async def run() -> None:
        await Agent(config, state_folder(config, args.state), partial(_load, args)).run()

    asyncio.run(run())
    return 0


def _identity(function: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        from edge import identity  # noqa: PLC0415
        from edge.config import state_folder  # noqa: PLC0415

        config = _load(args)
        work: Callable[..., int] = getattr(identity, function)
        return work(args, config, state_folder(config, args.state))

    return run


def _wire(args: argparse.Namespace) -> int:
    from edge.config import state_folder  # noqa: PLC0415
    from edge.propose_command import main as wire  # noqa: PLC0415

    config = _load(args)
    logging.getLogger().setLevel(logging.CRITICAL)  # a source that does not answer is no error here
    return wire(args, config, state_folder(config, args.state))


def _doctor(args: argparse.Namespace) -> int:
    from edge.config import state_folder  # noqa: PLC0415
    from edge.doctor import main as doctor  # noqa: PLC0415

    config = _load(args)
    logging.getLogger().setLevel(logging.CRITICAL)  # what fails is said once, by its step
    return doctor(args, config, state_folder(config, args.state))


def _check(args: argparse.Namespace) -> int:
    if args.schema:
        from edge.schema import gateway_schema  # noqa: PLC0415

        print(json.dumps(gateway_schema(), indent=2))
        return 0
    if args.config is None:
        raise UserError("--config", 0, "", "missing", "write -c gateway.toml")
    from edge.wiring import unit_notes, unknown_units, wire, wiring_notes  # noqa: PLC0415
    from models.spec import load_task  # noqa: PLC0415
    from models.width import unfit  # noqa: PLC0415

    config = _load(args)
    notes = unknown_units(config.tags.values())
    checked = set[str]()
    for path in args.task:
        task, _ = load_task(path)
        if task.name not in config.tasks:
            known = ", ".join(config.tasks) or "none"
            remedy = f"add [task.{task.name}] with signals = {{ … }}; wired now: {known}"
            raise UserError(config.file, 0, f"task.{task.name}", "is not wired", remedy)
        table = config.tasks[task.name]
        if problem := unfit(task, table.width):
            raise UserError(config.file, 0, f"task.{task.name}.width", problem, "leave it out, or write 1")
        wiring = wire(task, table, config.tags, config.file)
        notes += wiring_notes(task, table, config.tags, config.sources)
        notes += unit_notes(task, wiring, config.tags)
        checked.add(task.name)
    for name in config.tasks:
        if name not in checked:
            how = f"add --task FILE with the task.toml of {name}, which the operator has"
            notes.append(f"task {name}: not checked whether there is one of that name, nor its signals; {how}")
    found = {"file": config.file, "sources": len(config.sources), "tags": len(config.tags), "tasks": list(config.tasks)}
    found["notes"] = notes
    if args.json:
        print(json.dumps(found))
    else:
        sources, tags = counted(len(config.sources), "source"), counted(len(config.tags), "tag")
        print(f"{config.file}: ok ({sources}, {tags}, tasks: {', '.join(config.tasks)})")
        print("".join(f"  {note}\n" for note in notes), end="")
    return 0


def _status(args: argparse.Namespace) -> int:
    from edge.status_command import main as status  # noqa: PLC0415

    return status(_state(args), tags=args.tags, as_json=args.json)


def _demo(args: argparse.Namespace) -> int:
    from edge.lab.demo import main as demo  # noqa: PLC0415

    return demo(args)


def _simulate(args: argparse.Namespace) -> int:
    from edge.lab.simulate import main as simulate  # noqa: PLC0415

    return simulate(args)


def main(argv: list[str] | None = None) -> int:
    """Run one command: 0 done, 1 it says no, 2 somebody's input is wrong (one line on standard error says what).

    141 if whoever read standard output has gone (`| head -1`), as a shell says of a command that SIGPIPE ended.
    """
    try:
        try:
            return _command(argv)
        finally:
            print(end="", flush=True)  # here, since an error at the interpreter's end is caught by nobody
    except BrokenPipeError:
        # What is in the buffer still goes somewhere: https://docs.python.org/3/library/signal.html#note-on-sigpipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _SIGPIPE


def _command(argv: list[str] | None) -> int:
    level = os.environ.get("TUNDISH_LOG", "INFO").upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    arguments = sys.argv[1:] if argv is None else argv
    args = build_parser(next(iter(arguments), "")).parse_args(arguments)
    try:
        code: int = args.run(args)
    except (UserError, PeerError) as error:
        print(f"tundish: {error}", file=sys.stderr)
        return 2
    except TundishError as error:
        print(f"tundish: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
