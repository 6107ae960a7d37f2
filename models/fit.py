"""The training loop: base weights and windows in, new weights out."""

import importlib
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from models.delta import Layout, Vector
from models.spec import Task
from models.width import narrow, widen

# The least batch that a small set is cut down to, so that one pass makes so many steps.
_SMALLEST_BATCH, _STEPS = 8, 8
# A round of fewer steps than this passes over its windows again, but not more often than this.
_LEAST, _PASSES = 32, 4
_BETA1, _BETA2, _EPSILON, _CLIP = 0.9, 0.999, 1e-8, 5.0


@dataclass(frozen=True)
class Fitted:
    """The new weights (layout.size,), the mean loss of the last epoch, and what it cost."""

    vector: Vector
    loss: float
    steps: int
    seconds: float
    device: str


def set_threads(count: int) -> None:
    """Bound the CPU threads of everything that torch does in this process."""
    torch.set_num_threads(count)


def build_net(task: Task, width: float = 1) -> nn.Module:
    """Make the task's net, or a part of it (`models.width`), with torch's current random state."""
    module = importlib.import_module(f"models.nets.{task.net}")
    # A net that has no narrow form has no such argument either.
    part = {} if width == 1 else {"width": width}
    net: nn.Module = module.build(task.channels, task.window.length, task.outputs, **part)
    return net


def arrays_of(net: nn.Module) -> dict[str, NDArray[np.generic]]:
    """Return the state_dict as numpy arrays, in torch's order."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in net.state_dict().items()}


def load_vector(net: nn.Module, layout: Layout, vector: Vector) -> None:
    """Put a flat vector into a net; integer buffers stay as they are."""
    state = net.state_dict()
    for name, array in layout.split(vector).items():
        state[name] = torch.from_numpy(array.copy())
    net.load_state_dict(state)


def first_weights(task: Task, layout: Layout, seed: int) -> Vector:
    """Weights (layout.size,) of a net that has learnt nothing."""
    torch.manual_seed(seed)
    return layout.join(arrays_of(build_net(task)))


def fit(
    task: Task,
    layout: Layout,
    base: Vector,
    x: NDArray[np.float32],
    y: NDArray[np.float32] | None,
    *,
    seed: int,
    steps: int | None = None,
    epochs: int | None = None,
    proximal: float = 0.0,
    width: float = 1,
) -> Fitted:
    """Train from `base` on normalised windows.

    x (N, C, T) with NaN where a sample was masked; y (N,) class indices or normalised numbers, None for anomaly.
    `epochs` overrides the task's, `steps` the number of optimiser steps that they give. So that a round moves a plant
    with few windows too, these are trained on in batches smaller than the task's, and where neither is given, up to
    four times until 32 steps are made. `proximal` times half the squared distance from `base` is added to the loss
    (FedProx, Li et al. 2020, arXiv:1812.06127). Runs on CUDA when there is one, in mixed precision (`_mixed`).
    With a `width` below 1, the net is the part of `base` that `models.width` names, and so are the new weights: whole
    ones, zero elsewhere, which compute what the part does.
    Raises FloatingPointError when the weights do not stay finite, so that they never leave the box.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = build_net(task, width)
    inner, places = narrow(layout, width)
    load_vector(net, inner, base[places])
    net.to(device).train()
    inputs = torch.from_numpy(np.nan_to_num(x)).to(device)
    present = torch.from_numpy(np.isfinite(x)).to(device)
    targets = None if y is None else torch.from_numpy(y).to(device)
    adam = _Adam(list(net.parameters()), task.training.lr)
    batch = min(task.training.batch, max(_SMALLEST_BATCH, len(x) // _STEPS), len(x))
    per_epoch = len(x) // batch
    least = min(_LEAST, _PASSES * per_epoch) if epochs is None else 0
    total = steps or max((epochs or task.training.epochs) * per_epoch, least)
    losses: list[Tensor] = []
    anchor = [p.detach().clone() for p in net.parameters()] if proximal else []
    order, generator = torch.empty(0), torch.Generator().manual_seed(seed)
    for step in range(total):
        if step % per_epoch == 0:
            order, losses = torch.randperm(len(x), generator=generator), []
        rows = order[step % per_epoch * batch :][:batch].to(device)
        with _mixed(device):
            y_rows = None if targets is None else targets[rows]
            loss = _loss(task, net(inputs[rows]), inputs[rows], present[rows], y_rows)
        loss.backward()  # type: ignore[no-untyped-call]
        for p, start_at in zip(net.parameters(), anchor, strict=False):
            if p.grad is not None:
                p.grad += proximal * (p.detach() - start_at)
        adam.step()
        losses.append(loss.detach())
    vector = widen(layout, width, inner.join(arrays_of(net)))
    if not np.isfinite(vector).all():
        raise FloatingPointError("training diverged: the weights are not finite")
    return Fitted(vector, float(torch.stack(losses).mean()), total, time.perf_counter() - start, device.type)


def _mixed(device: torch.device) -> torch.autocast:
    """Products in bfloat16 where a GPU has it, which needs no scaling of the loss; weights and sums stay float32.

    (Micikevicius et al. 2018, arXiv:1710.03740; Kalamkar et al. 2019, arXiv:1905.12322.)
    """
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


class _Adam:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980) with the gradient's norm clipped to 5.

    torch's own imports its compiler when it is made: 1.4 s and 70 MB on every training of a small gateway.
    """

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        self.parameters, self.lr, self.steps = parameters, lr, 0
        self.mean = [torch.zeros_like(p) for p in parameters]
        self.square = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter along its gradient, then forget the gradients."""
        self.steps += 1
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        torch._foreach_mul_(gradients, self._clip(gradients))
        torch._foreach_lerp_(self.mean, gradients, 1 - _BETA1)
        torch._foreach_mul_(self.square, _BETA2)
        torch._foreach_addcmul_(self.square, gradients, gradients, 1 - _BETA2)
        root = torch._foreach_sqrt(self.square)  # noqa: SLF001
        torch._foreach_div_(root, (1 - _BETA2**self.steps) ** 0.5)
        torch._foreach_add_(root, _EPSILON)
        torch._foreach_addcdiv_(self.parameters, self.mean, root, -self.lr / (1 - _BETA1**self.steps))
        for p in self.parameters:
            p.grad = None

    def _clip(self, gradients: list[Tensor]) -> Tensor:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))  # noqa: SLF001
        scale: Tensor = (_CLIP / (norm + _EPSILON)).clamp(max=1.0)
        return scale


def _loss(task: Task, out: Tensor, x: Tensor, present: Tensor, y: Tensor | None) -> Tensor:
    """Cross entropy, Huber, or the squared error of what was really measured. out (B, outputs), x (B, C, T)."""
    if y is None:
        error = (out.view_as(x) - x).square() * present
        return error.sum() / present.sum().clamp(min=1)
    if task.kind == "classification":
        return functional.cross_entropy(out, y.long())
    return functional.smooth_l1_loss(out[:, 0], y)
