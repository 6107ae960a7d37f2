"""Two hidden layers over the flattened window, for rows of features. (B, C, T) -> (B, outputs)."""

from torch import Tensor, nn

from models.nets._narrow import layer_norm, part


class Mlp(nn.Module):
    """Linear, LayerNorm, ReLU, twice; then a linear head."""

    def __init__(self, channels: int, length: int, outputs: int, width: float) -> None:
        super().__init__()
        first, second = part(96, width), part(64, width)
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * length, first),
            layer_norm(96, width),
            nn.ReLU(),
            nn.Linear(first, second),
            layer_norm(64, width),
            nn.ReLU(),
        )
        self.head = nn.Linear(second, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, outputs): logits, or normalised numbers."""
        out: Tensor = self.head(self.body(x))
        return out


def build(channels: int, length: int, outputs: int, width: float = 1) -> nn.Module:
    """Make the net for windows (C, T), or the first channels of each hidden layer of it (`models.width`)."""
    return Mlp(channels, length, outputs, width)
