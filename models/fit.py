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


@dataclass(frozen=True)
class Fitted:
    """The new weights (layout.size,), the mean loss of the last epoch, and what it cost."""

    vector: Vector
    loss: float
    steps: int
    seconds: float
    device: str


def build_net(task: Task) -> nn.Module:
    """Make the task's net with torch's current random state."""
    module = importlib.import_module(f"models.nets.{task.net}")
    net: nn.Module = module.build(task.channels, task.window.length, task.outputs)
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


def fit(
    task: Task,
    layout: Layout,
    base: Vector,
    x: NDArray[np.float32],
    y: NDArray[np.float32] | None,
    *,
    seed: int,
    steps: int | None = None,
) -> Fitted:
    """Train from `base` on normalised windows.

    x (N, C, T) with NaN where a sample was masked; y (N,) class indices or normalised numbers, None for anomaly.
    `steps` overrides the number of optimiser steps that epochs give. Runs on CUDA when there is one.
    Raises FloatingPointError when the weights do not stay finite, so that they never leave the box.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = build_net(task)
    load_vector(net, layout, base)
    net.to(device).train()
    inputs = torch.from_numpy(np.nan_to_num(x)).to(device)
    present = torch.from_numpy(np.isfinite(x)).to(device)
    targets = None if y is None else torch.from_numpy(y).to(device)
    optimiser = torch.optim.Adam(net.parameters(), lr=task.training.lr)
    batch = min(task.training.batch, len(x))
    per_epoch = len(x) // batch
    total = steps or task.training.epochs * per_epoch
    losses: list[Tensor] = []
    order, generator = torch.empty(0), torch.Generator().manual_seed(seed)
    for step in range(total):
        if step % per_epoch == 0:
            order, losses = torch.randperm(len(x), generator=generator), []
        rows = order[step % per_epoch * batch :][:batch].to(device)
        optimiser.zero_grad(set_to_none=True)
        loss = _loss(task, net(inputs[rows]), inputs[rows], present[rows], None if targets is None else targets[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        losses.append(loss.detach())
    vector = layout.join(arrays_of(net))
    if not np.isfinite(vector).all():
        raise FloatingPointError("training diverged: the weights are not finite")
    return Fitted(vector, float(torch.stack(losses).mean()), total, time.perf_counter() - start, device.type)


def _loss(task: Task, out: Tensor, x: Tensor, present: Tensor, y: Tensor | None) -> Tensor:
    """Cross entropy, Huber, or the squared error of what was really measured. out (B, outputs), x (B, C, T)."""
    if y is None:
        error = (out.view_as(x) - x).square() * present
        return error.sum() / present.sum().clamp(min=1)
    if task.kind == "classification":
        return functional.cross_entropy(out, y.long())
    return functional.smooth_l1_loss(out[:, 0], y)
