"""Who this gateway is: its signing key, its TLS key, and the files that it and the operator exchange by hand.

state.db            the Ed25519 key that signs what it says; made on the first start
tls/key.pem         its TLS key, made by `tundish edge export`
tls/cert.pem, ca.pem    what `tundish edge import` brought
"""

import argparse
import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from broker import admission
from broker.messages import VERSION, Admission, Request, Signer
from broker.settings import MqttSettings, endpoint
from broker.topics import segment
from edge.config import Config
from edge.store import State
from models.errors import PeerError, UserError

log = logging.getLogger(__name__)

_TLS = "tls"


def own_signer(state: State) -> Signer:
    """This gateway's key; the first call makes it. It never leaves state.db."""
    stored = state.get("key")
    if stored is not None:
        return Signer.from_bytes(stored)
    signer = Signer.generate()
    with state.transaction():
        state.put("key", signer.to_bytes())
        state.record("key-made", {"public_key": signer.public_key.hex()})
    log.info("made this gateway's key: %s", signer.public_key.hex())
    return signer


def with_own_tls(settings: MqttSettings, folder: Path) -> MqttSettings:
    """Show the certificate that was imported, where the file names none."""
    ca, cert, key = (folder / _TLS / name for name in ("ca.pem", "cert.pem", "key.pem"))
    if not endpoint(settings.url).tls or settings.cert or not cert.is_file():
        return settings
    return msgspec.structs.replace(settings, ca=settings.ca or str(ca), cert=str(cert), key=str(key))


def export_request(args: argparse.Namespace, config: Config, folder: Path) -> int:
    """Write the request that the operator enrols this gateway by."""
    from broker.pki import make_request  # noqa: PLC0415 - X.509 is for enrolment alone

    with closing(State(folder)) as state:
        signer = own_signer(state)
        request = Request(VERSION, str(config.path), signer.public_key, make_request(_tls_key(folder / _TLS)))
        admission.write(args.request, signer, request)
        with state.transaction():
            state.record("request-made", {"path": str(config.path), "public_key": signer.public_key.hex()})
    print(
        f"{args.request} is for the operator, who runs: tundish broker enrol -c federation.toml --path {config.path} "
        f"--request {args.request.name} --out {args.request.with_suffix('.admission').name}"
    )
    print(f"he can tell it by its key: {signer.public_key.hex()}")
    return 0


def import_admission(args: argparse.Namespace, config: Config, folder: Path) -> int:
    """Take up what the operator sent back: the certificate, its authority, and the federation's key."""
    from broker.pki import write_file  # noqa: PLC0415 - X.509 is for enrolment alone

    answer = admission.read(args.file, Admission)
    try:
        segment(answer.federation)
    except PeerError as error:
        raise UserError(str(args.file), 0, "", error.detail, "let the operator make it again") from error
    if answer.path != str(config.path):
        problem = f"is for {answer.path}, this is {config.path}"
        raise UserError(str(args.file), 0, "", problem, "give the file that was made for this gateway")
    if config.federation.key and config.federation.key != answer.public_key.hex():
        remedy = "ask the operator which key is right; federation.key in gateway.toml says another one"
        raise UserError(str(args.file), 0, "", f"is of a federation with key {answer.public_key.hex()}", remedy)
    _check_fits(args.file, answer, folder / _TLS / "key.pem")
    with closing(State(folder)) as state:
        state.claim()  # a running gateway would go on with the old ones
        write_file(folder / _TLS / "ca.pem", answer.authority)
        write_file(folder / _TLS / "cert.pem", answer.certificate)
        with state.transaction():
            state.pin(answer.federation, answer.public_key, "imported")
    print(f"{config.path} takes part in {answer.federation}, whose key is {answer.public_key.hex()}")
    return 0


def _check_fits(file: Path, answer: Admission, key: Path) -> None:
    """UserError unless the certificate is for our own TLS key, and by the authority that comes with it."""
    from cryptography import x509  # noqa: PLC0415
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    again = "export the request again, and let the operator answer that one"
    try:
        certificate, authority = map(x509.load_pem_x509_certificate, (answer.certificate, answer.authority))
        certificate.verify_directly_issued_by(authority)
        ours = load_pem_private_key(key.read_bytes(), None).public_key()
    except OSError:
        raise UserError(str(file), 0, "", "this gateway made no request", "run tundish edge export first") from None
    except (ValueError, TypeError, x509.InvalidVersion, InvalidSignature) as error:
        raise UserError(str(file), 0, "", f"its certificate can't be used: {error}", again) from error
    if certificate.public_key() != ours:
        raise UserError(str(file), 0, "", "its certificate is for another key than this gateway has now", again)


def _tls_key(folder: Path) -> Any:
    """This gateway's TLS key; the first call makes it."""
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    from broker.pki import key_pem, write_file  # noqa: PLC0415

    path = folder / "key.pem"
    if path.is_file():
        stored = load_pem_private_key(path.read_bytes(), None)
        if isinstance(stored, ec.EllipticCurvePrivateKey):
            return stored
    made = ec.generate_private_key(ec.SECP256R1())
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_file(path, key_pem(made), secret=True)
    return made
