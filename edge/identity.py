"""Who this gateway is: its signing key, its TLS key, and what it and the operator exchange, by file or by token.

state.db            the Ed25519 key that signs what it says, and the X25519 key that it agrees on others by
                    (RFC 7748); made on the first start
tls/key.pem         its TLS key, made by `tundish edge export`, or by `import` of a token
tls/cert.pem, ca.pem    what `tundish edge import` brought
"""

import argparse
import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from broker import admission, stick
from broker.est import Token, is_token
from broker.messages import VERSION, Admission, ModelManifest, Request, Signer, Vote, peek
from broker.settings import MqttSettings, endpoint
from broker.topics import Accepted, Uplink, segment
from edge.charter import SAID
from edge.config import Config
from edge.stick_command import entries_of, import_messages
from edge.store import State
from models.commandline import counted
from models.errors import PeerError, UserError

log = logging.getLogger(__name__)

_TLS, _AGREEMENT = "tls", "agreement-key"


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


def own_agreement_key(state: State) -> bytes:
    """The public half (32 bytes) of this gateway's X25519 key; the first call makes it. It never leaves state.db."""
    stored = state.get(_AGREEMENT)
    key = X25519PrivateKey.generate() if stored is None else X25519PrivateKey.from_private_bytes(stored)
    public = key.public_key().public_bytes_raw()
    if stored is None:
        with state.transaction():
            state.put(_AGREEMENT, key.private_bytes_raw())
            state.record("key-made", {"agreement_key": public.hex()})
    return public


def with_own_tls(settings: MqttSettings, folder: Path) -> MqttSettings:
    """Show the certificate that was imported, where the file names none."""
    ca, cert, key = tls_files(folder)
    if not endpoint(settings.url).tls or settings.cert or not cert.is_file():
        return settings
    return msgspec.structs.replace(settings, ca=settings.ca or str(ca), cert=str(cert), key=str(key))


class Issued(msgspec.Struct, frozen=True):
    """This gateway's certificate: where it is renewed ("": by file alone), from when until when it is good (ms).

    `path` is whose it is; empty in a state of an earlier version.
    """

    url: str
    from_ms: int
    until_ms: int
    path: str = ""

    @classmethod
    def stored(cls, state: State) -> "Issued | None":
        """What `keep` stored; None before an enrolment."""
        data = state.get("certificate")
        return None if data is None else msgspec.json.decode(data, type=cls)

    def check(self, path: str, folder: Path) -> None:
        """UserError where a gateway runs with the state of another."""
        if self.path and self.path != path:
            problem = f"{folder} is the state of {self.path}, this gateway is {path}"
            raise UserError("--state", 0, "", problem, "give its own, or enrol it there under this path")

    def keep(self, state: State) -> None:
        """Store it, with a line in the ledger; inside of a transaction."""
        state.put("certificate", msgspec.json.encode(self))
        state.record("certificate", {"until_ms": self.until_ms})


def make_own_request(config: Config, signer: Signer, folder: Path) -> Request:
    """Make this gateway's request, and on the first call its TLS key."""
    from broker.pki import make_request  # noqa: PLC0415 - X.509 is for enrolment alone

    return Request(VERSION, str(config.path), signer.public_key, make_request(_tls_key(folder / _TLS)))


def export_request(args: argparse.Namespace, config: Config, folder: Path) -> int:
    """Write the request that the operator enrols this gateway by."""
    with closing(State(folder)) as state:
        signer = own_signer(state)
        admission.write(args.request, signer, make_own_request(config, signer, folder))
        with state.transaction():
            state.record("request-made", {"path": str(config.path), "public_key": signer.public_key.hex()})
    print(
        f"{args.request} is for the operator, who runs: tundish broker enrol -c federation.toml --path {config.path} "
        f"--request {args.request.name} --out {args.request.with_suffix('.admission').name}"
    )
    print(f"he can tell it by its key: {signer.public_key.hex()}")
    return 0


def export(args: argparse.Namespace, config: Config, folder: Path) -> int:
    """Write the request, or what waits to be sent."""
    return export_request(args, config, folder) if args.request else export_updates(args, config, folder)


def export_updates(args: argparse.Namespace, config: Config, folder: Path) -> int:
    """Write the word on the charter, the updates that have no receipt yet and the last votes, as MQTT has them."""
    entries_of(folder, config, "write the --state that tundish edge run has")
    with closing(State(folder)) as state:
        signer = own_signer(state)
        waiting = [out for out in state.outbox() if out.task in config.tasks]
        word = state.get(SAID)
        # First: of who has not accepted the charter, the aggregator takes no update.
        messages = [(Accepted(config.path).topic, word)] if word else []
        messages += [(Uplink(config.path, out.task, "update").topic, out.envelope) for out in waiting]
        for task in config.tasks:
            if vote := _last_vote(state, task):
                topic = Uplink(config.path, task, "vote").topic
                messages.append((topic, signer.seal(vote, topic)))
        stick.write(args.updates, messages)
        digests = [out.digest.hex() for out in waiting]
        with state.transaction():
            state.record("exported", {"updates": digests, "messages": len(messages)})
    votes, said = len(messages) - len(digests) - bool(word), ", the word on the charter" if word else ""
    print(f"{args.updates} is for the operator: {counted(len(digests), 'update')}, {counted(votes, 'vote')}{said}")
    print(f"he runs: tundish broker import -c federation.toml {args.updates.name}")
    return 0


def _last_vote(state: State, task: str) -> Vote | None:
    """The vote on the newest model that is here; on one before it, it is over."""
    data, manifest = state.get(f"vote/{task}"), state.get(f"manifest/{task}")
    if data is None or manifest is None:
        return None
    vote = msgspec.msgpack.decode(data, type=Vote)
    return vote if peek(manifest, ModelManifest).version == vote.version else None


def import_any(args: argparse.Namespace, config: Config, folder: Path) -> int:
    """Take up what came: the operator's answer, or what the federation says to a gateway without a network."""
    if not is_token(args.file) and stick.is_stick(Path(args.file)):
        return import_messages(Path(args.file), config, folder)
    return import_admission(args, config, folder)


def import_admission(args: argparse.Namespace, config: Config, folder: Path) -> int:
    """Take up the operator's answer, from a file or for a token: certificate, its authority, the federation's key."""
    answer = None if is_token(args.file) else _admission_for(Path(args.file), config, folder)
    with closing(State(folder)) as state:
        state.claim()  # a running gateway would go on with the old ones
        place, url = args.file, ""
        if answer is None:
            place, answer, url = _ask(args.file, config, folder, state)
            _check_answer(place, answer, config)
        took = take_up(place, answer, url, folder)
        with state.transaction():
            state.pin(answer.federation, answer.public_key, "imported")
            took.keep(state)
    print(f"{config.path} takes part in {answer.federation}, whose key is {answer.public_key.hex()}")
    return 0


def _admission_for(path: Path, config: Config, folder: Path) -> Admission:
    """Read the operator's answer; UserError unless it is for this gateway, whose state is there."""
    answer = admission.read(path, Admission)
    _check_answer(str(path), answer, config)
    entries_of(folder, config, "write the --state that tundish edge export --request had")
    return answer


def _ask(text: str, config: Config, folder: Path, state: State) -> tuple[str, Admission, str]:
    """Ask the listener that a token names: what to call it, the answer, where it is renewed."""
    from edge.enrol import by_token  # noqa: PLC0415 - X.509 is for enrolment alone

    token, signer = Token.parse(text), own_signer(state)
    with state.transaction():
        state.record("request-made", {"path": str(config.path), "public_key": signer.public_key.hex()})
    answer = by_token(token, signer, make_own_request(config, signer, folder))
    return "TOKEN", answer, token.url


def _check_answer(place: str, answer: Admission, config: Config) -> None:
    """UserError unless it is for this gateway, and of the federation that gateway.toml names."""
    try:
        segment(answer.federation)
    except PeerError as error:
        raise UserError(place, 0, "", error.detail, "let the operator make it again") from error
    if answer.path != str(config.path):
        problem = f"is for {answer.path}, this is {config.path}"
        raise UserError(place, 0, "", problem, "give the file that was made for this gateway")
    if config.federation.key and config.federation.key != answer.public_key.hex():
        remedy = "ask the operator which key is right; federation.key in gateway.toml says another one"
        raise UserError(place, 0, "", f"is of a federation with key {answer.public_key.hex()}", remedy)


def tls_files(folder: Path) -> tuple[Path, Path, Path]:
    """Where authority, certificate and key are."""
    return folder / _TLS / "ca.pem", folder / _TLS / "cert.pem", folder / _TLS / "key.pem"


def take_up(place: str, answer: Admission, url: str, folder: Path) -> Issued:
    """Store authority and certificate; UserError unless that is for our own TLS key, and by that authority."""
    from cryptography import x509  # noqa: PLC0415
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    from broker.pki import write_file  # noqa: PLC0415 - X.509 is for enrolment alone

    again = "export the request again, and let the operator answer that one"
    ca, cert, key = tls_files(folder)
    try:
        certificate, authority = map(x509.load_pem_x509_certificate, (answer.certificate, answer.authority))
        certificate.verify_directly_issued_by(authority)
        ours = load_pem_private_key(key.read_bytes(), None).public_key()
    except OSError:
        remedy = "run tundish edge export --request there, or write the --state that it had"
        raise UserError("--state", 0, "", f"no request was made with {folder}", remedy) from None
    except (ValueError, TypeError, x509.InvalidVersion, InvalidSignature) as error:
        raise UserError(place, 0, "", f"its certificate can't be used: {error}", again) from error
    if certificate.public_key() != ours:
        raise UserError(place, 0, "", "its certificate is for another key than this gateway has now", again)
    write_file(ca, answer.authority)
    write_file(cert, answer.certificate)
    since, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return Issued(url, int(1000 * since.timestamp()), int(1000 * until.timestamp()), answer.path)


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
