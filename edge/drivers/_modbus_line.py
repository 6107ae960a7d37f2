"""One Modbus connection, shared by all sources behind it: the devices of a serial line, or of one TCP gateway.

One request is in flight at a time (a serial line can't do otherwise, and many TCP devices don't), each with the timeout
of its own source; the requests of several sources take turns. A line is used once: whoever finds it over joins anew.
"""

import asyncio
import contextlib
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from pymodbus.client import AsyncModbusSerialClient, AsyncModbusTcpClient
from pymodbus.exceptions import ConnectionException, ModbusException
from pymodbus.pdu.register_message import ReadHoldingRegistersResponse, ReadInputRegistersResponse

from edge.drivers._common import LostError, endpoint, option, refusal
from edge.tags import Source

SERIAL_OPTIONS: dict[str, type] = {"baud": int, "parity": str, "data_bits": int, "stop_bits": int}

_RTU = "modbus+rtu://"
# The function codes 1 to 4, and no others: a driver only reads.
_READ = {
    "coil": "read_coils",
    "discrete": "read_discrete_inputs",
    "holding": "read_holding_registers",
    "input": "read_input_registers",
}
_BITS_OF_A_CHARACTER = 11  # start, eight of data, parity or a second stop, stop
_NEVER = 2**31


class _AsBytes:
    """A reply's registers as they came: the library would make a list of numbers that we make bytes again."""

    payload = b""

    def decode(self, data: bytes) -> None:
        """Take the bytes that the first one counts; ValueError, to which the library closes up, without them."""
        if len(data) <= data[0]:
            raise ValueError(f"{data[0]} bytes announced, {len(data) - 1} there")
        self.payload = data[1 : 1 + data[0]]

    def __str__(self) -> str:
        """Say little: the library makes a text of every reply, for a log that mostly is off."""
        return f"{len(self.payload)} bytes"


class _Holding(_AsBytes, ReadHoldingRegistersResponse):
    pass


class _Input(_AsBytes, ReadInputRegistersResponse):
    pass


class Place(NamedTuple):
    """Where a line is: host and port, or with port 0 a serial port (its path in `host`) and how it is set."""

    host: str
    port: int
    baud: int = 0
    parity: str = ""
    data_bits: int = 0
    stop_bits: int = 0

    @property
    def key(self) -> tuple[str, int]:
        """The same for all names of one port."""
        return (self.host.lower(), self.port) if self.port else (os.path.realpath(self.host), 0)

    @property
    def pause_s(self) -> float:
        """How long a serial line rests between two frames: 3.5 characters (Modbus over Serial Line V1.02, 2.5.1.1)."""
        if self.port:
            return 0.0
        return max(0.00175, 3.5 * _BITS_OF_A_CHARACTER / self.baud)

    @property
    def unreachable(self) -> str:
        """Why there is no connection, and what to check."""
        if self.port:
            return "can't be reached; check address, network, firewall and that the device is on"
        path = Path(self.host)
        if not path.exists():
            return "is not there; check the adapter, and the name with ls -l /dev/serial/by-id"
        if not os.access(path, os.R_OK | os.W_OK):
            return "is not permitted; check that this user is in the group of the port, mostly dialout"
        return "can't be opened; check that no other program uses it, and that it is a serial port"

    @property
    def ended(self) -> str:
        """Why there no longer is one, and what to check."""
        if self.port:
            return "closed the connection; check that the device serves one more client"
        return "went away; check the adapter and its cable"


def parse_place(source: Source) -> Place:
    """Read a source's URL and its serial options; UserError for what can't be meant."""
    if not source.url.startswith(_RTU):
        place = Place(*endpoint(source, "modbus+tcp", 502))
        for key in SERIAL_OPTIONS:
            if key in source.options:
                raise refusal(source, key, "is of a serial port", f"write url = {_RTU}/dev/ttyUSB0, or remove {key}")
        return place
    path = source.url.removeprefix(_RTU)
    if not path.startswith("/") or path.endswith("/"):
        raise refusal(source, "url", f"{source.url!r} names no serial port", f"write {_RTU}/dev/ttyUSB0")
    parity = option(source, "parity", "E").upper()
    if parity not in {"N", "E", "O"}:
        raise refusal(source, "parity", f"{parity!r} is none", 'write "N" (none), "E" (even) or "O" (odd)')
    # The defaults are the standard's own (V1.02, 2.5.1).
    return Place(
        path,
        0,
        option(source, "baud", 19_200, 300, 4_000_000),
        parity,
        option(source, "data_bits", 8, 7, 8),
        option(source, "stop_bits", 2 if parity == "N" else 1, 1, 2),
    )


class Line:
    """A connection and those who use it; `over` once it is of no more use to anybody."""

    def __init__(self, place: Place, key: tuple[str, int]) -> None:
        self.place = place
        self._key = key
        self.over = False
        self._users: set[object] = set()
        self._silent: set[object] = set()  # who got no answer since the last one that anybody got
        self._owing: set[int] = set()  # devices whose answer may still come
        self._lock = asyncio.Lock()
        self._quiet_at = 0.0  # nothing is asked before
        self._client: Any = None

    async def connect(self, timeout_s: float) -> None:
        """Connect unless another source has; LostError says why that can't be done."""
        async with self._lock:
            if self.over:
                raise LostError(self.place.unreachable)
            if self._client is None:
                self._client = _client(self.place, timeout_s, self._traced)
                # The library counts unanswered requests over all devices; a dead one must not end the live ones' line.
                self._client.set_max_no_responses(_NEVER)
            if self._client.connected:
                return
            if not await self._client.connect():
                self.end()
                raise LostError(self.place.unreachable)
            # What the last connection asked for may still be on its way here.
            await asyncio.sleep(0 if self.place.port else timeout_s)

    async def ask(
        self, user: object, table: str, at: int, count: int, device_id: int, timeout_s: float, retries: int
    ) -> Any:
        """Send one read request when the line is free and return the library's reply.

        LostError if the connection ends meanwhile, TimeoutError if no answer comes.
        """
        async with self._lock:
            if (quiet_s := self._quiet_at - time.monotonic()) > 0:
                await asyncio.sleep(quiet_s)
            if self.over:
                raise LostError(self.place.ended)
            reply = await self._ask(table, at, count, device_id, timeout_s, retries)
        if self.over:
            raise LostError(self.place.ended)
        if reply is None:
            self._silent.add(user)
            if self._silent >= self._users:
                self.end()
            raise TimeoutError
        return reply

    async def _ask(self, table: str, at: int, count: int, device_id: int, timeout_s: float, retries: int) -> Any:
        transactions = self._client.ctx
        transactions.comm_params.timeout_connect, transactions.retries = timeout_s, retries
        reply = None
        try:
            with contextlib.suppress(ModbusException, TimeoutError):
                reply = await getattr(self._client, _READ[table])(at, count=count, device_id=device_id)
                self._silent.clear()
            _check_cancelled()
        except asyncio.CancelledError:
            # The answer to a caller who is gone must not be taken for that to the next request.
            self._quiet_at = time.monotonic() + (timeout_s if reply is None else self.place.pause_s)
            raise
        if self.place.pause_s:
            # RTU frames bear no number: an answer that is late must not be taken for that to the next request.
            late = reply is not None and (reply.retries or device_id in self._owing)
            (self._owing.add if reply is None else self._owing.discard)(device_id)
            self._quiet_at = time.monotonic() + (timeout_s if late else self.place.pause_s)
        return reply

    def enter(self, user: object) -> None:
        """Use the line from now on."""
        self._users.add(user)

    def leave(self, user: object) -> None:
        """Use the line no more; the last one ends it."""
        self._users.discard(user)
        self._silent.discard(user)
        if not self._users:
            self.end()

    def end(self) -> None:
        """Close the connection, whoever uses it."""
        if self.over:
            return
        self.over = True
        del _lines[self._key]
        if self._client is not None:
            # The library lets who waits for an answer wait on until the timeout.
            answer = self._client.ctx.response_future
            if not answer.done():
                answer.set_exception(ConnectionException("over"))
                answer.exception()  # seen, if nobody waits
            self._client.close()

    def _traced(self, connected: bool) -> None:  # noqa: FBT001 - the library's signature
        if not connected:
            self.end()


def _check_cancelled() -> None:
    """Be cancelled after all: Python 3.11's wait_for, in the library, forgets it if it comes with the answer."""
    caller = asyncio.current_task()
    if caller is not None and caller.cancelling():
        raise asyncio.CancelledError


_lines: dict[tuple[str, int], Line] = {}


def join(place: Place, user: object) -> Line:
    """Return the line at a place, a new one if there is none; LostError if it is set otherwise there."""
    key = place.key  # of this moment: where the port's name leads may change
    line = _lines.get(key)
    if line is None:
        line = _lines[key] = Line(place, key)
    if line.place._replace(host="") != place._replace(host=""):
        raise LostError("is used by another source with other settings; check baud, parity, data_bits and stop_bits")
    line.enter(user)
    return line


def _client(place: Place, timeout_s: float, traced: Any) -> Any:
    once: dict[str, Any] = {
        "timeout": timeout_s,
        "reconnect_delay": 0,
        "reconnect_delay_max": 0,
        "trace_connect": traced,
    }
    client: AsyncModbusTcpClient | AsyncModbusSerialClient
    if place.port:
        client = AsyncModbusTcpClient(place.host, port=place.port, **once)
    else:
        client = AsyncModbusSerialClient(
            place.host,
            baudrate=place.baud,
            parity=place.parity,
            bytesize=place.data_bits,
            stopbits=place.stop_bits,
            **once,
        )
    client.register(_Holding)
    client.register(_Input)
    return client
