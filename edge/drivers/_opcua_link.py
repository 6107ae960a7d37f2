"""OPC UA: one session with a server over as many connections as it takes, and a subscription that outlives a cut.

After a cut the session is activated again over a new secure channel (Part 4, 6.7), or the subscription is transferred
to a new session (5.14.7); what the server queued meanwhile comes by itself. Messages that were under way when the
line was cut leave a hole in the sequence numbers, and are fetched with Republish (5.14.6). So every message is
delivered once and in order, or counted in `gaps`.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from asyncua import ua
from asyncua.client.client import Client
from asyncua.client.ua_session import UaSession
from asyncua.ua import uaerrors
from asyncua.ua.attribute_ids import AttributeIds
from asyncua.ua.object_ids import ObjectIds

from edge.drivers._common import LostError, endpoint
from edge.drivers._opcua_pki import application_uri
from edge.drivers._opcua_security import Security, UntrustedError
from edge.tags import Source

LIFETIME_S = 120.0  # of a session and a subscription without a connection; then a server may forget them
BATCH = 500  # operations of one call where a server names no limit; 1000 is a common one
_WATCH_S = 1.0  # between two looks at the server's state
_RENEW_AT = 0.75  # of a secure channel's lifetime (Part 4, 5.5.2.1)
_LEAST_RENEWAL_S = 0.5  # a server may say any lifetime
_MOST_REPUBLISHED = 1000  # messages of one hole; no server keeps more
_MOST_SEQUENCE = 2**32 - 1  # after which sequence numbers begin at 1 again (Part 4, 7.38)
_STATE = ua.NodeId(ua.Int32(ObjectIds.Server_ServerStatus_State))
_START = ua.NodeId(ua.Int32(ObjectIds.Server_ServerStatus_StartTime))
_TABLES = [
    ua.NodeId(ua.Int32(number))
    for number in (
        ObjectIds.Server_NamespaceArray,
        ObjectIds.Server_ServerCapabilities_OperationLimits_MaxMonitoredItemsPerCall,
        ObjectIds.Server_ServerCapabilities_OperationLimits_MaxNodesPerRead,
        ObjectIds.Server_ServerCapabilities_OperationLimits_MaxNodesPerBrowse,
    )
]

Take = Callable[[ua.PublishResult], None]


class _Session(UaSession):
    """The library's session without its publish loop, which forgets acknowledgements and fills no holes."""

    def ensure_publish_loop(self) -> None:
        """Leave publishing to `Link.publish`."""


class Link:
    """A client's half of one session. `gaps` counts holes in what was delivered that no server could fill."""

    def __init__(self, url: str, timeout_s: float, security: Security) -> None:
        self.gaps = 0
        self.subscription = 0
        self.max_items = self.max_reads = self.max_browses = BATCH
        self.spaces: list[str] = []
        self._url, self._timeout_s, self._security = url, timeout_s, security
        self._client: Client | None = None
        self._expected = 1  # the sequence number of the next message
        self._started: Any = None
        self._fresh = True  # nothing came of this subscription yet, and nothing was cut
        self._acks: list[ua.SubscriptionAcknowledgement] = []

    @property
    def session(self) -> Any:
        """The library's session; LostError when there is none."""
        if self._client is None:
            raise LostError("not connected")
        return self._client.uaclient.session

    @property
    def session_s(self) -> float:
        """For how long the server keeps the session without a connection."""
        return self._client.session_timeout / 1000 if self._client is not None else 0.0

    async def read(self, nodes: Sequence[ua.NodeId]) -> list[ua.DataValue]:
        """Read values with both timestamps; a bad status is the value's own."""
        params = ua.ReadParameters()
        params.TimestampsToReturn = ua.TimestampsToReturn.Both
        params.NodesToRead = [ua.ReadValueId(NodeId=node, AttributeId=AttributeIds.Value) for node in nodes]
        values: list[ua.DataValue] = await self.session.read(params)
        return values

    async def open(self) -> bool:
        """Connect; True if the subscription of before goes on. May raise anything."""
        await asyncio.to_thread(self._security.read_user)
        client = self._client
        if client is not None and client.uaclient.has_session and await self._resume(client):
            resumed = self.subscription != 0
        else:
            resumed = await self._begin()
        if not resumed:
            self.forget()
        await self._look_up()
        return resumed

    async def _resume(self, client: Client) -> bool:
        """Activate the session of before on a new channel; False if the server holds it no more."""
        self._fresh = False
        await client.connect_socket()
        try:
            await self._open_channel(client)
            client.uaclient.session.rebind_authentication_token()
            await self._activate(client)
            same = bool(await self._start_time(client) == self._started)
        except Exception:  # noqa: BLE001 - whatever it is, a server that answers a new client is begun anew
            same = False
        if not same:
            client.disconnect_socket()
        return same

    async def _begin(self) -> bool:
        """Begin a new session; True if it could take the subscription of before over."""
        client = Client(self._url, timeout=self._timeout_s)
        client.name = client.description = "Tundish"
        client.application_uri = application_uri()
        client.session_timeout = int(LIFETIME_S * 1000)
        client.uaclient.session = _Session(client.uaclient)
        client.user_certificate, client.user_private_key = self._security.certificate, self._security.key
        try:
            await self._connect(client)
            endpoint = self._security.select(await client.get_endpoints())
        except BaseException:
            client.disconnect_socket()  # the session of before may be had yet
            raise
        self._client = client
        if self._security.policy is not None:
            await client.close_secure_channel()
            client.disconnect_socket()
            host = client.server_url.hostname or ""
            await asyncio.to_thread(self._security.secure, client, endpoint, host)
            await self._connect(client)
        await client.create_session()
        try:
            await self._activate(client)
        except Exception:
            with contextlib.suppress(Exception):  # a server has few sessions to give
                await client.uaclient.close_session(delete_subscriptions=True)
            raise
        return self.subscription != 0 and await self._transfer(client)

    async def _start_time(self, client: Client) -> Any:
        """Return when the server started; None if it does not say.

        A restarted server may give the numbers of sessions and subscriptions to others, from whom none must be taken.
        """
        (data,) = await client.uaclient.session.read_attributes([_START], AttributeIds.Value)
        return data.Value.Value if data.Value is not None else None

    async def _transfer(self, client: Client) -> bool:
        if self._started is None or await self._start_time(client) != self._started:
            return False
        request = ua.TransferSubscriptionsParameters(SubscriptionIds=[self.subscription], SendInitialValues=False)
        try:
            (result,) = await client.uaclient.session.transfer_subscriptions(request)
        except (uaerrors.UaStatusCodeError, ValueError):
            return False
        return bool(result.StatusCode.is_good())

    async def _connect(self, client: Client) -> None:
        await client.connect_socket()
        await self._open_channel(client)

    async def _open_channel(self, client: Client) -> None:
        await client.send_hello()
        try:
            await client.open_secure_channel()
        except (AssertionError, OSError) as error:
            # A server may close the line in answer to a certificate that it does not trust (Part 6, 6.7.4), and the
            # library asserts where a server says so.
            if client.security_policy.host_certificate is None:
                raise
            raise UntrustedError from error

    async def _activate(self, client: Client) -> None:
        security = self._security
        await client.activate_session(security.user or None, security.password, security.certificate)

    async def _look_up(self) -> None:
        """Read the namespaces and the limits of this server's life; an absent limit is none."""
        self._started = await self._start_time(self._client) if self._client is not None else None
        spaces, *limits = await self.session.read_attributes(_TABLES, AttributeIds.Value)
        found = spaces.Value.Value if spaces.Value is not None else None
        self.spaces = [str(uri) for uri in found] if isinstance(found, list) else []
        counts = [limit.Value.Value if limit.Value is not None else 0 for limit in limits]
        self.max_items, self.max_reads, self.max_browses = (
            n if isinstance(n, int) and 0 < n < BATCH else BATCH for n in counts
        )

    async def subscribe(self, publishing_ms: int, keep_alives: int) -> ua.CreateSubscriptionResult:
        """Make a new subscription; what the server revised stands in the result."""
        params = ua.CreateSubscriptionParameters()
        params.RequestedPublishingInterval = publishing_ms
        params.RequestedMaxKeepAliveCount = keep_alives
        params.RequestedLifetimeCount = max(3 * keep_alives, int(LIFETIME_S * 1000) // publishing_ms)
        params.PublishingEnabled = True
        result: ua.CreateSubscriptionResult = await self.session.create_subscription(params, _ignore)
        self.subscription = result.SubscriptionId
        self._expected, self._fresh, self._acks = 1, True, []
        return result

    def forget(self) -> None:
        """Give the subscription up: what the server still held of it is lost, and counted as one gap."""
        self.gaps += self.subscription != 0
        self.subscription = 0

    async def abandon(self) -> None:
        """Close a session whose subscription is of no use any more, so that the server keeps neither."""
        self.forget()
        await self.close()

    async def publish(self, take: Take) -> None:
        """Hand each message of the subscription to `take`, once and in order; ends by raising.

        `take` gets keep-alives too, which hold no notification.
        """
        while True:
            try:
                response = await self.session.publish(self._acks)
            except (uaerrors.BadTimeout, uaerrors.UaStructParsingError):
                continue  # what could not be parsed leaves a hole, which `_fill` finds
            except (uaerrors.BadSubscriptionIdInvalid, uaerrors.BadNoSubscription) as error:
                self.forget()
                raise LostError(f"the server forgot the subscription ({type(error).__name__})") from error
            self._acks = []
            result = response.Parameters
            if result.SubscriptionId != self.subscription:
                continue
            message = result.NotificationMessage
            await self._fill(message.SequenceNumber, take)
            if not message.NotificationData:
                take(result)
            elif message.SequenceNumber == self._expected:
                self._take(result, take)

    async def _fill(self, sequence: int, take: Take) -> None:
        """Fetch the messages before `sequence` that never came. A keep-alive carries the number of the next message."""
        if self._fresh:  # the first number is 1 (Part 4, 7.38), but not every server heeds that
            self._fresh, self._expected = False, sequence
        missing = (sequence - self._expected) % _MOST_SEQUENCE
        if missing > _MOST_SEQUENCE // 2:
            return  # an old message, sent again
        if missing > _MOST_REPUBLISHED:
            self.gaps += 1
            self._expected, missing = sequence, 0
        lost = False
        for _ in range(missing):
            lost |= not await self._republish(take)
        self.gaps += lost

    async def _republish(self, take: Take) -> bool:
        """Fetch one message that never came; False if the server has it no more."""
        number = self._expected
        try:
            message = await self.session.republish(self.subscription, number)
        except (uaerrors.UaStatusCodeError, uaerrors.UaStructParsingError):
            message = None
        if message is None or message.SequenceNumber != number:
            self._expected = _after(number)
            return False
        self._take(ua.PublishResult(self.subscription, MoreNotifications=True, NotificationMessage=message), take)
        return True

    def _take(self, result: ua.PublishResult, take: Take) -> None:
        number = result.NotificationMessage.SequenceNumber
        self._acks.append(ua.SubscriptionAcknowledgement(self.subscription, number))
        self._expected = _after(number)
        take(result)

    async def watch(self) -> None:
        """Ask for the server's state again and again, and renew the channel in time; ends by raising."""
        client = self._client
        if client is None:
            raise LostError("not connected")
        renew_at = _renewal(client)
        while True:
            await asyncio.sleep(max(0.0, min(_WATCH_S, renew_at - time.monotonic())))
            async with asyncio.timeout(max(_WATCH_S, self._timeout_s / 2)):
                await self.session.read_attributes([_STATE], AttributeIds.Value)
            if time.monotonic() >= renew_at:
                await client.open_secure_channel(renew=True)
                client.uaclient.revolve_security_token()
                renew_at = _renewal(client)

    def cut(self) -> None:
        """Drop the connection and keep the session, for `open` to go on with."""
        if self._client is not None:
            self._client.disconnect_socket()

    async def close(self) -> None:
        """Close session and connection within a second and a half, whatever their state."""
        client, self._client, self.subscription = self._client, None, 0
        if client is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.disconnect(), 1.5)
            client.disconnect_socket()


def server_url(source: Source) -> str:
    """Return a source's URL with its port; UserError if it is no OPC UA one."""
    host, port = endpoint(source, "opc.tcp", 4840)
    shown = f"[{host}]" if ":" in host else host
    return source.url if f":{port}" in source.url else f"opc.tcp://{shown}:{port}"


def batches(things: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Cut a sequence in parts of `size`."""
    return [things[at : at + size] for at in range(0, len(things), size)]


def _renewal(client: Client) -> float:
    """Return when a channel that was opened now is to be renewed, on the monotonic clock."""
    return time.monotonic() + max(_LEAST_RENEWAL_S, _RENEW_AT * client.secure_channel_timeout / 1000)


def _after(sequence: int) -> int:
    return sequence % _MOST_SEQUENCE + 1


def _ignore(_result: ua.PublishResult) -> None:
    """Stand in for the library's publish loop, which does not run."""
