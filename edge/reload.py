"""What a running gateway does when its files have changed (SIGHUP). Pure: two configurations -> a plan.

A source that differs is started anew, alone; a task whose wiring differs begins its windows again. What can't be
changed under way is named, and stays as it is until the gateway is restarted.
"""

from typing import NamedTuple

import msgspec

from edge.config import Config, TaskTable
from edge.tags import Source, Tag

# Attributes of Config that are fixed from start to end -> how gateway.toml calls them.
_FIXED = {
    "path": "gateway.path",
    "mqtt": "mqtt",
    "federation": "federation",
    "store_bytes": "store.max_bytes",
    "store_days": "store.max_days",
    "training": "training",
    "training_memory": "training.memory",
    "scoring": "scoring",
}


class Plan(NamedTuple):
    """What to do, by the names of sources and tasks; `changed` are refs of tags that mean something else than before.

    `config` is what to run with from now on: the new one, with the old values of the keys in `restart`.
    """

    config: Config
    stop: tuple[str, ...]
    start: tuple[str, ...]
    leave: tuple[str, ...]
    join: tuple[str, ...]
    rewire: tuple[str, ...]
    changed: frozenset[str]
    restart: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The plan in one line."""
        said = {
            "sources stopped": [name for name in self.stop if name not in self.start],
            "sources started": [name for name in self.start if name not in self.stop],
            "sources started anew": [name for name in self.start if name in self.stop],
            "tasks left": self.leave,
            "tasks joined": self.join,
            "tasks wired anew": self.rewire,
        }
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in said.items() if names) or "nothing to do"


def plan(old: Config, new: Config, offline: frozenset[str] = frozenset()) -> Plan:
    """Compare the running configuration with the one in the files.

    Sources in `offline` are started anew even if they are the same: what they failed for (a password, a certificate)
    may stand in a file that they name.
    """
    before, after = ({source.name: source for source in config.sources} for config in (old, new))
    stays = {name for name in before.keys() & after.keys() if _meaning(before[name]) == _meaning(after[name])}
    running = stays - offline
    changed = _changed(before, after)
    tasks = old.tasks.keys() & new.tasks.keys()
    return Plan(
        config=msgspec.structs.replace(new, **{name: getattr(old, name) for name in _FIXED}),
        stop=tuple(name for name in before if name not in running),
        start=tuple(name for name in after if name not in running),
        leave=tuple(name for name in old.tasks if name not in tasks),
        join=tuple(name for name in new.tasks if name not in tasks),
        rewire=tuple(
            name
            for name, table in new.tasks.items()
            if name in tasks and (table != old.tasks[name] or changed & set(wired(table)))
        ),
        changed=frozenset(changed),
        restart=tuple(_differing(old, new)),
    )


def wired(table: TaskTable) -> list[str]:
    """Return the refs of all tags that a task's table names."""
    named = [*table.signals.values(), table.target, table.segment, *(condition.tag for condition in table.gate)]
    return [ref for ref in named if ref]


def _changed(before: dict[str, Source], after: dict[str, Source]) -> set[str]:
    """Return the tags that went, or whose values mean something else: another row, or another machine."""
    out = set()
    for name, source in before.items():
        there = after.get(name)
        same_machine = there is not None and _machine(source) == _machine(there)
        tags = {tag.ref: _row(tag) for tag in there.tags} if there is not None and same_machine else {}
        out |= {tag.ref for tag in source.tags if tags.get(tag.ref) != _row(tag)}
    return out


def _machine(source: Source) -> Source:
    """A source without its tags."""
    return msgspec.structs.replace(source, tags=())


def _row(tag: Tag) -> Tag:
    """A tag without where it is written and what is said of it."""
    return msgspec.structs.replace(tag, file="", line=0, description="")


def _meaning(source: Source) -> Source:
    """A source as its driver sees it."""
    return msgspec.structs.replace(source, tags=tuple(_row(tag) for tag in source.tags))


def _differing(old: Config, new: Config) -> list[str]:
    """Name the keys whose change needs a restart."""
    out: dict[str, None] = {}
    for name, key in _FIXED.items():
        was, now = getattr(old, name), getattr(new, name)
        if isinstance(was, msgspec.Struct):
            fields = [field for field in was.__struct_fields__ if getattr(was, field) != getattr(now, field)]
            out.update(dict.fromkeys(f"{key}.{field}" for field in fields))
        elif was != now:
            out[key] = None
    return list(out)
