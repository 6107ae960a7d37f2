"""What the federation has released, by metadata of The Update Framework that came over MQTT: `tuf.ngclient` checks it.

The first root is pinned when the aggregator, whose key this gateway trusts since its enrolment, first says it; what
comes after must follow from that one, by the operators' keys. Without a root, and unless a signed manifest says that
there are releases, nothing is released by stages: every new model is tried. Nothing here stops what scores: metadata
that is missing, expired, old or forged is told, and installs nothing. `tuf` is loaded when there is metadata to check.
"""

import asyncio
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from broker import messages as m
from broker.channels import CHANNELS, FIRST, MAX_METADATA, MAX_ROOTS, Channel, Custom, Released, check_name, target_of
from broker.link import Inbound
from edge.store import State
from models.errors import LocalError, PeerError

log = logging.getLogger(__name__)

# The state's keys of the pinned root, and of what a manifest said; another federation's key forgets both.
_PINNED, _TOLD = "release-root/pinned", "release-root/told"
# What to do, by the framework's errors; that of any other, and of this machine's, comes last.
_REMEDIES = {
    "ExpiredMetadataError": "check this gateway's clock; a running aggregator, or the next release, renews it",
    "BadVersionNumberError": "older than what is here: ask the operator (docs/operator.md, a restored journal)",
    "UnsignedMetadataError": "too few keys known here signed it: ask the operator (docs/operator.md, Releases)",
    "LengthOrHashMismatchError": "pieces of two releases do not go together: wait for the rest",
}
_REMEDY = "what the federation says of releases can't be used: ask the operator (docs/operator.md, Releases)"
_FAULT = "free space on the disk of the state folder, or mend its owner"
_MISSING = "releases: their metadata is missing: the first root has not come, so no new model scores; ask the operator"


class Releases:
    """What this gateway knows of releases. `take` and `pin` in the event loop; `look` blocks, in a thread."""

    def __init__(self, state: State, folder: Path, path: str) -> None:
        self._state, self._folder, self._path = state, folder, path
        self._files: dict[str, bytes] = {}
        self.changed = False
        self._problem = ""
        self.load()

    def load(self) -> None:
        """Take up what is known, which is forgotten when another federation is trusted; before the event loop."""
        self._root, self._told = self._state.get(_PINNED), self._state.get(_TOLD) is not None
        self._told_stored = self._told

    @property
    def in_force(self) -> bool:
        """Whether gateways of this federation score with what is released alone."""
        return self._told or self._root is not None

    @property
    def problem(self) -> str:
        """What is wrong with the metadata, or that it is missing; empty if nothing is."""
        return _MISSING if self._told and self._root is None else self._problem

    def tell(self, manifest: m.ModelManifest) -> None:
        """Remember that there are releases, if the aggregator says so: a broker could withhold their metadata."""
        if manifest.released and not self._told_stored:
            self._told = True
            self._telling = asyncio.ensure_future(self._keep_told())

    async def _keep_told(self) -> None:
        """Over a restart too; what the disk refuses is tried again with the next manifest."""
        try:
            await self._state.commit(lambda: self._state.put(_TOLD, b""))
        except LocalError as error:
            log.error("that there are releases can't be stored: %s", error)
        else:
            self._told_stored = True

    def hear(self, name: str, inbound: Inbound, key: bytes) -> None:
        """Take a message below `_release/`; the first root is the aggregator's word, whose `key` it is. PeerError."""
        if name != FIRST:
            self.take(name, inbound.payload)
        elif self._root is None:
            first = m.open_envelope(inbound.payload, inbound.topic, key, m.FirstRoot)
            self._pinning = asyncio.ensure_future(self.pin(first.root))

    async def news(self, tasks: list[str]) -> dict[str, Released]:
        """Look, if anything came since the last look."""
        return await asyncio.to_thread(self.look, tasks) if self.changed else {}

    def take(self, name: str, payload: bytes) -> None:
        """Take a file of metadata; PeerError for one that is none, or too large to be looked at."""
        check_name(name)
        if len(payload) > MAX_METADATA:
            raise PeerError("size", f"{len(payload)} bytes of metadata, at most {MAX_METADATA}")
        if self._files.get(name) != payload:
            self._files[name], self.changed = payload, True

    async def pin(self, root: bytes) -> None:
        """Keep the first root there is, and no later one in its place."""
        if self._root is not None:
            return
        self._root, self.changed = root, True
        body: dict[str, object] = {"sha256": hashlib.sha256(root).hexdigest(), "bytes": len(root)}

        def work() -> None:
            self._state.put(_PINNED, root)
            self._state.record("release-root-pinned", body)

        await self._state.commit(work)
        log.warning("releases: pinned the first root, %s; this gateway scores with what is released", body["sha256"])

    def look(self, tasks: Iterable[str]) -> dict[str, Released]:
        """Check the metadata that is here, and return what each task is to score with; blocks.

        What is wrong stands in `problem`. Of stable and canary, the higher release is the newer one: of a task of which
        either is withheld or wrong, nothing is said, or whoever withholds the newer one takes gateways back.
        """
        self.changed = False
        if self._root is None or "timestamp" not in self._files:
            return {}
        from tuf.api.exceptions import DownloadError, DownloadLengthMismatchError, RepositoryError  # noqa: PLC0415

        wrong = (RepositoryError, DownloadLengthMismatchError, OSError, ValueError, KeyError, TypeError, RecursionError)

        found: dict[str, Released] = {}
        try:
            updater = self._updater(self._root, dict(self._files))
            updater.refresh()
            key, self._problem = _online_key(self._cache(self._root)), ""
        except wrong as error:
            self._refuse(error)
            return {}
        except DownloadError:
            return {}  # the rest is on its way
        for task in tasks:
            targets = [(channel, target_of(channel, task, self._path)) for channel in CHANNELS]
            try:
                both = [_released(channel, updater.get_targetinfo(target), key) for channel, target in targets]
            except wrong as error:
                self._refuse(error)
            except DownloadError:
                pass  # so is this
            else:
                if some := [one for one in both if one]:
                    found[task] = max(some, key=lambda one: one.release)
        return found

    def _refuse(self, error: Exception) -> None:
        what = f"{type(error).__name__}: {error}"[:400]
        remedy = _FAULT if isinstance(error, OSError) else _REMEDIES.get(type(error).__name__, _REMEDY)
        problem = f"releases: {what}; {remedy}"
        if problem != self._problem:
            log.warning("%s; what scores goes on", problem)
        self._problem = problem
        self.changed |= isinstance(error, OSError)  # a fault of this machine is tried again

    def _cache(self, root: bytes) -> Path:
        return self._folder / hashlib.sha256(root).hexdigest()[:16]

    def _updater(self, root: bytes, files: Mapping[str, bytes]) -> "Updater":  # type: ignore[name-defined]  # noqa: F821
        """The framework's client, on files instead of HTTP; what it has verified it keeps in a folder of that root."""
        from tuf.api.exceptions import DownloadHTTPError  # noqa: PLC0415
        from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig  # noqa: PLC0415

        class Fetcher(FetcherInterface):
            def _fetch(self, url: str) -> Iterator[bytes]:
                name = url.rpartition("/")[2].removesuffix(".json")
                number, _, role = name.partition(".")
                data = files.get(f"{role}{number}")
                if data is None:
                    raise DownloadHTTPError(f"{name} has not come", 404)
                return iter([data])

        folder = self._cache(root)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        most = MAX_METADATA
        config = UpdaterConfig(
            max_root_rotations=MAX_ROOTS, root_max_length=most, timestamp_max_length=most, snapshot_max_length=most,
            targets_max_length=most,
        )  # fmt: skip
        return Updater(str(folder), "mqtt://", fetcher=Fetcher(), config=config, bootstrap=root)


def _online_key(folder: Path) -> str:
    """The id of the key of the timestamp, by the newest root that the framework's client has verified."""
    from tuf.api.metadata import Metadata, Root  # noqa: PLC0415

    return min(Metadata[Root].from_file(str(folder / "root.json")).signed.roles["timestamp"].keyids)


def _released(channel: Channel, target: "TargetFile | None", key: str) -> Released | None:  # type: ignore[name-defined]  # noqa: F821
    if target is None:
        return None
    said = msgspec.convert(target.custom, Custom)
    digest = bytes.fromhex(target.hashes["sha256"])
    return Released(channel, said.release, said.version, said.model, target.length, digest, key)
