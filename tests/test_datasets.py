"""Evidence, exact draws and Pyro model of each dataset agree with each other and with grids."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import Normal

from implicitvi.datasets import Banana, EightSchools, ToyDensity, TwoModes, XShaped, eight_schools, toy_densities
from implicitvi.errors import OptionError
from implicitvi.metrics import knn_kl

DENSITIES = [*toy_densities().values(), Banana(correlation=-0.5), TwoModes(offset=4.0), XShaped(correlation=0.5)]
each_density = pytest.mark.parametrize("density", DENSITIES, ids=repr)


def name_of(dataset: object) -> str:
    return type(dataset).__name__


def log_joint(model: Callable[..., object], values: dict[str, Tensor], *args: Tensor) -> Tensor:
    conditioned = poutine.condition(model, data=values)
    return poutine.trace(conditioned).get_trace(*args).log_prob_sum()


def standard_errors(values: Tensor, truth: Tensor | float) -> Tensor:
    """Return the distance of the mean over the first axis from the truth, in standard errors."""
    values = values.double()
    return ((values.mean(0) - truth) / (values.std(0) / len(values) ** 0.5)).abs()


# Eight Schools


def grid_posterior(data: EightSchools) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``mu``, ``tau`` and the log mass of ``p(mu, tau, y)`` on a plain grid, eta integrated out."""
    mu, tau = torch.meshgrid(
        torch.linspace(-4, 5, 901, dtype=torch.float64),
        torch.linspace(-8, 8, 1_601, dtype=torch.float64),
        indexing="ij",
    )
    log_mass = Normal(0.0, 1.0).log_prob(mu) + Normal(0.0, 1.0).log_prob(tau)
    for y, sigma in zip(data.y.double(), data.sigma.double(), strict=True):
        log_mass = log_mass + Normal(mu, (sigma**2 + tau**2).sqrt()).log_prob(y)
    return mu, tau, log_mass + 2 * math.log(0.01)


def test_log_evidence_agrees_with_a_grid_over_both_parameters() -> None:
    data = eight_schools()
    grid = float(grid_posterior(data)[2].logsumexp((0, 1)))
    assert data.log_evidence() == pytest.approx(grid, abs=1e-8)
    assert data.log_evidence() == pytest.approx(-12.7108, abs=1e-4)
    usual = EightSchools(
        y=torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]) / 10, sigma=torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]) / 10
    )
    assert usual.log_evidence() == pytest.approx(-13.0115, abs=1e-4)


def test_grid_moments_are_the_known_ones() -> None:
    mu, tau, log_mass = grid_posterior(eight_schools())
    mass = log_mass.flatten().softmax(0).reshape(log_mass.shape)
    mean = float((mass * mu).sum())
    assert mean == pytest.approx(0.776, abs=5e-4)
    assert float((mass * (mu - mean) ** 2).sum()) ** 0.5 == pytest.approx(0.324, abs=5e-4)
    assert float((mass * tau**2).sum()) ** 0.5 == pytest.approx(0.789, abs=5e-4)
    assert float((mass * tau.abs()).sum()) == pytest.approx(0.702, abs=5e-4)


def eight_schools_errors(draws: dict[str, Tensor]) -> Tensor:
    """Return the standard errors between the draws' means of test functions and those of the grid."""
    mu, tau, log_mass = grid_posterior(eight_schools())
    mass = log_mass.flatten().softmax(0).reshape(log_mass.shape)
    tests: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda mu, tau: mu,
        lambda mu, tau: mu**2,
        lambda mu, tau: tau,
        lambda mu, tau: tau**2,
        lambda mu, tau: tau.abs(),
        lambda mu, tau: mu * tau**2,
        lambda mu, tau: (tau.abs() < 0.3).double(),
    ]
    return torch.stack(
        [standard_errors(test(draws["mu"], draws["tau"]), float((mass * test(mu, tau)).sum())) for test in tests]
    )


def test_exact_draws_have_the_moments_of_the_grid(seed: int) -> None:
    """Failure rate of the gate (5 standard errors of 7 means): 0 of 200 seeds."""
    draws = eight_schools().exact_draws(20_000, generator=torch.Generator().manual_seed(seed))
    assert eight_schools_errors(draws).max() < 5
    assert eight_schools_errors(draws | {"mu": draws["mu"] * 1.02}).max() > 5
    assert eight_schools_errors(draws | {"tau": draws["tau"] * 1.05}).max() > 5


def stein_errors(draws: dict[str, Tensor]) -> Tensor:
    """Return the standard errors ``[11, 10]`` of ``E ∇log p = 0`` and ``E z ∇log p = -I`` (by parts)."""
    data = eight_schools()
    values = {name: draw.clone().requires_grad_() for name, draw in draws.items()}
    batch = {"mu": values["mu"][:, None], "tau": values["tau"][:, None], "eta": values["eta"]}
    total = log_joint(data.model, batch, data.sigma, data.y)
    score = stacked(dict(zip(values, torch.autograd.grad(total, list(values.values())), strict=True)))
    products = torch.einsum("si,sj->sij", stacked(draws), score)
    return torch.cat([standard_errors(score, 0.0)[None], standard_errors(products, -torch.eye(10))])


def stacked(draws: dict[str, Tensor]) -> Tensor:
    return torch.cat([draws["mu"][:, None], draws["tau"][:, None], draws["eta"]], 1)


def test_exact_draws_are_those_of_the_model(seed: int) -> None:
    """Failure rate of the gate (5 standard errors of 110 means): 0 of 200 seeds."""
    draws = eight_schools().exact_draws(20_000, generator=torch.Generator().manual_seed(seed))
    assert stein_errors(draws).max() < 5
    wide = draws["eta"].mean(0) + 1.05 * (draws["eta"] - draws["eta"].mean(0))
    assert stein_errors(draws | {"eta": wide}).max() > 5
    assert stein_errors(draws | {"eta": draws["eta"].flip(1)}).max() > 5


SE_KNN = 0.0222  # standard deviation over 200 seeds


def test_exact_draws_differ_by_no_more_than_the_estimator_does(seed: int) -> None:
    """Cells and rounding are not visible. Failure rate (5 standard errors): 0 of 200 seeds."""
    generator = torch.Generator().manual_seed(seed)
    one, two = (stacked(eight_schools().exact_draws(3_000, generator=generator)) for _ in "ab")
    assert abs(knn_kl(one, two)) < 5 * SE_KNN
    assert knn_kl(one.round(decimals=0) + 1e-3 * one, two) > 5 * SE_KNN


def test_the_posterior_is_symmetric() -> None:
    data = eight_schools()
    draws = data.exact_draws(1)
    mirrored = {"mu": draws["mu"], "tau": -draws["tau"], "eta": -draws["eta"]}
    one, other = (
        log_joint(data.model, {n: d.squeeze(0) for n, d in side.items()}, data.sigma, data.y)
        for side in (draws, mirrored)
    )
    assert one == other


# toy densities


def grid_of(density: ToyDensity) -> tuple[Tensor, float]:
    """Return points ``[G, 2]`` of a grid on three times the density's window, and the area of a cell."""
    left, right, bottom, top = density.extent
    points = [
        torch.linspace(2 * low - high, 2 * high - low, 1_501, dtype=torch.float64)
        for low, high in ((left, right), (bottom, top))
    ]
    area = float((points[0][1] - points[0][0]) * (points[1][1] - points[1][0]))
    return torch.cartesian_prod(*points), area


def window(density: ToyDensity, z: Tensor) -> Tensor:
    left, right, bottom, top = density.extent
    z1, z2 = z.unbind(-1)
    return (z1 > left) & (z1 < right) & (z2 > bottom) & (z2 < top)


@each_density
def test_log_normaliser_agrees_with_a_grid_and_the_window_holds_the_mass(density: ToyDensity) -> None:
    points, area = grid_of(density)
    mass = density.log_prob(points).exp() * area / math.exp(density.log_normaliser())
    assert float(mass.sum()) == pytest.approx(1, abs=1e-6)
    assert float(mass[window(density, points)].sum()) > 0.995


def toy_errors(density: ToyDensity, draws: Tensor) -> Tensor:
    """Return the standard errors between the draws' means of test functions and those of the grid."""
    points, area = grid_of(density)
    mass = density.log_prob(points).softmax(0)
    tests: list[Callable[[Tensor], Tensor]] = [
        lambda z: z,
        lambda z: z.square(),
        lambda z: z.prod(-1, keepdim=True),
        lambda z: (2 * z).cos(),
        lambda z: (2 * z).sin(),
        lambda z: density.log_prob(z)[:, None],
    ]
    errors = [standard_errors(test(draws), mass @ test(points)) for test in tests]
    return torch.cat(errors)


@each_density
def test_samples_follow_the_density(density: ToyDensity, seed: int) -> None:
    """Failure rate of the gate (5 standard errors of 10 means, 8 densities): 0 of 100 seeds."""
    draws = density.sample(20_000, torch.Generator().manual_seed(seed))
    assert draws.shape == (20_000, 2) and draws.dtype == torch.get_default_dtype()
    assert toy_errors(density, draws).max() < 5
    assert toy_errors(density, 1.05 * draws).max() > 5


@each_density
def test_model_has_the_density_and_nothing_else(density: ToyDensity) -> None:
    z = density.sample(7)
    trace = poutine.trace(density.model).get_trace()
    assert trace.stochastic_nodes == ["z"] and trace.nodes["z"]["value"].shape == (2,)
    one_by_one = torch.stack([log_joint(density.model, {"z": row}) for row in z])
    assert torch.equal(one_by_one, density.log_prob(z))
    with pyro.validation_enabled(False):  # Pyro's check for NaN branches on values, ours do not
        mapped = torch.func.vmap(lambda row: log_joint(density.model, {"z": row}))(z)
    assert torch.allclose(mapped, one_by_one, rtol=1e-6)
    assert density.log_prob(z.reshape(7, 1, 2)).shape == (7, 1)


@each_density
def test_scores_are_finite_far_out_and_at_the_origin(density: ToyDensity) -> None:
    z = torch.tensor([[0.0, 0.0], [30.0, -30.0], [-30.0, 30.0]], requires_grad=True)
    (score,) = torch.autograd.grad(density.log_prob(z).sum(), z)
    assert score.isfinite().all()


# all datasets


@pytest.mark.uses_param_store
@pytest.mark.parametrize("density", [eight_schools(), *toy_densities().values()], ids=name_of)
def test_pyro_fits_the_model(density: EightSchools | ToyDensity) -> None:
    args = (density.sigma, density.y) if isinstance(density, EightSchools) else ()
    svi = SVI(
        density.model,
        AutoNormal(density.model),
        pyro.optim.Adam({"lr": 0.01}),
        Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    )
    assert math.isfinite(svi.step(*args))


def draw_all(generator: torch.Generator | None, *, number: int = 5) -> list[Tensor]:
    schools = eight_schools().exact_draws(number, generator=generator)
    return [*schools.values(), *(d.sample(number, generator) for d in DENSITIES)]


def test_draws_come_from_the_generator_or_from_torchs_own() -> None:
    state = torch.get_rng_state()
    passed = draw_all(torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    own = draw_all(None)
    assert all(torch.equal(a, b) for a, b in zip(passed, own, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(own, draw_all(None), strict=True))


def test_everything_is_in_the_default_dtype() -> None:
    assert all(draw.dtype == torch.float32 for draw in draw_all(None))
    torch.set_default_dtype(torch.float64)
    try:
        assert eight_schools().y.dtype == torch.float64
        assert all(draw.dtype == torch.float64 for draw in draw_all(None))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("number", [0, -1])
def test_it_refuses_to_draw_nothing(number: int) -> None:
    with pytest.raises(OptionError, match="num_samples"):
        eight_schools().exact_draws(number)
    for density in DENSITIES:
        with pytest.raises(OptionError, match="num_samples"):
            density.sample(number)


def test_toy_densities_go_by_their_names() -> None:
    assert list(toy_densities()) == ["torus", "rosenbrock", "banana", "two_modes", "x_shaped"]
    assert all(name == density.name for name, density in toy_densities().items())
