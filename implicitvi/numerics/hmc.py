"""Hamiltonian Monte Carlo: one transition of many chains at once, with the random numbers passed in.

References:
    MCMC using Hamiltonian dynamics, Radford Neal, 2011.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Point(NamedTuple):
    """A position of each chain with the log density there.

    Attributes:
        position: ``u [..., D]``.
        log_p: ``log p(u) [...]`` in nats, ``-inf`` where there is no density.
        gradient: ``∇ log p(u) [..., D]``, finite.
    """

    position: Tensor
    log_p: Tensor
    gradient: Tensor


Evaluate = Callable[[Tensor], Point]  # positions [..., D] to the log density there


def transition(
    at: Evaluate,
    here: Point,
    *,
    momentum: Tensor,
    uniform: Tensor,
    step_size: Tensor,
    num_leapfrog: int,
    temper: Callable[[Point], Point] = lambda point: point,
) -> tuple[Point, Tensor]:
    """Make one transition that leaves the tempered ``p`` invariant: leapfrog steps, then accept or reject.

    Args:
        at: Evaluates ``log p``.
        here: Current point of each chain.
        momentum: Standard normal draws ``[..., D]``.
        uniform: Uniform draws ``[...]`` that decide on acceptance.
        step_size: Step size of each chain ``[...]``.
        num_leapfrog: Leapfrog steps, one gradient each.
        temper: Maps a point of ``p`` to that of the density to leave invariant; the identity by default.

    Returns:
        The next points, those of ``p``, and the acceptance probabilities ``[...]``.
    """
    eps = step_size[..., None]
    start = temper(here)
    there, p = here, momentum + eps / 2 * start.gradient
    for i in range(num_leapfrog):
        there = at(there.position + eps * p)
        end = temper(there)
        p = p + (eps if i + 1 < num_leapfrog else eps / 2) * end.gradient
    before = momentum.square().sum(-1) / 2 - start.log_p
    after = p.square().sum(-1) / 2 - end.log_p
    chance = (before - after).exp().clamp(max=1).nan_to_num(0.0)
    # a chain at a point without density accepts any point that has one
    chance = chance.where(start.log_p.isfinite(), end.log_p.isfinite().to(chance))
    return _choose(uniform < chance, there, here), chance


def _choose(accepted: Tensor, there: Point, here: Point) -> Point:
    """Return ``there`` for the chains ``[...]`` that accept, else ``here``."""
    row = accepted[..., None]
    pairs = zip((row, accepted, row), there, here, strict=True)
    return Point(*(torch.where(chosen, new, old) for chosen, new, old in pairs))
