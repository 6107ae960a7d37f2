"""Errors, typed by who is to blame.

TundishError
├── UserError    a file or option that a person wrote: says file, line, key and remedy; exit code 2
├── PeerError    bytes that another machine sent: a typed reason, a log line and a counter; never fatal
└── LocalError   this machine: a disk, a port, a missing package
"""


class TundishError(Exception):
    """The root of every error that this project raises on purpose."""


class UserError(TundishError):
    """Something that a person wrote is wrong; the text is one line that says where and what to write.

    `place` is a file (`gateway.toml`) or an option (`--rounds`); `line` counts from 1, 0 when there is none.
    """

    def __init__(self, place: str, line: int, key: str, problem: str, remedy: str) -> None:
        self.place = place
        self.line = line
        self.key = key
        self.problem = problem
        self.remedy = remedy
        where = f"{place}:{line}" if line else place
        super().__init__(": ".join(part for part in (where, key, f"{problem}; {remedy}") if part))


class PeerError(TundishError):
    """A peer's bytes were refused. `reason` is a stable word that counters and receipts carry."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class LocalError(TundishError):
    """This machine can't do what was asked: a disk is full, a port is taken, a package is missing."""
