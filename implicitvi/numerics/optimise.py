"""Gradients of a log density at many points, Adam on a closure, and the check for finite draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicitvi.numerics.types import LogDensity


def gradients(log_joint: LogDensity, z: Tensor, *, chunk: int = 2000) -> tuple[Tensor, Tensor]:
    """Return ``log p [S]`` and its gradient ``[S, D]`` at draws ``z [S, D]``; a gradient that is not finite is NaN."""
    values, slopes = [], []
    for part in z.detach().split(chunk):
        part = part.requires_grad_()
        with torch.enable_grad():
            log_p = log_joint(part)
            (slope,) = torch.autograd.grad(log_p.sum() + 0 * part.sum(), part)
        values.append(log_p.detach())
        slopes.append(slope)
    return torch.cat(values), torch.cat(slopes)


def where_finite(log_p: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log p [S]`` and its gradient ``[S, D]``: ``-inf`` and 0 where one of them is not finite."""
    known = log_p.isfinite() & slope.isfinite().all(1)
    return log_p.where(known, -torch.inf), slope.where(known[:, None], 0.0)


def descend(
    loss: Callable[[], Tensor | None], groups: list[dict[str, Any]], num_steps: int, *, normalised: bool = False
) -> None:
    """Minimise a loss by Adam with rates that fall to a twentieth; skip steps whose gradient is not finite.

    Args:
        loss: Returns the loss, a scalar; ``None`` skips the step.
        groups: Adam's parameter groups: ``params``, ``lr`` and other options.
        num_steps: Steps.
        normalised: Whether to clip the gradient of each group to norm 1 and average squared gradients over 50 steps
            rather than 1,000: where the first gradients are by far the largest, as for a scale that has yet to find its
            size, Adam's memory of them would slow down all later steps.
    """
    if not num_steps:
        return
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.98 if normalised else 0.999), fused=True)
    parameters = [p for group in groups for p in group["params"]]
    cooling = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.05 ** (1 / num_steps))
    for _ in range(num_steps):
        value = loss()
        if value is None:
            continue
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        if all(g.isfinite().all() for g in gradients if g is not None):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            for group in optimiser.param_groups if normalised else ():
                torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimiser.step()
            cooling.step()
    optimiser.zero_grad()


def finite_draws(log_p: Tensor, group: int = 1) -> Tensor:
    """Return a mask ``[S]`` of finite ``log_p [S, ...]``, equal for ``group`` draws that lie ``S / group`` apart."""
    finite = log_p.isfinite().flatten(1).all(1) if log_p.dim() > 1 else log_p.isfinite()
    return finite if group == 1 else finite.view(group, -1).all(0).repeat(group)
