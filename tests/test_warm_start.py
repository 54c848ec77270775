"""The Gaussian that a fit starts from: the best one whatever the units, found by many paths."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from implicitvi import AVBSVI, ImplicitGuide
from implicitvi.inference.gaussian_fit import GaussianFit, best_gaussian, gaussian_fit, refine_gaussian
from implicitvi.inference.pathfinder import _step, lower_triangular, pathfinder
from implicitvi.numerics.types import LogDensity
from implicitvi.rng import RandomStream

# as the coefficients of a regression on a constant, a share, an IQ and the product of the last two
UNITS = torch.tensor([14.0, 15.0, 0.15, 0.16])
CORRELATION = torch.tensor(
    [[1.0, -0.9, -0.99, 0.9], [-0.9, 1.0, 0.9, -0.99], [-0.99, 0.9, 1.0, -0.9], [0.9, -0.99, -0.9, 1.0]]
)
SCALE = UNITS[:, None] * torch.linalg.cholesky(CORRELATION + 1e-3 * torch.eye(4))
LOC = torch.tensor([-11.0, 51.0, 1.0, -0.5])


def far(z: Tensor) -> Tensor:
    return MultivariateNormal(LOC, scale_tril=SCALE, validate_args=False).log_prob(z)


def off(loc: Tensor, scale_tril: Tensor) -> tuple[float, float]:
    """Shift of the mean in standard deviations, and the worst log ratio of a principal standard deviation."""
    shift = torch.linalg.solve_triangular(SCALE, (loc - LOC)[:, None], upper=False)
    ratio = torch.linalg.solve_triangular(SCALE, scale_tril, upper=False)
    return shift.norm().item(), torch.linalg.svdvals(ratio).log().abs().max().item()


def refined(log_joint: LogDensity, loc: Tensor, scale_tril: Tensor) -> GaussianFit:
    fit = refine_gaussian(log_joint, loc, scale_tril)
    assert fit is not None
    return fit


def test_a_posterior_in_raw_units_is_found() -> None:
    """Adam, the planted bug, is far from it after all of its steps."""
    with RandomStream(0):
        first = gaussian_fit(far, torch.zeros(4), torch.eye(4))
        shift, spread = off(*first)
        assert shift > 3 and spread > 1
        fit = refined(far, *first)
    shift, spread = off(fit.loc, fit.scale_tril)
    assert fit.arrived and shift < 0.1 and spread < 0.3


@pytest.mark.parametrize("factor", [1e-4, 1e6])
def test_units_have_no_part_in_it(factor: float) -> None:
    """The same draws of the standard normal give the same Gaussian in other units, to rounding."""
    begin = torch.zeros(4), 0.1 * SCALE
    with RandomStream(0):
        fit = refined(far, *begin)
    with RandomStream(0):
        there = refined(lambda z: far(z / factor), *(factor * part for part in begin))
    assert torch.allclose(there.loc / factor, fit.loc, atol=1e-3 * float(UNITS.max()))
    assert torch.allclose(there.scale_tril / factor, fit.scale_tril, atol=1e-3 * float(UNITS.max()))


def test_a_gaussian_that_is_right_stays() -> None:
    with RandomStream(0):
        fit = refined(far, LOC, SCALE)
    shift, spread = off(fit.loc, fit.scale_tril)
    assert shift < 0.05 and spread < 0.2


def test_a_gaussian_without_density_is_none_and_an_improper_one_never_arrives() -> None:
    nowhere = torch.zeros(2), torch.eye(2)
    with RandomStream(0):
        assert refine_gaussian(lambda z: z.sum(1) * torch.nan, *nowhere) is None
        assert not refined(lambda z: 10 * z.sum(1), *nowhere).arrived


def test_a_lower_elbo_is_no_step() -> None:
    """Steps across a narrow valley would leave it; the planted bug took them."""

    def valley(z: Tensor) -> Tensor:
        return -0.5 * z[:, 0].square() - 50 * (z[:, 1] - (3 * z[:, 0]).sin()).square()

    with RandomStream(1):
        first = GaussianFit.at(valley, torch.zeros(2), torch.eye(2))
        fit = refined(valley, torch.zeros(2), torch.eye(2))
    assert first is not None and fit.elbo > first.elbo


def test_the_ends_of_a_support_are_no_obstacle() -> None:
    """Half of the first draws have no density: the standard normal above -1, from above."""

    def cut(z: Tensor) -> Tensor:
        return torch.where(z > -1, -0.5 * z.square(), -torch.inf).sum(1)

    with RandomStream(0):
        fit = refined(cut, torch.tensor([30.0]), torch.tensor([[12.0]]))
    # the draws without density count for nothing, so that the best Gaussian may lie at the edge
    assert -1.5 < fit.loc.item() < 1.5 and 0.2 < fit.scale_tril.item() < 2


def test_a_step_is_that_of_bfgs() -> None:
    """The factor gives the inverse Hessian of the textbook's update, and its determinant."""
    with RandomStream(0):
        hessian = torch.randn(5, 5, dtype=torch.float64)
        hessian = hessian @ hessian.mT + torch.eye(5)

        def log_p(u: Tensor) -> Tensor:
            return -0.5 * torch.einsum("si,ij,sj->s", u, hessian, u)

        starts, scale = torch.randn(3, 5, dtype=torch.float64), torch.full((5,), 0.1, dtype=torch.float64)
        paths = pathfinder(log_p, starts, scale, num_steps=2)
        u, slope, root = paths.u.clone(), paths.slope.clone(), paths.root.clone()
        _step(log_p, paths, torch.arange(3), scale, torch.float64)
    for k in range(3):
        s, z = paths.u[k] - u[k], slope[k] - paths.slope[k]
        rho, unit = 1 / (s @ z), torch.eye(5, dtype=torch.float64)
        left = unit - rho * torch.outer(s, z)
        expected = left @ root[k] @ root[k].mT @ left.mT + rho * torch.outer(s, s)
        torch.testing.assert_close(paths.root[k] @ paths.root[k].mT, expected)
        torch.testing.assert_close(paths.log_det[k], paths.root[k].det().abs().log())


def test_all_paths_to_a_gaussian_arrive_whatever_its_units() -> None:
    """Its scales differ by 10⁹; the guess of them is wrong by up to 10⁵, and the starts are 10⁶ of them away."""
    scale = torch.tensor([1e-4, 1.0, 3e2, 1e5], dtype=torch.float64)
    chol = scale[:, None] * SCALE.double() / UNITS.double()[:, None]
    exact = MultivariateNormal(1e3 * scale, scale_tril=chol)
    with RandomStream(0):
        starts = 1e6 * scale * torch.randn(8, 4, dtype=torch.float64)
        paths = pathfinder(exact.log_prob, starts, scale * scale.new_tensor([1e5, 10, 1e3, 1e2]), num_steps=100)
    height = exact.log_prob(exact.loc)
    assert (paths.log_p > height - 0.1).all()
    loc, scale_tril = paths.gaussian(int(paths.elbo.argmax()))
    assert ((loc - exact.loc) / scale).abs().max() < 0.3
    torch.testing.assert_close(
        scale_tril @ scale_tril.mT / (chol @ chol.mT), torch.ones(4, 4).double(), rtol=0.2, atol=0
    )


def test_a_triangular_factor_has_the_same_covariance() -> None:
    root = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    factor = lower_triangular(root)
    torch.testing.assert_close(factor @ factor.mT, root @ root.mT)
    assert (factor.diagonal() > 0).all() and (factor.triu(1) == 0).all()


def test_the_gaussian_with_most_mass_is_taken_not_the_highest_end() -> None:
    """A spike is 20 nats higher than a wide hill, which has a thousand times its mass; paths lead to both."""

    def spiked(z: Tensor) -> Tensor:
        hill = -0.5 * z.square().sum(1)
        spike = 20 - 0.5 * ((z - 8) / 1e-7).square().sum(1)
        return torch.logaddexp(hill, spike)

    with RandomStream(0):
        starts = torch.cat([torch.full((1, 2), 8.0), torch.randn(5, 2)]).double()
        paths = pathfinder(spiked, starts, torch.ones(2).double(), num_steps=60)
        assert paths.log_p.max() > 15
        fit = best_gaussian(spiked, paths, tries=2)
    assert fit is not None and fit.loc.abs().max() < 0.2


def no_mean(y: Tensor) -> None:
    """A model whose posterior is improper: the data say nothing of ``b``."""
    with pyro.poutine.mask(mask=False):
        b = pyro.sample("b", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.factor("pull", 3 * b + 0 * y.sum())


def test_a_start_that_does_not_arrive_says_so() -> None:
    with pytest.warns(UserWarning, match="has not arrived"):
        AVBSVI(no_mean, ImplicitGuide(no_mean), num_steps=1, progress=False, seed=0).run(torch.zeros(2))
