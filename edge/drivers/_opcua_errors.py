"""OPC UA: what a failure means and what to do about it, in one line."""

import socket

from asyncua.ua import uaerrors

from edge.drivers._common import LostError
from edge.drivers._opcua_pki import SecurityError
from edge.drivers._opcua_security import UntrustedError
from models.errors import UserError

_USER = "refuses the user; check user and password_file, or user_certificate and user_key, of the source"
_TRUST = (
    "refuses this gateway's certificate; trust it at the server, where it lies among the rejected ones "
    "(here it is pki/own/cert.der in the state folder)"
)
_MEANS = (
    (ConnectionRefusedError, "refuses connections; check that the server runs and the port is open"),
    (socket.gaierror, "has an unknown host name; write its IP address or mend the name service"),
    (uaerrors.BadUserAccessDenied, _USER),
    (uaerrors.BadIdentityTokenRejected, _USER),
    (uaerrors.BadIdentityTokenInvalid, _USER),
    (uaerrors.BadUserSignatureInvalid, _USER),
    (UntrustedError, _TRUST),
    (uaerrors.BadSecurityChecksFailed, _TRUST),
    (uaerrors.BadCertificateUntrusted, _TRUST),
    (uaerrors.BadCertificateUriInvalid, _TRUST),
    (uaerrors.BadCertificateTimeInvalid, _TRUST + ", and check both clocks"),
    (uaerrors.BadSecurityPolicyRejected, "refuses this security; check what the server allows"),
    (uaerrors.BadSecurityModeRejected, "refuses this security; check what the server allows"),
    (uaerrors.BadTooManySessions, "has no free session; close another client or raise the server's limit"),
)


def explain(where: str, timeout_s: float, error: Exception) -> str:
    """Say in one line what failed at `where` ("plc: opc.tcp://…") and what to do about it."""
    text = " ".join(str(error).split()) or type(error).__name__
    for kind, means in _MEANS:
        if isinstance(error, kind):
            return f"{where} {means}"
    match error:
        case SecurityError() | UserError():
            return f"{where}: {text}"
        case LostError():
            return f"{where}: {text}; connecting again"
        case TimeoutError():
            return f"{where} did not answer within {timeout_s:g} s; check address, network and firewall"
        case uaerrors.UaStatusCodeError():
            return f"{where} answers {type(error).__name__}: {text}; see the server's log"
        case OSError():
            return f"{where} can't be reached ({text}); check the network and that the server runs"
    return f"{where}: {type(error).__name__}: {text}; check that the URL is an OPC UA server's"
