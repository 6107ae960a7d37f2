"""One task's released model: told of a release and of manifests, it fetches the one that is released, and no other."""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from broker import messages as m
from broker.channels import Released, model_digest
from edge.handback import Fetch, Model
from edge.memory import Memory
from edge.scoring import Scoring
from edge.shop import Shop
from models.errors import LocalError, PeerError

log = logging.getLogger(__name__)

# Between two tries after a fault of this machine: the first time, and in the end.
RETRY_S, LONGEST_S = 5.0, 600.0
_NOTHING: tuple[int, str, Model | None] = 0, "", None


class Installer:
    """`model` is the released one that is here, of release `number` (0: none), by metadata of the online key `key`.

    `lock` is held while a model is installed, `spawn` runs what need not be waited for.
    """

    def __init__(
        self,
        shop: Shop,
        memory: Memory,
        scoring: Scoring,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        lock: asyncio.Lock,
    ) -> None:
        self._shop, self._memory, self._scoring, self._spawn, self._lock = shop, memory, scoring, spawn, lock
        self.problem = ""
        try:
            self.number, self.key, self.model = memory.release() or _NOTHING
        except PeerError as error:  # of another version of this program: what is released comes again
            self.number, self.key, self.model = _NOTHING
            self._tell(f"the release that is stored can't be read: {error}")
        scoring.released = self.model
        self._wanted: Released | None = None
        self._offers: dict[str, tuple[m.ModelManifest, bytes]] = {}
        self._fetch: Fetch | None = None
        self._underway: Released | None = None  # what is being installed

    @property
    def fetching(self) -> bool:
        """Whether pieces of the released model are still missing."""
        return self._fetch is not None

    @property
    def status(self) -> dict[str, object]:
        """Number of the release that scores here, and where there are releases, what is known of it; plain JSON types.

        The channel is said by metadata, and empty from a start until that has come.
        """
        releases, wanted = self._shop.releases, self._wanted
        if not releases.in_force:
            return {"release": self.number, "released": None}
        same = wanted is not None and (wanted.release, wanted.key) == (self.number, self.key)
        about = {
            "channel": wanted.channel if wanted and same else "",
            "version": self.model.manifest.version if self.model else None,
            "problem": releases.problem,
        }
        return {"release": self.number, "released": about}

    @property
    def installed(self) -> m.Installed | None:
        """What of the federation's releases is here; None where there are none, or none has come yet."""
        if not self._shop.releases.in_force or self.model is None:
            return None
        return m.Installed(self._memory.task, self.number, self.model.manifest.version)

    def on_release(self, release: Released, held: Model | None) -> None:
        """Take what verified metadata says this task is to score with; `held` is a model that is here already."""
        if release != self._wanted:
            self._wanted = release
            self._drop()
            self.begin(held)

    def on_manifest(self, channel: str, manifest: m.ModelManifest, envelope: bytes, held: Model | None) -> None:
        """Take the manifest of a channel, verified as the aggregator's; it counts where metadata says the same."""
        self._offers[channel] = manifest, envelope
        self.begin(held)

    def begin(self, held: Model | None) -> None:
        """Fetch what is wanted, once the task is wired by a first model."""
        wanted = self._wanted
        if held is None or wanted is None or wanted.channel not in self._offers:
            return
        same = self.model is not None and self.model.manifest.digest == wanted.digest
        if wanted.key == self.key and wanted.release <= self.number:
            if wanted.release < self.number:
                self.problem = f"release {wanted.release} is older than {self.number}, which is installed and stays"
            elif not same:
                self.problem = f"release {wanted.release} is another one than that which is installed and stays"
            else:
                self.problem = ""
            return
        if wanted == self._underway:
            return
        manifest, envelope = self._offers[wanted.channel]
        if (manifest.version, manifest.digest) != (wanted.version, wanted.digest):
            return
        self._drop()
        self._fetch = Fetch(self._shop.federation, self._memory.task, manifest, self.model if same else held)
        self._shop.subscribe(*self._fetch.topics)
        self._complete(wanted, envelope)

    def _drop(self) -> None:
        """What is being fetched is not wanted any more."""
        if self._fetch:
            self._shop.unsubscribe(*self._fetch.topics)
        self._fetch = None

    def on_chunk(self, topic: str, payload: bytes) -> None:
        """Take a piece of the model being fetched."""
        fetch, wanted = self._fetch, self._wanted
        due = fetch.topics if fetch else []
        if fetch is None or wanted is None or not fetch.take(topic, payload):
            return
        self._shop.unsubscribe(topic)
        self._shop.subscribe(*(one for one in fetch.topics if one not in due))
        self._complete(wanted, self._offers[wanted.channel][1])

    def _complete(self, wanted: Released, envelope: bytes) -> None:
        if self._fetch and not self._fetch.topics:
            fetch, self._fetch = self._fetch, None
            self._underway = wanted
            self._spawn(self._take(fetch, wanted, envelope))

    async def _take(self, fetch: Fetch, wanted: Released, envelope: bytes) -> None:
        """Hold a whole model against the metadata, keep it, and let it score.

        A fault of this machine is tried again for as long as that is wanted, a fault of the model is not.
        """
        pause = RETRY_S
        try:
            while wanted == self._wanted:
                try:
                    return await self._put(fetch, wanted, envelope)
                except (LocalError, OSError) as error:
                    self._tell(f"release {wanted.release} can't be installed yet: {error}")
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_S)
        except PeerError as error:
            self._shop.refused[error.reason] += 1
            self._tell(f"release {wanted.release} refused: {error}")
        finally:
            if self._underway == wanted:
                self._underway = None

    def _tell(self, problem: str) -> None:
        if problem != self.problem:
            log.error("%s: %s", self._memory.task, problem)
        self.problem = problem

    async def _put(self, fetch: Fetch, wanted: Released, envelope: bytes) -> None:
        model = await asyncio.to_thread(fetch.model)
        check(model, wanted)
        async with self._lock:
            if wanted != self._wanted:
                return  # another was released meanwhile
            known = {one.graph for one in (fetch.held, self.model) if one}
            if model.graph not in known:
                await self._shop.prober.run(model)
            if wanted.release != self.number or self.model is None or self.model.manifest.digest != wanted.digest:
                await self._scoring.release(model, anew=wanted.key != self.key)
        body: dict[str, object] = {"task": self._memory.task, "release": wanted.release, "version": wanted.version}
        body |= {"channel": wanted.channel, "digest": wanted.digest.hex()}

        def work() -> None:
            self._memory.keep_release(wanted.release, wanted.key, model, envelope)
            self._shop.state.record("release-installed", body)

        await self._shop.state.commit(work)
        self.number, self.key, self.model, self.problem = wanted.release, wanted.key, model, ""
        log.info("%s: release %d, version %d, is installed", self._memory.task, wanted.release, wanted.version)


def check(model: Model, release: Released) -> None:
    """Refuse (PeerError "release") a model that verified metadata does not name, its graph and task included."""
    data = model.vector.astype("<f4").tobytes()
    if len(data) != release.size or hashlib.sha256(data).digest() != release.digest:
        raise PeerError("release", "its weights are not those that were released")
    if model_digest(model.task, model.layout, hashlib.sha256(model.graph).digest()) != release.model:
        raise PeerError("release", "its task, layout or graph are not those that were released")
