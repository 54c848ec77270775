"""Where Markov chains go: those that start at the draws should not go anywhere, those from afar should come back.

Transitions of Hamiltonian Monte Carlo leave ``p`` as it is. So draws of ``p`` have, after some of them, the same
mean, spread and tails as before (`moved`), and what has changed says in which direction the draws were wrong. Chains
that start far from the draws end where there is mass; an end far from all draws is mass that the draws do not have
(`elsewhere`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from scipy.spatial import cKDTree
from torch import Tensor

from implicitvi.errors import check_at_least
from implicitvi.numerics.gaussian import frame
from implicitvi.numerics.gaussian import whiten as standardise
from implicitvi.numerics.optimise import gradients
from implicitvi.numerics.types import LogDensity

TAIL = 0.01  # share of the draws that counts as their tail
_ACCEPTANCE = 0.8
_FAR = 1.5  # times the distance of the most solitary draw


@dataclass(frozen=True, eq=False)
class MomentDrift:
    """What transitions that leave ``p`` alone have changed in the draws.

    Attributes:
        mean: Change of the mean of each coordinate ``[D]``, in standard deviations of the draws.
        mean_error: Its standard error.
        sd: Ratio of standard deviations after to before, ``[D]``.
        sd_error: Standard error of its logarithm.
        tail: Share of the moved draws in what were the draws' outermost hundredth, the least likely under ``p``.
        tail_error: Its standard error.
        acceptance: Share of the transitions that were accepted.
    """

    mean: Tensor
    mean_error: Tensor
    sd: Tensor
    sd_error: Tensor
    tail: float
    tail_error: float
    acceptance: float


def moment_drift(
    log_joint: LogDensity, z: Tensor, *, num_steps: int = 15, num_leapfrog: int = 6, seed: int = 0
) -> MomentDrift:
    """Move every draw by Hamiltonian Monte Carlo and compare; for draws of ``p`` nothing changes.

    Args:
        log_joint: ``log p`` of points ``[S, D]`` up to a constant, ``[S]``, with gradients.
        z: Draws ``[S, D]``, unconstrained, independent.
        num_steps: Transitions of each draw.
        num_leapfrog: Gradients in each.
        seed: Of momenta and acceptances.

    >>> z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    >>> change = moment_drift(lambda z: -((z - 1) ** 2).sum(1) / 8, z)  # draws of N(0, 1), target N(1, 2²)
    >>> bool((change.mean > 0.7).all()), bool((change.sd > 1.5).all())
    (True, True)
    """
    there, acceptance = transitions(log_joint, z, num_steps=num_steps, num_leapfrog=num_leapfrog, seed=seed)
    with torch.no_grad():
        log_p, after_log_p = (log_joint(x).nan_to_num(-torch.inf).double() for x in (z, there))
    before, after = z.double(), there.double()
    loc, scale = before.mean(0), before.std(0)
    first = (after - before) / scale
    sd = after.std(0) / scale
    square = ((after - after.mean(0)) / (sd * scale)) ** 2 - ((before - loc) / scale) ** 2
    root = sqrt(len(z))
    tail = (after_log_p < log_p.quantile(TAIL)).double().mean().item()
    return MomentDrift(
        mean=first.mean(0),
        mean_error=first.std(0) / root,
        sd=sd,
        sd_error=square.std(0) / (2 * root),
        tail=tail,
        # the quantile of the draws has an error of its own
        tail_error=sqrt((max(tail, TAIL) + TAIL) / len(z)),
        acceptance=acceptance,
    )


def transitions(
    log_joint: LogDensity,
    z: Tensor,
    *,
    num_steps: int,
    num_leapfrog: int = 6,
    reference: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, float]:
    """Hamiltonian Monte Carlo from every draw: where each is afterwards ``[S, D]``, and the share of moves taken.

    The chains work in coordinates in which the reference has covariance ``I``. A pilot of the same length finds the
    step size; the transitions that count start at the draws again and keep it.

    Args:
        log_joint: ``log p`` of points ``[S, D]`` up to a constant, ``[S]``, with gradients.
        z: Draws ``[S, D]``, unconstrained.
        num_steps: Transitions of each draw.
        num_leapfrog: Gradients in each.
        reference: Draws ``[R, D]``, more than ``D``; ``None`` for ``z``.
        seed: Of momenta and acceptances.
    """
    check_at_least("num_steps", num_steps, 1)
    check_at_least("num_leapfrog", num_leapfrog, 1)
    chain = _Chain(log_joint, *_placed(z if reference is None else reference), seed)
    w = chain.whiten(z)
    size, _, _ = chain.run(w, num_steps, num_leapfrog, 1.0 / w.shape[1] ** 0.25, adapt=True)
    _, there, acceptance = chain.run(w, num_steps, num_leapfrog, size)
    return chain.unwhiten(there), acceptance


@dataclass(frozen=True, eq=False)
class MissedModes:
    """Where chains from afar have ended.

    Attributes:
        ends: Their ends ``[C, D]``.
        is_far: Which ends lie by themselves, further out than any draw does, at a density as high as theirs ``[C]``.
        share: Share of these among the ends that have come to such a density at all.
        arrived: Number of those.
    """

    ends: Tensor
    is_far: Tensor
    share: float
    arrived: int


def find_missed_modes(
    log_joint: LogDensity,
    z: Tensor,
    starts: Tensor | None = None,
    *,
    num_chains: int = 64,
    num_steps: int = 15,
    seed: int = 0,
) -> MissedModes:
    """Look for mass where there are no draws, by chains from far away.

    Each start climbs until it has the median density of the draws, or is at a top, then moves by Hamiltonian Monte
    Carlo, which takes it into the bulk of whatever it has found. It is compared with the draws by the distance to the
    nearest one, and coordinate by coordinate. What no chain meets is not found: the fewer dimensions and the wider
    the modes, the surer it is. The share of the chains says nothing about the weight of a mode.

    Args:
        log_joint: As for `moved`.
        z: Draws ``[S, D]``.
        starts: Points ``[C, D]`` to start from, such as draws of the prior; besides, ``num_chains`` start
            from Gaussians 2 to 20 times as wide as the draws.
        num_chains: Number of those.
        num_steps: Transitions of each chain after its climb.
        seed: Of everything that is random.
    """
    check_at_least("num_chains", num_chains, 1)
    chain = _Chain(log_joint, *_placed(z), seed)
    w = chain.whiten(z)
    widths = torch.logspace(0.301, 1.301, num_chains, dtype=w.dtype, device=w.device)
    begin = widths[:, None] * chain.noise(num_chains, w.shape[1])
    if starts is not None:
        begin = torch.cat([begin, chain.whiten(starts[starts.isfinite().all(1)])])
    # no gradient leads away from where there is no density
    begin = begin[chain.log_p(begin).isfinite()]
    log_p = chain.log_p(w)
    log_p = log_p[log_p.isfinite()]
    top = chain.climb(begin, log_p.median())
    _, ends, _ = chain.run(top, 2 * num_steps, 6, 0.3 / w.shape[1] ** 0.25, adapt=True)
    known = w.double().numpy(force=True)
    tree = cKDTree(known)
    between = tree.query(known, k=[2], workers=1)[0][:, 0]
    reached = ends.isfinite().all(1) & (chain.log_p(ends) >= log_p.quantile(0.02) - 1)
    where = ends.nan_to_num(0.0)
    distance = torch.from_numpy(tree.query(where.double().numpy(force=True), workers=1)[0])
    far = distance > _FAR * float(between.max())
    # in many dimensions all draws are far from each other, but not in each of them
    far |= (_beyond(where, w) | _beyond(chain.unwhiten(where), z)).cpu()
    far &= reached.cpu()
    arrived = int(reached.sum())
    return MissedModes(chain.unwhiten(ends), far, int(far.sum()) / max(arrived, 1), arrived)


def _beyond(ends: Tensor, z: Tensor) -> Tensor:
    """Which of the ends ``[C, D]`` have a coordinate far outside those of all draws ``[S, D]``."""
    middle = z.median(0).values
    high, low = z.amax(0) - middle, middle - z.amin(0)
    off = ends - middle
    return ((off > _FAR * high) | (-off > _FAR * low)).any(1)


def _placed(z: Tensor) -> tuple[Tensor, Tensor]:
    loc, scale_tril = frame(z.double())
    return loc.to(z), scale_tril.to(z)


class _Chain:
    """Hamiltonian Monte Carlo of many chains in the coordinates ``w`` of a frame, with random numbers of its own."""

    def __init__(self, log_joint: LogDensity, loc: Tensor, scale_tril: Tensor, seed: int):
        self.log_joint, self.loc, self.scale_tril = log_joint, loc, scale_tril
        self.generator = torch.Generator().manual_seed(seed)

    def whiten(self, z: Tensor) -> Tensor:
        return standardise(z, self.loc, self.scale_tril)

    def unwhiten(self, w: Tensor) -> Tensor:
        return self.loc + w @ self.scale_tril.mT

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.loc)

    def log_p(self, w: Tensor) -> Tensor:
        """``log p [C]``, ``-inf`` where there is none."""
        with torch.no_grad():
            log_p = self.log_joint(self.unwhiten(w))
        return log_p.nan_to_num(-torch.inf, -torch.inf, -torch.inf)

    def at(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """``log p [C]``, ``-inf`` where there is none, and its gradient in ``w``, 0 there."""
        log_p, slope = gradients(self.log_joint, self.unwhiten(w))
        slope = slope @ self.scale_tril
        known = log_p.isfinite() & slope.isfinite().all(1)
        return log_p.where(known, -torch.inf), slope.where(known[:, None], 0.0)

    def run(
        self, w: Tensor, num_steps: int, num_leapfrog: int, size: float, *, adapt: bool = False
    ) -> tuple[float, Tensor, float]:
        """Step size at the end, positions ``[C, D]`` at the end, and the mean acceptance."""
        log_p, slope = self.at(w)
        accepted = 0.0
        for _ in range(num_steps):
            momentum = self.noise(*w.shape)
            # each chain varies its steps, lest a trajectory be a period of the posterior
            uniform = torch.rand(2, len(w), generator=self.generator, dtype=torch.float64).to(w)
            eps = (size * (0.5 + uniform[0]))[:, None]
            there, there_log_p, there_slope, p = w, log_p, slope, momentum
            for _ in range(num_leapfrog):
                p = p + eps / 2 * there_slope
                there = there + eps * p
                there_log_p, there_slope = self.at(there)
                p = p + eps / 2 * there_slope
            gain = there_log_p - log_p + (momentum.square() - p.square()).sum(1) / 2
            chance = gain.exp().clamp(max=1).nan_to_num(0.0)
            # from where there is no density, whatever has one is better
            chance = chance.where(log_p.isfinite(), there_log_p.isfinite().to(w))
            take = uniform[1] < chance
            w = torch.where(take[:, None], there, w)
            log_p = torch.where(take, there_log_p, log_p)
            slope = torch.where(take[:, None], there_slope, slope)
            rate = chance.mean().item()
            accepted += rate / num_steps
            if adapt:
                size *= 2 ** ((rate - _ACCEPTANCE) / max(_ACCEPTANCE, 1 - _ACCEPTANCE))
        return size, w, accepted

    def climb(self, w: Tensor, enough: Tensor, num_steps: int = 200) -> Tensor:
        """Uphill from ``w [C, D]`` by Adam until ``log p`` is ``enough``, each with steps by its distance."""
        rate = (w.abs().amax(1, keepdim=True) / 20).clamp(min=0.1)
        mean, square = torch.zeros_like(w), torch.zeros_like(w)
        cooling = 0.05 ** (1 / num_steps)
        for step in range(1, num_steps + 1):
            log_p, slope = self.at(w)
            mean = 0.8 * mean + 0.2 * slope
            square = 0.95 * square + 0.05 * slope.square()
            ahead = mean / (1 - 0.8**step) / ((square / (1 - 0.95**step)).sqrt() + 1e-12)
            going = (log_p < enough)[:, None]
            if not going.any():
                break
            w = torch.where(going, w + rate * cooling**step * ahead, w)
        return w
