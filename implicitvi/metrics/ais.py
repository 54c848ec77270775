"""Annealed importance sampling: from a Gaussian to the posterior of each datum by Hamiltonian Monte Carlo.

In the coordinates ``u = (z - loc) / scale`` chains go from ``f_0 = N(0, I)`` to ``f_1(u) = p(x, z) |scale|``,
which has the integral ``p(x)``. On its way

    log f_β(u) = (1 - β) log f_0(u) + β log f_1(u)                         β = 0 … 1

a chain makes one transition at each ``β`` in between and gathers the log weight ``Σ (β' - β) (log f_1 - log f_0)(u)``.
The weight is ``p(x)`` in expectation, so its logarithm is a lower bound in expectation, ``Var[log weight] / 2`` too low
where the log weights of single chains are about Gaussian. From an exact draw of the posterior the same way back gives
the weight ``1 / p(x)``, and with it an upper bound: that is what `bidirectional` does on simulated data.

References:
    Annealed importance sampling, Radford Neal, 2001.
    On the Quantitative Analysis of Decoder-Based Generative Models, Yuhuai Wu, Yuri Burda, Ruslan Salakhutdinov, Roger
    Grosse, 2017.
    Adversarial Variational Bayes, Lars Mescheder, Sebastian Nowozin, Andreas Geiger, 2017, section 5.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import log, pi
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitvi.errors import ModelError, OptionError, ShapeError, check_at_least, check_choice, check_positive
from implicitvi.metrics.evidence import check_start
from implicitvi.pyro_model.log_joint import LogJoint as LogDensity

SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda t: t,
    "sigmoidal": lambda t: (8 * t - 4).sigmoid(),  # Wu et al. 2017, with their δ = 4
}

_RATE = 0.2  # of the log step size, for each unit that the acceptance is above
_JITTER = 0.5  # share by which step sizes vary, lest a trajectory be one period of the posterior
_FAR = 1e4  # standard deviations from the start at which f_1 is cut off, and a trajectory that diverges is caught


@dataclass(frozen=True, eq=False)
class Annealed:
    """What the chains have brought back.

    Attributes:
        log_weights: Log weight of every chain and datum ``[S, B]``, in nats.
        acceptance: Mean probability of each datum's transitions to be accepted ``[B]``.
        step_sizes: Step size of each transition from ``β = 0`` on, ``[num_steps - 1, B]``, in units of ``scale``.
    """

    log_weights: Tensor
    acceptance: Tensor
    step_sizes: Tensor

    @property
    def log_mean(self) -> Tensor:
        """Logarithm of the chains' mean weight, ``[B]`` in nats."""
        return self.log_weights.logsumexp(0) - log(len(self.log_weights))


@dataclass(frozen=True)
class Annealing:
    """How to anneal: the options of `ais` and `bidirectional`.

    The step size of each datum follows the acceptance of a pilot chain, which has no part in the estimate. Given the
    pilot, the transitions of all other chains are fixed, so that their weights stay exactly unbiased; if chains
    steered themselves, as in the code of the AVB paper, they would not be. Every transition varies its step size
    by up to a half, for every chain by itself.

    Args:
        num_steps: Intervals of ``β``; there is one transition between any two.
        num_chains: Chains of each datum.
        num_leapfrog: Leapfrog steps of a transition, with one gradient each.
        step_size: Of the first transition, in units of ``scale``.
        schedule: ``"linear"``, even steps of ``β``; or ``"sigmoidal"``, small ones at both ends, better from afar.
        adapt: Whether the step size follows the acceptance; one more chain runs if it does.
        acceptance: What it is to be. That of the AVB paper, 0.65, has longer trajectories, of which a third come to
            nothing: on Gaussians of 10 and 32 dimensions it takes 1.4 to 3 times as many steps for the same variance.

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
            check_at_least(option, getattr(self, option), 1)
        check_positive("step_size", self.step_size)
        check_choice("schedule", self.schedule, SCHEDULES)
        if not 0 < self.acceptance < 1:
            raise OptionError("acceptance is out of range", got=self.acceptance, expected="between 0 and 1")

    def betas(self) -> list[float]:
        """The path from 0 to 1, ``num_steps + 1`` values."""
        t = SCHEDULES[self.schedule](torch.linspace(0, 1, self.num_steps + 1, dtype=torch.float64))
        path: list[float] = ((t - t[0]) / (t[-1] - t[0])).tolist()
        return path

    @torch.no_grad()
    def forward(self, log_joint: LogDensity, loc: Tensor, scale: Tensor) -> Annealed:
        """From the Gaussian to the posterior: weights of mean ``p(x)``.

        Args:
            log_joint: ``z [S, B, D]`` to ``log p(x, z) [S, B]``, with gradients.
            loc: Means ``[B, D]`` of the Gaussian that chains start from.
            scale: Its standard deviations ``[B, D]``.
        """
        path = _Path(log_joint, loc, scale)
        chains = self.num_chains + self.adapt
        u = torch.randn(chains, *loc.shape, dtype=loc.dtype, device=loc.device)
        return self._run(path, u, self.betas(), None)

    @torch.no_grad()
    def backward(self, log_joint: LogDensity, loc: Tensor, scale: Tensor, z: Tensor, step_sizes: Tensor) -> Annealed:
        """From a draw of the posterior to the Gaussian: weights of mean ``1 / p(x)``.

        Args:
            log_joint: As for `forward`.
            loc: As for `forward`.
            scale: As for `forward`.
            z: An exact draw ``[B, D]`` of each datum's posterior, where all its chains start.
            step_sizes: Of a run forward, ``[num_steps - 1, B]``: the transitions have to be the same, and must not
                depend on ``z``.
        """
        path = _Path(log_joint, loc, scale)
        if step_sizes.shape != (self.num_steps - 1, len(loc)):
            raise ShapeError(
                "there has to be a step size for every transition of each datum",
                got=tuple(step_sizes.shape),
                expected=(self.num_steps - 1, len(loc)),
                do="Take those of a run forward with the same options.",
            )
        u = ((z - loc) / scale).expand(self.num_chains, *loc.shape)
        back = self._run(path, u, self.betas()[::-1], step_sizes.flip(0))
        return Annealed(back.log_weights, back.acceptance, step_sizes)

    def _run(self, path: _Path, u: Tensor, betas: list[float], step_sizes: Tensor | None) -> Annealed:
        """Anneal along ``betas``; without step sizes, by those that the last chain, the pilot, asks for."""
        here = path.at(u)
        if here.log_f.isnan().any():
            raise ModelError(
                "the log joint is not a number where the chains start",
                got=f"{int(here.log_f.isnan().any(0).sum())} such data of {u.shape[1]}",
                do="Look at the decoder's outputs at the encoder's means.",
            )
        log_weights = (betas[1] - betas[0]) * (here.log_f - _gaussian(here.u))
        accepted = torch.zeros_like(log_weights)
        size, sizes = u.new_full(u.shape[1:2], self.step_size), []
        for i, (beta, following) in enumerate(pairwise(betas[1:])):
            if step_sizes is not None:
                size = step_sizes[i]
            here, acceptance = _transition(path, here, beta, size, self.num_leapfrog)
            log_weights = log_weights + (following - beta) * (here.log_f - _gaussian(here.u))
            accepted += acceptance
            sizes.append(size)
            if self.adapt:
                size = size * (_RATE * (acceptance[-1] - self.acceptance)).exp()
        return Annealed(
            log_weights[: self.num_chains],
            accepted[: self.num_chains].mean(0) / max(1, len(sizes)),
            torch.stack(sizes) if sizes else size.new_empty(0, *size.shape),
        )


def ais(log_joint: LogDensity, loc: Tensor, scale: Tensor, **options: Any) -> Tensor:
    """Annealed importance sampling of ``log p(x)``, a lower bound in expectation: ``[B]`` in nats.

    `Annealing.forward` also tells acceptance and step sizes, and how much the chains differ.

    Args:
        log_joint: ``z [S, B, D]`` to ``log p(x, z) [S, B]``, with gradients.
        loc: Means ``[B, D]`` of the Gaussian that chains start from, best those of the posterior.
        scale: Its standard deviations ``[B, D]``.
        options: Those of `Annealing`.

    Raises:
        OptionError: An option, or a scale, has a value that cannot work.
        ShapeError: ``loc``, ``scale`` or what ``log_joint`` returns has the wrong shape.
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
    """Bounds of ``log p(x)`` from both sides, each in expectation, for data whose posterior has been drawn from.

    Draw ``z`` from the prior and ``x`` given ``z``, and ``z`` is an exact draw of its posterior. The gap between the
    bounds says what `ais` misses on data that the model has made itself.

    Args:
        log_joint: As for `ais`.
        loc: As for `ais`.
        scale: As for `ais`.
        z: The codes that made the data, ``[B, D]``.
        options: Those of `Annealing`.

    Returns:
        Lower and upper bounds ``[B]`` in nats.

    Raises:
        OptionError: As `ais`.
        ShapeError: As `ais`, or ``z`` has another shape than ``loc``.
        ModelError: As `ais`.

    References:
        Sandwiching the marginal likelihood using bidirectional Monte Carlo, Roger Grosse, Zoubin Ghahramani, Ryan
        Adams, 2015.
    """
    if z.shape != loc.shape:
        raise ShapeError(
            "there has to be one posterior draw of each datum", got=f"shape {tuple(z.shape)}", expected=tuple(loc.shape)
        )
    annealing = Annealing(**options)
    there = annealing.forward(log_joint, loc, scale)
    back = annealing.backward(log_joint, loc, scale, z, there.step_sizes)
    return there.log_mean, -back.log_mean


class _Point(NamedTuple):
    """A place ``u [S, B, D]``, and ``log f_1 [S, B]`` with its gradient ``[S, B, D]`` there."""

    u: Tensor
    log_f: Tensor
    gradient: Tensor

    def energy(self, beta: float) -> Tensor:
        return -(1 - beta) * _gaussian(self.u) - beta * self.log_f

    def force(self, beta: float) -> Tensor:
        return beta * self.gradient - (1 - beta) * self.u


class _Path:
    """``log f_1`` in the coordinates of the start."""

    def __init__(self, log_joint: LogDensity, loc: Tensor, scale: Tensor):
        check_start(loc, scale)
        self.log_joint, self.loc, self.scale = log_joint, loc, scale
        self.log_volume = scale.log().sum(-1)

    def at(self, u: Tensor) -> _Point:
        """``log f_1`` and its gradient; a place too far away has no weight."""
        inside = u.abs().amax(-1) < _FAR
        # What a diverging trajectory asks for is rejected; no distribution should have to see it.
        near = u.where(inside[..., None], 0.0).requires_grad_()
        with torch.enable_grad():
            log_p = self.log_joint(self.loc + self.scale * near)
            if log_p.shape != u.shape[:-1]:
                raise ShapeError(
                    "the log joint has the wrong shape",
                    got=tuple(log_p.shape),
                    expected=f"{tuple(u.shape[:-1])} for codes {tuple(u.shape)}",
                )
            if not log_p.requires_grad:
                raise ModelError(
                    "the log joint has no gradient with respect to the codes",
                    do="Leave out detach() and no_grad(), or use method='iwae'.",
                )
            (gradient,) = torch.autograd.grad(log_p.sum(), near)
        log_f = (log_p.detach() + self.log_volume).where(inside, -torch.inf)
        return _Point(u, log_f, gradient)


def _transition(path: _Path, here: _Point, beta: float, size: Tensor, num_leapfrog: int) -> tuple[_Point, Tensor]:
    """One transition of Hamiltonian Monte Carlo that leaves ``f_β`` as it is, and its acceptance ``[S, B]``."""
    varied = 1 + _JITTER * (2 * torch.rand_like(here.log_f) - 1)
    eps = (size * varied)[..., None]
    start = torch.randn_like(here.u)
    there, momentum = here, start + eps / 2 * here.force(beta)
    for _ in range(num_leapfrog - 1):
        there = path.at(there.u + eps * momentum)
        momentum = momentum + eps * there.force(beta)
    there = path.at(there.u + eps * momentum)
    momentum = momentum + eps / 2 * there.force(beta)
    before = here.energy(beta) + start.square().sum(-1) / 2
    after = there.energy(beta) + momentum.square().sum(-1) / 2
    acceptance = (before - after).exp().clamp(max=1).nan_to_num(0.0)
    return _choose(_accepted(acceptance), there, here), acceptance


def _accepted(acceptance: Tensor) -> Tensor:
    return torch.rand_like(acceptance) < acceptance


def _choose(which: Tensor, there: _Point, here: _Point) -> _Point:
    """``there`` for the chains ``[S, B]`` that have moved, else ``here``."""
    return _Point(
        torch.where(which[..., None], there.u, here.u),
        torch.where(which, there.log_f, here.log_f),
        torch.where(which[..., None], there.gradient, here.gradient),
    )


def _gaussian(u: Tensor) -> Tensor:
    """``log N(u; 0, I)``, ``[S, B]``."""
    return -(u.square().sum(-1) + u.shape[-1] * log(2 * pi)) / 2
