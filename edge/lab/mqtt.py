"""The embedded MQTT broker (amqtt, MQTT 3.1.1) on loopback, in a process of its own: `python -m edge.lab.mqtt PORT`."""

import asyncio
import logging
import sys

from models.errors import LocalError


async def serve(port: int) -> None:
    """Serve until the process is stopped; nothing is kept on disk."""
    try:
        from amqtt.broker import Broker  # noqa: PLC0415 - an extra, named in the error
    except ImportError as error:
        raise LocalError("the embedded broker is not installed; pip install 'tundish[demo]'") from error
    config = {
        "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }
    await Broker(config).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    asyncio.run(serve(int(sys.argv[1])))
