"""Two OPC UA servers that ask for certificates and users, one of them by nobody of this project; and a line to cut."""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pytest
from asyncua import ua
from asyncua.common.utils import ServiceError
from asyncua.crypto.permission_rules import User, UserRole
from asyncua.server.server import Server
from asyncua.server.user_managers import UserManager
from asyncua.ua.status_codes import StatusCodes
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from edge.drivers._opcua_pki import Identity, make_identity
from edge.lab.processes import free_port
from edge.tags import Source, Tag
from tests.rigs import OpcuaRig

NODE = Path(__file__).parent / "node_opcua"
URI = "urn:rig:server"
USER, PASSWORD = "ot", "Grüße aus Lyon"
POLICIES = [
    getattr(ua.SecurityPolicyType, f"{policy}_{mode}")
    for policy in ("Basic256Sha256", "Aes128Sha256RsaOaep", "Aes256Sha256RsaPss")
    for mode in ("Sign", "SignAndEncrypt")
]


def write_identity(identity: Identity, folder: Path, name: str) -> tuple[Path, Path]:
    """Write certificate and key as PEM files."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key.pem"
    pem = serialization.Encoding.PEM
    certificate.write_bytes(identity.certificate.public_bytes(pem))
    pkcs8, bare = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    key.write_bytes(identity.key.private_bytes(pem, pkcs8, bare))
    return certificate, key


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


class Plant(Protocol):
    """What the tests need of a server."""

    port: int
    folder: Path
    certificate: Path
    transfers: bool  # subscriptions outlive their session
    knows_percent: bool
    tells_removal: bool
    flags_overflow: bool

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def add(self, name: str, value: Any, **more: Any) -> None: ...
    async def put(self, name: str, value: Any) -> None: ...
    async def remove(self, name: str) -> None: ...
    async def forget_sessions(self) -> None: ...
    async def trust(self, certificate: x509.Certificate, *, user: bool = False) -> None: ...


def source(plant: Plant, *tags: Tag, pki: Path | None = None, port: int = 0, **options: Any) -> Source:
    """Make a source that reads some tags of a plant."""
    return Source(
        name="plc",
        driver="opcua",
        url=f"opc.tcp://127.0.0.1:{port or plant.port}",
        tags=tags,
        options={"publishing_ms": 50, **options},
        pki=str(pki or ""),
    )


def tag(name: str, **more: Any) -> Tag:
    return Tag(source="plc", name=name, address=f"nsu=urn:rig;s={name}", **more)


class _Users(UserManager):
    """The users of a plant."""

    def __init__(self, plant: "AsyncuaPlant") -> None:
        self.plant = plant

    def get_user(
        self, iserver: Any, username: str | None = None, password: str | None = None, certificate: Any = None
    ) -> User | None:
        del iserver
        if certificate and certificate not in self.plant.gateways:
            known = certificate in self.plant.users
        else:
            known = (username, password) in {(None, None), (USER, PASSWORD)}
        return User(UserRole.User) if known else None


class AsyncuaPlant(OpcuaRig):
    """An asyncua server with every policy, which knows its gateways and users."""

    transfers = knows_percent = tells_removal = flags_overflow = False

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.identity = make_identity(URI, "Rig", ["127.0.0.1"])
        self.certificate, self.key = write_identity(self.identity, folder, "server")
        self.gateways: list[bytes] = []
        self.users: list[bytes] = []
        self.values = {}

    async def prepare(self, server: Server) -> None:
        await server.set_application_uri(URI)
        await server.load_certificate(str(self.certificate))
        await server.load_private_key(str(self.key))
        server.set_security_policy([ua.SecurityPolicyType.NoSecurity, *POLICIES])
        server.set_certificate_validator(self._check)
        server.iserver.set_user_manager(_Users(self))

    async def _check(self, certificate: x509.Certificate, _application: ua.ApplicationDescription) -> None:
        # Without message security the library's client sends a user's certificate as its own.
        if der(certificate) not in self.gateways + self.users:
            raise ServiceError(StatusCodes.BadCertificateUntrusted)

    async def add(self, name: str, value: Any, kind: Any = None, **_more: Any) -> None:
        await super().add(name, value, kind)

    async def remove(self, name: str) -> None:
        assert self.server is not None
        await self.server.delete_nodes([self.nodes.pop(name)])

    async def forget_sessions(self) -> None:
        assert self.server is not None
        for session in list(self.server.iserver._external_sessions.values()):
            await session.close_session(delete_subs=True)

    async def trust(self, certificate: x509.Certificate, *, user: bool = False) -> None:
        (self.users if user else self.gateways).append(der(certificate))


class NodePlant:
    """A node-opcua server in a process of its own."""

    transfers = knows_percent = tells_removal = flags_overflow = True

    def __init__(self, folder: Path, modules: Path) -> None:
        self.port, self.folder, self.modules = free_port(), folder, modules
        self.identity = make_identity(URI, "Rig", ["127.0.0.1"])
        self.certificate, self.key = write_identity(self.identity, folder, "server")
        self.process: asyncio.subprocess.Process | None = None
        self.types: dict[str, str] = {}

    async def start(self) -> None:
        asked = {
            "port": self.port, "uri": URI, "folder": str(self.folder), "password": PASSWORD,
            "certificate": str(self.certificate), "key": str(self.key),
        }  # fmt: skip
        self.process = await asyncio.create_subprocess_exec(
            "node", str(NODE / "server.js"), json.dumps(asked),
            env=os.environ | {"NODE_PATH": str(self.modules)},
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        await self._answer()

    async def _answer(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            while (line := await self.process.stdout.readline()) != b"done\n":
                assert line, "the node-opcua server ended"

    async def tell(self, verb: str, **more: Any) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"verb": verb, **more}).encode() + b"\n")
        await self._answer()

    async def add(self, name: str, value: Any, **more: Any) -> None:
        first = value[0] if isinstance(value, list) else value
        self.types[name] = {bool: "Boolean", int: "Int32", float: "Double", str: "String"}[type(first)]
        await self.tell("add", name=name, type=self.types[name], value=value, **more)

    async def put(self, name: str, value: Any) -> None:
        await self.tell("put", name=name, type=self.types[name], value=value)

    async def remove(self, name: str) -> None:
        await self.tell("remove", name=name)

    async def forget_sessions(self) -> None:
        await self.tell("drop")

    async def trust(self, certificate: x509.Certificate, *, user: bool = False) -> None:
        folder = self.folder / ("users" if user else "server") / "trusted" / "certs"
        (folder / f"{certificate.serial_number}.der").write_bytes(der(certificate))
        await self.tell("reload")

    async def stop(self) -> None:
        if self.process is not None:
            process, self.process = self.process, None
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()


def install_node(cache: Path) -> Path:
    """Return a folder with node-opcua, installed there once; skips where node or npm is missing."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("node and npm are not installed (apt-get install nodejs npm)")
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tests run in several processes
        _install_node(cache)
    return cache / "node_modules"


def _install_node(cache: Path) -> None:
    wanted = (NODE / "package.json").read_text()
    made = cache / "package.json"
    if not made.exists() or made.read_text() != wanted:
        # The manifest goes in last: it says that all of it is there.
        shutil.copy(NODE / "package.json", cache / "package.json.new")
        with contextlib.suppress(FileNotFoundError):
            made.unlink()
        flags = ["--no-save", "--no-package-lock", "--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund"]
        packages = [f"{name}@{version}" for name, version in json.loads(wanted)["dependencies"].items()]
        command = ["npm", "install", "--prefix", str(cache), *flags, *packages]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode:
            pytest.skip(f"npm could not install node-opcua: {done.stderr.strip()[-200:]}")
        (cache / "package.json.new").rename(made)


class Line:
    """A TCP line to a server that can be cut, and later mended; while it is `silent` it carries nothing."""

    def __init__(self, port: int) -> None:
        self.port, self._to, self.silent = free_port(), port, False
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", self.port)

    async def cut(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:  # the line is there, the server isn't
            writer.close()
            return
        self._writers |= {writer, to_server}

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    if not self.silent:
                        sink.write(data)
                        await sink.drain()
            sink.close()

        await asyncio.gather(copy(reader, to_server), copy(from_server, writer))


@contextlib.asynccontextmanager
async def line_to(plant: Plant) -> AsyncIterator[Line]:
    line = Line(plant.port)
    await line.mend()
    try:
        yield line
    finally:
        await line.cut()


def with_url(made: Source, url: str) -> Source:
    return msgspec.structs.replace(made, url=url)
