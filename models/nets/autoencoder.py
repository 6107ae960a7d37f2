"""Squeeze a window through a narrow layer and rebuild it, for anomaly detection. (B, C, T) -> (B, C * T).

What it has not learnt to rebuild is unusual (Sakurada & Yairi 2014, MLSDA); the error per channel says where.
"""

from torch import Tensor, nn

from models.nets._narrow import layer_norm, part


class Autoencoder(nn.Module):
    """C * T -> 96 -> 16 -> 96 -> C * T."""

    def __init__(self, channels: int, length: int, width: float) -> None:
        super().__init__()
        size, hidden, code = channels * length, part(96, width), part(16, width)
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(size, hidden), layer_norm(96, width), nn.ReLU(), nn.Linear(hidden, code)
        )
        self.decoder = nn.Sequential(nn.Linear(code, hidden), layer_norm(96, width), nn.ReLU())
        self.head = nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C * T), the window rebuilt, channel by channel."""
        out: Tensor = self.head(self.decoder(self.encoder(x)))
        return out


def build(channels: int, length: int, outputs: int, width: float = 1) -> nn.Module:
    """Make the net for windows (C, T); `outputs` is C * T by definition of an anomaly task.

    With a `width`, the first channels of each hidden layer of it (`models.width`).
    """
    if outputs != channels * length:
        raise ValueError("an autoencoder rebuilds its whole input")
    return Autoencoder(channels, length, width)
