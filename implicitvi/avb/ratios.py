"""Ratio losses: how an adversary learns the log density ratio of two distributions from their draws.

The adversary minimises ``loss(t_q, t_r)`` over scores ``t_q [S, ...]`` of draws of ``q`` and ``t_r [R, ...]`` of draws
of the contrast ``r``; its output ``t`` then gives ``log q - log r`` through ``log_ratio(t)``.

Implementing a ratio loss: a frozen dataclass with these two methods, its `log_ratio` taken at the minimum
of `loss` over all functions; then join `RATIOS` and the list in ``tests/contracts.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn.functional import softplus

from implicitvi.errors import check_choice


class RatioLoss(Protocol):
    """A loss that an adversary minimises, and the map from its output to a log ratio."""

    def loss(self, t_q: Tensor, t_r: Tensor) -> Tensor:
        """Return the loss, a scalar, of scores ``t_q [S, ...]`` and ``t_r [R, ...]``; lower is better."""

    def log_ratio(self, t: Tensor) -> Tensor:
        """Return ``log q - log r`` in nats, same shape as ``t``."""


@dataclass(frozen=True)
class Logistic:
    """The binary cross-entropy (Mescheder et al. 2017, eq. 3.3): ``-E_q log σ(t) - E_r log σ(-t)``.

    Minimised by ``t = log q - log r``; its value there is ``2 log 2 - 2 JS(q, r)``.

    >>> import torch
    >>> round(Logistic().loss(torch.zeros(3), torch.zeros(3)).item(), 4)
    1.3863
    """

    def loss(self, t_q: Tensor, t_r: Tensor) -> Tensor:
        return softplus(-t_q).mean() + softplus(t_r).mean()

    def log_ratio(self, t: Tensor) -> Tensor:
        return t


@dataclass(frozen=True)
class FGanKL:
    """The f-GAN bound of the KL divergence (eq. 6.10; Nguyen et al. 2010): ``-E_q t + E_r exp(t - 1)``.

    Minimised by ``t = 1 + log q - log r``, where its value is ``-KL(q‖r)``. The exponential makes its gradients
    heavy-tailed far from the minimum; prefer `Logistic` unless you need this form. Above ``limit`` the tangent replaces
    the exponential (`capped_exp`), so that an adversary that has overshot can return.

    Args:
        limit: Log ratio in nats up to which the form is exact.
    """

    limit: float = 10.0

    def loss(self, t_q: Tensor, t_r: Tensor) -> Tensor:
        return capped_exp(t_r - 1, self.limit).mean() - t_q.mean()

    def log_ratio(self, t: Tensor) -> Tensor:
        return t - 1


def capped_exp(log_ratio: Tensor, limit: float) -> Tensor:
    """Return ``exp`` up to ``limit`` and above it its tangent there: convex, increasing, and never infinite.

    >>> import torch
    >>> capped_exp(torch.tensor([0.0, 1.0, 10.0]), limit=0.0)
    tensor([ 1.,  2., 11.])
    """
    low = log_ratio.clamp(max=limit)
    return low.exp() * (1 + log_ratio - low)


@dataclass(frozen=True)
class LeastSquares:
    """The squared error of the class probability (Mao et al. 2017): ``E_q (1 - σ(t))² + E_r σ(t)²``.

    A proper score (Brier's), so ``t = log q - log r`` minimises it. Unlike in the published least squares GAN the
    output passes a sigmoid, without which a score below 0 or above 1 would not have a log ratio.
    """

    def loss(self, t_q: Tensor, t_r: Tensor) -> Tensor:
        return (1 - t_q.sigmoid()).square().mean() + t_r.sigmoid().square().mean()

    def log_ratio(self, t: Tensor) -> Tensor:
        return t


RATIOS: dict[str, type[RatioLoss]] = {"logistic": Logistic, "fgan_kl": FGanKL, "least_squares": LeastSquares}


def ratio_of(ratio: str | RatioLoss) -> RatioLoss:
    """Return a ratio loss by its name, or the given one unchanged."""
    if not isinstance(ratio, str):
        return ratio
    check_choice("ratio", ratio, RATIOS)
    return RATIOS[ratio]()
