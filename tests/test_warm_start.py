"""The Gaussian that a fit starts from: the best one whatever the units, and left alone where it is that already."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from implicitvi.inference.gaussian_fit import WIDEST, gaussian_fit, refine_gaussian
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


def test_a_posterior_in_raw_units_is_found() -> None:
    """Where Adam, the planted bug, is far from it after all of its steps."""
    with RandomStream(0):
        first = gaussian_fit(far, torch.zeros(4))
        shift, spread = off(*first)
        assert shift > 3 and spread > 1
        shift, spread = off(*refine_gaussian(far, *first))
    assert shift < 0.5 and spread < 0.3


@pytest.mark.parametrize("factor", [1e-4, 1e6])
def test_units_have_no_part_in_it(factor: float) -> None:
    """The same draws of the standard normal give the same Gaussian in other units, to rounding."""
    begin = torch.zeros(4), 0.1 * SCALE
    with RandomStream(0):
        loc, scale_tril = refine_gaussian(far, *begin)
    with RandomStream(0):
        there = refine_gaussian(lambda z: far(z / factor), *(factor * part for part in begin))
    assert torch.allclose(there[0] / factor, loc, atol=1e-3 * float(UNITS.max()))
    assert torch.allclose(there[1] / factor, scale_tril, atol=1e-3 * float(UNITS.max()))


def test_a_gaussian_that_is_right_stays_as_it_is() -> None:
    with RandomStream(0):
        loc, scale_tril = refine_gaussian(far, LOC, SCALE)
    assert loc is LOC and scale_tril is SCALE


def test_what_cannot_be_improved_or_known_stays() -> None:
    """No density at the draws; steps that lead nowhere better; too many dimensions; an improper density."""
    nowhere = torch.zeros(2), torch.eye(2)
    many = torch.zeros(WIDEST + 1), torch.eye(WIDEST + 1)
    with RandomStream(0):
        assert refine_gaussian(lambda z: z.sum(1) * torch.nan, *nowhere)[0] is nowhere[0]
        assert refine_gaussian(lambda z: 10 * torch.sin(30 * z).sum(1), *nowhere)[0] is nowhere[0]
        assert refine_gaussian(lambda z: -1e4 * z.square().sum(1), *many)[0] is many[0]
        assert refine_gaussian(lambda z: 10 * z.sum(1), *nowhere)[0] is nowhere[0]


def test_the_ends_of_a_support_are_no_obstacle() -> None:
    """Half of the first draws have no density: the standard normal above -1, from above."""

    def cut(z: Tensor) -> Tensor:
        return torch.where(z > -1, -0.5 * z.square(), -torch.inf).sum(1)

    with RandomStream(0):
        loc, scale_tril = refine_gaussian(cut, torch.tensor([30.0]), torch.tensor([[12.0]]))
    assert -1 < loc.item() < 1.5 and 0.2 < scale_tril.item() < 1.5
