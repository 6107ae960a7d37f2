"""Hidden layers of a part of their channels, such that they compute what whole ones of zero channels would."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

_GROUPS = 4


def part(count: int, width: float) -> int:
    """How many of a layer's channels a net of `width` (`models.width`) has: the first of them."""
    return math.ceil(width * count)


def group_norm(count: int, width: float) -> nn.Module:
    """GroupNorm over the first channels of `count`: the first groups of the whole net's, none of them cut."""
    return nn.GroupNorm(round(_GROUPS * width), part(count, width))


def layer_norm(count: int, width: float) -> nn.Module:
    """LayerNorm over the first channels of `count`, as if the others were there and zero."""
    return nn.LayerNorm(count) if width == 1 else _PartNorm(count, part(count, width))


class _PartNorm(nn.LayerNorm):
    def __init__(self, count: int, kept: int) -> None:
        super().__init__(kept)
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        """(B, kept) -> (B, kept)."""
        whole = functional.pad(x, (0, self.count - x.shape[-1]))
        normal = functional.layer_norm(whole, (self.count,), eps=self.eps)[..., : x.shape[-1]]
        out: Tensor = torch.addcmul(self.bias, normal, self.weight)
        return out
