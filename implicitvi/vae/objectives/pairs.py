"""Pairs of a code and a datum, which the adversaries of joint densities look at: ``adversary(z, x)``.

Codes ``z [..., N, D]`` and data ``x [N, *x_shape]`` are scored together, ``[..., N]``, so that a datum which is paired
with several codes is looked at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from implicitvi.errors import ShapeError


def codes(prior: Distribution, num_samples: int) -> Tensor:
    """Draws ``z [num_samples, D]`` of the prior, without gradients."""
    z: Tensor = prior.sample(torch.Size([num_samples]))
    return z


def rows(z: Tensor) -> Tensor:
    """Codes ``[S, B, D]`` as ``[S · B, D]``, to be paired with a datum each."""
    return z.flatten(0, -2)


def parted(z: Tensor) -> Tensor:
    """The codes ``z [S, B, D]`` dealt out again, so that none stays with its datum.

    The data are put on a circle in random order, and each takes the codes of its neighbour: with ``z ~ q(z | x)`` this
    pairs draws of ``q(x) q(z)``.

    Raises:
        ShapeError: There is one datum only.
    """
    count = z.shape[-2]
    if count < 2:
        raise ShapeError(
            "the codes of a batch cannot be dealt out to other data",
            got="a batch of 1 row",
            expected="2 rows or more",
            do="Take a larger batch_size.",
        )
    circle = torch.randperm(count, device=z.device)
    giver = torch.empty_like(circle)
    giver[circle] = circle.roll(1)
    return z[..., giver, :]


def slope(adversary: nn.Module, z: Tensor, x: Tensor) -> Tensor:
    """Mean squared gradient of the scores of pairs in ``z [..., N, D]`` and ``x [N, *x_shape]``, a scalar.

    As a penalty on the draws of one side it damps the circling of two players.

    References:
        Which Training Methods for GANs do actually Converge?, Lars Mescheder, Andreas Geiger, Sebastian Nowozin,
        2018, eq. 9.
    """
    with torch.enable_grad():
        inputs = [z.detach().requires_grad_(), x.detach().requires_grad_()]
        scores: Tensor = adversary(*inputs)
        gradients = torch.autograd.grad(scores.sum(), inputs, create_graph=True)
    squares: Tensor = torch.stack([g.square().sum() for g in gradients]).sum()
    return squares / scores.numel()
