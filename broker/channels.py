"""Releases, what both sides know of them: names, bounds, and what a release says of a model.

A federation whose federation.toml has `[release]` tells its gateways with which model to score by metadata of The
Update Framework (https://theupdateframework.github.io/specification/v1.0.34/), as retained messages below
`_fl/{federation}/_release/`: `root1`, `root2`, …, `timestamp`, `snapshot`, `targets`, and the delegated roles `stable`,
whose keys are the operators' and offline, and `canary`, whose key is the aggregator's. A target is the weights of one
task for one channel: `stable/{task}`, or `canary/{gateway path}/{task}`, where the delegation, which the offline keys
sign, names the gateways. Its length and SHA-256 are those of the weights as little-endian float32 in layout order.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import msgspec

from models.delta import Layout
from models.errors import PeerError
from models.spec import Task

Channel = Literal["stable", "canary"]
CHANNELS: tuple[Channel, ...] = get_args(Channel)
# The first root, in an envelope that the aggregator signs: what a gateway pins.
FIRST = "first"
# Of one file of metadata. A root of eight keys has some 3 kB, canary some 300 bytes a gateway and task.
MAX_METADATA = 64 * 1024
MAX_ROOTS = 32
_NAME = re.compile(rf"{FIRST}|timestamp|snapshot|targets|{'|'.join(CHANNELS)}|root([1-9][0-9]?)")
# What of a task says how a model scores.
_SCORES = ("name", "kind", "net", "window", "signal", "personal", "target", "alarm")


class Custom(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a target says beside length and SHA-256; `model` is `model_digest`, hex. A higher release is newer."""

    release: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    version: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    model: str


@dataclass(frozen=True)
class Released:
    """A release for one task and channel, as verified metadata says it: `size` bytes of weights with this SHA-256.

    `key` is the id of the online key that signed; under another one, numbers of releases begin anew.
    """

    channel: Channel
    release: int
    version: int
    model: str
    size: int
    digest: bytes
    key: str


def check_name(name: str) -> None:
    """PeerError("topic") unless a file of metadata is called that."""
    match = _NAME.fullmatch(name)
    if match is None or int(match[1] or 1) > MAX_ROOTS:
        raise PeerError("topic", f"{name[:80]!r} is no metadata of releases")


def target_of(channel: Channel, task: str, path: str) -> str:
    """The target path of a task's release, for the gateway of a path."""
    return f"stable/{task}" if channel == "stable" else f"canary/{path}/{task}"


def model_digest(task: Task, layout: Layout, graph_digest: bytes) -> str:
    """SHA-256 (hex) of what beside its weights makes a model's scores: task, layout and graph."""
    scores = [msgspec.to_builtins(getattr(task, key)) for key in _SCORES]
    text = msgspec.json.encode([scores, layout.to_wire(), graph_digest.hex()])
    return hashlib.sha256(text).hexdigest()
