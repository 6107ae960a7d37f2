"""`charter.toml`: what the members of a federation agreed on, and which plans that leaves. Pure.

A charter is named by the SHA-256 of its file, which is published as it is: what `sha256sum` says of one's own copy is
what a plan names and a site accepts.
"""

import hashlib
from collections.abc import Iterable
from typing import Annotated, Literal, NamedTuple

import msgspec

from broker.messages import Message, Millis
from models.errors import UserError
from models.tomlfile import TomlFile

SECURE = "secure-aggregation"
CHARTER, ACCEPTANCE = "charter", "acceptance"  # kinds of ledger entries
BOM = "\ufeff"
MOST_CHARTER = 60 * 1024  # bytes of its text, so that its message has 64 KiB at most
_MOST_TITLE = 120
_MOST_GATEWAYS = 10**6


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the file's tables."""


class CharterPrivacy(_Table, frozen=True, kw_only=True):
    """`[privacy]`: whether a sum may be made in the clear, and the budget of epsilon, if there is one."""

    mode: Literal["plain", "secure-aggregation"]
    max_epsilon: float | None = None


class CharterModel(_Table, frozen=True, kw_only=True):
    """`[model]`: who receives the model that was learnt together, and under which terms."""

    recipients: tuple[str, ...]
    terms: str


class Charter(_Table, frozen=True, kw_only=True):
    """The whole file. `members` are enterprises, the roots of their gateways' paths.

    `tasks`, `members`, `min_gateways` and `[privacy]` bind every plan; the rest is for people.
    """

    title: str
    purpose: str
    tasks: tuple[str, ...]
    members: tuple[str, ...]
    min_gateways: int
    retention: str
    contributions: str
    privacy: CharterPrivacy
    model: CharterModel


class CharterText(Message, frozen=True, tag="charter"):
    """Retained, signed: the charter in force as its file has it, empty for none any more; `time_ms` grows."""

    text: Annotated[str, msgspec.Meta(max_length=MOST_CHARTER)]
    time_ms: Millis


class Acceptance(Message, frozen=True, tag="acceptance"):
    """Retained: a gateway has accepted the charter of this SHA-256, or (empty) accepts none any more."""

    digest: Annotated[bytes, msgspec.Meta(max_length=32)]
    time_ms: Millis


class Named(NamedTuple):
    """A charter with its text and what it is named by: the text's SHA-256."""

    charter: Charter
    text: str
    digest: bytes


def parse_charter(text: str, name: str = "charter.toml") -> Named:
    """Parse and check a charter; UserError with file, line, key and remedy."""
    data = text.encode()
    if len(data) > MOST_CHARTER:
        raise UserError(name, 0, "", f"larger than {MOST_CHARTER} bytes", "a charter is a short text")
    try:
        file = TomlFile(name, text.removeprefix(BOM))
    except (ValueError, RecursionError) as error:  # a number of many digits, tables in tables without end
        raise UserError(name, 0, "", f"not TOML: {type(error).__name__}", "mend what is no charter") from error
    charter = file.convert(Charter)
    _check(file, charter)
    return Named(charter, text, hashlib.sha256(data).digest())


def _check(file: TomlFile, charter: Charter) -> None:
    def need(ok: bool, path: list[str | int], problem: str, remedy: str) -> None:  # noqa: FBT001
        if not ok:
            raise file.error(path, problem, remedy)

    texts = {key: getattr(charter, key) for key in ("title", "purpose", "retention", "contributions")}
    for key, text in texts.items():
        need(bool(text.strip()), [key], "says nothing", "write it down: somebody has to sign it")
    line = charter.title.isprintable() and len(charter.title) <= _MOST_TITLE
    need(line, ["title"], "is no title", f"write one line of {_MOST_TITLE} characters at most")
    need(bool(charter.tasks), ["tasks"], "empty", 'write the tasks by name: tasks = ["spindle-wear"]')
    need(bool(charter.members), ["members"], "empty", 'write the enterprises: members = ["acme", "borealis"]')
    many = 1 <= charter.min_gateways <= _MOST_GATEWAYS
    need(many, ["min_gateways"], "out of range", f"write 1 to {_MOST_GATEWAYS}")
    epsilon = charter.privacy.max_epsilon
    need(epsilon is None or epsilon > 0, ["privacy", "max_epsilon"], "out of range", "write a number above 0")
    need(bool(charter.model.recipients), ["model", "recipients"], "empty", "write who receives the model")
    need(bool(charter.model.terms.strip()), ["model", "terms"], "says nothing", "write under which terms")


def outside(
    charter: Charter, task: str, roots: Iterable[str], *, min_gateways: int, secure: bool
) -> tuple[str, str] | None:
    """Say what of a charter a plan breaks, as (code, sentence); None if nothing. No plan adds noise yet."""
    strangers = [root for root in roots if root not in charter.members]
    if task not in charter.tasks:
        return "task", f"the charter names no task {task}"
    if strangers:
        return "members", f"the charter names no member {strangers[0]}"
    if min_gateways < charter.min_gateways:
        return "min-gateways", f"the charter wants {charter.min_gateways} gateways in a sum, the plan {min_gateways}"
    if charter.privacy.max_epsilon is not None:
        bound = f"the charter bounds epsilon at {charter.privacy.max_epsilon:g}"
        return "max-epsilon", f"{bound}, the plan adds no noise"
    if charter.privacy.mode == SECURE and not secure:
        return "secure-aggregation", "the charter requires secure aggregation, the plan has none"
    return None
