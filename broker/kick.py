"""End the connection of one who was revoked, which a reload of the MQTT broker leaves open, deaf and mute.

A client id belongs to the name in the certificate (`broker.acl`), and whoever connects with a client id ends the
connection that had it (MQTT 3.1.1, 3.1.4-2). So a certificate of that name is made for a moment, and taken back.
"""

import asyncio
import tempfile
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from broker.link import Inbound, Link
from broker.pki import Authority, key_pem, write_file
from broker.settings import MqttSettings
from models.errors import LocalError

_WITHIN_S = 15.0


def end_connection(settings: MqttSettings, authority: Authority, path: str) -> None:
    """Connect as a gateway with the aggregator's `[mqtt]` settings, and go; LocalError where that can't be done."""
    key = ec.generate_private_key(ec.SECP256R1())
    with tempfile.TemporaryDirectory() as folder:
        cert, secret = Path(folder) / "cert.pem", Path(folder) / "key.pem"
        write_file(secret, key_pem(key), secret=True)
        write_file(cert, authority.issue(key.public_key(), path, "client", days=1))
        try:
            asyncio.run(_visit(msgspec.structs.replace(settings, cert=str(cert), key=str(secret)), path))
        finally:
            authority.revoke(path)


async def _visit(settings: MqttSettings, path: str) -> None:
    there = asyncio.Event()

    def nothing(_inbound: Inbound) -> None:
        """It subscribes to nothing."""

    link = Link(settings, client_id=path, will=None, on_message=nothing, on_up=there.set, on_down=lambda _: None)
    link.start()
    try:
        await asyncio.wait_for(there.wait(), _WITHIN_S)
    except TimeoutError:
        why = link.error or "the MQTT broker does not answer"
        raise LocalError(f"the connection of {path} could not be ended: {why}") from None
    finally:
        await link.stop()
