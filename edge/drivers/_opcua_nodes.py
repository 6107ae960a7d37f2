"""OPC UA addresses as people write them: the standard's text form (Part 6, 5.3.1.10)."""

import base64
import re
import uuid
from typing import Any
from urllib.parse import quote, unquote

from asyncua import ua

from edge.tags import Tag
from models.errors import UserError

_ADDRESS = re.compile(r"(?:nsu=(?P<uri>[^;]+);|ns=(?P<ns>\d{1,5});)?(?P<kind>[isgb])=(?P<id>.+)", re.DOTALL)
_MOST_UINT32 = 2**32 - 1
_MOST_UINT16 = 2**16 - 1


def parse_address(tag: Tag) -> tuple[str | None, ua.NodeId]:
    """Parse a tag's address into namespace URI (None: the index stands in the node) and node; UserError."""
    parsed = parse_node(tag.address)
    if parsed is None:
        remedy = "write nsu=urn:plant;s=Spindle.Temp, ns=2;s=Spindle.Temp or ns=2;i=1001"
        if tag.address.startswith(("ns=", "nsu=")) and ";" not in tag.address:
            remedy += ", in quotes where semicolons part the cells"
        raise UserError(tag.file, tag.line, "address", f"{tag.address!r} is not an OPC UA node", remedy)
    return parsed


def parse_node(text: str) -> tuple[str | None, ua.NodeId] | None:
    """Parse the text form into namespace URI and node; None if it is none."""
    match = _ADDRESS.fullmatch(text.strip())
    identifier = _identifier(match["kind"], match["id"]) if match else None
    space = int(match["ns"] or 0) if match else 0
    if match is None or identifier is None or space > _MOST_UINT16:
        return None
    return unquote(match["uri"]) if match["uri"] else None, ua.NodeId(identifier, ua.Int16(space))


def _identifier(kind: str, text: str) -> Any:
    """Return what follows `s=`, `i=`, `g=` or `b=` as the library wants it; None if it is no such thing."""
    try:
        if kind == "i":
            return ua.Int32(text) if 0 <= int(text) <= _MOST_UINT32 else None
        if kind == "g":
            return uuid.UUID(text)
        return text if kind == "s" else base64.b64decode(text, validate=True)
    except ValueError:
        return None


def format_node(node: ua.NodeId, spaces: list[str]) -> str:
    """Write a node with its namespace's URI, which outlives a renumbering; by index where the server names none."""
    text: Any = node.Identifier
    kind = "s"
    if isinstance(text, uuid.UUID):
        kind = "g"
    elif isinstance(text, bytes):
        kind, text = "b", base64.b64encode(text).decode()
    elif isinstance(text, int):
        kind = "i"
    space = node.NamespaceIndex
    if space == 0:
        return f"{kind}={text}"
    if space < len(spaces):
        # Only what would end the URI early is escaped (Part 6, 5.3.1.10).
        return f"nsu={quote(spaces[space], safe=':/?#[]@!$&()*+,=~ ')};{kind}={text}"
    return f"ns={space};{kind}={text}"
