"""What all tasks of a gateway share."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from broker.messages import Signer
from edge.config import Config
from edge.ring import Samples
from edge.store import State


@dataclass
class Shop:
    """Configuration, stores, key and link. `publish` returns False when the broker is away."""

    config: Config
    folder: Path
    state: State
    samples: Samples
    signer: Signer
    publish: Callable[..., bool]
    subscribe: Callable[..., object]
    unsubscribe: Callable[..., object]
    refused: Counter[str] = field(default_factory=Counter)
    federation: str = ""
    federation_key: bytes = b""
