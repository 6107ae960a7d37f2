"""Whether an MQTT broker knows this federation from another aggregator: asked once, before a new one says a word.

A new state folder has a new key, and gateways trust the one that they know. So a `--state` that is not the right one,
or a disk that was restored without it, would begin a second federation of the same name; what it publishes takes the
place of what the first one did. What is retained on `_fl/FEDERATION/status` is signed, and outlives its aggregator.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from broker.config import FederationConfig
from broker.journal import Journal
from broker.link import Inbound, Link
from broker.messages import FederationBirth, open_envelope, peek
from broker.topics import FederationStatus
from models.errors import PeerError, UserError

log = logging.getLogger(__name__)

# What is retained comes right after the subscription; this long after the connection there was none.
SETTLE_S = 2.0
_TICK_S = 0.05
LOOKS = "first start: it waits for the MQTT broker, to see whether this federation is there already"
_REMEDY = 'write the --state of that one; if it is lost for good, see "A lost state" in docs/operator.md'


async def look(
    config: FederationConfig, journal: Journal, stopping: Callable[[], bool], then: Callable[[], None]
) -> bool:
    """Do `check_alone` unless this journal's aggregator did it before, and `then`; False if `stopping` came first."""
    if not journal.has_looked():
        if not await check_alone(config, journal.path.parent, journal.signer().public_key, stopping):
            return False
        with journal.transaction():
            journal.put_looked(time.time_ns() // 1_000_000)
    then()
    return True


async def check_alone(config: FederationConfig, state: Path, own: bytes, stopping: Callable[[], bool]) -> bool:
    """Wait until the broker has had time to show a status of this federation; False if `stopping` came before.

    UserError if there is one by another key than `own`, or one that can't be read, as a later version's. As long as
    the broker can't be reached, it tries again.
    """
    topic, found, loop = FederationStatus(config.name).topic, list[str](), asyncio.get_running_loop()
    until = float("inf")

    def hear(inbound: Inbound) -> None:
        if inbound.topic != topic or not inbound.payload:
            return  # some brokers send more than was subscribed to; and what is empty clears what was retained
        try:
            key = peek(inbound.payload, FederationBirth).public_key
            open_envelope(inbound.payload, topic, key, FederationBirth)
        except PeerError as error:
            found.append(f"has something on {topic} that can't be read ({error})")
        else:
            if key != own:
                found.append(f"has federation {config.name} of the key {key.hex()}")

    def up() -> None:
        nonlocal until
        until = loop.time() + SETTLE_S

    def down(_reason: str) -> None:
        nonlocal until
        until = float("inf")

    log.info("first start with %s: is federation %s on %s already?", state, config.name, config.mqtt.url)
    # Without a will, and with a client id of its own: a running aggregator keeps its connection. Where the MQTT broker
    # takes the certificate's name for it, as with the files of `broker acl`, that is seen to before (`broker.folder`).
    settings, name = msgspec.structs.replace(config.mqtt, client_id=None), f"tundish-look-{secrets.token_hex(4)}"
    link = Link(settings, client_id=name, will=None, on_message=hear, on_up=up, on_down=down)
    link.subscribe(topic)
    link.start()
    try:
        while not found and not stopping() and loop.time() < until:  # noqa: ASYNC110 - the end of a wait is no event
            await asyncio.sleep(_TICK_S)
    finally:
        await link.stop()
    if found:
        raise UserError("--state", 0, "", f"{state} is new, but {config.mqtt.url} {found[0]}", _REMEDY)
    return not stopping()
