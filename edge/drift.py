"""Watches whether what one task scores still looks like what it was trained on here; published on `_drift/{task}`.

Of each window in which the gate held and enough was good, a few values are kept; once there are `[drift] windows` of
them, a thread compares them with the last training's (`models.drift`), and they begin again.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.topics import Local
from edge.memory import Memory
from edge.shop import Shop
from models.drift import Reference, Windows, picked
from models.spec import Task

log = logging.getLogger(__name__)

_MOST_NAMED = 8


class Drift:
    """The drift of one task. `last` is what was published last, `drifted` the signals that it names.

    `wish` is told why a round would help, or "" when nothing has drifted; `spawn` runs what need not be waited for.
    """

    def __init__(
        self,
        shop: Shop,
        memory: Memory,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        wish: Callable[[str], object],
    ) -> None:
        """Read the memory: before the event loop, or in the state's own thread."""
        self._shop, self._memory, self._spawn, self._wish = shop, memory, spawn, wish
        self._reference = memory.reference()
        self._newest = list[Windows]()
        self._said = set[str]()
        self.last: dict[str, Any] = {}

    @property
    def drifted(self) -> list[str]:
        """Signals that had drifted when it was last looked."""
        return list(self.last.get("drifted", []))

    def begin(self) -> None:
        """Windows are wired otherwise from now on."""
        self._newest.clear()

    def take(self, task: Task, x: Windows) -> None:
        """Take one raw window (C, T) that could be trained on."""
        reference = self._reference
        if reference is None or len(reference.edges) != task.channels:
            return
        self._newest.append(picked(task, x[None])[0])
        if len(self._newest) >= task.drift.windows:
            newest, self._newest = self._newest, []
            self._spawn(self._look(task, reference, newest))

    def learnt(self, reference: Reference) -> None:
        """Measure against another training from now on, the windows that are collected too."""
        self._reference = reference
        if self.last:
            self._say({"windows": 0, "psi": {}, "drifted": []}, reference)

    def repeat(self) -> None:
        """Publish again: a broker may have come back empty."""
        if self.last:
            self._publish()

    async def _look(self, task: Task, reference: Reference, newest: list[Windows]) -> None:
        psi = await asyncio.to_thread(lambda: reference.psi(np.stack(newest)))
        if reference is not self._reference:
            return  # it was trained again meanwhile
        above = max(task.drift.above, reference.chance(len(newest)))
        names = [signal.name for signal in task.signal]
        shown = {name: round(float(one), 4) if np.isfinite(one) else None for name, one in zip(names, psi, strict=True)}
        drifted = [names[i] for i in _largest(psi) if psi[i] > above]
        body: dict[str, Any] = {"windows": len(newest), "above": round(above, 4), "psi": shown, "drifted": drifted}
        self._say(body, reference)
        # Which ones, and how far, stays on the site.
        why = f"{len(drifted)} of {len(names)} signals have drifted (PSI above {above:.2f})" if drifted else ""
        # Said once, until it is well below: one that hovers about the bound would be said all the time.
        self._said -= {name for name, one in shown.items() if one is not None and one < above / 2}
        if new := set(drifted) - self._said:
            self._said |= new
            named = ", ".join(f"{name} {shown[name]}" for name in drifted[:_MOST_NAMED])
            log.warning("%s: %s: %s", task.name, why, named)
            note = {"task": task.name, "above": body["above"], "psi": {name: shown[name] for name in drifted}}
            self._spawn(self._shop.state.commit(lambda: self._shop.state.record("drift", note)))
        self._wish(why)

    def _say(self, body: dict[str, Any], reference: Reference) -> None:
        self.last = {"timestamp_ms": int(time.time() * 1000), "trained_on": reference.windows, **body}
        self._publish()

    def _publish(self) -> None:
        topic = Local(self._shop.config.path, "drift", self._memory.task).topic
        self._shop.publish(topic, json.dumps(self.last).encode(), qos=0, retain=True)


def _largest(psi: NDArray[np.float64]) -> list[int]:
    order: list[int] = np.argsort(-np.nan_to_num(psi)).tolist()
    return order
