"""`tundish edge browse`: what an OPC UA server has, as a table or as a tags CSV to begin with."""

import argparse
import asyncio
import csv
import fnmatch
import io
import json
import sys
from pathlib import Path

from asyncua import ua
from asyncua.ua.object_ids import ObjectIds

from edge.config import said_folder
from edge.doctor import handed_over
from edge.drivers._opcua_browse import MOST_NODES, Found, Tree, Walk
from edge.drivers._opcua_errors import explain
from edge.drivers._opcua_link import Link, server_url
from edge.drivers._opcua_nodes import parse_node
from edge.drivers._opcua_security import OPTIONS, Security
from edge.tags import Source
from edge.tagscsv import COLUMNS, MAX_TAGS
from models.commandline import counted
from models.errors import LocalError, UserError

_TIMEOUT_S = 10.0
_SHOWN = 20


def main(args: argparse.Namespace) -> int:
    """Browse as the command line says; 0, or 1 if the server can't be read to the end."""
    if args.write and args.write.exists() and not args.force:
        raise UserError("--write", 0, "", f"{args.write} exists", "name another file, or add --force")
    if args.depth < 1:
        raise UserError("--depth", 0, "", f"{args.depth} is out of range", "write 1 or more")
    source = _source(args)
    with handed_over(Path(source.pki).parent if source.pki else None):
        tree = asyncio.run(browse(source, args.node, args.depth, args.filter))
    tags = [found for found in tree.found if not found.reason]
    if args.write and tags:
        if len(tags) > MAX_TAGS:
            raise UserError("--filter", 0, "", f"{len(tags)} tags, {MAX_TAGS} fit a file", "narrow it, or --node")
        _write(args.write, tags)
    if args.json:
        print(json.dumps(_as_json(args, tree)))
    else:
        _show(tree, args.filter)
        if args.write and tags:
            print(f"{counted(len(tags), 'tag')} written to {args.write}")
    return 0 if tree.complete else 1


def _source(args: argparse.Namespace) -> Source:
    """Make a source of the options; what is wrong with them is told by their own names."""
    state = said_folder(args.state)
    options: dict[str, object] = {key: str(getattr(args, key)) for key in OPTIONS if getattr(args, key)}
    if args.security and args.security != "None" and state is None:
        raise UserError("--state", 0, "", "certificates lie in the gateway's state folder", "add --state DIR")
    pki = str(state / "pki") if state else ""
    return Source(name="browse", driver="opcua", url=args.url, tags=(), options=options, pki=pki)


async def browse(source: Source, node: str, depth: int, pattern: str) -> Tree:
    """Connect, walk from `node` (its text form; "" for the Objects folder) and close; UserError, LocalError."""
    try:
        url = server_url(source)
        link = Link(url, _TIMEOUT_S, Security(source))
    except UserError as error:
        key = "URL" if error.key == "url" else f"--{error.key.replace('_', '-')}"
        raise UserError(key, 0, "", error.problem, error.remedy) from None
    try:
        await link.open()
        start = _start(node, link.spaces)
        return await Walk(link, lambda name: fnmatch.fnmatchcase(name, pattern), _progress).run(start, depth)
    except UserError:
        raise
    except Exception as error:  # the boundary: the library raises bare exceptions too
        raise LocalError(explain(url, _TIMEOUT_S, error)) from error
    finally:
        await link.close()


def _start(text: str, spaces: list[str]) -> ua.NodeId:
    if not text:
        return ua.NodeId(ua.Int32(ObjectIds.ObjectsFolder))
    parsed = parse_node(text)
    if parsed is None:
        raise UserError(
            "--node", 0, "", f"{text!r} is not an OPC UA node", "write nsu=urn:plant;s=Line1 or ns=2;s=Line1"
        )
    uri, node = parsed
    if uri is None:
        return node
    if uri not in spaces:
        raise UserError("--node", 0, "", f"the server has no namespace {uri}", f"it has: {', '.join(spaces)}")
    return ua.NodeId(node.Identifier, ua.Int16(spaces.index(uri)))


def _progress(seen: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{seen} nodes", end="", file=sys.stderr, flush=True)


def _write(path: Path, tags: list[Found]) -> None:
    """Write a tags CSV, whole or not at all, with the mark by which Excel knows UTF-8."""
    text = io.StringIO()
    rows = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    rows.writeheader()
    for found in tags:
        rows.writerow({key: getattr(found, key) for key in ("tag", "address", "type", "unit", "description")})
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text.getvalue(), encoding="utf-8-sig")
        part.replace(path)
    except OSError as error:
        raise UserError("--write", 0, "", f"{path} can't be written: {error.strerror}", "name another file") from error


def _as_json(args: argparse.Namespace, tree: Tree) -> dict[str, object]:
    def row(found: Found, *keys: str) -> dict[str, str]:
        return {key: getattr(found, key) for key in keys}

    good = ("tag", "address", "type", "unit", "description")
    return {
        "url": args.url,
        "tags": [row(found, *good) for found in tree.found if not found.reason],
        "skipped": [row(found, "tag", "address", "reason") for found in tree.found if found.reason],
        "unopened": tree.unopened,
        "complete": tree.complete,
        "written": str(args.write) if args.write and any(not found.reason for found in tree.found) else None,
    }


def _show(tree: Tree, pattern: str) -> None:
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    tags = [found for found in tree.found if not found.reason]
    skipped = [found for found in tree.found if found.reason]
    rows = [("tag", "type", "unit", "address"), *((f.tag, f.type, f.unit, f.address) for f in tags)]
    rows += [(name, "(folder)", "", address) for name, address in tree.unopened.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip())
    if not tags:
        hint = "; --filter is compared with whole names, and * stands for anything" if pattern != "*" else ""
        print(f"no tag found{hint}")
    for found in skipped[:_SHOWN]:
        print(f"skipped {found.tag}: {found.reason}")
    if len(skipped) > _SHOWN:
        print(f"skipped {len(skipped) - _SHOWN} more (--json has all)")
    if tree.unopened:
        print(f"{len(tree.unopened)} folders were not opened; open one with --node, or all with a larger --depth")
    if not tree.complete:
        print(f"INCOMPLETE: more than {MOST_NODES} nodes; begin further down with --node")
