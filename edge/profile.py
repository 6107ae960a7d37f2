"""A board's file in firmware-configs/ -> frozen typed values: what it is, what was tested on it, and its caps.

A board file is complete: every key stands in it, so that adding a board is one file that says all. The caps hold
where gateway.toml says nothing.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from models.tomlfile import read_toml, size_bytes

_MIB = 1 << 20
# Importing torch alone takes about 270 MB; a training child under this cap would never finish.
LEAST_TRAINING = 512 * _MIB
LEAST_STORE = 64 * _MIB

Threads = Annotated[int, msgspec.Meta(ge=1, le=256)]
Device = Annotated[str, msgspec.Meta(pattern=r"^/dev/[A-Za-z0-9_/-]+$")]
Text = Annotated[str, msgspec.Meta(min_length=1)]


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the file's tables."""


class Board(_Struct, frozen=True, kw_only=True):
    """The hardware. `tested` and `untested` say what is known of it and how; neither may be empty."""

    description: Text
    arch: Literal["x86_64", "aarch64"]
    serial_ports: tuple[Device, ...]
    tested: Annotated[tuple[Text, ...], msgspec.Meta(min_length=1)]
    untested: Annotated[tuple[Text, ...], msgspec.Meta(min_length=1)]


class Training(_Struct, frozen=True, kw_only=True):
    """Caps of the training child, as `[training]` of gateway.toml; it never outranks what scores."""

    threads: Threads
    memory: str
    cpu_seconds: Annotated[int, msgspec.Meta(ge=60)]
    nice: Annotated[int, msgspec.Meta(ge=1, le=19)]


class Scoring(_Struct, frozen=True, kw_only=True):
    """ONNX Runtime, as `[scoring]` of gateway.toml."""

    threads: Threads
    provider: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9]+ExecutionProvider$")]


class Store(_Struct, frozen=True, kw_only=True):
    """Bounds of the sample ring, as `[store]` of gateway.toml."""

    max_bytes: str
    max_days: int = 0


class Profile(_Struct, frozen=True, kw_only=True):
    """One board file."""

    board: Board
    training: Training
    scoring: Scoring
    store: Store

    def defaults(self) -> dict[str, dict[str, Any]]:
        """Give the tables that stand where gateway.toml says nothing, as TOML has them."""
        tables = {"training": self.training, "scoring": self.scoring, "store": self.store}
        return {name: msgspec.structs.asdict(table) for name, table in tables.items()}


def load_profile(path: Path) -> Profile:
    """Read and check one board file; UserError says file, line, key and remedy."""
    file = read_toml(path)
    profile = file.convert(Profile)
    sizes = (("training", "memory", LEAST_TRAINING), ("store", "max_bytes", LEAST_STORE))
    for table, key, least in sizes:
        text = profile.defaults()[table][key]
        try:
            size = size_bytes(text)
        except ValueError as error:
            raise file.error([table, key], str(error), 'write "512MiB" or "2GiB"') from None
        if size < least:
            raise file.error([table, key], f"{text} is too little", f'write "{least // _MIB}MiB" or more')
    return profile
