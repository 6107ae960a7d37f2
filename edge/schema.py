"""gateway.toml as a JSON Schema (draft 2020-12), for editors that complete and check while one writes.

It says what stands in the file alone; what the file names (tags, certificates) is for `tundish edge check`.
"""

from typing import Any

import msgspec

from edge.config import SOURCE_KEYS, GatewayFile
from edge.drivers import registry

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array"}


def gateway_schema() -> dict[str, Any]:
    """Return the schema: the tables from their types, a source's keys from the drivers that there are."""
    (ref,), parts = msgspec.json.schema_components([GatewayFile], ref_template="#/$defs/{name}")
    root = parts.pop(ref["$ref"].rpartition("/")[2])
    root["properties"]["source"]["items"] = {"oneOf": [_source(name) for name in registry.driver_names()]}
    return {"$schema": _DIALECT, **root, "title": "gateway.toml", "$defs": parts}


def _source(driver: str) -> dict[str, Any]:
    """Return what a [[source]] with this driver may hold."""
    keys: dict[str, Any] = {key: {"type": "string"} for key in SOURCE_KEYS} | {"driver": {"const": driver}}
    options = {key: {"type": _TYPES[kind]} for key, kind in registry.load(driver).OPTIONS.items()}
    return {
        "title": driver,
        "type": "object",
        "properties": keys | options,
        "required": list(SOURCE_KEYS),
        "additionalProperties": False,
    }
