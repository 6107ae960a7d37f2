"""2-D convolutional net for square grey pictures. (B, C, H * W) -> (B, outputs), 69 k parameters whatever the size.

A picture is one array value, so it comes flat, rows from the top, and is folded here. Two residual stages of half the
size each (He et al. 2016, arXiv:1512.03385) with GroupNorm (Wu & He 2018, arXiv:1803.08494), since BatchNorm's
statistics do not average across plants. Mean and maximum over the picture: the maximum finds one small flaw.
"""

import math

import torch
from torch import Tensor, nn

from models.nets._narrow import group_norm, part


class _Stage(nn.Module):
    """Half the size, more channels, and a residual convolution there."""

    def __init__(self, before: int, after: int, width: float) -> None:
        super().__init__()
        size = part(after, width)
        self.down = nn.Conv2d(part(before, width), size, 3, stride=2, padding=1)
        self.norm = group_norm(after, width)
        self.conv = nn.Conv2d(size, size, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) -> (B, after, H / 2, W / 2), or the first channels of both."""
        h = self.down(x)
        out: Tensor = h + self.conv(torch.relu(self.norm(h)))
        return out


class Cnn2d(nn.Module):
    """A wide strided stem, two stages, mean and maximum over the picture, a linear head."""

    def __init__(self, channels: int, side: int, outputs: int, width: float) -> None:
        super().__init__()
        self.picture = (-1, channels, side, side)
        stem = nn.Conv2d(channels, part(16, width), 5, stride=2, padding=2)
        self.stem = nn.Sequential(stem, group_norm(16, width), nn.ReLU())
        self.stages = nn.Sequential(_Stage(16, 32, width), group_norm(32, width), nn.ReLU(), _Stage(32, 64, width))
        self.norm = group_norm(64, width)
        self.head = nn.Linear(2 * part(64, width), outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H * W) -> (B, outputs): logits, or normalised numbers."""
        h = self.stages(self.stem(x.reshape(self.picture)))  # (B, 64, H / 8, W / 8)
        h = torch.relu(self.norm(h)).flatten(2)
        out: Tensor = self.head(torch.cat([h.mean(-1), h.amax(-1)], 1))
        return out


def build(channels: int, length: int, outputs: int, width: float = 1) -> nn.Module:
    """Make the net, or a part of it, for pictures (C, H * W) with H = W; ValueError if `length` is no square."""
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(f"{length} values are no square picture")
    return Cnn2d(channels, side, outputs, width)
