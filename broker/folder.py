"""Which folder is an aggregator's memory: a command that needs one refuses any other, and a new one is not made twice.

A journal holds the key by which gateways know their federation. A command with a wrong `--state` would make another,
and say that all is well.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from broker.config import FederationConfig
from broker.database import LOCK_FILE, is_there
from broker.journal import Journal
from broker.settings import endpoint
from broker.status import STATUS_FILE
from models.errors import UserError

log = logging.getLogger(__name__)

_JOURNAL = "journal.db"


def check_state(state: Path, config: FederationConfig, *, new: bool) -> None:
    """UserError unless `broker init` or `broker run` was here before, or (`new`) this may be where they begin.

    None begins where `[mqtt] cert` is out of another state folder, which then is the one that was meant.
    """
    if is_state(state):
        return
    if meant := _state_of_certificate(config):
        problem = f"no aggregator has its state in {state}, and [mqtt] cert is of the one in {meant}"
        raise UserError("--state", 0, "", problem, f"write --state {meant}")
    if not new:
        problem = f"no aggregator has its state in {state}"
        remedy = "write the --state of tundish broker init and run, or start with one of these"
        raise UserError("--state", 0, "", problem, remedy)


def check_authority(config: FederationConfig, state: Path) -> None:
    """Before a run: UserError where `[enrolment]` has no authority to let gateways in by.

    Without certificates of its own, `broker init` may have been forgotten; yet an MQTT broker may be there that asks
    for none, or the authority may be kept elsewhere.
    """
    has_authority = is_there(state / "pki" / "ca.key")
    if config.enrolment is not None and not has_authority:
        problem = f"[enrolment] needs an authority, and there is none in {state}"
        raise UserError("--state", 0, "", problem, "run tundish broker init first, or write the --state that it had")
    if not config.mqtt.cert and endpoint(config.mqtt.url).tls and not has_authority:
        log.warning("[mqtt] has no cert: an MQTT broker set up by tundish broker acl needs tundish broker init first")
    if config.mqtt.cert and not is_state(state):
        log.warning("%s is new: whoever runs with the certificate of [mqtt] loses its connection for a moment", state)


@contextlib.contextmanager
def owned(state: Path) -> Iterator[Journal]:
    """The journal of the one aggregator that has this state, until the end; LocalError if there is another.

    A first start that is refused (UserError) leaves nothing that it made, so that no later command takes the folder for
    a good one; unless somebody was let in meanwhile.
    """
    had_folder, had_journal = state.is_dir(), is_there(state / _JOURNAL)
    journal = Journal(state)
    try:
        journal.claim()
        yield journal
    except UserError:
        with journal.transaction():  # nobody is let in meanwhile
            forget = not had_journal and not journal.roster_size() and not journal.has_tokens()
            for name in (_JOURNAL, f"{_JOURNAL}-wal", f"{_JOURNAL}-shm", STATUS_FILE, LOCK_FILE) if forget else ():
                (state / name).unlink(missing_ok=True)
        if forget and not had_folder:
            with contextlib.suppress(OSError):  # somebody has put something there
                state.rmdir()
        raise
    finally:
        journal.close()


def is_state(state: Path) -> bool:
    """Whether `broker init` or `broker run` was ever here."""
    return is_there(state / _JOURNAL) or is_there(state / "pki" / "ca.key")


def _state_of_certificate(config: FederationConfig) -> Path | None:
    """The state folder whose authority made the certificate that this aggregator shows; None if it lies elsewhere."""
    pki = Path(config.mqtt.cert).parent if config.mqtt.cert else None
    return pki.parent if pki and pki.name == "pki" and is_there(pki / "ca.key") else None
