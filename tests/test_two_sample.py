"""Comparisons of draws agree with their definitions, closed forms and what they promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from implicitvi.errors import OptionError, ShapeError
from implicitvi.metrics import c2st, knn_kl, mean_error, mmd, sd_ratio, sliced_wasserstein, two_sample, whiten

EVERY = {
    "knn_kl": knn_kl,
    "mmd": mmd,
    "c2st": partial(c2st, folds=2),
    "mean_error": mean_error,
    "sd_ratio": sd_ratio,
    "sliced_wasserstein": sliced_wasserstein,
    "whiten": whiten,
}
every_comparison = pytest.mark.parametrize("compare", EVERY.values(), ids=EVERY)
Q_MEAN, Q_SD = torch.tensor([0.5, 0.0]), torch.tensor([1.0, 0.5])


def normals(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def turned(x: Tensor) -> Tensor:
    """Rotate, shift and scale by the same factor in every direction."""
    rotation = torch.linalg.qr(normals(x.shape[1], x.shape[1], seed=9)).Q
    return 3 + 7 * x @ rotation


# k nearest neighbours


def dense_knn_kl(q: Tensor, p: Tensor, k: int, *, self_counts: bool = False) -> float:
    """The definition, from all distances, or the mistake of letting a draw be its own neighbour."""
    mode = "donot_use_mm_for_euclid_dist"
    within = torch.cdist(q, q, compute_mode=mode)
    if not self_counts:
        within.fill_diagonal_(math.inf)
    rho = within.sort().values[:, k - 1]
    nu = torch.cdist(q, p, compute_mode=mode).sort().values[:, k - 1]
    return float(q.shape[1] * (nu / rho).log().mean()) + math.log(len(p) / (len(q) - 1))


def two_normals(seed: int) -> tuple[Tensor, Tensor]:
    """3 000 draws of ``N(Q_MEAN, Q_SD²)`` and 6 000 of a standard normal."""
    draws = normals(9_000, 2, seed=seed)
    return Q_MEAN + Q_SD * draws[:3_000], draws[3_000:]


KL_TWO_NORMALS = float((-Q_SD.log() + (Q_SD.square() + Q_MEAN.square() - 1) / 2).sum())
SE_TWO_NORMALS = 0.0212  # standard deviation over 300 seeds


@pytest.mark.parametrize(("k", "dim"), [(1, 1), (2, 3), (5, 10)])
def test_knn_kl_is_its_definition(k: int, dim: int) -> None:
    q, p = 1.5 * normals(70, dim), 0.3 + normals(110, dim, seed=1)
    assert knn_kl(q, p, k=k) == pytest.approx(dense_knn_kl(q, p, k), abs=1e-10)
    if k > 1:
        assert abs(knn_kl(q, p, k=k) - dense_knn_kl(q, p, k, self_counts=True)) > 0.1


def test_knn_kl_does_not_depend_on_frame_or_order() -> None:
    q, p = normals(2, 400, 3)
    once = knn_kl(0.5 * q, p)
    assert knn_kl(turned(0.5 * q), turned(p)) == pytest.approx(once, abs=1e-9)
    assert knn_kl(0.5 * q.flip(0), p.flip(0)) == pytest.approx(once, abs=1e-12)


def test_knn_kl_finds_the_divergence_of_two_normals() -> None:
    """Failure rate of the gate (5 standard errors): 0 of 300 seeds."""
    q, p = two_normals(0)
    gate = 5 * SE_TWO_NORMALS
    estimate = knn_kl(q, p)
    assert abs(estimate - KL_TWO_NORMALS) < gate
    bugs = {
        "without the term of the numbers": estimate - math.log(len(p) / (len(q) - 1)),
        "without the dimension": (estimate + math.log(len(p) / (len(q) - 1))) / 2,
    }
    assert all(abs(bug - KL_TWO_NORMALS) > gate for bug in bugs.values()), bugs


def test_knn_kl_refuses_draws_that_repeat() -> None:
    q, p = normals(2, 400, 2)
    chain = q[::4].repeat_interleave(4, 0)
    for first, second in [(chain, p), (p, chain), (q, q), (q, q[:300])]:
        with pytest.raises(OptionError, match="repeated"):
            knn_kl(first, second)


def test_knn_kl_refuses_an_atom_and_forgives_a_coincidence() -> None:
    q, p = normals(2, 1_000, 1)
    q[:2] = q[0]
    assert math.isfinite(knn_kl(q, p))
    q[:7] = q[0]
    with pytest.raises(OptionError, match="more than 5 draws coincide"):
        knn_kl(q, p)


def test_knn_kl_wants_more_than_k_rows() -> None:
    with pytest.raises(ShapeError, match="at least 6 rows, got 5"):
        knn_kl(normals(5, 2), normals(50, 2))
    with pytest.raises(OptionError, match="k must be"):
        knn_kl(normals(50, 2), normals(50, 2, seed=1), k=0)


# maximum mean discrepancy


def dense_mmd(x: Tensor, y: Tensor, bandwidth: float, *, diagonal: bool = False) -> float:
    """The definition, or the mistake of counting each draw with itself."""
    pairs = [(x, x), (y, y), (x, y)]
    kernels = [(-torch.cdist(*pair).square() / (2 * bandwidth**2)).exp() for pair in pairs]
    if not diagonal:
        for kernel in kernels[:2]:
            kernel.fill_diagonal_(0).mul_(len(kernel) / (len(kernel) - 1))
    return float(kernels[0].mean() + kernels[1].mean() - 2 * kernels[2].mean())


def test_mmd_is_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normals(60, 3), 0.5 + normals(90, 3, seed=1)
    once = mmd(x, y, bandwidth=1.3)
    assert once == pytest.approx(dense_mmd(x, y, 1.3), abs=1e-12)
    assert abs(once - dense_mmd(x, y, 1.3, diagonal=True)) > 0.01
    median = float(torch.nn.functional.pdist(torch.cat([x, y])).median())
    assert mmd(x, y) == pytest.approx(dense_mmd(x, y, median), abs=1e-12)
    monkeypatch.setattr(two_sample, "_BLOCK_ENTRIES", 200)
    assert mmd(x, y, bandwidth=1.3) == pytest.approx(once, abs=1e-12)


def test_mmd_is_symmetric_and_does_not_depend_on_the_frame() -> None:
    x, y = normals(1_500, 2), 2 * normals(800, 2, seed=1)
    assert mmd(y, x) == pytest.approx(mmd(x, y), abs=1e-12)
    assert mmd(turned(x), turned(y)) == pytest.approx(mmd(x, y), abs=1e-9)
    assert mmd(x + 1e6, y + 1e6) == pytest.approx(mmd(x, y), abs=1e-7)


SE_MMD = 0.0071  # standard deviation over 1 000 seeds


def test_mmd_finds_the_discrepancy_of_two_normals() -> None:
    """Failure rate of the gate (5 standard errors): 0 of 1 000 seeds."""
    x, y = normals(2, 1_000, 2)
    assert abs(mmd(x + 0.5, y, bandwidth=1.0) - mmd_of_normals(0.5)) < 5 * SE_MMD
    assert abs(mmd(x + 0.75, y, bandwidth=1.0) - mmd_of_normals(0.5)) > 5 * SE_MMD


def mmd_of_normals(shift: float) -> float:
    """Both axes of the plane shifted, unit bandwidth: ``E k(a, b) = exp(-|shift|² / 6) / 3``."""
    return 2 / 3 * (1 - math.exp(-2 * shift**2 / 6))


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.inf, math.nan, 1e300, 1e-300])
def test_mmd_refuses_a_bandwidth_that_cannot_work(bandwidth: float) -> None:
    with pytest.raises(OptionError, match="bandwidth"):
        mmd(*normals(2, 20, 2), bandwidth=bandwidth)


def test_mmd_refuses_draws_without_a_median_distance() -> None:
    with pytest.raises(OptionError, match="Pass a bandwidth"):
        mmd(torch.zeros(20, 2), torch.zeros(20, 2))


# classifier two-sample test

SE_C2ST_EQUAL = 0.0172  # standard deviation over 200 seeds
SE_C2ST_APART = 0.0091  # standard deviation over 100 seeds


def test_c2st_of_equal_distributions_is_a_half() -> None:
    """Failure rate of the gate (5 standard errors): 0 of 200 seeds."""
    x, y = normals(2, 800, 2)
    assert abs(c2st(x, y) - 0.5) < 5 * SE_C2ST_EQUAL
    assert abs(c2st(x + 0.5, y) - 0.5) > 5 * SE_C2ST_EQUAL


def test_c2st_of_two_normals_is_the_best_accuracy() -> None:
    """Normals ``d`` apart can be told with accuracy Φ(d / 2). Failure rate: 0 of 100 seeds."""
    x, y = normals(2, 800, 2)
    axis = torch.tensor([1.0, 0.0])
    assert abs(c2st(x + 2 * axis, y) - 0.8413) < 5 * SE_C2ST_APART
    assert abs(c2st(x + 2.6 * axis, y) - 0.8413) > 5 * SE_C2ST_APART


@pytest.mark.parametrize("apart", [6.0, 1e5, 1e20])
@pytest.mark.parametrize("rows", [20, 800])
def test_c2st_of_disjoint_sets_is_one(rows: int, apart: float) -> None:
    x, y = normals(2, rows, 2)
    assert c2st(x + apart, y) > 0.99


def test_c2st_sees_what_moments_do_not() -> None:
    """Two modes against the normal of the same moments; lowest of 100 seeds 0.68."""
    x, y = normals(2, 800, 1)
    modes = 0.3 * x + 0.9539 * x.flip(0).sign()
    assert mean_error(modes, y) < 0.2 and 0.9 < sd_ratio(modes, y)[0] < 1.1
    assert c2st(modes, y, folds=2) > 0.6


def test_c2st_is_a_function_of_draws_and_seed() -> None:
    x, y = 1.2 * normals(100, 2), normals(60, 2, seed=1)
    state, numpys = torch.get_rng_state(), np.random.get_state()[1]
    once = c2st(x, y, folds=2)
    assert once == c2st(x, y, folds=2) == c2st(x[:60], y, folds=2)
    assert c2st(x, y, folds=2, seed=1) != once
    # Powers of two, so that not even rounding differs.
    units = torch.tensor([2.0**20, 2.0**-20])
    assert c2st(x * units, y * units, folds=2) == once
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpys)


def test_c2st_takes_every_seed_of_torch() -> None:
    x = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    assert 0 <= c2st(x, x + 1, seed=2**64 - 1, folds=2) <= 1


def test_c2st_refuses_too_few_folds_or_rows() -> None:
    with pytest.raises(OptionError, match="folds"):
        c2st(*normals(2, 50, 2), folds=1)
    with pytest.raises(ShapeError, match="at least 5 rows, got 4"):
        c2st(normals(50, 2), normals(4, 2))


# sliced Wasserstein


def test_sliced_wasserstein_on_a_line_is_that_of_the_quantiles() -> None:
    """Exact there: a shift moves every draw by itself, a scale every draw by its size, an order nothing."""
    x = normals(40, 1)
    other = x.flip(0)
    assert sliced_wasserstein(x, other) == 0
    assert sliced_wasserstein(x, other + 3) == pytest.approx(3)
    assert sliced_wasserstein(x, 2 * other) == pytest.approx(float(x.square().mean().sqrt()))


def test_sliced_wasserstein_of_a_shift_is_its_share_of_a_direction() -> None:
    """``|δ| / sqrt(D)``, here 1; relative error of 20 000 directions in 4-D, 0.5 %."""
    x = normals(50, 4)
    shift = torch.tensor([0.0, 2.0, 0.0, 0.0])
    far = sliced_wasserstein(x, x + shift, num_projections=20_000)
    assert abs(far - 1) < 5 * 0.005
    assert far == sliced_wasserstein(x + shift, x, num_projections=20_000)


def test_sliced_wasserstein_is_a_function_of_draws_and_seed() -> None:
    x, y = 1.2 * normals(100, 2), normals(60, 2, seed=1)
    state = torch.get_rng_state()
    once = sliced_wasserstein(x, y)
    assert once == sliced_wasserstein(x, y) == sliced_wasserstein(x[:60], y)
    assert sliced_wasserstein(x, y, seed=1) != once
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(OptionError, match="num_projections"):
        sliced_wasserstein(x, y, num_projections=0)


# moments


def test_moments_by_hand() -> None:
    reference = torch.tensor([[0.0, 0.0], [2.0, 20.0], [4.0, 40.0]])
    draws = torch.tensor([[1.0, 30.0], [1.0, 60.0]])
    assert mean_error(draws, reference) == pytest.approx(25 / 20)
    assert sd_ratio(draws, reference) == pytest.approx((0.0, 30 / math.sqrt(2) / 20))


def test_moments_do_not_depend_on_units() -> None:
    x, y = 1.3 * normals(30, 3), normals(40, 3, seed=1)
    units = torch.tensor([1e-8, 1.0, -1e8])
    there = x * units + 5, y * units + 5
    assert mean_error(*there) == pytest.approx(mean_error(x, y), rel=1e-6)
    assert sd_ratio(*there) == pytest.approx(sd_ratio(x, y), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("dim", [1, 4])
def test_whiten_makes_the_reference_standard(dim: int, scale: float) -> None:
    mixing = normals(dim, dim, seed=2) * scale ** torch.linspace(0, 1, dim)
    x, y = normals(20, dim) @ mixing, (normals(50, dim, seed=1) + 3) @ mixing
    white = whiten(y, y)
    assert torch.allclose(white.mean(0), torch.zeros(dim).double(), atol=1e-6)
    covariance = white.T.cov().reshape(dim, dim)
    assert torch.allclose(covariance, torch.eye(dim).double(), atol=1e-6)
    # One affine map for every row, whichever set it comes in.
    assert torch.allclose(whiten(torch.cat([y, x]), y)[50:], whiten(x, y))


def test_whiten_refuses_a_reference_on_a_plane() -> None:
    flat = normals(50, 3)
    flat[:, 2] = flat[:, 0] - flat[:, 1]
    with pytest.raises(OptionError, match="singular"):
        whiten(normals(10, 3), flat)
    with pytest.raises(ShapeError, match="second set of draws must have at least . rows, got 3"):
        whiten(normals(10, 3), normals(3, 3))


# what every comparison promises


@every_comparison
def test_it_takes_torch_and_numpy_and_changes_nothing(compare: Callable[..., Any]) -> None:
    x, y = normals(60, 2), normals(50, 2, seed=1)
    before = x.clone(), y.clone()
    once = compare(x, y)
    frozen = y.numpy()[::-1].copy()
    frozen.flags.writeable = False
    again = compare(x.requires_grad_().numpy(force=True), frozen[::-1])
    with_gradient = compare(x, y)
    for other in (again, with_gradient):
        if isinstance(once, Tensor):
            assert torch.equal(other, once) and not other.requires_grad
        else:
            assert other == once
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


@every_comparison
@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        (normals(60), normals(60, 1), ShapeError, "first set of draws must be a matrix"),
        (normals(60, 2), normals(3, 60, 2), ShapeError, "second set of draws must be a matrix"),
        (normals(60, 0), normals(60, 0), ShapeError, "must be a matrix"),
        (normals(60, 2), normals(60, 3), ShapeError, "different dimensions"),
        (normals(0, 2), normals(60, 2), ShapeError, "first set of draws must have at least"),
        (normals(60, 2), normals(0, 2), ShapeError, "must have at least"),
        (normals(60, 2) / 0, normals(60, 2), OptionError, "must be finite, got 60 bad rows of 60"),
        (normals(60, 2), normals(60, 2).log(), OptionError, "second set .* must be finite"),
    ],
)
def test_it_refuses_bad_draws(
    compare: Callable[..., Any], first: Tensor, second: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compare(first, second)


@pytest.mark.parametrize("compare", [c2st, mean_error, sd_ratio, whiten])
@pytest.mark.parametrize("level", [0.0, 0.1, 1e6])
def test_it_refuses_a_constant_reference(compare: Callable[..., Any], level: float) -> None:
    reference = normals(60, 3)
    reference[:, 1] = level
    with pytest.raises(OptionError, match=r"must vary .* constant dimensions \[1\]"):
        compare(normals(60, 3, seed=1), reference)
