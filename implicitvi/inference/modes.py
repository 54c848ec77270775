"""Find modes of a posterior that lie too far apart for one Gaussian start.

Many paths lead uphill at once, in the units of a Gaussian. Ends between which the log density has no barrier belong to
one mode. Each further mode gets a Gaussian fit of its own, and its share of the evidence by importance sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import lgamma, log, pi

import torch
from pyro.distributions import MultivariateStudentT
from torch import Tensor
from torch.distributions import MultivariateNormal

from implicitvi.avb.multimodal import MixtureSampler
from implicitvi.avb.samplers import Sampler
from implicitvi.inference.gaussian_fit import GaussianFit, best_gaussian, refine_gaussian
from implicitvi.inference.pathfinder import pathfinder
from implicitvi.numerics.gaussian import whiten
from implicitvi.numerics.types import LogDensity
from implicitvi.pyro_model.target import Target
from implicitvi.rng import forked

CLIMB = 60  # most steps of each path uphill
BARRIER = 6.0  # nats, as between two Gaussians of one scale that are 7 standard deviations apart
SLACK = (20.0, 3.0)  # nats below the first fit, and more for each dimension: lower ends have no mass
STOPS = 16  # points on a path
TAIL = 5.0  # degrees of freedom of the wide proposals
BENDS = 60  # steps in which a path bends around what is in its way
DRAWS = 500  # of each proposal, to weigh the modes by
FAILURES = 4  # ends in a row that turn out to be no mode; the search then ends
STARTS = 32  # around the Gaussian
LEAST = 0.01  # share of the evidence below which a mode is left out


@dataclass(frozen=True)
class Mode:
    """A mode with its Gaussian.

    Attributes:
        weight: Share of the posterior.
        loc: Location ``[D]``.
        scale_tril: Lower triangular scale ``[D, D]``.
    """

    weight: float
    loc: Tensor
    scale_tril: Tensor


def search_modes(target: Target, loc: Tensor, scale_tril: Tensor, ends: Tensor, *, max_modes: int) -> list[Mode]:
    """Search a target for far modes, from wide starts around a Gaussian and from the ends of paths uphill.

    A model that is scored in a loop would take minutes, and each look at a minibatch sees another posterior: of these
    the Gaussian's own mode is returned alone. Random numbers of the process are left as they are.

    Args:
        target: The target.
        loc: Location ``[D]`` of the Gaussian.
        scale_tril: Its lower triangular scale ``[D, D]``.
        ends: Ends ``[N, D]`` of paths from draws of the prior.
        max_modes: Most modes to find, the first included.
    """
    if max_modes == 1 or target.log_joint.mode == "loop" or target.log_joint.minibatches:
        return [Mode(1.0, loc, scale_tril)]
    with forked():
        starts = torch.cat([wide_starts(loc, scale_tril, STARTS), ends])
        return find_modes(target, loc, scale_tril, starts, max_modes=max_modes)


def find_modes(
    log_joint: LogDensity, loc: Tensor, scale_tril: Tensor, starts: Tensor, *, max_modes: int = 8
) -> list[Mode]:
    """Return the far modes of a posterior with a Gaussian fit; the first is the Gaussian's own.

    Args:
        log_joint: Log density of points ``[S, D]`` in nats, not necessarily normalised.
        loc: Location ``[D]`` of the Gaussian.
        scale_tril: Its lower triangular scale ``[D, D]``.
        starts: Points ``[N, D]`` to climb from.
        max_modes: Most modes to find, the first included.

    Returns:
        The modes that hold at least 1 % of the posterior, their weights summing to 1. One mode with the Gaussian's own
        ``loc`` means that there is no other, and no better Gaussian on its own hill.

    References:
        Paths: A climbing image nudged elastic band method, Graeme Henkelman, Blas Uberuaga, Hannes Jónsson, 2000;
        Essentially No Barriers in Neural Network Energy Landscape, Felix Draxler, Kambis Veschgini, Manfred Salmhofer,
        Fred Hamprecht, 2018.
    """

    def score(v: Tensor) -> Tensor:
        """Return the log density ``[...]`` at ``v [..., D]``, in units of the first Gaussian; ``-inf`` if undefined."""
        if not v.numel():
            return v.new_zeros(v.shape[:-1])
        scores = log_joint(loc + v.reshape(-1, len(loc)) @ scale_tril.mT)
        return scores.nan_to_num(-torch.inf, -torch.inf, -torch.inf).reshape(v.shape[:-1])

    unit = torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
    first = GaussianFit.at(score, torch.zeros_like(loc), unit)
    v = whiten(starts, loc, scale_tril)
    paths = pathfinder(score, v[v.isfinite().all(-1)], torch.ones_like(loc), num_steps=CLIMB)
    if first is None or not len(paths.u):
        return [Mode(1.0, loc, scale_tril)]
    better = best_gaussian(score, paths, tries=1, best=first)
    if better is not None and better is not first and bent_barriers(score, better.loc, first.loc[None]) < BARRIER:
        first = better
    fits = [first]
    enough = paths.log_p > score(first.loc) - SLACK[0] - SLACK[1] * len(loc)
    apart = enough & (barriers(score, first.loc, paths.u) > BARRIER)
    failures = 0  # in a row
    while apart.any() and len(fits) < max_modes and failures < FAILURES:
        top = int(paths.elbo.masked_fill(~apart, -torch.inf).argmax())  # a point of high density may have no mass
        failures += 1
        apart &= barriers(score, paths.u[top], paths.u) > BARRIER
        apart[top] = False
        known = torch.stack([fit.loc for fit in fits])
        if bent_barriers(score, paths.u[top], known).min() > BARRIER:
            fit = refine_gaussian(score, *paths.gaussian(top))
            if fit is not None and bent_barriers(score, fit.loc, known).min() > BARRIER:
                apart &= barriers(score, fit.loc, paths.u) > BARRIER
                fits.append(fit)
                failures = 0
    places = [(fit.loc, fit.scale_tril) for fit in fits]
    weights = evidence_shares(score, places) if len(fits) > 1 else unit.new_ones(1)
    kept = [i for i, weight in enumerate(weights.tolist()) if weight >= LEAST]
    total = weights[kept].sum()
    return [Mode((weights[i] / total).item(), loc + scale_tril @ places[i][0], scale_tril @ places[i][1]) for i in kept]


def split(sampler: Sampler, modes: Sequence[Mode], make_sampler: Callable[[int], Sampler]) -> Sampler:
    """Return a `MixtureSampler` with a sampler for each of several modes; a single mode moves the sampler itself."""
    samplers, first = [sampler], modes[0].loc
    if len(modes) > 1:
        samplers = [make_sampler(len(first)).to(first) for _ in modes]
        sampler = MixtureSampler(samplers, first.new_tensor([mode.weight for mode in modes])).to(first)
    for each, mode in zip(samplers, modes, strict=True):
        each.set_affine(mode.loc, mode.scale_tril)
    return sampler


def wide_starts(loc: Tensor, scale_tril: Tensor, count: int) -> Tensor:
    """Draw points ``[count, D]`` around a Gaussian, 2 to 200 times as far out as its own draws."""
    unit = torch.randn(count, len(loc), dtype=loc.dtype, device=loc.device)
    reach = 2 * 100 ** torch.rand(count, 1, dtype=loc.dtype, device=loc.device)
    return loc + reach * unit @ scale_tril.mT


@torch.no_grad()
def barriers(score: LogDensity, a: Tensor, b: Tensor) -> Tensor:
    """Return the fall of the log density below both ends on straight lines from ``a [D]`` to ``b [N, D]``: ``[N]``."""
    return _falls(score, straight(a, b))


def bent_barriers(score: LogDensity, a: Tensor, b: Tensor) -> Tensor:
    """Return `barriers` from ``a [D]`` to each of ``b [N, D]``, ``[N]``, on paths that have bent uphill.

    The paths bend across their direction and keep their points at even distances.
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
    """Return points ``[N, STOPS + 1, D]`` on the straight lines from ``a [D]`` to ``b [N, D]``, ends included."""
    shares = torch.linspace(0, 1, STOPS + 1, dtype=a.dtype, device=a.device)[:, None]
    return a + shares * (b - a)[:, None]


def evenly(paths: Tensor) -> Tensor:
    """Return the same broken lines ``[N, P, D]`` with their points at even distances."""
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
    """Return the shares ``[K]`` of the modes in the evidence, by importance sampling from all of them at once.

    The proposals are each Gaussian ``(loc [D], scale_tril [D, D])`` and a Student t of its shape for the tails; a draw
    counts for the mode whose Gaussian is densest there.
    """
    normals = [MultivariateNormal(m, scale_tril=s, validate_args=False) for m, s in fits]
    tails = [MultivariateStudentT(m.new_tensor(TAIL), m, s, validate_args=False) for m, s in fits]
    draws = torch.cat([proposal.sample((DRAWS,)) for proposal in (*normals, *tails)])
    # the log_prob of a Student t would repeat its matrix for every draw
    both = [_log_densities(draws, *fit) for fit in fits]
    densities = torch.stack([normal for normal, _ in both] + [tail for _, tail in both])
    log_weights = score(draws) - densities.logsumexp(0)
    owners = densities[: len(fits)].argmax(0)
    owned = torch.nn.functional.one_hot(owners, len(fits)).T.bool()
    return log_weights.masked_fill(~owned, -torch.inf).logsumexp(-1).softmax(0)


def _log_densities(z: Tensor, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
    """Return log densities of ``z [S, D]`` under a Gaussian and the Student t of its shape: ``[S]`` each."""
    square, dim = whiten(z, loc, scale_tril).square().sum(-1), len(loc)
    log_scale = scale_tril.diagonal().log().sum()
    normal = -0.5 * (square + dim * log(2 * pi)) - log_scale
    above = (TAIL + dim) / 2
    constant = lgamma(above) - lgamma(TAIL / 2) - dim / 2 * log(TAIL * pi)
    return normal, constant - log_scale - above * (square / TAIL).log1p()
