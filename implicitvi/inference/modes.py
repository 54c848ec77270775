"""Modes of a posterior that lie too far apart for one Gaussian start to find them all.

Many points are sent uphill at once, in the units of a Gaussian fit that is already there. Ends between which the log
density has no barrier belong to one mode. Each mode that is left gets a Gaussian fit of its own, and its share of the
evidence by importance sampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lgamma, log, pi

import torch
from pyro.distributions import MultivariateStudentT
from torch import Tensor
from torch.distributions import MultivariateNormal

from implicitvi.inference.gaussian_fit import gaussian_fit
from implicitvi.numerics.gaussian import whiten
from implicitvi.numerics.optimise import descend
from implicitvi.numerics.types import LogDensity

CLIMB = 150  # steps of each point uphill
BARRIER = 6.0  # nats; two Gaussians of one scale have as much between them at 7 standard deviations
SLACK = (20.0, 3.0)  # nats below the fit that is there, and more for each dimension: ends beyond have no mass
STOPS = 16  # points on a path
TAIL = 5.0  # degrees of freedom of the wide proposals
BENDS = 60  # steps in which a path bends around what is in its way
DRAWS = 500  # of each proposal, to weigh the modes by
LEAST = 0.01  # share of the evidence below which a mode is left out


@dataclass(frozen=True)
class Mode:
    """A Gaussian of a mode.

    Attributes:
        weight: Its share of the posterior.
        loc: Location ``[D]``.
        scale_tril: Lower triangular scale ``[D, D]``.
    """

    weight: float
    loc: Tensor
    scale_tril: Tensor


def find_modes(
    log_joint: LogDensity, loc: Tensor, scale_tril: Tensor, starts: Tensor, *, max_modes: int = 8, num_steps: int = 300
) -> list[Mode]:
    """The far modes of a posterior that a Gaussian has been fitted to; the first is the Gaussian's own.

    Args:
        log_joint: Log density of points ``[S, D]`` in nats, not necessarily normalised.
        loc: Location ``[D]`` of the Gaussian.
        scale_tril: Its lower triangular scale ``[D, D]``.
        starts: Where to climb from, ``[N, D]``.
        max_modes: Modes to look for, the first included.
        num_steps: Steps of the Gaussian fit of each further mode.

    Returns:
        The modes that hold at least 1 % of the posterior, their weights summing to 1. One mode with the Gaussian's own
        ``loc`` says that nothing else was found.

    References:
        Starts and ends: Pathfinder: Parallel quasi-Newton variational inference, Lu Zhang, Bob Carpenter, Andrew
        Gelman, Aki Vehtari, 2022. Paths: A climbing image nudged elastic band method, Graeme Henkelman, Blas Uberuaga,
        Hannes Jónsson, 2000; Essentially No Barriers in Neural Network Energy Landscape, Felix Draxler, Kambis
        Veschgini, Manfred Salmhofer, Fred Hamprecht, 2018.
    """

    def score(v: Tensor) -> Tensor:
        """The log density in units of the first Gaussian, ``-inf`` where there is none: ``v [..., D]`` to ``[...]``."""
        if not v.numel():
            return v.new_zeros(v.shape[:-1])
        scores = log_joint(loc + v.reshape(-1, len(loc)) @ scale_tril.mT)
        return scores.nan_to_num(-torch.inf, -torch.inf, -torch.inf).reshape(v.shape[:-1])

    unit = torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
    fits = [(torch.zeros_like(loc), unit)]
    v = whiten(starts, loc, scale_tril)
    ends = climb(score, v[v.isfinite().all(-1)])
    heights = score(ends)
    enough = heights > score(fits[0][0]) - SLACK[0] - SLACK[1] * len(loc)
    ends, heights = ends[enough], heights[enough]
    apart = barriers(score, fits[0][0], ends) > BARRIER
    for _ in range(2 * max_modes):
        ends, heights = ends[apart], heights[apart]
        if not len(ends) or len(fits) == max_modes:
            break
        top = ends[heights.argmax()]
        apart = (barriers(score, top, ends) > BARRIER) & (ends != top).any(-1)
        known = torch.stack([m for m, _ in fits])
        if bent_barriers(score, top, known).min() > BARRIER:
            fit = gaussian_fit(score, top, num_steps=num_steps)
            if bent_barriers(score, fit[0], known).min() > BARRIER:
                apart &= barriers(score, fit[0], ends) > BARRIER
                fits.append(fit)
    if len(fits) == 1:
        return [Mode(1.0, loc, scale_tril)]
    weights = evidence_shares(score, fits)
    kept = [i for i, weight in enumerate(weights.tolist()) if weight >= LEAST]
    total = weights[kept].sum()
    return [Mode((weights[i] / total).item(), loc + scale_tril @ fits[i][0], scale_tril @ fits[i][1]) for i in kept]


def wide_starts(loc: Tensor, scale_tril: Tensor, count: int) -> Tensor:
    """Points ``[count, D]`` around a Gaussian, 2 to 200 times as far out as its own draws."""
    unit = torch.randn(count, len(loc), dtype=loc.dtype, device=loc.device)
    reach = 2 * 100 ** torch.rand(count, 1, dtype=loc.dtype, device=loc.device)
    return loc + reach * unit @ scale_tril.mT


def climb(score: LogDensity, v: Tensor) -> Tensor:
    """Ends ``[N', D]`` of points ``v [N, D]`` that have gone uphill, without those that have no density.

    The unit of each point's steps is its own distance from the origin, so that near and far ones arrive.
    """
    v = v[score(v).isfinite()]
    reach = v.square().mean(-1, keepdim=True).sqrt().clamp(min=1.0)
    moved = torch.zeros_like(v).requires_grad_()

    def loss() -> Tensor | None:
        here = v + reach * moved
        here.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))
        scores = score(here)
        finite = scores.isfinite()
        if finite.all():
            return -scores.sum()
        return -score(here[finite]).sum() if finite.any() else None

    if len(v):
        descend(loss, [{"params": [moved], "lr": 0.1}], CLIMB)
    ends = (v + reach * moved).detach()
    return ends[score(ends).isfinite()]


@torch.no_grad()
def barriers(score: LogDensity, a: Tensor, b: Tensor) -> Tensor:
    """How far the log density falls below both ends on the straight way from ``a [D]`` to each of ``b [N, D]``."""
    return _falls(score, straight(a, b))


def bent_barriers(score: LogDensity, a: Tensor, b: Tensor) -> Tensor:
    """As `barriers`, from ``a [D]`` to each of ``b [N, D]``: ``[N]``, on paths that have bent uphill.

    They bend across their direction, with their points at even distances.
    """
    paths = straight(a, b)
    for step in range(BENDS):
        v = paths[:, 1:-1].detach().requires_grad_()
        scores = score(v)
        (slope,) = torch.autograd.grad(scores[scores.isfinite()].sum(), v)
        slope = slope.nan_to_num(0.0, 0.0, 0.0)
        with torch.no_grad():
            along = torch.nn.functional.normalize(paths[:, 2:] - paths[:, :-2], dim=-1)
            across = slope - (slope * along).sum(-1, keepdim=True) * along
            stride = (paths[:, 1:] - paths[:, :-1]).norm(dim=-1).mean(-1)[:, None, None]
            reach = stride * 0.5 * 0.1 ** (step / BENDS)
            moved = v + reach * across / (1 + across.norm(dim=-1, keepdim=True))
            paths = evenly(torch.cat([paths[:, :1], moved, paths[:, -1:]], 1))
    with torch.no_grad():
        return _falls(score, paths)


def straight(a: Tensor, b: Tensor) -> Tensor:
    """Points ``[N, STOPS + 1, D]`` on the straight ways from ``a [D]`` to each of ``b [N, D]``, the ends included."""
    shares = torch.linspace(0, 1, STOPS + 1, dtype=a.dtype, device=a.device)[:, None]
    return a + shares * (b - a)[:, None]


def evenly(paths: Tensor) -> Tensor:
    """The same broken lines ``[N, P, D]`` with their points at even distances."""
    lengths = (paths[:, 1:] - paths[:, :-1]).norm(dim=-1)
    reached = torch.cat([lengths.new_zeros(len(paths), 1), lengths.cumsum(-1)], -1)
    shares = torch.linspace(0, 1, paths.shape[1], dtype=paths.dtype, device=paths.device)
    wanted = shares * reached[:, -1:]
    right = torch.searchsorted(reached, wanted).clamp(1, paths.shape[1] - 1)
    begin, end = reached.gather(1, right - 1), reached.gather(1, right)
    blend = ((wanted - begin) / (end - begin).clamp(min=1e-12))[..., None]
    index = right[..., None].expand_as(paths)
    return torch.lerp(paths.gather(1, index - 1), paths.gather(1, index), blend)


def _falls(score: LogDensity, paths: Tensor) -> Tensor:
    scores = score(paths)
    return torch.minimum(scores[:, 0], scores[:, -1]) - scores.min(-1).values


@torch.no_grad()
def evidence_shares(score: LogDensity, fits: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Shares ``[K]`` of the modes in the evidence, by importance sampling from all of them at once.

    Each Gaussian ``(loc [D], scale_tril [D, D])`` proposes, and a Student t of the same shape for the tails; a draw
    counts for the mode whose Gaussian is denser there.
    """
    normals = [MultivariateNormal(m, scale_tril=s, validate_args=False) for m, s in fits]
    tails = [MultivariateStudentT(m.new_tensor(TAIL), m, s, validate_args=False) for m, s in fits]
    draws = torch.cat([proposal.sample((DRAWS,)) for proposal in (*normals, *tails)])
    # not by the proposals' log_prob: a Student t repeats its matrix for every draw
    both = [_log_densities(draws, *fit) for fit in fits]
    densities = torch.stack([normal for normal, _ in both] + [tail for _, tail in both])
    log_weights = score(draws) - densities.logsumexp(0)
    owners = densities[: len(fits)].argmax(0)
    owned = torch.nn.functional.one_hot(owners, len(fits)).T.bool()
    return log_weights.masked_fill(~owned, -torch.inf).logsumexp(-1).softmax(0)


def _log_densities(z: Tensor, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
    """Log densities of ``z [S, D]`` under a Gaussian, and under the Student t of the same shape: ``[S]`` each."""
    square, dim = whiten(z, loc, scale_tril).square().sum(-1), len(loc)
    log_scale = scale_tril.diagonal().log().sum()
    normal = -0.5 * (square + dim * log(2 * pi)) - log_scale
    above = (TAIL + dim) / 2
    constant = lgamma(above) - lgamma(TAIL / 2) - dim / 2 * log(TAIL * pi)
    return normal, constant - log_scale - above * (square / TAIL).log1p()
