"""OPC UA: walk an address space and say of each variable what tag it makes, or why it makes none.

Browse and Read go in batches within the server's limits, with continuation points (Part 4, 5.8); of a value only its
type and length are kept. A node is opened once, however many ways lead to it.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from asyncua import ua
from asyncua.ua.attribute_ids import AttributeIds
from asyncua.ua.object_ids import ObjectIds
from asyncua.ua.status_codes import StatusCodes

from edge.drivers._opcua_link import Link, batches
from edge.drivers._opcua_nodes import format_node, parse_node

MOST_NODES = 200_000  # opened or read of one server; more is said to be incomplete
_MOST_REFERENCES = 1000  # of one node in one answer; the rest comes with continuation points
_MOST_NAME = 200
_MOST_WIDTH = 999_999  # of a waveform in a tags CSV
_READ = 100  # values in one answer: each may be an array
_UNIT = "EngineeringUnits"
_HIERARCHICAL = ua.NodeId(ua.Int32(ObjectIds.HierarchicalReferences))
_SERVER = ua.NodeId(ua.Int32(ObjectIds.Server))
# As in the driver: what fails is said once, by whoever asked.
logging.getLogger("asyncua").setLevel(logging.CRITICAL)

_CLASSES = ua.UInt32(ua.NodeClass.Object | ua.NodeClass.Variable | ua.NodeClass.Method)
_ALL_FIELDS = ua.UInt32(63)  # of a reference (Part 4, 5.8.2)
_TYPES = {
    ua.VariantType.Boolean: "bool",
    ua.VariantType.SByte: "int8",
    ua.VariantType.Byte: "uint8",
    ua.VariantType.Int16: "int16",
    ua.VariantType.UInt16: "uint16",
    ua.VariantType.Int32: "int32",
    ua.VariantType.UInt32: "uint32",
    ua.VariantType.Int64: "int64",
    ua.VariantType.UInt64: "uint64",
    ua.VariantType.Float: "float32",
    ua.VariantType.Double: "float64",
}
_DECLARED: dict[Any, str] = {kind.value: name for kind, name in _TYPES.items()}
_CLOSED = {StatusCodes.BadNotReadable, StatusCodes.BadUserAccessDenied, StatusCodes.BadNodeIdUnknown}
_TEXTS = {ua.VariantType.String, ua.VariantType.LocalizedText}


@dataclass
class Found:
    """One variable: what its row in a tags CSV says. `reason` says why it can be no tag; else it is empty."""

    tag: str
    address: str
    type: str = ""
    unit: str = ""
    description: str = ""
    reason: str = ""


@dataclass
class Tree:
    """What a walk found. `unopened` maps the objects below the last depth to their addresses."""

    found: list[Found] = field(default_factory=list)
    unopened: dict[str, str] = field(default_factory=dict)
    complete: bool = True


@dataclass
class _Place:
    """A node on the way: its path of browse names, and the variable that it is, if it is one."""

    node: ua.NodeId
    path: str
    found: Found | None = None


class Walk:
    """One walk over one server. `progress` is told how many nodes have been seen."""

    def __init__(self, link: Link, wanted: Callable[[str], bool], progress: Callable[[int], None]) -> None:
        self.tree = Tree()
        self._link, self._wanted, self._progress = link, wanted, progress
        self._seen: set[ua.NodeId] = {_SERVER}  # hundreds of counters that tell of no machine
        self._names: dict[str, int] = {}

    async def run(self, start: ua.NodeId, depth: int) -> Tree:
        """Open `start` and what lies below it, level by level; `depth` 1 opens `start` alone."""
        self._seen.discard(start)
        self._seen.add(start)
        level = [_Place(start, "")]
        for _ in range(depth):
            below: list[_Place] = []
            for part in batches(level, self._link.max_browses):
                below += await self._open(part)
                self._progress(len(self._seen))
                if len(self._seen) > MOST_NODES:
                    self.tree.complete = False
                    return self.tree
            level = below
            if not level:
                break
        # Variables of the last level are opened for their units alone.
        for part in batches([place for place in level if place.found is not None], self._link.max_browses):
            await self._open(part, deeper=False)
        self.tree.unopened = {p.path: self._address(p.node) for p in level if p.found is None}
        return self.tree

    async def _open(self, places: Sequence[_Place], *, deeper: bool = True) -> list[_Place]:
        """Browse some nodes at once, read the variables among their children, and return the children to open."""
        units: dict[int, ua.NodeId] = {}
        variables: list[_Place] = []
        children: list[_Place] = []
        for place, reference in await self._references(places):
            node = ua.NodeId(reference.NodeId.Identifier, reference.NodeId.NamespaceIndex)
            if place.found is not None and reference.BrowseName.Name == _UNIT:
                units[id(place.found)] = node
                continue
            if node in self._seen or not deeper:
                continue
            self._seen.add(node)
            child = _Place(node, _join(place.path, reference.BrowseName.Name or ""))
            if reference.NodeClass == ua.NodeClass.Variable:
                if _is_property(reference):
                    continue
                child.found = self._note(child, reference)
                variables.append(child)
            elif reference.NodeClass == ua.NodeClass.Method:
                self._skip(child, "a method")
                continue
            children.append(child)
        await self._read_units([place.found for place in places if place.found is not None], units)
        await self._read_types(variables)
        return children

    async def _references(self, places: Sequence[_Place]) -> list[tuple[_Place, Any]]:
        """Return the forward hierarchical references of some nodes, however many answers that takes."""
        params = ua.BrowseParameters()
        params.RequestedMaxReferencesPerNode = _MOST_REFERENCES
        for place in places:
            wanted = ua.BrowseDescription(place.node, ua.BrowseDirection.Forward, _HIERARCHICAL, IncludeSubtypes=True)
            wanted.NodeClassMask, wanted.ResultMask = _CLASSES, _ALL_FIELDS
            params.NodesToBrowse.append(wanted)
        out: list[tuple[_Place, Any]] = []
        left = list(zip(places, await self._link.session.browse(params), strict=True))
        while left:
            out += [(place, reference) for place, result in left for reference in result.References or ()]
            if len(self._seen) + len(out) > MOST_NODES:
                self.tree.complete = False
                return out
            # A point without references would let a server hold us here for ever.
            more = [(place, result) for place, result in left if result.ContinuationPoint and result.References]
            if not more:
                return out
            again = ua.BrowseNextParameters(
                ReleaseContinuationPoints=False, ContinuationPoints=[result.ContinuationPoint for _, result in more]
            )
            results = await self._link.session.browse_next(again)
            left = [(place, result) for (place, _), result in zip(more, results, strict=True)]
        return out

    def _note(self, place: _Place, reference: Any) -> Found:
        shown = reference.DisplayName.Text or ""
        name = reference.BrowseName.Name or ""
        found = Found(place.path, self._address(place.node), description=clean(shown) if shown != name else "")
        if parse_node(found.address) is None or clean(found.address) != found.address:
            found.reason = "its address does not go into one cell of a CSV"
        return found

    def _skip(self, place: _Place, reason: str) -> None:
        if self._wanted(place.path):
            self.tree.found.append(Found(place.path, self._address(place.node), reason=reason))

    async def _read_types(self, variables: Sequence[_Place]) -> None:
        """Read values for their types, and take those whose name is wanted into the tree."""
        wanted = [place for place in variables if self._wanted(place.path)]
        for part in batches(wanted, min(_READ, self._link.max_reads)):
            values = await self._link.read([place.node for place in part])
            unset = [place.node for place, data in zip(part, values, strict=True) if _unset(data)]
            declared = await self._declared(unset) if unset else {}
            for place, data in zip(part, values, strict=True):
                found = place.found
                if found is None:
                    continue
                if not found.reason:
                    found.type, found.reason = declared.get(place.node) or _tag_type(data)
                if not found.reason:
                    found.tag = self._unique(found.tag)
                self.tree.found.append(found)

    async def _declared(self, nodes: list[ua.NodeId]) -> dict[ua.NodeId, tuple[str, str]]:
        """Say by their declaration what scalars are that have no value yet."""
        kinds = await self._link.session.read_attributes(nodes, AttributeIds.DataType)
        ranks = await self._link.session.read_attributes(nodes, AttributeIds.ValueRank)
        out = {}
        for node, kind, rank in zip(nodes, kinds, ranks, strict=True):
            id_: Any = kind.Value.Value if kind.Value is not None else None
            if isinstance(id_, ua.NodeId) and id_.NamespaceIndex == 0 and rank.Value is not None:
                name = _DECLARED.get(id_.Identifier)
                if name and rank.Value.Value == ua.ValueRank.Scalar:
                    out[node] = (name, "")
        return out

    async def _read_units(self, founds: Sequence[Found], units: dict[int, ua.NodeId]) -> None:
        """Read the engineering units of variables (EUInformation, Part 8, 5.6.4.3)."""
        mine = [found for found in founds if id(found) in units]
        for part in batches(mine, self._link.max_reads):
            values = await self._link.session.read_attributes([units[id(f)] for f in part], AttributeIds.Value)
            for found, data in zip(part, values, strict=True):
                unit = getattr(data.Value.Value, "DisplayName", None) if data.Value is not None else None
                found.unit = clean(unit.Text or "") if unit is not None else ""

    def _unique(self, name: str) -> str:
        """Return a name that no other tag of this walk has."""
        count = self._names[name] = self._names.get(name, 0) + 1
        return name if count == 1 else self._unique(f"{name}_{count}")

    def _address(self, node: ua.NodeId) -> str:
        return format_node(node, self._link.spaces)


def clean(text: str) -> str:
    """Return a peer's text as one printable line that no spreadsheet takes for a formula."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[:_MOST_NAME])
    return line.strip().lstrip("=+-@").strip()


def _join(path: str, name: str) -> str:
    part = re.sub(r"[^\w.\-]+", "_", name).strip("_-.") or "node"
    return f"{path}.{part}"[-_MOST_NAME:].strip(".-_") if path else part[:_MOST_NAME]


def _is_property(reference: Any) -> bool:
    """Say whether a variable describes another node (Part 3, 7.7, HasProperty) and measures nothing."""
    kind = reference.ReferenceTypeId
    return bool(kind.NamespaceIndex == 0 and kind.Identifier == ObjectIds.HasProperty)


def _unset(data: ua.DataValue) -> bool:
    """Say whether a variable that may be read has no value now."""
    closed = data.StatusCode is not None and data.StatusCode.value in _CLOSED
    return not closed and (data.Value is None or data.Value.Value is None)


def _tag_type(data: ua.DataValue) -> tuple[str, str]:
    """Return what the type column says of a value, and why it can be no tag."""
    status = data.StatusCode
    if status is not None and status.is_bad():
        return "", f"the server gives no value: {status.name}"
    variant = data.Value
    if variant is None or variant.Value is None:
        return "", "it has no value, so its type is not known"
    kind, value = variant.VariantType, variant.Value
    name = getattr(kind, "name", str(kind))
    if variant.Dimensions is not None and len(variant.Dimensions) > 1:
        return "", "a matrix"
    if isinstance(value, list):
        if kind not in _TYPES:
            return "", f"an array of {name}"
        if not 0 < len(value) <= _MOST_WIDTH:
            return "", f"an array of {len(value)} values now; a waveform has one length"
        return f"float32[{len(value)}]", ""
    if kind in _TEXTS:
        return "string", ""
    return (_TYPES[kind], "") if kind in _TYPES else ("", f"of type {name}")
