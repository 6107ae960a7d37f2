"""A gateway's answers to round plans, signed and in the ledger."""

import time

from broker import messages as m
from broker.topics import Uplink
from edge.clauses import terms_of
from edge.events import Answer
from edge.shop import Shop


class Mouth:
    """Says the answers of one task."""

    def __init__(self, shop: Shop, task: str) -> None:
        self._shop, self._task = shop, task
        self._said: Answer | None = None

    async def say(self, answer: Answer, plan: m.Plan | None) -> None:
        """Send an answer to a plan, once the ledger has it; one that is said again is one entry."""
        topic = Uplink(self._shop.config.path, self._task, "answer").topic
        word = m.Answer(
            m.VERSION, answer.round, answer.verdict, answer.code, answer.reason[:512], int(time.time() * 1000)
        )
        envelope = self._shop.signer.seal(word, topic)

        def work() -> None:
            if answer != self._said:
                body: dict[str, object] = {"task": self._task, "round": answer.round, "reason": word.reason}
                body |= {"code": answer.code, "message_bytes": len(envelope)} | terms_of(plan)
                self._shop.state.record(answer.verdict, body)
                self._said = answer

        await self._shop.state.commit(work)
        self._shop.publish(topic, envelope)
