"""The unified namespace: every topic is formatted here and parsed here, and the two are inverse of each other.

ISA-95 levels at a fixed depth; functional segments begin with `_`; anything but `[A-Za-z0-9_-]` is refused, never
rewritten.

>>> path = GatewayPath.parse("acme/lyon/press/line4/cell2")
>>> Uplink(path, "spindle-wear", "update").topic
'acme/lyon/press/line4/cell2/_fl/spindle-wear/update'
>>> parse("acme/lyon/press/line4/cell2/_fl/spindle-wear/update").path == path
True
>>> parse("_fl/press-lines/spindle-wear/model/7/c0").version
7
"""

import re
from dataclasses import dataclass

from models.errors import PeerError

_SEGMENT = re.compile(r"[A-Za-z0-9_-]{1,64}")
LEVELS = 5
FL = "_fl"
RELEASE = "_release"


def segment(text: str) -> str:
    """Return the text if it can be one topic level; PeerError("topic") if not."""
    if not _SEGMENT.fullmatch(text):
        raise PeerError("topic", f"{text[:80]!r} is no topic level: use A-Z a-z 0-9 _ - (1 to 64)")
    return text


@dataclass(frozen=True)
class GatewayPath:
    """Where a gateway stands: enterprise/site/area/line/cell."""

    enterprise: str
    site: str
    area: str
    line: str
    cell: str

    @classmethod
    def parse(cls, text: str) -> "GatewayPath":
        """Inverse of `str()`; no level may begin with `_`, which marks functional segments."""
        levels = text.split("/")
        if len(levels) != LEVELS:
            raise PeerError("topic", f"{text[:400]!r} has {len(levels)} levels: write enterprise/site/area/line/cell")
        for level in levels:
            if segment(level).startswith("_"):
                raise PeerError("topic", f"level {level!r} begins with _, which marks functional segments")
        return cls(*levels)

    def __str__(self) -> str:
        return f"{self.enterprise}/{self.site}/{self.area}/{self.line}/{self.cell}"


@dataclass(frozen=True)
class Status:
    """A gateway's retained birth; its last will is the death."""

    path: GatewayPath

    @property
    def topic(self) -> str:
        """`…/_fl/status`."""
        return f"{self.path}/{FL}/status"


@dataclass(frozen=True)
class Accepted:
    """A gateway's retained word on the federation's charter."""

    path: GatewayPath

    @property
    def topic(self) -> str:
        """`…/_fl/charter`."""
        return f"{self.path}/{FL}/charter"


@dataclass(frozen=True)
class Uplink:
    """A signed message of a gateway for one task; `what` is `update`, `answer` or `vote`.

    `update` is one signed Update at QoS 1; nothing here is retained.
    """

    path: GatewayPath
    task: str
    what: str

    @property
    def topic(self) -> str:
        """`…/_fl/{task}/{what}`."""
        return f"{self.path}/{FL}/{self.task}/{self.what}"


@dataclass(frozen=True)
class Local:
    """What stays on the site: `_raw` of a tag, `_health` of a source; `_inference`, `_drift`, `_feedback` of a task."""

    path: GatewayPath
    what: str
    name: str

    @property
    def topic(self) -> str:
        """`…/_{what}/{name}`."""
        return f"{self.path}/_{self.what}/{self.name}"


@dataclass(frozen=True)
class FederationStatus:
    """The aggregator's retained status; its last will is the death."""

    federation: str

    @property
    def topic(self) -> str:
        """`_fl/{federation}/status`."""
        return f"{FL}/{self.federation}/status"


@dataclass(frozen=True)
class CharterInForce:
    """The federation's retained, signed charter."""

    federation: str

    @property
    def topic(self) -> str:
        """`_fl/{federation}/charter`."""
        return f"{FL}/{self.federation}/charter"


@dataclass(frozen=True)
class RosterOf:
    """A part of the federation's retained, signed roster: number 0 is the first one, and mostly all."""

    federation: str
    part: int

    @property
    def topic(self) -> str:
        """`_fl/{federation}/roster`, and `…/roster/{part}` from 1 on."""
        return f"{FL}/{self.federation}/roster" + (f"/{self.part}" if self.part else "")


@dataclass(frozen=True)
class RoundPlan:
    """The retained, signed plan of the task's latest round."""

    federation: str
    task: str

    @property
    def topic(self) -> str:
        """`_fl/{federation}/{task}/round`."""
        return f"{FL}/{self.federation}/{self.task}/round"


@dataclass(frozen=True)
class Manifest:
    """The retained, signed manifest of the task's newest model, or of the one that was released to a channel."""

    federation: str
    task: str
    of: str = "manifest"

    @property
    def topic(self) -> str:
        """`_fl/{federation}/{task}/model/manifest`, or `…/stable`, `…/canary`."""
        return f"{FL}/{self.federation}/{self.task}/model/{self.of}"


@dataclass(frozen=True)
class ReleaseFile:
    """One retained file of the metadata of releases (`broker.channels`)."""

    federation: str
    name: str

    @property
    def topic(self) -> str:
        """`_fl/{federation}/_release/{name}`."""
        return f"{FL}/{self.federation}/{RELEASE}/{self.name}"


@dataclass(frozen=True)
class Chunk:
    """One retained piece of a model; the manifest's signature covers its SHA-256."""

    federation: str
    task: str
    version: int
    chunk: str

    @property
    def topic(self) -> str:
        """`_fl/{federation}/{task}/model/{version}/{chunk}`."""
        return f"{FL}/{self.federation}/{self.task}/model/{self.version}/{self.chunk}"


@dataclass(frozen=True)
class ReceiptFor:
    """The signed receipt that lets one gateway's outbox delete."""

    federation: str
    task: str
    path: GatewayPath

    @property
    def topic(self) -> str:
        """`_fl/{federation}/{task}/receipt/{the gateway's five levels}`."""
        return f"{FL}/{self.federation}/{self.task}/receipt/{self.path}"


Topic = (
    Status
    | Accepted
    | Uplink
    | Local
    | FederationStatus
    | CharterInForce
    | RosterOf
    | ReleaseFile
    | RoundPlan
    | Manifest
    | Chunk
    | ReceiptFor
)

_MANIFESTS = ("manifest", "stable", "canary")
# What an aggregator, a gateway and a site bridge subscribe to.
ALL_STATUS = f"+/+/+/+/+/{FL}/status"
ALL_ACCEPTED = f"+/+/+/+/+/{FL}/charter"


def uplink_filter(task: str) -> str:
    """Filter for every gateway's uplink messages of one task."""
    return f"+/+/+/+/+/{FL}/{task}/+"


def downlink_filters(federation: str, task: str, path: GatewayPath) -> list[str]:
    """Filters for what one gateway reads of one task; `federation` may be `+` until one is pinned."""
    base = f"{FL}/{federation}/{task}"
    return [f"{base}/round", *(f"{base}/model/{of}" for of in _MANIFESTS), f"{base}/receipt/{path}"]


def common_filters(federation: str) -> list[str]:
    """Filters for what a federation says to all of its gateways, beside its tasks."""
    base = f"{FL}/{federation}"
    return [f"{base}/charter", f"{base}/roster", f"{base}/roster/+", f"{base}/{RELEASE}/+"]


def parse(topic: str) -> Topic:
    """Inverse of every `.topic`; PeerError("topic") for anything that none of them writes."""
    levels = topic.split("/")
    for level in levels:
        segment(level)
    found = _of_federation(levels) if levels[0] == FL else _of_gateway(levels)
    if found is None:
        raise PeerError("topic", f"{topic[:200]!r} is not in the topic tree")
    return found


def _of_federation(levels: list[str]) -> Topic | None:
    match levels:
        case ["_fl", federation, "status" | "charter" as what]:
            return FederationStatus(federation) if what == "status" else CharterInForce(federation)
        case ["_fl", federation, "roster"]:
            return RosterOf(federation, 0)
        case ["_fl", federation, "roster", part] if re.fullmatch(r"[1-9][0-9]{0,5}", part):
            return RosterOf(federation, int(part))
        case ["_fl", federation, "_release", name]:
            return ReleaseFile(federation, name)
        case ["_fl", federation, task, "round"]:
            return RoundPlan(federation, task)
        case ["_fl", federation, task, "model", "manifest" | "stable" | "canary" as of]:
            return Manifest(federation, task, of)
        case ["_fl", federation, task, "model", version, chunk] if re.fullmatch(r"0|[1-9][0-9]{0,17}", version):
            return Chunk(federation, task, int(version), chunk)
        case ["_fl", federation, task, "receipt", *path] if len(path) == LEVELS:
            return ReceiptFor(federation, task, GatewayPath.parse("/".join(path)))
    return None


def _of_gateway(levels: list[str]) -> Topic | None:
    match levels:
        case [_, _, _, _, _, "_fl", "status" | "charter" as what]:
            return (Status if what == "status" else Accepted)(GatewayPath.parse("/".join(levels[:LEVELS])))
        case [_, _, _, _, _, "_fl", task, what]:
            return Uplink(GatewayPath.parse("/".join(levels[:LEVELS])), task, what)
        case [_, _, _, _, _, "_raw" | "_inference" | "_drift" | "_feedback" | "_health" as what, name]:
            return Local(GatewayPath.parse("/".join(levels[:LEVELS])), what[1:], name)
    return None
