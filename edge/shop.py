"""What all tasks of a gateway share."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from broker.messages import Signer
from edge.config import Config
from edge.ring import Samples
from edge.store import State
from edge.tags import Sample


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
    # Every tag's last sample: one that seldom changes has said its value long before a task is there.
    latest: dict[str, Sample] = field(default_factory=dict)
    federation: str = ""
    federation_key: bytes = b""
