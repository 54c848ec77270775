"""Climb a log density from several starts at once, and read a Gaussian off each path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitvi.numerics.optimise import gradients, where_finite
from implicitvi.numerics.types import LogDensity

# sizes of a step, as shares of the quasi-Newton step; each row is tried where none before rises
SIZES = ((3.0, 1.0, 0.3), (0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5), tuple(10.0**-k for k in range(6, 18)))
ENOUGH = 1e-3  # nats that a step must promise
ROUNDING = 1e-7  # relative rise of a log density that counts
WIDTH = 50  # dimensions for each step from one look at the Gaussian to the next
DRAWS = 8  # of the Gaussian at each point, to find the best of a path
FINAL_DRAWS = 64  # of the best Gaussian of each path, to compare the paths


@dataclass(eq=False)
class Paths:
    """Paths uphill: ``P`` present points, and the best Gaussian that each has passed.

    Attributes:
        u: Present points ``[P, D]``.
        log_p: Their log density ``[P]`` in nats.
        slope: Its gradient ``[P, D]``.
        root: Factor ``A [P, D, D]`` of the estimated inverse Hessian ``H = A Aᵀ``; not triangular.
        log_det: ``log|det A|`` of each, ``[P]``.
        moving: Mask ``[P]`` of paths that go on.
        elbo: Evidence lower bound of each best Gaussian ``[P]`` in nats; ``-inf`` without one.
        best_loc: Their means ``[P, D]``.
        best_root: Their scales ``[P, D, D]``, not triangular.
        best_log_det: ``log|det|`` of these, ``[P]``.
    """

    u: Tensor
    log_p: Tensor
    slope: Tensor
    root: Tensor
    log_det: Tensor
    moving: Tensor
    elbo: Tensor
    best_loc: Tensor
    best_root: Tensor
    best_log_det: Tensor

    def to(self, dtype: torch.dtype) -> Paths:
        """Return the same paths in another precision."""
        moved = {name: x if x.dtype == torch.bool else x.to(dtype) for name, x in vars(self).items()}
        return Paths(**moved)

    def gaussian(self, k: int) -> tuple[Tensor, Tensor]:
        """Return mean ``[D]`` and lower triangular scale ``[D, D]`` of the best Gaussian of a path."""
        return self.best_loc[k], lower_triangular(self.best_root[k])


def lower_triangular(root: Tensor) -> Tensor:
    """Return the lower triangular ``L [D, D]`` with a positive diagonal and ``L Lᵀ = A Aᵀ``, from ``A [D, D]``."""
    upper: Tensor = torch.linalg.qr(root.mT).R
    return upper.mT * upper.diagonal().sign()


def pathfinder(log_joint: LogDensity, starts: Tensor, scale: Tensor, *, num_steps: int) -> Paths:
    """Climb from every start by BFGS; keep the Gaussian with the highest ELBO on each path.

    At a point ``u`` with gradient ``g`` and estimated inverse Hessian ``H`` the Gaussian is ``N(u + H g, H)``. The
    search along each step tries several sizes at once. ``H = A Aᵀ`` is kept as its factor: it stays positive, and
    steps and draws cost ``D²``.

    Args:
        log_joint: Log density of points ``[S, D]`` in nats, not necessarily normalised.
        starts: Points ``[P, D]``; those without a finite density and gradient are left out.
        scale: First guess of the scale of each coordinate ``[D]``; a wrong one costs steps.
        num_steps: Most steps of a path.

    References:
        Pathfinder: Parallel quasi-Newton variational inference, Lu Zhang, Bob Carpenter, Andrew Gelman, Aki Vehtari,
        2022, algorithms 1 and 2. The factor: On rank one and two corrections to positive definite matrices expressed in
        product form, K. W. Brodlie, A. R. Gourlay, J. Greenstadt, 1973.
    """
    # in float64: from a wide prior to a narrow posterior the factors lose more digits than float32 has
    dtype, scale, u = starts.dtype, scale.double(), starts.double()

    def exact(z: Tensor) -> Tensor:
        return log_joint(z.to(dtype)).double()

    log_p, slope = _gradients(exact, u)
    known = log_p.isfinite()
    u, log_p, slope = u[known], log_p[known], slope[known]
    root, log_det = torch.diag(scale).repeat(len(u), 1, 1), scale.log().sum().repeat(len(u))
    nothing = torch.full_like(log_p, -torch.inf)
    paths = Paths(u, log_p, slope, root, log_det, nothing < 0, nothing, u.clone(), root.clone(), log_det.clone())
    every = max(1, starts.shape[1] // WIDTH)
    for step in range(num_steps):
        active = paths.moving.nonzero()[:, 0]
        if not len(active):
            break
        _step(exact, paths, active, scale, dtype)
        due = active if step % every == 0 or step == num_steps - 1 else active[~paths.moving[active]]
        _look(exact, paths, due)
    paths.elbo = _elbo(exact, paths.best_loc, paths.best_root, paths.best_log_det, FINAL_DRAWS)
    return paths.to(dtype)


def _step(log_joint: LogDensity, paths: Paths, active: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """Move every point to the best of several places along its quasi-Newton step, and update the inverse Hessian.

    Where that promises or brings nothing, the step begins anew with the first guess of the inverse Hessian.
    """
    u, log_p, slope, root = (x[active] for x in (paths.u, paths.log_p, paths.slope, paths.root))
    log_det = paths.log_det[active]
    inner = (root.mT @ slope[..., None]).squeeze(-1)
    direction = (root @ inner[..., None]).squeeze(-1)
    promising = inner.square().sum(-1) > 2 * ENOUGH
    size = _search(log_joint, u, direction, log_p, promising)
    stuck = size == 0
    if stuck.any():
        anew = slope * scale.square()
        size_anew = _search(log_joint, u, anew, log_p + ENOUGH, stuck)
        begun = size_anew > 0
        root[begun], log_det[begun] = torch.diag(scale), scale.log().sum()
        direction, size = anew.where(begun[:, None], direction), size_anew.where(begun, size)
    there = (u + size[:, None] * direction).to(dtype).double()  # the point that is scored
    log_p_there, slope_there = _gradients(log_joint, there)
    rises = (size > 0) & log_p_there.isfinite()
    # the product form of BFGS, with B the Hessian before the step: s = size H g, so B s = size g
    s, z, bs = there - u, slope - slope_there, size[:, None] * slope
    curved, before = (s * z).sum(-1), (s * bs).sum(-1)
    bends = rises & (curved > 1e-6 * before) & curved.isfinite()
    curved, before = curved.where(bends, 1.0), before.where(bends, 1.0)  # 1: no update
    p = z / curved[:, None] - bs / (curved * before).sqrt()[:, None]
    root = (root - s[:, :, None] * (p[:, None] @ root)).where(bends[:, None, None], root)
    paths.root[active], paths.log_det[active] = root, log_det + 0.5 * (before / curved).log().where(bends, 0.0)
    paths.u[active] = there.where(rises[:, None], u)
    paths.log_p[active] = log_p_there.where(rises, log_p)
    paths.slope[active] = slope_there.where(rises[:, None], slope)
    paths.moving[active] = rises


def _search(log_joint: LogDensity, u: Tensor, direction: Tensor, log_p: Tensor, wanted: Tensor) -> Tensor:
    """Return the size ``[P]`` of the step along each wanted direction ``[P, D]`` that rises most; 0 where none rises.

    The next row of sizes is tried for those that no size before has raised.
    """
    size, least = torch.zeros_like(log_p), log_p + ROUNDING * log_p.abs()
    for sizes in SIZES:
        waiting = (wanted & (size == 0)).nonzero()[:, 0]
        if len(waiting):
            t = torch.tensor(sizes).to(u)
            top, which = _values(log_joint, u[waiting] + t[:, None, None] * direction[waiting]).max(0)
            size[waiting] = t[which].where(top > least[waiting], 0.0)
    return size


def _look(log_joint: LogDensity, paths: Paths, active: Tensor) -> None:
    """Estimate the ELBO of the Gaussian at each moving point; keep it where it is the best of its path so far."""
    root, log_det = paths.root[active], paths.log_det[active]
    loc = paths.u[active] + (root @ (root.mT @ paths.slope[active][..., None])).squeeze(-1)
    elbo = _elbo(log_joint, loc, root, log_det, DRAWS)
    better = elbo > paths.elbo[active]
    kept = active[better]
    paths.elbo[kept], paths.best_loc[kept] = elbo[better], loc[better]
    paths.best_root[kept], paths.best_log_det[kept] = root[better], log_det[better]


def _elbo(log_joint: LogDensity, loc: Tensor, root: Tensor, log_det: Tensor, draws: int) -> Tensor:
    """Return the ELBO ``[P]`` of Gaussians with means ``[P, D]`` and scales ``[P, D, D]``, from so many draws.

    One draw comes first: Gaussians for which it has no density get ``-inf``.
    """
    eps = torch.randn(draws, *loc.shape, dtype=loc.dtype, device=loc.device)
    z = loc + (root @ eps[..., None]).squeeze(-1)
    log_p = torch.full(eps.shape[:-1], -torch.inf, dtype=loc.dtype, device=loc.device)
    log_p[0] = _values(log_joint, z[0])
    known = log_p[0].isfinite()
    log_p[1:, known] = _values(log_joint, z[1:, known])
    return (log_p + 0.5 * eps.square().sum(-1)).mean(0) + log_det


def _gradients(log_joint: LogDensity, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log p [S]`` and its gradient ``[S, D]``; ``-inf`` and 0 where one of them is not finite."""
    log_p, slope = where_finite(*gradients(log_joint, u))
    return log_p.to(u), slope


@torch.no_grad()
def _values(log_joint: LogDensity, u: Tensor) -> Tensor:
    """Return ``log p [...]`` of ``u [..., D]``, ``-inf`` where it is not finite."""
    if not u.numel():
        return u.new_zeros(u.shape[:-1])
    flat = log_joint(u.reshape(-1, u.shape[-1]))
    return flat.nan_to_num(-torch.inf, -torch.inf, -torch.inf).reshape(u.shape[:-1]).to(u)
