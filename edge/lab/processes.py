"""Child processes of a lab: started with a log file each, watched, and stopped or killed for real."""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from models.errors import LocalError

_STOP_S = 10
# Below those that Linux gives to outgoing connections (ip_local_port_range).
_PORTS = 12_000, 32_000


def free_port() -> int:
    """Return a TCP port of loopback that nobody has now, and that no outgoing connection is given before it is used."""
    while True:
        port = random.randrange(*_PORTS)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def python(module: str, *arguments: object) -> list[str]:
    """Return the command line that runs a module with this interpreter."""
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]


class Process:
    """One child. `start` can be called again after `stop` or `kill`; the log goes on in the same file."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name, self.command, self.log = name, command, log
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the child; its output goes to the log."""
        environment = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    @property
    def pid(self) -> int:
        """Process id of the running child."""
        if self._child is None:
            raise LocalError(f"{self.name} is not running")
        return self._child.pid

    def complete(self) -> None:
        """Start the child and wait until it has ended by itself; LocalError, with its last line, if it failed."""
        self.start()
        try:
            if self._child is not None and self._child.wait():
                raise LocalError(f"{self.name} failed: {self.last_line()}")
        finally:
            self.stop()

    def check(self) -> None:
        """Raise LocalError, with the last line of the log, when the child has ended by itself."""
        if self._child is not None and self._child.poll() is not None:
            raise LocalError(f"{self.name} ended with {self._child.returncode}: {self.last_line()}; see {self.log}")

    def last_line(self) -> str:
        """Return the newest line of the log."""
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").strip().splitlines()
            return lines[-1] if lines else "it said nothing"
        return "there is no log"

    def kill(self) -> None:
        """SIGKILL: no goodbye, no flush."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None

    def stop(self) -> None:
        """SIGTERM, and SIGKILL when ten seconds were not enough."""
        if self._child is None:
            return
        self._child.terminate()
        try:
            self._child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child = None


def mosquitto_path() -> str | None:
    """Return where Mosquitto is, None without it; Debian keeps it out of the users' PATH."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def mqtt_broker(kind: str, port: int, folder: Path) -> Process:
    """Make (not start) a broker on loopback: `embedded` is amqtt, `mosquitto` the real one.

    Both forget everything when they stop, which is the harder case for those who talk to them. Mosquitto reads
    mosquitto.conf in the folder.
    """
    log = folder / "broker.log"
    if kind == "embedded":
        return Process("broker", python("edge.lab.mqtt", port), log)
    binary = mosquitto_path()
    if binary is None:
        raise LocalError("mosquitto is not installed; apt-get install mosquitto, or use --broker embedded")
    return Process("broker", [binary, "-c", str(folder / "mosquitto.conf")], log)


def wait_for(what: str, ready: Callable[[], bool], processes: list[Process], timeout_s: float) -> None:
    """Poll until `ready`; LocalError when a process ends meanwhile or the time is up."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        for process in processes:
            process.check()
        if time.monotonic() > deadline:
            raise LocalError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(0.1)


def listens(port: int) -> bool:
    """Say whether somebody accepts connections on a port of loopback."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
