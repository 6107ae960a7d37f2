"""What was refused, counted by reason, and which of it is worth a line: a flood must not become a flood of lines."""

import logging
from collections import Counter

log = logging.getLogger(__name__)

LOUD = 10
_EACH = 1000
# Of one gateway that enter the ledger between two openings; the counter knows the rest.
_NOTED = 16


class Refusals(Counter[str]):
    """Reason -> how many."""

    def __init__(self) -> None:
        super().__init__()
        self._noted: Counter[str] = Counter()

    def count(self, topic: str, reason: str, detail: str) -> None:
        """Count one, and log the first of each reason."""
        self[reason] += 1
        number = self[reason]
        if number <= LOUD or number % _EACH == 0:
            log.warning("refused (%s, %d so far) %r: %r", reason, number, topic[:400], detail[:400])

    def enters(self, path: str) -> bool:
        """Whether one more of a gateway is for the ledger."""
        self._noted[path] += 1
        return self._noted[path] <= _NOTED

    def opened(self) -> None:
        """Let the ledger have some of every gateway again."""
        self._noted.clear()
