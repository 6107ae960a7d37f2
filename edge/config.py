"""gateway.toml, its tags CSVs and a board profile -> frozen typed values: the gateway's only reader of user files."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from broker.settings import MqttSettings, check_mqtt
from broker.topics import GatewayPath, segment
from edge.drivers import registry
from edge.hours import Rule, parse_rule
from edge.profile import Profile, load_profile
from edge.tags import Sample, Source, Tag
from edge.tagscsv import parse_tags
from edge.window import Condition, parse_gate
from models.errors import PeerError, UserError
from models.tomlfile import TomlFile, read_toml, seconds, size_bytes
from models.width import WIDTHS

SOURCE_KEYS = ("name", "driver", "url", "tags")


# What stands in a refusal, and in an editor.
_KEY = "the 64 digits of the public key that tundish broker status prints, in lower case"
_CHARTER = "the 64 digits that sha256sum charter.toml prints, in lower case"


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the file's tables."""


class GatewayTable(_Struct, frozen=True, kw_only=True):
    """Who this gateway is. `publish_raw` lists tags whose values also go to `_raw/`, on this site's broker."""

    path: str
    publish_raw: tuple[str, ...] = ()


class FederationTable(_Struct, frozen=True, kw_only=True):
    """Which federation to follow, and its key (hex); without them the first one seen is pinned and logged."""

    name: str | None = None
    key: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", description=_KEY)] | None = None


class TaskTable(_Struct, frozen=True, kw_only=True):
    """How this gateway wires one task: the task's signals, target, gate and segment to its own tags.

    `width` is the part of the net that it trains and sends (`models.width`).
    """

    signals: dict[str, str]
    target: str | None = None
    active_when: str | None = None
    segment: str | None = None
    max_lag: str = "2s"
    width: float = 1

    @property
    def gate(self) -> tuple[Condition, ...]:
        """The conditions of `active_when`; ValueError says what is wrong with them."""
        return parse_gate(self.active_when) if self.active_when else ()


class Policy(_Struct, frozen=True, kw_only=True):
    """What this gateway allows; a plan that asks for less protection is declined, and scoring goes on.

    `charter` is the SHA-256 of the federation's charter, once this site has accepted it.
    """

    federate: bool = True
    min_gateways: int = 1
    secure_aggregation: Literal["required", "allowed"] = "allowed"
    max_epsilon: float | None = None
    charter: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", description=_CHARTER)] | None = None


class StoreTable(_Struct, frozen=True, kw_only=True):
    """Bounds of the sample ring; `max_days` 0 is none."""

    max_bytes: str = "1GiB"
    max_days: int = 0


class TrainingTable(_Struct, frozen=True, kw_only=True):
    """Caps of the training child: threads, memory, CPU seconds of one training, `nice` value; and when it may start."""

    threads: int = 1
    memory: str = "1536MiB"
    cpu_seconds: int = 3600
    nice: int = 19
    train_when: str | None = None

    @property
    def rule(self) -> Rule | None:
        """When training may start, None for always; ValueError says what is wrong with `train_when`."""
        return None if self.train_when is None else parse_rule(self.train_when)


class ScoringTable(_Struct, frozen=True, kw_only=True):
    """ONNX Runtime: threads of one session, and the execution provider."""

    threads: int = 1
    provider: str = "CPUExecutionProvider"


class GatewayFile(_Struct, frozen=True, kw_only=True):
    """The whole file as it is written; a source's keys are checked against its driver."""

    gateway: GatewayTable
    mqtt: MqttSettings
    source: tuple[dict[str, Any], ...] = ()
    task: dict[str, TaskTable] = {}
    federation: FederationTable = FederationTable()
    policy: Policy = Policy()
    store: StoreTable = StoreTable()
    training: TrainingTable = TrainingTable()
    scoring: ScoringTable = ScoringTable()


class Config(_Struct, frozen=True, kw_only=True):
    """Everything that `tundish edge run` needs, checked."""

    file: str
    path: GatewayPath
    publish_raw: dict[str, str]
    mqtt: MqttSettings
    sources: tuple[Source, ...]
    tasks: dict[str, TaskTable]
    federation: FederationTable
    policy: Policy
    store_bytes: int
    store_days: int
    training: TrainingTable
    training_memory: int
    scoring: ScoringTable

    @property
    def tags(self) -> dict[str, Tag]:
        """Every tag by its ref."""
        return {tag.ref: tag for source in self.sources for tag in source.tags}

    @property
    def meanings(self) -> dict[str, str]:
        """Ref -> what makes a tag's stored values what they are."""
        return {tag.ref: source.meaning(tag) for source in self.sources for tag in source.tags}


def load_config(path: Path, profile: Path | None = None) -> Config:
    """Read and check gateway.toml and what it names; UserError says file, line, key and remedy."""
    file = read_toml(path)
    if profile is not None:
        _apply_profile(file, load_profile(profile))
    raw = file.convert(GatewayFile)
    try:
        gateway = GatewayPath.parse(raw.gateway.path)
    except PeerError as error:
        raise file.error(["gateway", "path"], error.detail, 'write "acme/lyon/press/line4/cell2"') from None
    sources = tuple(_source(file, i, table, path.parent) for i, table in enumerate(raw.source))
    names = [s.name for s in sources]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise file.error(["source", i, "name"], f"{name!r} is used twice", "give each source its own name")
    _check_caps(file, raw)
    tags = {tag.ref: tag for source in sources for tag in source.tags}
    for name, table in raw.task.items():
        _check_task(file, name, table, tags)
    _check_train_when(file, raw.training, tags)
    return Config(
        file=str(path),
        path=gateway,
        publish_raw=_raw_topics(file, raw.gateway.publish_raw, tags),
        mqtt=check_mqtt(file, raw.mqtt),
        sources=sources,
        tasks=raw.task,
        federation=raw.federation,
        policy=raw.policy,
        store_bytes=_size(file, ["store", "max_bytes"], raw.store.max_bytes),
        store_days=raw.store.max_days,
        training=raw.training,
        training_memory=_size(file, ["training", "memory"], raw.training.memory),
        scoring=raw.scoring,
    )


def _check_caps(file: TomlFile, raw: GatewayFile) -> None:
    """Bounds of numbers."""
    bounds = {
        ("training", "threads"): (raw.training.threads, 1, 256),
        ("training", "nice"): (raw.training.nice, 0, 19),
        ("training", "cpu_seconds"): (raw.training.cpu_seconds, 1, 10**7),
        ("scoring", "threads"): (raw.scoring.threads, 1, 256),
        ("store", "max_days"): (raw.store.max_days, 0, 36_500),
        ("policy", "min_gateways"): (raw.policy.min_gateways, 1, 10**6),
    }
    for key, (value, low, high) in bounds.items():
        if not low <= value <= high:
            raise file.error(list(key), f"{value} is out of range", f"write {low} to {high}")
    if raw.scoring.provider != ScoringTable().provider:
        import onnxruntime  # noqa: PLC0415 - only where something else than the default is asked for

        known = onnxruntime.get_available_providers()
        if raw.scoring.provider not in known:
            problem = f"{raw.scoring.provider!r} is not in this machine's ONNX Runtime"
            raise file.error(["scoring", "provider"], problem, f"write one of: {', '.join(known)}")


def _size(file: TomlFile, key: list[str | int], text: str) -> int:
    try:
        return size_bytes(text)
    except ValueError as error:
        raise file.error(key, str(error), 'write "512MiB" or "2GiB"') from None


def _own_keys(file: TomlFile, i: int, table: dict[str, Any]) -> None:
    for key in SOURCE_KEYS:
        if not isinstance(table.get(key), str):
            if key not in table and (near := difflib.get_close_matches(key, table.keys() - set(SOURCE_KEYS), n=1)):
                raise file.error(["source", i, near[0]], "unknown key", f"did you mean {key!r}?")
            raise file.error(["source", i, key], "missing, or not a text", f'write {key} = "…"')


def _source(file: TomlFile, i: int, table: dict[str, Any], folder: Path) -> Source:
    """Check one [[source]]: its own keys here, its driver's options against the driver."""
    _own_keys(file, i, table)
    drivers = registry.driver_names()
    if table["driver"] not in drivers:
        raise file.error(
            ["source", i, "driver"], f"no driver {table['driver']!r}", f"write one of: {', '.join(drivers)}"
        )
    module = registry.load(table["driver"])
    options = {key: value for key, value in table.items() if key not in SOURCE_KEYS}
    for key, value in options.items():
        kind = module.OPTIONS.get(key)
        if kind is None:
            raise _unknown(file, ["source", i, key], [*SOURCE_KEYS, *module.OPTIONS])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise file.error(["source", i, key], f"{value!r} is not of type {kind.__name__}", "write one that is")
    try:
        segment(table["name"])
    except PeerError as error:
        raise file.error(["source", i, "name"], error.detail, "use A-Z a-z 0-9 _ -") from None
    tags = tuple(_tags(table["name"], folder / table["tags"], file, i))
    source = Source(
        name=table["name"],
        driver=table["driver"],
        url=table["url"],
        tags=tags,
        options=options,
        folder=str(folder.absolute()),
    )
    try:
        module.Driver(source, _nowhere)
    except UserError as error:
        # A driver knows the tag's file and line; of its own options it knows the key only.
        if error.line or Path(error.place).is_file():
            raise
        raise file.error(["source", i, error.key], error.problem, error.remedy) from None
    return source


def _nowhere(_samples: list[Sample], /) -> None:
    """Take nothing: a driver that is built to check its addresses is never run."""


def _unknown(file: TomlFile, path: list[str | int], known: Iterable[str]) -> UserError:
    names = sorted(known)
    near = difflib.get_close_matches(str(path[-1]), names, n=1)
    return file.error(path, "unknown key", f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}")


def _tags(source: str, path: Path, file: TomlFile, i: int) -> Iterable[Tag]:
    """Read the tags CSV of source i."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(str(path), 0, "", "not UTF-8 text", 'save it as "CSV UTF-8"') from None
    except OSError as error:
        raise file.error(["source", i, "tags"], f"{path} can't be read: {error.strerror}", "check the path") from None
    return parse_tags(source, str(path), text)


def _known(file: TomlFile, ref: str, path: list[str | int], tags: dict[str, Tag]) -> None:
    if ref not in tags:
        near = difflib.get_close_matches(ref, tags, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else 'write "source/tag" of a [[source]] and its tags file'
        raise file.error(path, f"no tag {ref!r}", remedy)


def _check_task(file: TomlFile, name: str, table: TaskTable, tags: dict[str, Tag]) -> None:
    try:
        segment(name)
    except PeerError as error:
        raise file.error(["task", name], error.detail, "use the task's own name") from None
    for signal, ref in table.signals.items():
        _known(file, ref, ["task", name, "signals", signal], tags)
    for key in ("target", "segment"):
        if ref := getattr(table, key):
            _known(file, ref, ["task", name, key], tags)
    try:
        gate = table.gate
    except ValueError as error:
        remedy = 'write "plc1/Running == 1", joined by "and"'
        raise file.error(["task", name, "active_when"], str(error), remedy) from None
    for condition in gate:
        _known(file, condition.tag, ["task", name, "active_when"], tags)
        _scalar(tags[condition.tag], "the gate active_when", text=False)
    if table.segment:
        _scalar(tags[table.segment], "segment", text=True)
    try:
        seconds(table.max_lag)
    except ValueError as error:
        raise file.error(["task", name, "max_lag"], str(error), 'write "2s"') from None
    if table.width not in WIDTHS:
        raise file.error(["task", name, "width"], f"{table.width:g} is no width", "write 0.25, 0.5, 0.75 or 1")


def _scalar(tag: Tag, name: str, *, text: bool) -> None:
    """Refuse a waveform where one value is needed, and a text unless its checksum will do."""
    if tag.width:
        problem = f"{tag.ref} is a waveform, which {name} can't be"
        raise UserError(tag.file, tag.line, "type", problem, "wire a tag that is one number")
    if tag.type == "string" and not text:
        remedy = "wire it as segment, or another tag here"
        raise UserError(tag.file, tag.line, "type", f"{tag.ref} is a text, {name} a number", remedy)


def _check_train_when(file: TomlFile, table: TrainingTable, tags: dict[str, Tag]) -> None:
    path: list[str | int] = ["training", "train_when"]
    try:
        rule = table.rule or ()
    except ValueError as error:
        raise file.error(path, str(error), 'write "Sat 06:00-14:00 or plc1/Running == 0"') from None
    for condition in (term for terms in rule for term in terms if isinstance(term, Condition)):
        _known(file, condition.tag, path, tags)
        tag = tags[condition.tag]
        if tag.width or tag.type == "string":
            raise file.error(path, f"{tag.ref} is no number", "compare with a tag that is one")


def _raw_topics(file: TomlFile, refs: tuple[str, ...], tags: dict[str, Tag]) -> dict[str, str]:
    """Map ref -> the level after `_raw/`: the tag's name, which must be a topic level and nobody else's."""
    out: dict[str, str] = {}
    for i, ref in enumerate(refs):
        path: list[str | int] = ["gateway", "publish_raw", i]
        if ref not in tags:
            raise file.error(path, f"no tag {ref!r}", 'write "source/tag"')
        name = tags[ref].name
        try:
            segment(name)
        except PeerError as error:
            raise file.error(path, error.detail, f"rename the tag in {tags[ref].file}:{tags[ref].line}") from None
        if name in out.values():
            other = next(r for r, n in out.items() if n == name)
            raise file.error(path, f"{ref} and {other} share the topic _raw/{name}", "rename one of the tags")
        out[ref] = name
    return out


# -- board profiles ------------------------------------------------------------------------------------------------


def profile_path(name: str) -> Path:
    """Find firmware-configs/NAME.toml: beside the packages in a checkout, inside the package when installed."""
    here = Path(__file__).parent
    folders = [here.parent / "firmware-configs", here / "firmware-configs"]
    known = sorted({p.stem for folder in folders for p in folder.glob("*.toml")})
    for folder in folders:
        if name in known and (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    raise UserError("--profile", 0, "", f"no board {name!r}", f"write one of: {', '.join(known)}")


def _apply_profile(file: TomlFile, profile: Profile) -> None:
    """Let a board's [training], [scoring] and [store] stand where gateway.toml says nothing."""
    for name, values in profile.defaults().items():
        table = file.data.setdefault(name, {})
        if isinstance(table, dict):  # else convert() says what is wrong with it
            for key, value in values.items():
                table.setdefault(key, value)


def said_folder(override: Path | None) -> Path | None:
    """The state folder that `--state` or else $STATE_DIRECTORY (systemd) says; None where neither does."""
    systemd = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    return override or (Path(systemd) if systemd else None)


def state_folder(config: Config, override: Path | None) -> Path:
    """Where this gateway keeps its state: where that is said, else in the platform's place."""
    said = said_folder(override)
    if said is not None:
        return said
    import platformdirs  # noqa: PLC0415 - only where neither of the above says

    return platformdirs.user_state_path("tundish") / "edge" / str(config.path).replace("/", "-")
