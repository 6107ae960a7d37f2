"""The vote on a new model, sans-IO: each gateway that has data says whether it is for it, and a majority decides."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from broker.round import Action, Event


@dataclass(frozen=True)
class Voted(Event):
    """A gateway's first verified vote on a version."""

    path: str
    version: int
    against: bool


@dataclass(frozen=True)
class Decided(Action):
    """The vote on a version is over. One that is not kept makes way for the weights of version `before`, again."""

    version: int
    before: int
    kept: bool
    votes: Mapping[str, bool]


@dataclass
class Ballot:
    """The vote on a version: the one before it, the paths that are waited for, until when, and who is against it."""

    version: int
    before: int
    voters: frozenset[str]
    until_ms: int
    votes: dict[str, bool] = field(default_factory=dict)

    def take(self, vote: Voted) -> None:
        """Count a vote on this version, the first of each gateway."""
        if vote.version == self.version:
            self.votes.setdefault(vote.path, vote.against)

    def waits_for(self, gone: AbstractSet[str]) -> set[str]:
        """Paths whose votes are waited for: of those who could judge it, and have not gone."""
        return set(self.voters - self.votes.keys() - gone)

    def decide(self, gone: AbstractSet[str], now_ms: int) -> Decided | None:
        """End it once everybody who is there and could judge it has voted, or its time is over; None before.

        It is voted down by more than half of those who could judge it, or who did: who is silent lets it pass.
        """
        if now_ms < self.until_ms and self.waits_for(gone):
            return None
        against = sum(self.votes.values())
        kept = 2 * against <= max(len(self.votes), len(self.voters))
        return Decided(self.version, self.before, kept, self.votes)
