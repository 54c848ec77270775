"""`ImplicitGuide` is a proper Pyro autoguide, and says what is wrong when it cannot be one."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from torch import Tensor

import models
from implicitvi import AVBSVI, ImplicitGuide
from implicitvi.avb import samplers
from implicitvi.avb.samplers import DenseSampler
from implicitvi.errors import ModelError, OptionError, SetupError, ShapeError
from implicitvi.inference.guide import quantiles_of

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


FLAT = {
    "as it is": lambda: dist.ImproperUniform(dist.constraints.real, (3,), ()),
    "one event": lambda: dist.ImproperUniform(dist.constraints.positive, (), ()).expand([3]).to_event(1),
    "expanded": lambda: dist.ExpandedDistribution(dist.ImproperUniform(dist.constraints.real, (), ()), [3]),
    "masked": lambda: dist.ImproperUniform(dist.constraints.real, (3,), ()).mask(Y > 0),
    "transformed": lambda: dist.TransformedDistribution(
        dist.ImproperUniform(dist.constraints.real, (3,), ()), [dist.transforms.ExpTransform()]
    ),
}


@pytest.mark.parametrize("kind", FLAT)
def test_an_improper_prior_is_fitted_in_every_wrapping(kind: str) -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", FLAT[kind]())
        pyro.sample("obs", dist.Normal(mu, 1.0).to_event(1), obs=y)

    draws = ImplicitGuide(model).setup(Y).sample(2)["mu"]
    assert draws.shape == (2, 3)
    assert kind not in ("one event", "transformed") or (draws > 0).all()


def test_a_plate_of_improper_priors_is_amortized() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)

    guide = ImplicitGuide(model, amortize="data")
    AVBSVI(model, guide, num_steps=2, num_particles=4, warm_start=2, progress=False).run(Y)
    assert guide.sample(2, Y)["mu"].shape == (2, 3)


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


LOSSES: dict[str, Callable[[], Any]] = {
    "Trace_ELBO": Trace_ELBO,
    "many particles": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "TraceEnum_ELBO": lambda: TraceEnum_ELBO(max_plate_nesting=1),
    "RenyiELBO": RenyiELBO,
    "JitTrace_ELBO": JitTrace_ELBO,
    "ReweightedWakeSleep": ReweightedWakeSleep,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.uses_param_store
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_pyro_cannot_ruin_a_trained_guide(loss: str) -> None:
    """They would move the sampler along the learned density of the sampler before."""
    guide = ImplicitGuide(models.normal_normal).setup(Y)
    guide.set_log_density(lambda u: -0.5 * u.square().sum(-1) + 0 * guide.sampler.net.skip.weight.sum())
    before = [weight.detach().clone() for weight in guide.sampler.parameters()]
    svi = pyro.infer.SVI(models.normal_normal, guide, pyro.optim.Adam({"lr": 1.0}), loss=LOSSES[loss]())
    with pytest.raises(SetupError, match=r"does not follow its sampler.*AVB_ELBO.*Trace_ELBO cannot"):
        svi.step(Y)
    for weight, old in zip(guide.sampler.parameters(), before, strict=True):
        assert torch.equal(weight, old) and weight.grad is None


@pytest.mark.uses_param_store
def test_a_trained_guide_can_be_evaluated_and_called() -> None:
    """Without gradients its density counts, and so it does where its weights are fixed."""
    guide = ImplicitGuide(models.normal_normal).setup(Y)
    guide.set_log_density(lambda u: -0.5 * u.square().sum(-1))
    svi = pyro.infer.SVI(models.normal_normal, guide, pyro.optim.Adam({}), loss=Trace_ELBO())
    assert isinstance(svi.evaluate_loss(Y), float)
    assert guide(Y)["mu"].requires_grad
    assert Predictive(models.normal_normal, guide=guide, num_samples=2)(Y)["obs"].shape == (2, 3)
    u = torch.zeros(4, 1, requires_grad=True)
    guide.get_posterior().log_prob(u).sum().backward()
    assert u.grad is not None
    guide.requires_grad_(False).train(False)
    assert torch.isfinite(Trace_ELBO().differentiable_loss(models.normal_normal, guide, Y))


@pytest.mark.uses_param_store
def test_a_guide_of_a_plate_has_no_density_for_a_loss() -> None:
    guide = ImplicitGuide(local, amortize="rows").setup(Y)
    svi = pyro.infer.SVI(local, guide, pyro.optim.Adam({}), loss=Trace_ELBO())
    for call in (svi.step, svi.evaluate_loss):
        with pytest.raises(SetupError, match="have draws, but not a density.*Trace_ELBO cannot"):
            call(Y)


def local(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=y)


def column(y: Tensor) -> Tensor:
    return y[:, None]


def pickled(guide: Any) -> Any:
    return pickle.loads(pickle.dumps(guide))  # noqa: S301


def saved(guide: Any) -> Any:
    torch.save(guide, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickled, saved])
def test_copies_of_a_guide_have_its_model_and_leave_it_alone(copied: Callable[[Any], Any]) -> None:
    guide = ImplicitGuide(local, amortize={"rows": column})
    twin = copied(guide)
    for each in (twin, guide):
        each.setup(Y)
        assert each.sample(2, Y)["z"].shape == (2, 3)
    again = copied(guide)
    torch.manual_seed(0)
    expected = guide.sample(2, Y)["z"]
    torch.manual_seed(0)
    assert torch.equal(again.sample(2, Y)["z"], expected)
    shared = {id(weight) for weight in guide.parameters()} & {id(weight) for weight in again.parameters()}
    assert bool(shared) == (copied is copy.copy)


def test_a_guide_of_a_local_model_is_copied_but_not_pickled() -> None:
    def model(y: Tensor) -> None:
        models.normal_normal(y)

    guide = ImplicitGuide(model)
    assert copy.deepcopy(guide).setup(Y).sample(3)["mu"].shape == (3,)
    for store in (pickled, saved):
        with pytest.raises(SetupError, match="ImplicitGuide cannot be pickled.*top level of a module.*state_dict"):
            store(guide)


OWN: dict[str, tuple[dict[str, Any], str]] = {
    "a number": ({"sampler": 3}, "sampler must be the name of a sampler.*, got 3"),
    "returns nothing": ({"sampler": lambda dim: None}, "returns a Sampler of draws .*, got NoneType"),
    "a layer": ({"sampler": lambda dim: torch.nn.Linear(dim, dim)}, "returns a Sampler.*, got Linear"),
    "of another dimension": ({"sampler": lambda dim: DenseSampler(dim + 1)}, r"draws \[S, 1\], got draws \(2, 2\)"),
    "takes no dimension": ({"sampler": lambda: None}, "sampler must be .*, got TypeError"),
    "a word for a start": ({"init_loc_fn": "median"}, "init_loc_fn must be a function .*, got 'median'"),
}


@pytest.mark.parametrize("case", OWN)
def test_functions_of_ones_own_are_tried_at_set_up(case: str) -> None:
    options, message = OWN[case]
    with pytest.raises(OptionError, match=message):
        ImplicitGuide(models.normal_normal, **options).setup(Y)


def test_no_model_is_refused() -> None:
    with pytest.raises(OptionError, match="model must be a function, the Pyro model, got None"):
        ImplicitGuide(None)  # type: ignore[arg-type]


def test_many_draws_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise is that of all at once, so the draws are the same to rounding."""
    guide, plated = ImplicitGuide(models.normal_normal).setup(Y), ImplicitGuide(local, amortize="rows").setup(Y)
    found = []
    for at_once in (1000, 7):
        monkeypatch.setattr(samplers, "AT_ONCE", at_once)
        torch.manual_seed(0)
        found.append([*guide.sample(100).values(), *plated.sample(100, Y).values(), torch.rand(1)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    sizes: list[int] = []
    guide.sampler.net.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    assert guide.sample(100)["mu"].shape == (100,) and max(sizes) == 7 and sum(sizes) == 100


def test_numbers_of_numpy_and_tensors_are_numbers(guide: ImplicitGuide) -> None:
    for five in (np.int64(5), torch.tensor(5), np.array(5)):
        assert len(guide.sample(five)["scale"]) == 5  # type: ignore[arg-type]
    for wrong in (True, 5.0, "5", [5], np.float32(5.0), torch.tensor([5])):
        with pytest.raises(OptionError, match="num_samples must be an int >= 1, got "):
            guide.sample(wrong)  # type: ignore[arg-type]


def test_quantiles_and_points_of_a_wrong_kind_are_refused(guide: ImplicitGuide) -> None:
    for wrong in ([2.0], "0.5", [float("nan")], None, torch.ones(2, 1)):
        with pytest.raises(OptionError, match="quantiles must be numbers from 0 to 1, got "):
            guide.quantiles(wrong)  # type: ignore[arg-type]
    one = ImplicitGuide(models.normal_normal).setup(Y)
    one.set_log_density(lambda u: u.sum(-1))
    assert one.get_posterior().log_prob(np.ones((2, 1))).tolist() == [1.0, 1.0]  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"of shape \[..., 1\], got \(3, 5\)"):
        one.get_posterior().log_prob(torch.zeros(3, 5))


def test_more_draws_than_torch_takes_have_quantiles() -> None:
    value = torch.arange(2**24 + 1.0)
    assert quantiles_of(value, torch.tensor([0.25, 0.5])).tolist() == [2.0**22, 2.0**23]
