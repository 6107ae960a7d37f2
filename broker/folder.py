"""Which folder is an aggregator's memory: a command that needs one refuses any other, and a new one is not made twice.

A journal holds the key by which gateways know their federation. A command with a wrong `--state` would make another,
and say that all is well.
"""

from pathlib import Path

from broker.config import FederationConfig
from broker.database import is_there
from models.errors import UserError


def check_state(state: Path, config: FederationConfig, *, new: bool) -> None:
    """UserError unless `broker init` or `broker run` was here before, or (`new`) this may be where they begin.

    None begins where `[mqtt] cert` is out of another state folder, which then is the one that was meant.
    """
    if is_there(state / "journal.db") or is_there(state / "pki" / "ca.key"):
        return
    if meant := _state_of_certificate(config):
        problem = f"no aggregator has its state in {state}, and [mqtt] cert is of the one in {meant}"
        raise UserError("--state", 0, "", problem, f"write --state {meant}")
    if not new:
        problem = f"no aggregator has its state in {state}"
        remedy = "write the --state of tundish broker init and run, or start with one of these"
        raise UserError("--state", 0, "", problem, remedy)


def _state_of_certificate(config: FederationConfig) -> Path | None:
    """The state folder whose authority made the certificate that this aggregator shows; None if it lies elsewhere."""
    pki = Path(config.mqtt.cert).parent if config.mqtt.cert else None
    return pki.parent if pki and pki.name == "pki" and is_there(pki / "ca.key") else None
