"""Diagnose draws with short chains of Hamiltonian Monte Carlo: moments must not drift, distant chains must return.

Transitions leave ``p`` invariant, so draws of ``p`` keep their mean, spread and tails; `moment_drift` measures the
change, which also shows in which direction draws are wrong. Chains that start far from the draws end where ``p`` has
mass; an end far from all draws is mass that the draws miss (`find_missed_modes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from scipy.spatial import cKDTree
from torch import Tensor

from implicitvi.errors import check_seed, check_whole
from implicitvi.numerics.gaussian import mean_and_cholesky, whiten
from implicitvi.numerics.hmc import Evaluate, Point, transition
from implicitvi.numerics.optimise import descend, gradients, where_finite
from implicitvi.numerics.types import LogDensity

TAIL = 0.01  # share of the draws that counts as their tail
_ACCEPTANCE = 0.8
_FAR = 1.5  # times the largest distance of a draw to its nearest neighbour


@dataclass(frozen=True, eq=False)
class MomentDrift:
    """A comparison of draws before and after transitions that leave ``p`` invariant.

    Attributes:
        mean: Change of the mean of each coordinate ``[D]``, in standard deviations of the draws.
        mean_error: Its standard error.
        sd: Ratio of standard deviations after to before, ``[D]``.
        sd_error: Standard error of its logarithm.
        tail: Share of the moved draws in the outermost hundredth of the draws, those least likely under ``p``.
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
    """Move every draw by Hamiltonian Monte Carlo and compare moments; those of draws of ``p`` do not change.

    Args:
        log_joint: ``log p`` of points ``[S, D]`` up to a constant, ``[S]``, with gradients.
        z: Independent draws ``[S, D]``, unconstrained.
        num_steps: Transitions of each draw.
        num_leapfrog: Gradients in each.
        seed: Seed of momenta and acceptances.

    >>> z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    >>> change = moment_drift(lambda z: -((z - 1) ** 2).sum(1) / 8, z)  # draws of N(0, 1), target N(1, 2²)
    >>> bool((change.mean > 0.7).all()), bool((change.sd > 1.5).all())
    (True, True)
    """
    there, acceptance = transitions(log_joint, z, num_steps=num_steps, num_leapfrog=num_leapfrog, seed=seed)
    with torch.no_grad():
        log_p, after_log_p = (log_joint(x).nan_to_num(-torch.inf).double() for x in (z, there))
    before, after = z.double(), there.double()
    scale, root = before.std(0), sqrt(len(z))
    shift, sd = (after - before) / scale, after.std(0) / scale
    square = ((after - after.mean(0)) / (sd * scale)) ** 2 - ((before - before.mean(0)) / scale) ** 2
    tail = (after_log_p < log_p.quantile(TAIL)).double().mean().item()
    tail_error = sqrt((max(tail, TAIL) + TAIL) / len(z))  # the quantile of the draws has an error of its own
    return MomentDrift(shift.mean(0), shift.std(0) / root, sd, square.std(0) / (2 * root), tail, tail_error, acceptance)


def transitions(
    log_joint: LogDensity,
    z: Tensor,
    *,
    num_steps: int,
    num_leapfrog: int = 6,
    reference: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, float]:
    """Run Hamiltonian Monte Carlo from every draw, in coordinates in which the reference has covariance ``I``.

    A pilot run of the same length adapts the step size; the final run starts at the draws again and keeps it.

    Args:
        log_joint: ``log p`` of points ``[S, D]`` up to a constant, ``[S]``, with gradients.
        z: Draws ``[S, D]``, unconstrained.
        num_steps: Transitions of each draw.
        num_leapfrog: Gradients in each.
        reference: Draws ``[R, D]``, more than ``D``; ``None`` for ``z``.
        seed: Seed of momenta and acceptances.

    Returns:
        The last point of every chain ``[S, D]``, and the share of transitions that were accepted.
    """
    check_whole("num_steps", num_steps)
    check_whole("num_leapfrog", num_leapfrog)
    seed = check_seed("seed", seed)
    chains = _Chains(log_joint, z if reference is None else reference, seed)
    w = chains.whiten(z)
    size, _, _ = chains.run(w, num_steps, num_leapfrog, 1.0 / w.shape[1] ** 0.25, adapt=True)
    _, there, acceptance = chains.run(w, num_steps, num_leapfrog, size)
    return chains.unwhiten(there), acceptance


@dataclass(frozen=True, eq=False)
class MissedModes:
    """The ends of chains that started far from the draws.

    Attributes:
        ends: Last point of each chain ``[C, D]``.
        is_far: Mask ``[C]`` of ends farther out than any draw, at a density as high as that of the draws.
        share: Share of these among the ends at such a density.
        arrived: Number of ends at such a density.
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
    """Search for mass where there are no draws, by chains from far away.

    Each chain climbs to the median density of the draws, or a maximum, then moves by Hamiltonian Monte Carlo into the
    bulk of the mode. Its end is compared with the nearest draw, and coordinate by coordinate. Modes that no chain
    reaches are not found: wide modes in few dimensions rarely stay hidden. The share of the chains does not measure
    the weight of a mode.

    Args:
        log_joint: As for `moment_drift`.
        z: Draws ``[S, D]``.
        starts: Points ``[C, D]`` to start from, such as draws of the prior; ``num_chains`` more start from Gaussians 2
            to 20 times as wide as the draws.
        num_chains: Number of those.
        num_steps: Half the number of transitions after the climb.
        seed: Random seed.
    """
    check_whole("num_chains", num_chains)
    check_whole("num_steps", num_steps)
    seed = check_seed("seed", seed)
    chains = _Chains(log_joint, z, seed)
    w = chains.whiten(z)
    widths = torch.logspace(0.301, 1.301, num_chains, dtype=w.dtype, device=w.device)
    begin = widths[:, None] * chains.noise(num_chains, w.shape[1])
    if starts is not None:
        begin = torch.cat([begin, chains.whiten(starts[starts.isfinite().all(1)])])
    begin = begin[chains.log_p(begin).isfinite()]  # without density there is no gradient to follow
    log_p = chains.log_p(w)
    log_p = log_p[log_p.isfinite()]
    top = climb(chains.at, begin, log_p.median())
    _, ends, _ = chains.run(top, 2 * num_steps, 6, 0.3 / w.shape[1] ** 0.25, adapt=True)
    known = w.double().numpy(force=True)
    tree = cKDTree(known)
    between = tree.query(known, k=[2], workers=1)[0][:, 0]
    reached = ends.isfinite().all(1) & (chains.log_p(ends) >= log_p.quantile(0.02) - 1)
    where = ends.nan_to_num(0.0)
    distance = torch.from_numpy(tree.query(where.double().numpy(force=True), workers=1)[0])
    far = distance > _FAR * float(between.max())
    # in many dimensions all draws are far from each other, but not in each coordinate
    far = (far | (_beyond(where, w) | _beyond(chains.unwhiten(where), z)).cpu()) & reached.cpu()
    arrived = int(reached.sum())
    return MissedModes(chains.unwhiten(ends), far, int(far.sum()) / max(arrived, 1), arrived)


def _beyond(ends: Tensor, z: Tensor) -> Tensor:
    """Return a mask of ends ``[C, D]`` with a coordinate far outside those of all draws ``[S, D]``."""
    middle = z.median(0).values
    high, low = z.amax(0) - middle, middle - z.amin(0)
    off = ends - middle
    return ((off > _FAR * high) | (-off > _FAR * low)).any(1)


class _Chains:
    """A set of Hamiltonian Monte Carlo chains in coordinates ``w`` that whiten the reference draws ``[R, D]``."""

    def __init__(self, log_joint: LogDensity, reference: Tensor, seed: int):
        self.log_joint = log_joint
        self.loc, self.scale_tril = (each.to(reference) for each in mean_and_cholesky(reference.double()))
        self.generator = torch.Generator().manual_seed(seed)

    def whiten(self, z: Tensor) -> Tensor:
        return whiten(z, self.loc, self.scale_tril)

    def unwhiten(self, w: Tensor) -> Tensor:
        return self.loc + w @ self.scale_tril.mT

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.loc)

    def log_p(self, w: Tensor) -> Tensor:
        """Return ``log p [C]``, ``-inf`` where it is not finite."""
        with torch.no_grad():
            return self.log_joint(self.unwhiten(w)).nan_to_num(-torch.inf, -torch.inf, -torch.inf)

    def at(self, w: Tensor) -> Point:
        """Evaluate ``log p [C]`` and its gradient in ``w``: ``-inf`` and 0 where one of them is not finite."""
        log_p, slope = gradients(self.log_joint, self.unwhiten(w))
        return Point(w, *where_finite(log_p, slope @ self.scale_tril))

    def run(
        self, w: Tensor, num_steps: int, num_leapfrog: int, size: float, *, adapt: bool = False
    ) -> tuple[float, Tensor, float]:
        """Return the last step size, the last positions ``[C, D]`` and the mean acceptance."""
        here, accepted = self.at(w), 0.0
        for _ in range(num_steps):
            momentum = self.noise(*w.shape)
            uniform = torch.rand(2, len(w), generator=self.generator, dtype=torch.float64).to(w)
            varied = size * (0.5 + uniform[0])  # a trajectory must not be a period of the posterior
            here, chance = transition(
                self.at, here, momentum=momentum, uniform=uniform[1], step_size=varied, num_leapfrog=num_leapfrog
            )
            rate = chance.mean().item()
            accepted += rate / num_steps
            if adapt:
                size *= 2 ** ((rate - _ACCEPTANCE) / max(_ACCEPTANCE, 1 - _ACCEPTANCE))
        return size, here.position, accepted


@torch.enable_grad()
def climb(at: Evaluate, start: Tensor, enough: Tensor, num_steps: int = 200) -> Tensor:
    """Climb from ``start [C, D]`` by Adam until ``log p`` is ``enough``; step sizes grow with the distance."""
    rate = (start.abs().amax(1, keepdim=True) / 20).clamp(min=0.1)
    steps = torch.zeros_like(start, requires_grad=True)  # in units of the rate
    top, climbing = start, torch.ones(len(start), 1, dtype=torch.bool, device=start.device)

    def loss() -> Tensor | None:
        nonlocal top, climbing
        if not climbing.any():
            return None
        top = torch.where(climbing, start + rate * steps.detach(), top)
        here = at(top)
        climbing = (here.log_p < enough)[:, None]
        return -(rate * here.gradient * steps).sum()

    descend(loss, [{"params": [steps], "lr": 0.05 ** (1 / num_steps), "betas": (0.8, 0.95), "eps": 1e-12}], num_steps)
    return torch.where(climbing, start + rate * steps.detach(), top)
