"""Two hidden layers over the flattened window, for rows of features. (B, C, T) -> (B, outputs)."""

from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear, LayerNorm, ReLU, twice; then a linear head."""

    def __init__(self, channels: int, length: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * length, 96),
            nn.LayerNorm(96),
            nn.ReLU(),
            nn.Linear(96, 64),
            nn.LayerNorm(64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, outputs): logits, or normalised numbers."""
        out: Tensor = self.head(self.body(x))
        return out


def build(channels: int, length: int, outputs: int) -> nn.Module:
    """Make the net for windows (C, T)."""
    return Mlp(channels, length, outputs)
