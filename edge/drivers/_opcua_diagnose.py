"""OPC UA for `tundish edge doctor`: endpoints, security, the server's certificate, the kind of user; then the tags."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from asyncua import ua
from asyncua.client.client import Client
from cryptography.hazmat.primitives import hashes

from broker.diagnose import Step, fail, note, ok, reach
from edge.drivers._common import endpoint
from edge.drivers._diagnose import listen
from edge.drivers._opcua_errors import explain
from edge.drivers._opcua_link import server_url
from edge.drivers._opcua_pki import SecurityError, application_uri
from edge.drivers._opcua_security import Security, offered
from edge.tags import Source

_TIMEOUT_S = 5.0
_KINDS = {
    ua.UserTokenType.Anonymous: "anonymous users",
    ua.UserTokenType.UserName: "user names",
    ua.UserTokenType.Certificate: "users' certificates",
    ua.UserTokenType.IssuedToken: "issued tokens",
}


async def diagnose(source: Source) -> AsyncIterator[Step]:
    """Go from the name to the values of one server."""
    host, port = endpoint(source, "opc.tcp", 4840)
    async for step in reach(host, port):
        yield step
        if step.ok is False:
            return
    security, url = Security(source), server_url(source)
    try:
        endpoints = await _endpoints(url)
    except Exception as error:  # noqa: BLE001 - the boundary: the library raises bare exceptions too
        yield fail("endpoints", explain(url, _TIMEOUT_S, error))
        return
    yield ok("endpoints", f"the server offers {', '.join(offered(endpoints)) or 'none that is safe'}")
    try:
        chosen = security.select(endpoints)
    except SecurityError as error:
        yield fail("security", str(error))
        return
    yield ok("security", f"{security.asked} is among them")
    if security.exposed:
        yield note("security", security.exposed)
    if security.policy is not None:
        step = await asyncio.to_thread(_certificate, security, chosen, host)
        yield step
        if not step.ok:
            return
    step = _user(security, chosen)
    yield step
    if not step.ok:
        return
    async for step in listen(source):
        yield step


async def _endpoints(url: str) -> list[ua.EndpointDescription]:
    client = Client(url, timeout=_TIMEOUT_S)
    client.application_uri = application_uri()
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await client.connect_socket()
            await client.send_hello()
            await client.open_secure_channel()
            found: list[ua.EndpointDescription] = await client.get_endpoints()
            with contextlib.suppress(Exception):
                await client.close_secure_channel()
            return found
    finally:
        client.disconnect_socket()


def _certificate(security: Security, chosen: Any, host: str) -> Step:
    """Check the server's certificate as the driver does; blocks (RSA, disk)."""
    try:
        leaf = security.check(chosen, host)
    except (SecurityError, OSError) as error:
        return fail("certificate", str(error))
    print_ = leaf.fingerprint(hashes.SHA256()).hex()[:16]
    return ok("certificate", f"trusted (SHA-256 {print_}…), valid until {leaf.not_valid_after_utc:%Y-%m-%d}")


def _user(security: Security, chosen: Any) -> Step:
    """Whether the endpoint takes the kind of user that the source is."""
    kinds = [token.TokenType for token in chosen.UserIdentityTokens or ()]
    asked = ua.UserTokenType.Anonymous
    if security.user:
        asked = ua.UserTokenType.UserName
    elif security.certificate is not None:
        asked = ua.UserTokenType.Certificate
    taken = ", ".join(_KINDS[kind] for kind in dict.fromkeys(kinds))
    if kinds and asked not in kinds:
        remedy = "set user and password_file, or user_certificate and user_key, of the source as it wants"
        return fail("user", f"the server does not take {_KINDS[asked]} with this security, but {taken}; {remedy}")
    return ok("user", f"the server takes {_KINDS[asked]}")
