"""Plain AVB needs only draws of the prior; every other method refuses a prior without a density."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from implicitvi import AVBSVI, ImplicitGuide, to_arviz
from implicitvi.errors import ModelError

Y = torch.tensor([0.5, -0.3, 1.0])
SMALL: dict[str, Any] = {"num_steps": 6, "num_particles": 16, "progress": False, "seed": 0}


class Pushed(dist.TorchDistribution):  # type: ignore[misc]
    """A standard normal without a log_prob."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, batch_shape: torch.Size = torch.Size()):
        super().__init__(batch_shape, torch.Size(), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Pushed:
        return Pushed(torch.Size(batch_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return torch.randn(torch.Size(sample_shape) + self.batch_shape)


def model(y: Tensor) -> None:
    """Posterior of ``mu``: N(Σy / 4, 1 / 4); of the other site, which has a density, its prior."""
    mu = pyro.sample("mu", Pushed())
    pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)


def test_the_posterior_under_a_prior_without_density_is_found() -> None:
    """Short run: means within 0.15 posterior sds, sds within 15 %; the prior has them 0.6 and 100 % off."""
    guide = ImplicitGuide(model)
    options = {"num_steps": 400, "num_particles": 256, "progress": False}
    fit = AVBSVI(model, guide, contrast="prior", **options, seed=0).run(Y)
    assert fit.skipped == 0
    draws = guide.sample(20_000)
    assert abs(draws["mu"].mean().item() - Y.sum().item() / 4) < 0.15 * 0.5
    assert abs(draws["mu"].std().item() / 0.5 - 1) < 0.15
    log_scale = draws["scale"].log()
    assert abs(log_scale.mean().item()) < 0.15 * 0.3
    assert abs(log_scale.std().item() / 0.3 - 1) < 0.15


@pytest.mark.parametrize("informed", [True, False])
def test_no_density_is_asked_for(informed: bool) -> None:
    AVBSVI(model, ImplicitGuide(model), contrast="prior", informed=informed, **SMALL).run(Y)


@pytest.mark.parametrize("contrast", ["mixture", "gaussian", "flow"])
def test_adaptive_contrasts_are_refused_with_the_reason(contrast: str) -> None:
    with pytest.raises(ModelError, match="prior has no density, 'mu', must be the prior, got .*'prior'"):
        AVBSVI(model, ImplicitGuide(model), contrast=contrast, **SMALL).run(Y)


def flat(y: Tensor) -> None:
    pyro.sample("mu", dist.Normal(0.0, 1.0).mask(False))


def flat_vector(y: Tensor) -> None:
    pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).mask(False).to_event(1))


def flat_by_a_handler(y: Tensor) -> None:
    with poutine.mask(mask=False):
        pyro.sample("mu", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("prior", [flat, flat_vector, flat_by_a_handler])
def test_a_flat_prior_is_refused_as_a_contrast(prior: Callable[[Tensor], None]) -> None:
    """Its site can be drawn from the masked distribution, which would then become the prior of the posterior."""

    def model(y: Tensor) -> None:
        pyro.sample("other", dist.Normal(0.0, 1.0))
        prior(y)

    with pytest.raises(ModelError, match="the prior of 'mu' must be .* not a flat one.*mixture"):
        AVBSVI(model, ImplicitGuide(model), contrast="prior", **SMALL).run(Y)


def test_export_leaves_out_groups_that_need_the_density() -> None:
    guide = ImplicitGuide(model)
    AVBSVI(model, guide, contrast="prior", **SMALL).run(Y)
    with pytest.warns(UserWarning, match="'mu'.*not have a density.*sample_stats"):
        idata = to_arviz(guide, model, Y, num_samples=10)
    assert not hasattr(idata, "sample_stats")
    assert idata.posterior["mu"].shape == (1, 10)
    assert idata.log_likelihood["obs"].shape == (1, 10, 3)
