"""`ImplicitGuide` is a proper Pyro autoguide, and says what is wrong when it cannot be one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive, Trace_ELBO
from torch import Tensor

import models
from implicitvi import ImplicitGuide
from implicitvi.avb.samplers import DenseSampler
from implicitvi.errors import ModelError, OptionError, SetupError

Y = torch.tensor([0.5, -0.3, 1.0])


@pytest.fixture
def guide() -> ImplicitGuide:
    return ImplicitGuide(models.every_support).setup(Y)


def test_draws_have_the_shapes_and_supports_of_the_sites(guide: ImplicitGuide) -> None:
    draws = guide.sample(7)
    trace = pyro.poutine.trace(models.every_support).get_trace(Y)
    assert set(draws) == set(guide.layout.names)
    for name, value in draws.items():
        site = trace.nodes[name]
        assert value.shape == (7, *site["value"].shape)
        assert site["fn"].support.check(value).all()
        assert not value.requires_grad


def test_guide_trace_matches_the_model(guide: ImplicitGuide) -> None:
    """Sites, shapes and plates agree, and every draw of the guide can be scored by the model."""
    guide_trace = pyro.poutine.trace(guide).get_trace(Y)
    model = pyro.poutine.replay(models.every_support, guide_trace)
    model_trace = pyro.poutine.trace(model).get_trace(Y)
    pyro.infer.util.torch_item(model_trace.log_prob_sum())
    pyro.poutine.util.prune_subsample_sites(guide_trace)
    for name in guide.layout.names:
        assert guide_trace.nodes[name]["value"].shape == model_trace.nodes[name]["value"].shape
        assert [f.name for f in guide_trace.nodes[name]["cond_indep_stack"]] == [
            f.name for f in model_trace.nodes[name]["cond_indep_stack"]
        ]
    pyro.clear_param_store()


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.uses_param_store
def test_predictive_works(parallel: bool) -> None:
    guide = ImplicitGuide(models.eight_schools).setup(models.SIGMA, models.Y)
    predictive = Predictive(models.eight_schools, guide=guide, num_samples=6, parallel=parallel)
    draws = predictive(models.SIGMA)
    assert draws["obs"].shape == (6, 8)
    assert draws["obs"].unique(dim=0).shape == (6, 8)


def test_dtype_follows_the_model() -> None:
    guide = ImplicitGuide(models.normal_normal).setup(Y.double())
    assert guide.sample(3)["mu"].dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in guide.parameters())


def test_setup_gives_parameters_and_state(guide: ImplicitGuide) -> None:
    other = ImplicitGuide(models.every_support).setup(Y)
    other.load_state_dict(guide.state_dict())
    torch.manual_seed(1)
    a = guide.sample(4)
    torch.manual_seed(1)
    b = other.sample(4)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert len(list(guide.parameters())) > 0
    guide.to(torch.float64)
    assert guide.sample_unconstrained(2).dtype == torch.float64


def test_median_and_quantiles(guide: ImplicitGuide) -> None:
    median = guide.median()
    quantiles = guide.quantiles([0.1, 0.5, 0.9])
    for site in guide.layout.sites:
        assert median[site.name].shape == site.shape
        assert quantiles[site.name].shape == (3, *site.shape)
    assert quantiles["scale"][0] < median["scale"] < quantiles["scale"][2]


def test_names_are_unique_in_the_process() -> None:
    a, b = (ImplicitGuide(models.normal_normal).setup(Y) for _ in range(2))
    names = [set(pyro.poutine.trace(g).get_trace(Y).param_nodes) for g in (a, b)]
    assert names[0] and not names[0] & names[1]
    pyro.clear_param_store()
    assert ImplicitGuide(models.normal_normal, name="mine")._pyro_name == "mine"


def test_a_sampler_of_ones_own() -> None:
    guide = ImplicitGuide(
        models.normal_normal, sampler=lambda dim: DenseSampler(dim, noise_dim=dim + 3, hidden=(8,))
    ).setup(Y)
    assert guide.sampler.noise_dim == 4


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.no_latent, "no latent site"),
        (models.all_discrete, "discrete latent site 'k' is not marked"),
        (models.local_latents, "subsampled plate: data"),
    ],
)
def test_models_that_cannot_be_fitted_are_refused(model: Callable[..., Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ImplicitGuide(model).setup(Y)


def test_global_latents_may_meet_minibatches() -> None:
    assert ImplicitGuide(models.global_latents_in_minibatches).setup(Y).layout.names == ("mu",)


def test_before_setup_there_is_a_named_error() -> None:
    guide = ImplicitGuide(models.eight_schools)
    with pytest.raises(SetupError, match="must be set up with its model"):
        guide.sample(3)
    with pytest.raises(SetupError, match="must be set up with its model"):
        guide.load_state_dict({})
    with pytest.raises(SetupError, match="must be set up with its model"):
        _ = guide.layout
    assert guide.sample(3, models.SIGMA, models.Y)["eta"].shape == (3, 8)


def test_bad_options_are_refused() -> None:
    with pytest.raises(OptionError, match="Did you mean 'dense'"):
        ImplicitGuide(models.normal_normal, sampler="dence")
    with pytest.raises(TypeError, match="hiden"):
        ImplicitGuide(models.normal_normal, hiden=3)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="num_samples"):
        ImplicitGuide(models.normal_normal).setup(Y).sample(0)
    with pytest.raises(OptionError, match="no density"):
        ImplicitGuide(models.eight_schools, sampler=lambda dim: DenseSampler(dim, noise_dim=2)).setup(
            models.SIGMA, models.Y
        )


@pytest.mark.uses_param_store
def test_a_loss_that_needs_a_density_is_told_that_there_is_none() -> None:
    guide = ImplicitGuide(models.normal_normal)
    svi = pyro.infer.SVI(models.normal_normal, guide, pyro.optim.Adam({}), loss=Trace_ELBO())
    with pytest.raises(SetupError, match="Trace_ELBO cannot"):
        svi.step(Y)


def test_two_init_functions_give_two_starts() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.tensor(5.0), 1.0))

    def at_seven(site: dict[str, Any]) -> Tensor:
        return torch.tensor(7.0)

    assert ImplicitGuide(model).setup().sampler.loc.item() == pytest.approx(5.0, abs=3)
    assert ImplicitGuide(model, init_loc_fn=at_seven).setup().sampler.loc.item() == 7.0


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)


def test_a_column_beside_a_row_is_refused() -> None:
    """It would be compared with it each with each, and give another posterior without a word."""
    x, y = torch.randn(50, 3), torch.randn(50)
    ImplicitGuide(regression).setup(x, y)
    with pytest.raises(ModelError, match=r"shape of its plates, \(50,\), got \(50, 1\), which makes \(50, 50\)"):
        ImplicitGuide(regression).setup(x, y[:, None])


@pytest.mark.parametrize(
    ("distribution", "good", "bad"),
    [
        (dist.Bernoulli, 1.0, 2.0),
        (dist.Poisson, 3.0, 1.5),
        (lambda p: dist.Beta(1 + p, 1.0), 0.5, 1.5),
        (lambda p: dist.Normal(p, 1.0).expand([2, 3]).to_event(1), 0.5, torch.nan),
    ],
)
def test_data_outside_the_support_are_refused(distribution: Callable[..., Any], good: float, bad: float) -> None:
    def model(y: Tensor, mask: Tensor | None = None) -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("rows", 2):
            fn = distribution(p)
            pyro.sample("obs", fn if mask is None else fn.mask(mask), obs=y)

    with torch.no_grad():
        event = distribution(torch.tensor(0.5)).event_shape
    y = torch.full((2, *event), good)
    ImplicitGuide(model).setup(y)
    y[1] = bad
    with pytest.raises(ModelError, match="data of site 'obs' lie outside.*got 1 of 2"):
        ImplicitGuide(model).setup(y)
    ImplicitGuide(model).setup(y, torch.tensor([True, False]))
