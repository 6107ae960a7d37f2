"""Squeeze a window through a narrow layer and rebuild it, for anomaly detection. (B, C, T) -> (B, C * T).

What it has not learnt to rebuild is unusual (Sakurada & Yairi 2014, MLSDA); the error per channel says where.
"""

from torch import Tensor, nn


class Autoencoder(nn.Module):
    """C * T -> 96 -> 16 -> 96 -> C * T."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        size = channels * length
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, 96), nn.LayerNorm(96), nn.ReLU(), nn.Linear(96, 16))
        self.decoder = nn.Sequential(nn.Linear(16, 96), nn.LayerNorm(96), nn.ReLU())
        self.head = nn.Linear(96, size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C * T), the window rebuilt, channel by channel."""
        out: Tensor = self.head(self.decoder(self.encoder(x)))
        return out


def build(channels: int, length: int, outputs: int) -> nn.Module:
    """Make the net for windows (C, T); `outputs` is C * T by definition of an anomaly task."""
    if outputs != channels * length:
        raise ValueError("an autoencoder rebuilds its whole input")
    return Autoencoder(channels, length)
