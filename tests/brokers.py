"""Two real MQTT brokers as child processes on a free port of 127.0.0.1: Mosquitto (MQTT 5) and amqtt (3.1.1 alone)."""

import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

import pytest

from edge.lab.processes import free_port, mosquitto_path, python

BROKERS = ("mosquitto", "amqtt")
START_S = 20


def need_mosquitto() -> None:
    """Skip where Mosquitto is missing; where CI promises to have installed it, let the test fail."""
    if mosquitto_path() is None and "CI" not in os.environ:
        pytest.skip("mosquitto is not installed")


class BrokerProcess:
    """One broker; `stop` kills it, `start` brings it back on the same port, empty.

    With `tls` (ca, cert, key) Mosquitto listens with TLS and asks for client certificates.
    """

    def __init__(self, kind: str, tls: tuple[Path, Path, Path] | None = None) -> None:
        self.kind = kind
        self.port = free_port()
        self._tls = tls
        self._process: subprocess.Popen[bytes] | None = None
        self._config: Path | None = None

    @property
    def url(self) -> str:
        return f"{'mqtts' if self._tls else 'mqtt'}://127.0.0.1:{self.port}"

    def start(self) -> Self:
        self._process = subprocess.Popen(self._command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.kind} ended with {self._process.returncode}")
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                time.sleep(0.05)
            else:
                return self
        raise TimeoutError(f"{self.kind} does not listen")

    def stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._config:
            self._config.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _command(self) -> list[str]:
        if self.kind == "amqtt":
            return python("edge.lab.mqtt", self.port)
        lines = [f"listener {self.port} 127.0.0.1", "allow_anonymous true", "persistence false"]
        if self._tls:
            ca, cert, key = self._tls
            lines += [f"cafile {ca}", f"certfile {cert}", f"keyfile {key}", "require_certificate true"]
        with tempfile.NamedTemporaryFile("w", suffix=".conf", delete=False) as file:
            file.write("\n".join([*lines, ""]))
        self._config = Path(file.name)
        self._config.chmod(0o644)  # Mosquitto reads it after it has given up root
        return [mosquitto_path() or "mosquitto", "-c", file.name]
