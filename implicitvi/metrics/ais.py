"""Annealed importance sampling: Hamiltonian Monte Carlo from a Gaussian to the posterior of each datum.

In the coordinates ``u = (z - loc) / scale`` chains move from ``f_0 = N(0, I)`` to ``f_1(u) = p(x, z) |scale|``, whose
integral is ``p(x)``, along the path

    log f_β(u) = (1 - β) log f_0(u) + β log f_1(u)                         β = 0 … 1

A chain makes one transition at each ``β`` in between and sums the log weight ``(β' - β) (log f_1 - log f_0)(u)``. The
expected weight is ``p(x)``, so its logarithm is a lower bound in expectation, ``Var[log weight] / 2`` too low where the
log weights of single chains are about Gaussian. From an exact draw of the posterior the same path in reverse gives the
weight ``1 / p(x)``, hence an upper bound: `bidirectional` does this on simulated data.

References:
    Annealed importance sampling, Radford Neal, 2001. On the Quantitative Analysis of Decoder-Based Generative Models,
    Yuhuai Wu, Yuri Burda, Ruslan Salakhutdinov, Roger Grosse, 2017. Adversarial Variational Bayes, Lars Mescheder,
    Sebastian Nowozin, Andreas Geiger, 2017, section 5.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import isinf, log, pi
from typing import Any

import torch
from torch import Tensor

from implicitvi.errors import ModelError, OptionError, ShapeError, check_choice, check_flag, check_positive, check_whole
from implicitvi.metrics.evidence import check_scores, check_start
from implicitvi.numerics.hmc import Point, transition
from implicitvi.numerics.types import LogDensity

SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda t: t,
    "sigmoidal": lambda t: (8 * t - 4).sigmoid(),  # Wu et al. 2017, with their δ = 4
}

_RATE = 0.2  # change of the log step size per unit of acceptance above the target
_JITTER = 0.5  # share by which step sizes vary: a trajectory must not be a period of the posterior
_FAR = 1e4  # standard deviations from the start beyond which f_1 is 0, which stops diverging trajectories


@dataclass(frozen=True, eq=False)
class Annealed:
    """The result of annealing.

    Attributes:
        log_weights: Log weight of every chain and datum ``[S, B]``, in nats.
        acceptance: Mean acceptance probability of each datum's transitions ``[B]``.
        step_sizes: Step size of each transition from ``β = 0`` on, ``[num_steps - 1, B]``, in units of ``scale``.
    """

    log_weights: Tensor
    acceptance: Tensor
    step_sizes: Tensor

    @property
    def log_mean(self) -> Tensor:
        """Logarithm of the mean weight over chains, ``[B]`` in nats."""
        return self.log_weights.logsumexp(0) - log(len(self.log_weights))


@dataclass(frozen=True)
class Annealing:
    """A way to anneal: the options of `ais` and `bidirectional`.

    The step size of each datum follows the acceptance of a pilot chain, which the estimate leaves out: given the pilot,
    all other chains have fixed transitions and exactly unbiased weights, unlike chains that adapt their own step sizes,
    as in the code of the AVB paper. Every transition varies the step size of each chain by up to a half.

    Args:
        num_steps: Intervals of ``β``, with one transition between any two.
        num_chains: Chains of each datum.
        num_leapfrog: Leapfrog steps of a transition, with one gradient each.
        step_size: Step size of the first transition, in units of ``scale``.
        schedule: ``"linear"``, equal steps of ``β``; or ``"sigmoidal"``, small ones at both ends, better from afar.
        adapt: Whether the step size follows the acceptance, which takes one more chain.
        acceptance: Target acceptance. That of the AVB paper, 0.65, rejects a third of longer trajectories and takes 1.4
            to 3 times as many steps for the same variance on Gaussians of 10 and 32 dimensions.

    Raises:
        OptionError: An option has a value that cannot work.
    """

    num_steps: int = 1000
    num_chains: int = 5
    num_leapfrog: int = 10
    step_size: float = 0.5
    schedule: str = "linear"
    adapt: bool = True
    acceptance: float = 0.85

    def __post_init__(self) -> None:
        for option in ("num_steps", "num_chains", "num_leapfrog"):
            check_whole(option, getattr(self, option))
        for option in ("step_size", "acceptance"):
            check_positive(option, getattr(self, option))
        if isinf(self.step_size):
            raise OptionError.must_be("step_size", "finite", self.step_size)
        check_flag("adapt", self.adapt)
        check_choice("schedule", self.schedule, SCHEDULES)
        if not self.acceptance < 1:
            raise OptionError.must_be("acceptance", "between 0 and 1", self.acceptance)

    def betas(self) -> list[float]:
        """Return the path from 0 to 1, ``num_steps + 1`` values."""
        t = SCHEDULES[self.schedule](torch.linspace(0, 1, self.num_steps + 1, dtype=torch.float64))
        return list(((t - t[0]) / (t[-1] - t[0])).tolist())

    @torch.no_grad()
    def forward(self, log_joint: LogDensity, loc: Tensor, scale: Tensor) -> Annealed:
        """Anneal from the Gaussian to the posterior: the expected weight is ``p(x)``.

        Args:
            log_joint: ``z [S, B, D]`` to ``log p(x, z) [S, B]``, with gradients.
            loc: Means ``[B, D]`` of the Gaussian from which chains start.
            scale: Its standard deviations ``[B, D]``.
        """
        path = _Path(log_joint, loc, scale)
        u = torch.randn(self.num_chains + self.adapt, *loc.shape, dtype=loc.dtype, device=loc.device)
        return self._run(path, u, self.betas(), None)

    @torch.no_grad()
    def backward(self, log_joint: LogDensity, loc: Tensor, scale: Tensor, z: Tensor, step_sizes: Tensor) -> Annealed:
        """Anneal from a draw of the posterior to the Gaussian: the expected weight is ``1 / p(x)``.

        Args:
            log_joint: As for `forward`.
            loc: As for `forward`.
            scale: As for `forward`.
            z: An exact draw ``[B, D]`` of each datum's posterior, where all its chains start.
            step_sizes: Those of a forward run, ``[num_steps - 1, B]``, as the transitions must not depend on ``z``.
        """
        path = _Path(log_joint, loc, scale)
        if step_sizes.shape != (shape := (self.num_steps - 1, len(loc))):
            expected = f"of shape {shape}, a step size for every transition of each datum"
            do = "Pass those of a forward run with the same options."
            raise ShapeError.must_be("step_sizes", expected, tuple(step_sizes.shape), do)
        u = ((z - loc) / scale).expand(self.num_chains, *loc.shape)
        back = self._run(path, u, self.betas()[::-1], step_sizes.flip(0))
        return Annealed(back.log_weights, back.acceptance, step_sizes)

    def _run(self, path: _Path, u: Tensor, betas: list[float], step_sizes: Tensor | None) -> Annealed:
        """Anneal along ``betas``; without step sizes, by those that the last chain, the pilot, adapts."""
        here = path.at(u)
        if bad := int(here.log_p.isnan().any(0).sum()):
            data, do = f"{bad} of {u.shape[1]} data", "Check the decoder's outputs at the encoder's means."
            raise ModelError(f"The log joint is not a number where the chains start, for {data}. {do}")
        log_weights = (betas[1] - betas[0]) * (here.log_p - _gaussian(here.position))
        accepted = torch.zeros_like(log_weights)
        size, sizes = u.new_full(u.shape[1:2], self.step_size), []
        step = partial(transition, path.at, num_leapfrog=self.num_leapfrog)
        for i, (beta, following) in enumerate(pairwise(betas[1:])):
            if step_sizes is not None:
                size = step_sizes[i]
            varied = size * (1 + _JITTER * (2 * torch.rand_like(log_weights) - 1))
            momentum, uniform = torch.randn_like(u), torch.rand_like(log_weights)
            temper = partial(_tempered, beta)
            here, acceptance = step(here, momentum=momentum, uniform=uniform, step_size=varied, temper=temper)
            log_weights = log_weights + (following - beta) * (here.log_p - _gaussian(here.position))
            accepted += acceptance
            sizes.append(size)
            if self.adapt:
                size = size * (_RATE * (acceptance[-1] - self.acceptance)).exp()
        used = slice(self.num_chains)
        rates = torch.stack(sizes) if sizes else size.new_empty(0, *size.shape)
        return Annealed(log_weights[used], accepted[used].mean(0) / max(1, len(sizes)), rates)


def ais(log_joint: LogDensity, loc: Tensor, scale: Tensor, **options: Any) -> Tensor:
    """Estimate ``log p(x)`` by annealed importance sampling, a lower bound in expectation: ``[B]`` in nats.

    `Annealing.forward` also returns acceptance, step sizes and the weights of single chains.

    Args:
        log_joint: ``z [S, B, D]`` to ``log p(x, z) [S, B]``, with gradients.
        loc: Means ``[B, D]`` of the Gaussian from which chains start, best those of the posterior.
        scale: Its standard deviations ``[B, D]``.
        options: Those of `Annealing`.

    Raises:
        OptionError: An option, or a scale, has a value that cannot work.
        ShapeError: ``loc``, ``scale`` or the value of ``log_joint`` has the wrong shape.
        ModelError: The log joint has no gradient or is not a number at the start.

    >>> def log_joint(z):  # of x = 1 with x ~ N(z, 1) and z ~ N(0, 1), so that x ~ N(0, 2)
    ...     return -0.5 * ((1 - z) ** 2 + z**2).sum(-1) - log(2 * pi)
    >>> estimate = ais(log_joint, torch.tensor([[0.5]]), torch.tensor([[0.7]]), num_steps=100)
    >>> abs(estimate.item() - -0.5 * (log(4 * pi) + 0.5)) < 0.02
    True
    """
    return Annealing(**options).forward(log_joint, loc, scale).log_mean


def bidirectional(
    log_joint: LogDensity, loc: Tensor, scale: Tensor, z: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Bound ``log p(x)`` from both sides, each in expectation, for data with an exact draw of their posterior.

    A ``z`` from the prior that generated ``x`` is an exact draw of its posterior, so on data from the model the gap
    between the bounds limits the error of `ais`.

    Args:
        log_joint: As for `ais`.
        loc: As for `ais`.
        scale: As for `ais`.
        z: The codes that generated the data, ``[B, D]``.
        options: Those of `Annealing`.

    Returns:
        Lower and upper bounds ``[B]`` in nats.

    Raises:
        ShapeError: ``z`` has another shape than ``loc``. Other errors are those of `ais`.

    References:
        Sandwiching the marginal likelihood using bidirectional Monte Carlo, Roger Grosse, Zoubin Ghahramani, Ryan
        Adams, 2015.
    """
    if z.shape != loc.shape:
        expected = f"one posterior draw of each datum, shape {tuple(loc.shape)}"
        raise ShapeError.must_be("z", expected, f"shape {tuple(z.shape)}")
    annealing = Annealing(**options)
    there = annealing.forward(log_joint, loc, scale)
    back = annealing.backward(log_joint, loc, scale, z, there.step_sizes)
    return there.log_mean, -back.log_mean


class _Path:
    """A view of ``log f_1`` in the coordinates ``u`` of the start."""

    def __init__(self, log_joint: LogDensity, loc: Tensor, scale: Tensor):
        check_start(log_joint, loc, scale)
        self.log_joint, self.loc, self.scale = log_joint, loc, scale
        self.log_volume = scale.log().sum(-1)

    def at(self, u: Tensor) -> Point:
        """Return ``log f_1`` and its gradient at ``u [S, B, D]``; ``-inf`` too far from the start."""
        inside = u.abs().amax(-1) < _FAR
        near = u.where(inside[..., None], 0.0).requires_grad_()  # the model never sees a diverging trajectory
        with torch.enable_grad():
            log_p = self.log_joint(self.loc + self.scale * near)
            check_scores(log_p, u)
            if not log_p.requires_grad:
                do = "Leave out detach() and no_grad(), or use method='iwae'."
                raise ModelError(f"The log joint has no gradient with respect to the codes. {do}")
            (gradient,) = torch.autograd.grad(log_p.sum(), near)
        return Point(u, (log_p.detach() + self.log_volume).where(inside, -torch.inf), gradient)


def _tempered(beta: float, point: Point) -> Point:
    """Return ``log f_β`` and its gradient at a point of ``f_1``."""
    u, log_p, gradient = point
    return Point(u, (1 - beta) * _gaussian(u) + beta * log_p, beta * gradient - (1 - beta) * u)


def _gaussian(u: Tensor) -> Tensor:
    """Return ``log N(u; 0, I)``, ``[S, B]``."""
    return -(u.square().sum(-1) + u.shape[-1] * log(2 * pi)) / 2
