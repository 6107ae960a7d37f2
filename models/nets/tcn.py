"""1-D convolutional net over time, for windows and waveforms. (B, C, T) -> (B, outputs), ~15 k to 45 k parameters.

Residual blocks with growing dilation (Bai et al. 2018, arXiv:1803.01271, without the causal padding: a window is
scored when it is complete) and GroupNorm, since BatchNorm's statistics do not average across plants. Long waveforms
pass a strided stem first, as in WDCNN (Zhang et al. 2017, Sensors 17(2):425): a wide first kernel, then halvings.
"""

import torch
from torch import Tensor, nn

from models.nets._narrow import group_norm, part

_WIDTH = 40
_LONG = 256


class _Block(nn.Module):
    def __init__(self, dilation: int, width: float) -> None:
        super().__init__()
        size = part(_WIDTH, width)
        self.norm = group_norm(_WIDTH, width)
        self.conv = nn.Conv1d(size, size, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, T) -> (B, W, T)."""
        out: Tensor = x + self.conv(torch.relu(self.norm(x)))
        return out


class Tcn(nn.Module):
    """Stem, three dilated blocks, mean and maximum over time, a linear head."""

    def __init__(self, channels: int, length: int, outputs: int, width: float) -> None:
        super().__init__()
        size, few = part(_WIDTH, width), part(16, width)
        if length > _LONG:
            self.stem: nn.Module = nn.Sequential(
                nn.Conv1d(channels, few, 64, stride=8, padding=28),
                group_norm(16, width),
                nn.ReLU(),
                nn.Conv1d(few, size, 5, stride=2, padding=2),
            )
        else:
            self.stem = nn.Conv1d(channels, size, 5, padding=2)
        self.blocks = nn.Sequential(*(_Block(d, width) for d in (1, 2, 4)))
        self.norm = group_norm(_WIDTH, width)
        self.head = nn.Linear(2 * size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, outputs): logits, or normalised numbers."""
        h = torch.relu(self.norm(self.blocks(self.stem(x))))  # (B, W, T')
        out: Tensor = self.head(torch.cat([h.mean(-1), h.amax(-1)], 1))
        return out


def build(channels: int, length: int, outputs: int, width: float = 1) -> nn.Module:
    """Make the net for windows (C, T), or the first channels of each hidden layer of it (`models.width`)."""
    return Tcn(channels, length, outputs, width)
