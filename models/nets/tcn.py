"""1-D convolutional net over time, for windows and waveforms. (B, C, T) -> (B, outputs), ~15 k to 45 k parameters.

Residual blocks with growing dilation (Bai et al. 2018, arXiv:1803.01271, without the causal padding: a window is
scored when it is complete) and GroupNorm, since BatchNorm's statistics do not average across plants. Long waveforms
pass a strided stem first, as in WDCNN (Zhang et al. 2017, Sensors 17(2):425): a wide first kernel, then halvings.
"""

import torch
from torch import Tensor, nn

_WIDTH = 40
_LONG = 256


class _Block(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.conv = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, T) -> (B, W, T)."""
        out: Tensor = x + self.conv(torch.relu(self.norm(x)))
        return out


class Tcn(nn.Module):
    """Stem, three dilated blocks, mean and maximum over time, a linear head."""

    def __init__(self, channels: int, length: int, outputs: int) -> None:
        super().__init__()
        if length > _LONG:
            self.stem: nn.Module = nn.Sequential(
                nn.Conv1d(channels, 16, 64, stride=8, padding=28),
                nn.GroupNorm(4, 16),
                nn.ReLU(),
                nn.Conv1d(16, _WIDTH, 5, stride=2, padding=2),
            )
        else:
            self.stem = nn.Conv1d(channels, _WIDTH, 5, padding=2)
        self.blocks = nn.Sequential(*(_Block(_WIDTH, d) for d in (1, 2, 4)))
        self.norm = nn.GroupNorm(4, _WIDTH)
        self.head = nn.Linear(2 * _WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, outputs): logits, or normalised numbers."""
        h = torch.relu(self.norm(self.blocks(self.stem(x))))  # (B, W, T')
        out: Tensor = self.head(torch.cat([h.mean(-1), h.amax(-1)], 1))
        return out


def build(channels: int, length: int, outputs: int) -> nn.Module:
    """Make the net for windows (C, T)."""
    return Tcn(channels, length, outputs)
