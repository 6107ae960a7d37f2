"""The command line of `tundish bench`; what one kind needs is imported when it runs."""

import argparse
import json
from pathlib import Path
from typing import Any


def add_kinds(kinds: Any) -> None:
    """Mount the kinds of bench."""
    footprint = _kind(kinds, "footprint", "resident memory of a scoring gateway beside that of its imports alone")
    footprint.set_defaults(run=_footprint)
    ingest = _kind(
        kinds, "ingest", "values per CPU-second of drivers and store beside raw clients of the same libraries"
    )
    ingest.add_argument("--seconds", type=float, default=4.0, help="length of one measurement (default 4)")
    ingest.add_argument("--rounds", type=int, default=5, help="pairs of raw and ours (default 5)")
    ingest.add_argument("--soak", type=float, default=0.0, metavar="SECONDS", help="instead, watch memory for so long")
    ingest.add_argument("--data", type=Path, help="store this recorded data (.npz) instead of the simulated spindles")
    ingest.set_defaults(run=_ingest)
    codec = _kind(kinds, "codec", "bytes, time and lost accuracy of every way to send an update, in one run")
    codec.add_argument("--data", type=Path, help="train on this recorded data (.npz) instead of the simulated spindles")
    codec.add_argument("--rounds", type=int, default=16, help="rounds of each federation (default 16)")
    codec.add_argument("--seeds", type=int, default=1, help="federations for each codec (default 1)")
    codec.set_defaults(run=_codec)
    aggregate = _kind(kinds, "aggregate", "decode and sum 1,000 updates, beside numpy that adds 1,000 float32 vectors")
    aggregate.set_defaults(run=_aggregate)
    infer = _kind(kinds, "infer", "a window from its last value to its published score, beside a bare session's run")
    infer.add_argument("--windows", type=int, default=2000, help="windows of each measurement (default 2000)")
    infer.set_defaults(run=_infer)


def _kind(kinds: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=text, epilog=f"example: tundish bench {name} --json")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    return parser


def _footprint(args: argparse.Namespace) -> int:
    from edge.lab.footprint import main  # noqa: PLC0415

    return main(as_json=args.json)


def _ingest(args: argparse.Namespace) -> int:
    from edge.lab.ingest import main  # noqa: PLC0415

    return main(seconds=args.seconds, rounds=args.rounds, soak=args.soak, data=args.data, as_json=args.json)


def _codec(args: argparse.Namespace) -> int:
    from edge.lab.bench_codec import measure  # noqa: PLC0415

    return _say(measure(args.data, args.rounds, args.seeds), as_json=args.json)


def _aggregate(args: argparse.Namespace) -> int:
    from edge.lab.bench_aggregate import measure  # noqa: PLC0415

    return _say(measure(), as_json=args.json)


def _infer(args: argparse.Namespace) -> int:
    from edge.lab.bench_infer import measure  # noqa: PLC0415

    return _say(measure(args.windows), as_json=args.json)


def _say(found: dict[str, Any], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(found))
        return 0
    for key, value in found.items():
        if isinstance(value, list):
            for row in value:
                print("  " + "  ".join(f"{name} {one}" for name, one in row.items()))
        else:
            print(f"{key:<20}{value}")
    return 0
