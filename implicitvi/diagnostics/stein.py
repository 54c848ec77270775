"""Test draws of ``p`` by Stein's identities, which need only the score ``s = ∇ log p``.

For smooth ``f`` that do not grow too fast, ``E_p[∇·f(z) + f(z)·s(z)] = 0``. A kernel tests all ``f`` of its space at
once (`kernel_stein`); single coordinates show where the identity fails (`stein_identities`). Neither needs the density
of the draws or the evidence. Both evaluate ``p`` only at the draws, so a mode far from all draws is invisible to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from implicitvi.errors import OptionError, ShapeError, check_seed, check_whole
from implicitvi.numerics.gaussian import mean_and_cholesky, standard_deviations, whiten

LEAST = 20  # draws
DRAWS_PER_DIM = 20  # needed for a covariance; with fewer only variances are used
_ENTRIES = 2**22  # of a block of the kernel matrix: 32 MiB


@dataclass(frozen=True)
class KernelStein:
    """The result of `kernel_stein`.

    Attributes:
        discrepancy: Squared kernel Stein discrepancy, an unbiased U-statistic; 0 in expectation for draws of ``p``.
        score_error: ``sqrt(discrepancy / mean k)``: distance between the score of the draws and that of ``p``, averaged
            over the draws and smoothed by the kernel, in whitened coordinates. It is ``δ`` for draws of a Gaussian
            whose mean is off by ``δ`` standard deviations, and 0 if the discrepancy is below 0.
        p_value: Share of wild bootstrap statistics at least as large as the discrepancy, for independent draws.
    """

    discrepancy: float
    score_error: float
    p_value: float


def kernel_stein(
    z: Tensor, score: Tensor, *, reference: Tensor | None = None, num_bootstrap: int = 500, seed: int = 0
) -> KernelStein:
    """Compute the kernel Stein discrepancy between draws and the distribution with a given score, and its p-value.

        KSD² = E u(z, z')        u = s·s' k + s·∇' k + s'·∇ k + ∇·∇' k        k = (c² + |z - z'|²)^(-1/2)

    in coordinates in which the reference has covariance ``I``, with the median distance of the draws as ``c``. This
    inverse multiquadric detects non-convergence where a Gaussian kernel does not (Gorham and Mackey). The bootstrap
    uses random signs: the p-value is uniform for independent draws of ``p`` and too small for those of a Markov chain
    (thin them). With enough draws every variational fit is significant: ``score_error`` shows whether it matters.

    Args:
        z: Draws ``[S, D]``, unconstrained.
        score: ``∇ log p`` at each draw ``[S, D]``; the evidence cancels.
        reference: Other draws ``[R, D]`` of the same distribution, which define the coordinates; ``None`` for ``z``. If
            there are fewer than 20 for each dimension, only their variances are used: the covariance of so few draws
            fits their noise, and hides their errors.
        num_bootstrap: Number of bootstrap statistics.
        seed: Seed of the bootstrap's signs.

    Raises:
        ShapeError: Draws and scores are not matrices of one shape with at least 20 rows.
        OptionError: A value is not finite, the draws lie on a plane, or ``num_bootstrap`` is below 1.

    >>> generator = torch.Generator().manual_seed(0)
    >>> z = torch.randn(500, 2, generator=generator)
    >>> kernel_stein(z, -z).p_value > 0.01
    True
    >>> kernel_stein(z, -(z - 0.5)).p_value < 0.01  # draws of N(0, I), score of N(0.5, I)
    True

    References:
        A Kernelized Stein Discrepancy for Goodness-of-fit Tests, Qiang Liu, Jason Lee, Michael Jordan, 2016, eq. 12
        to 14. A Kernel Test of Goodness of Fit, Kacper Chwialkowski, Heiko Strathmann, Arthur Gretton, 2016.
        Measuring Sample Quality with Kernels, Jackson Gorham, Lester Mackey, 2017.
    """
    check_whole("num_bootstrap", num_bootstrap)
    seed = check_seed("seed", seed)
    z, score = _pair(z, score)
    loc, scale_tril = _location_scale(z if reference is None else reference.detach().to(z))
    w, s = whiten(z, loc, scale_tril), score @ scale_tril
    square = torch.nn.functional.pdist(w[:1000]).median().item() ** 2
    signs = torch.randint(0, 2, (num_bootstrap, len(w)), generator=torch.Generator().manual_seed(seed)).to(w) * 2 - 1
    total, kernel, boot = 0.0, 0.0, w.new_zeros(num_bootstrap)
    rows = max(1, _ENTRIES // len(w))
    for start in range(0, len(w), rows):
        part = slice(start, start + rows)
        k, u = _stein_kernel(w[part], s[part], w, s, square)
        k.diagonal(start).zero_()
        u.diagonal(start).zero_()
        total, kernel = total + u.sum().item(), kernel + k.sum().item()
        boot += ((signs[:, part] @ u) * signs).sum(1)
    p_value = (1 + int((boot >= total).sum())) / (1 + num_bootstrap)
    return KernelStein(total / (len(w) * (len(w) - 1)), sqrt(max(total, 0.0) / kernel), p_value)


@dataclass(frozen=True, eq=False)
class SteinIdentities:
    """The result of `stein_identities` for each coordinate; all ``[D]``.

    Attributes:
        mean: ``-E[sd s]``: 0 for draws of ``p``; independent Gaussian draws whose mean is ``δ`` standard deviations too
            high have ``δ``.
        mean_error: Its standard error.
        spread: ``-E[(z - m) s] - 1``: 0 for draws of ``p``; Gaussian draws of variance ``v`` times that of ``p`` have
            ``v - 1``.
        spread_error: Its standard error.
    """

    mean: Tensor
    mean_error: Tensor
    spread: Tensor
    spread_error: Tensor


def stein_identities(z: Tensor, score: Tensor) -> SteinIdentities:
    """Estimate the Langevin–Stein identities of every coordinate: ``E[s_j] = 0`` and ``E[(z_j - m_j) s_j] = -1``.

    Unlike `kernel_stein` they show which coordinate is off, and by how much in its own standard deviations.

    Args:
        z: Independent draws ``[S, D]``, unconstrained.
        score: ``∇ log p`` at each draw ``[S, D]``.

    Raises:
        ShapeError: Draws and scores are not matrices of one shape with at least 20 rows.
        OptionError: A value is not finite.

    >>> z = 0.5 * torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    >>> off = stein_identities(z, -z).spread  # a quarter of the variance: 0.25 - 1
    >>> bool(((off + 0.75).abs() < 0.05).all())
    True

    References:
        Measuring Sample Quality with Stein's Method, Jackson Gorham, Lester Mackey, 2015.
    """
    z, score = _pair(z, score)
    centred = z - z.mean(0)
    first = -centred.std(0) * score
    second = -centred * (score - score.mean(0)) - 1  # without the mean score, which has its own identity
    tiny = torch.finfo(z.dtype).tiny
    first_error, second_error = ((each.std(0) / sqrt(len(z))).clamp(min=tiny) for each in (first, second))
    return SteinIdentities(first.mean(0), first_error, second.mean(0), second_error)


def _location_scale(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and scale of draws ``[R, D]``, diagonal if they are too few for a covariance."""
    if len(draws) >= DRAWS_PER_DIM * draws.shape[1]:
        return mean_and_cholesky(draws)
    return draws.mean(0), torch.diag(standard_deviations(draws))


def _stein_kernel(a: Tensor, s_a: Tensor, b: Tensor, s_b: Tensor, square: float) -> tuple[Tensor, Tensor]:
    """Return ``k [A, B]`` and ``u [A, B]`` for two sets of draws with their scores, ``c² = square``."""
    base = square + torch.cdist(a, b).square()
    k = base.rsqrt()
    slope = k / base  # ∇_b k = slope (a - b), ∇_a k = -slope (a - b)
    # (s_a - s_b)·(a - b), without a tensor [A, B, D]
    along = (s_a * a).sum(1)[:, None] - s_a @ b.mT - a @ s_b.mT + (s_b * b).sum(1)
    curl = slope * a.shape[1] - 3 * (base - square) * slope / base
    return k, (s_a @ s_b.mT) * k + slope * along + curl


def _pair(z: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as finite float64 matrices on the CPU."""
    if z.dim() != 2 or z.shape != score.shape:
        shapes = f"shapes {tuple(z.shape)} and {tuple(score.shape)}"
        raise ShapeError.must_be("Draws and scores", "matrices of one shape [S, D]", shapes)
    if len(z) < LEAST:
        raise ShapeError(f"There must be at least {LEAST} draws, got {len(z)}.")
    z, score = (t.detach().to("cpu", torch.float64) for t in (z, score))
    bad = ~(z.isfinite().all(1) & score.isfinite().all(1))
    if bad.any():
        rows, do = f"{int(bad.sum())} bad rows of {len(z)}", "Check the model there: its log density has no gradient."
        raise OptionError.must_be("Draws and scores", "finite", rows, do)
    return z, score
