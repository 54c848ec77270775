"""Stein's identities: what must hold of draws of ``p`` wherever its score ``s = ∇ log p`` is known.

For smooth ``f`` that do not grow too fast, ``E_p[∇·f(z) + f(z)·s(z)] = 0``. A kernel takes all such ``f`` of its
space at once (`kernel_stein`); single coordinates say where it fails (`stein_identities`). Neither asks for the density
of the draws, nor for the evidence. Both look at ``p`` only where the draws are: a mode that the draws do not know of,
far from those they do, is invisible to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from implicitvi.errors import OptionError, ShapeError, check_at_least
from implicitvi.numerics.gaussian import mean_and_cholesky, standard_deviations, whiten

LEAST = 20  # draws
FRAME = 20  # draws for each dimension, of which a covariance is taken
_ENTRIES = 2**22  # of a kernel matrix made at once: 32 MiB


@dataclass(frozen=True)
class KernelStein:
    """What `kernel_stein` has found.

    Attributes:
        discrepancy: Squared kernel Stein discrepancy, an unbiased U-statistic; 0 in expectation for draws of ``p``.
        score_error: ``sqrt(discrepancy / mean k)``: how far the score of the draws is from that of ``p``, on
            average over the draws and smoothed by the kernel, in whitened coordinates. Draws of a Gaussian whose mean
            is off by ``δ`` standard deviations have ``δ``. 0 where the discrepancy is below 0.
        p_value: Share of wild bootstrap statistics at least as large as the discrepancy, for independent draws.
    """

    discrepancy: float
    score_error: float
    p_value: float


def kernel_stein(
    z: Tensor, score: Tensor, *, reference: Tensor | None = None, num_bootstrap: int = 500, seed: int = 0
) -> KernelStein:
    """Kernel Stein discrepancy of draws to the distribution with a given score, and its significance.

        KSD² = E u(z, z')        u = s·s' k + s·∇' k + s'·∇ k + ∇·∇' k        k = (c² + |z - z'|²)^(-1/2)

    in coordinates in which the reference has covariance ``I``, with the median distance of the draws as ``c``. This
    inverse multiquadric decides convergence where a Gaussian kernel does not (Gorham and Mackey). The bootstrap takes
    random signs: for independent draws of ``p`` the p-value is uniform. Draws of a Markov chain have too small ones:
    thin them. At enough draws every variational fit is significant: ``score_error`` says whether it matters.

    Args:
        z: Draws ``[S, D]``, unconstrained.
        score: ``∇ log p`` at each ``[S, D]``; the evidence has no part in it.
        reference: Other draws ``[R, D]`` of the same distribution, which give the coordinates; ``None`` for ``z``.
            Where there are fewer than 20 for each dimension they are asked for variances alone: a covariance of so
            few draws fits their noise, and hides what is wrong with them.
        num_bootstrap: Statistics of the bootstrap.
        seed: Of the bootstrap's signs.

    Raises:
        ShapeError: The two are not matrices of one shape with 20 rows or more.
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
    check_at_least("num_bootstrap", num_bootstrap, 1)
    z, score = _pair(z, score)
    loc, scale_tril = _frame_for(z if reference is None else reference.detach().to(z))
    w = whiten(z, loc, scale_tril)
    s = score @ scale_tril
    square = torch.nn.functional.pdist(w[:1000]).median().item() ** 2
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (num_bootstrap, len(w)), generator=generator).to(w) * 2 - 1
    total, kernel, boot = 0.0, 0.0, w.new_zeros(num_bootstrap)
    rows = max(1, _ENTRIES // len(w))
    for start in range(0, len(w), rows):
        part = slice(start, start + rows)
        k, u = _stein_kernel(w[part], s[part], w, s, square)
        diagonal = torch.arange(len(k))
        k[diagonal, diagonal + start] = 0
        u[diagonal, diagonal + start] = 0
        total, kernel = total + u.sum().item(), kernel + k.sum().item()
        boot += ((signs[:, part] @ u) * signs).sum(1)
    pairs = len(w) * (len(w) - 1)
    exceeding = int((boot >= total).sum())
    return KernelStein(
        discrepancy=total / pairs,
        score_error=sqrt(max(total, 0.0) / kernel),
        p_value=(1 + exceeding) / (1 + num_bootstrap),
    )


@dataclass(frozen=True, eq=False)
class SteinIdentities:
    """What `stein_identities` has found, coordinate by coordinate; all ``[D]``.

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

    def significance(self) -> Tensor:
        """The larger of the two in standard errors ``[D]``."""
        return torch.maximum((self.mean / self.mean_error).abs(), (self.spread / self.spread_error).abs())


def stein_identities(z: Tensor, score: Tensor) -> SteinIdentities:
    """Langevin–Stein identities of every coordinate: ``E[s_j] = 0`` and ``E[(z_j - m_j) s_j] = -1``.

    They say which coordinate is off, and about by how much in its own standard deviations, which `kernel_stein` does
    not.

    Args:
        z: Draws ``[S, D]``, unconstrained, independent.
        score: ``∇ log p`` at each ``[S, D]``.

    Raises:
        ShapeError: The two are not matrices of one shape with 20 rows or more.
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
    # the mean score is taken out: it has an identity of its own, and the centre is that of the same draws
    second = -centred * (score - score.mean(0)) - 1
    root = sqrt(len(z))
    tiny = torch.finfo(z.dtype).tiny
    return SteinIdentities(
        first.mean(0), (first.std(0) / root).clamp(min=tiny), second.mean(0), (second.std(0) / root).clamp(min=tiny)
    )


def _frame_for(draws: Tensor) -> tuple[Tensor, Tensor]:
    """The `frame` of draws ``[R, D]``, of their variances alone where they are too few for more."""
    if len(draws) >= FRAME * draws.shape[1]:
        return mean_and_cholesky(draws)
    return draws.mean(0), torch.diag(standard_deviations(draws))


def _stein_kernel(a: Tensor, s_a: Tensor, b: Tensor, s_b: Tensor, square: float) -> tuple[Tensor, Tensor]:
    """``k [A, B]`` and ``u [A, B]`` of two sets of draws with their scores, ``c² = square``."""
    base = square + torch.cdist(a, b).square()
    k = base.rsqrt()
    slope = k / base  # ∇_b k = slope (a - b), ∇_a k = -slope (a - b)
    # (s_a - s_b)·(a - b), without a tensor [A, B, D]
    along = (s_a * a).sum(1)[:, None] - s_a @ b.mT - a @ s_b.mT + (s_b * b).sum(1)
    distance = base - square
    curl = slope * a.shape[1] - 3 * distance * slope / base
    return k, (s_a @ s_b.mT) * k + slope * along + curl


def _pair(z: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Both as finite float64 matrices on the CPU."""
    if z.dim() != 2 or z.shape != score.shape:
        raise ShapeError(
            "draws and scores are not matrices of one shape",
            got=f"shapes {tuple(z.shape)} and {tuple(score.shape)}",
            expected="[S, D] both",
        )
    if len(z) < LEAST:
        raise ShapeError("there are too few draws", got=len(z), expected=f">= {LEAST}")
    z, score = (t.detach().to("cpu", torch.float64) for t in (z, score))
    bad = ~(z.isfinite().all(1) & score.isfinite().all(1))
    if bad.any():
        raise OptionError(
            "draws or scores are not finite",
            got=f"{int(bad.sum())} bad rows of {len(z)}",
            do="Look at the model there: its log density has no gradient.",
        )
    return z, score
