"""What a charter and the roster bind at this gateway: which plans they leave, and which they do not. Pure."""

from dataclasses import dataclass
from typing import NamedTuple

from broker import messages as m
from broker.charter import Charter, outside
from edge.config import Policy


@dataclass(frozen=True)
class Clauses:
    """What a charter, named by its SHA-256, says of one task of a gateway below one root."""

    digest: bytes
    charter: Charter
    task: str
    root: str


class Headcount(NamedTuple):
    """How many gateways the roster that is held has, which is that of `time_ms`."""

    time_ms: int
    gateways: int


def breach(policy: Policy, clauses: Clauses | None, plan: m.Plan) -> tuple[str, str] | None:
    """Say why a plan is not under the charter that was accepted, as (code, sentence); None if nothing is wrong.

    A federation without a charter is one to a gateway that accepted none.
    """
    accepted, named = policy.charter or "", plan.charter.hex()
    if named != accepted:
        missing = f"charter {named} waits for acceptance" if named else "the plan is under no charter"
        return "charter", f"{missing}; accepted is {accepted or 'none'}"
    if not named:
        return None
    if clauses is None or clauses.digest != plan.charter:
        return "charter", f"charter {named} has not come yet"
    return outside(
        clauses.charter, clauses.task, [clauses.root],
        min_gateways=plan.min_gateways, secure=plan.secure_aggregation,
    )  # fmt: skip


def too_few(policy: Policy, held: Headcount | None, roster_ms: int) -> tuple[str, str] | None:
    """Say that fewer gateways are in the roster than the policy wants in a sum, or that nobody knows; None otherwise.

    A plan names the roster that it was made under, that of `roster_ms`, so that a broker that withholds that one
    switches nothing off; a policy of 1 counts nobody, and waits for none. Of an aggregator that says no roster, nothing
    is known.
    """
    if policy.min_gateways > 1 and roster_ms > (held.time_ms if held else 0):
        return "roster", f"the roster of {roster_ms} has not come yet (tundish broker acl, and a reload)"
    if held is None or held.gateways >= policy.min_gateways:
        return None
    wanted = f"policy wants {policy.min_gateways} gateways in a sum"
    return "roster", f"{wanted}, the federation's roster has {held.gateways}"


def terms_of(plan: m.Plan | None) -> dict[str, object]:
    """What an answer's ledger entry says of the plan that is answered."""
    if plan is None:
        return {}
    return {
        "charter": plan.charter.hex(), "roster_ms": plan.roster_ms, "min_gateways": plan.min_gateways,
        "secure_aggregation": plan.secure_aggregation, "base": plan.base, "bits": plan.bits,
        "deadline_ms": plan.deadline_ms,
    }  # fmt: skip
