"""`to_arviz` returns the right groups, shapes and numbers, and calls both generations of ArviZ correctly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import models
from implicitvi import AVBSVI, ImplicitGuide, to_arviz
from implicitvi.avb.contrasts import GaussianContrast
from implicitvi.errors import ModelError, OptionError, ShapeError
from implicitvi.export import _container

ARGS = (models.SIGMA, models.Y)
RECENT = int(az.__version__.split(".")[0]) >= 1
ELPD = "elpd" if RECENT else "elpd_loo"


def groups_of(idata: Any) -> set[str]:
    """Names of the groups, in the container of either generation."""
    return {name.strip("/") for name in idata.groups} - {""} if RECENT else set(idata.groups())


@pytest.fixture(scope="module")
def guide() -> ImplicitGuide:
    guide = ImplicitGuide(models.eight_schools)
    options: dict[str, Any] = {"num_steps": 3, "num_particles": 16, "warm_start": 5}
    AVBSVI(models.eight_schools, guide, **options, seed=0, progress=False).run(*ARGS)
    return guide


def test_groups_shapes_and_dims(guide: ImplicitGuide) -> None:
    idata = to_arviz(guide, models.eight_schools, *ARGS, num_samples=40)
    assert groups_of(idata) == {
        "posterior",
        "posterior_predictive",
        "log_likelihood",
        "prior",
        "prior_predictive",
        "observed_data",
        "constant_data",
        "sample_stats",
    }
    assert idata.posterior["eta"].dims == ("chain", "draw", "schools")
    assert idata.posterior["mu"].shape == (1, 40)
    assert set(idata.posterior) == {"mu", "tau", "eta"}
    assert idata.posterior_predictive["obs"].shape == (1, 40, 8)
    assert idata.prior_predictive["obs"].dims == ("chain", "draw", "schools")
    assert set(idata.prior) == {"mu", "tau", "eta"} and idata.prior["eta"].shape == (1, 40, 8)
    assert set(idata.constant_data) == {"sigma"}
    assert np.array_equal(idata.constant_data["sigma"], models.SIGMA.numpy())
    assert np.array_equal(idata.observed_data["obs"], models.Y.numpy())
    assert idata.attrs["inference_library"] == "implicitvi"
    given = to_arviz(
        guide, models.eight_schools, *ARGS, num_samples=5, coords={"school": list("ABCDEFGH")}, dims={"eta": ["school"]}
    )
    assert list(given.posterior["eta"].coords["school"].values) == list("ABCDEFGH")


def test_deterministic_sites_have_the_dimensions_of_their_plates() -> None:
    """With or without a declared event; a dimension of another size does not get a plate's name."""

    def model(x: torch.Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("column", 2, dim=-2), pyro.plate("row", len(x), dim=-1):
            pyro.deterministic("mean", (slope * x).expand(2, -1))
            pyro.deterministic("pair", torch.stack([slope * x] * 3, -1).expand(2, -1, 3), event_dim=1)
            pyro.deterministic("other", (slope * x)[:2])
        pyro.deterministic("outside", slope * x)

    x = torch.linspace(-1, 1, 4)
    idata = to_arviz(ImplicitGuide(model).setup(x), model, x, num_samples=5, coords={"row": list("abcd")})
    for group in ("posterior", "prior"):
        assert idata[group]["mean"].dims == ("chain", "draw", "column", "row")
        assert idata[group]["outside"].dims == ("chain", "draw", "outside_dim_0")
        assert idata[group]["other"].dims == ("chain", "draw", "other_dim_0")
        own = "pair_dim_0" if RECENT else "pair_dim_2"  # counted from the first without a name, or from all
        assert idata[group]["pair"].dims == ("chain", "draw", "column", "row", own)
    mean = idata["posterior"]["mean"].sel(row="d", column=0)
    assert (mean.values == idata["posterior"]["slope"].values).all()


def test_numbers_are_those_of_the_model(guide: ImplicitGuide) -> None:
    """Log likelihood and log joint by hand at the exported draws; learned density and weight are consistent."""
    idata = to_arviz(guide, models.eight_schools, *ARGS, num_samples=40)
    mu, tau, eta = (torch.tensor(idata.posterior[name].values[0]) for name in ("mu", "tau", "eta"))
    mean = mu[:, None] + tau[:, None] * eta
    likelihood = dist.Normal(mean, models.SIGMA).log_prob(models.Y)
    np.testing.assert_allclose(idata.log_likelihood["obs"].values[0], likelihood, rtol=1e-4)
    standard = dist.Normal(0.0, 1.0)
    prior = standard.log_prob(mu) + standard.log_prob(tau) + standard.log_prob(eta).sum(-1)
    stats = idata.sample_stats
    np.testing.assert_allclose(stats["lp"].values[0], prior + likelihood.sum(-1), rtol=1e-4)
    np.testing.assert_allclose(  # every site is unconstrained here, so log|J| is 0
        stats["log_weight"], stats["lp"] - stats["log_q_learned"], rtol=1e-4, atol=1e-4
    )


def test_the_log_ratio_is_that_of_the_adversary() -> None:
    """With a contrast whose moments are those of the draws, ``log q - log r`` by hand."""
    options: dict[str, Any] = {"num_steps": 3, "num_particles": 16, "warm_start": 5}
    one = ImplicitGuide(models.eight_schools)
    AVBSVI(models.eight_schools, one, **options, contrast="gaussian", seed=0, progress=False).run(*ARGS)
    idata = to_arviz(one, models.eight_schools, *ARGS, num_samples=60, prior=False)
    stats = idata.sample_stats
    parts = [idata.posterior[name].values[0].reshape(60, -1) for name in ("mu", "tau", "eta")]
    u = torch.tensor(np.concatenate(parts, 1))
    r = GaussianContrast()(u)
    np.testing.assert_allclose(
        stats["log_q_learned"].values[0] - stats["log_ratio"].values[0], r.log_prob(u), rtol=1e-3, atol=1e-3
    )
    assert stats["log_ratio"].values.std() > 0


def test_several_fits_are_chains_and_their_record_is_kept(tmp_path: Path) -> None:
    """Each restart is one chain; R-hat shows that two fits, moved apart, disagree."""
    fits = [
        AVBSVI(
            models.normal_normal,
            ImplicitGuide(models.normal_normal),
            num_steps=2,
            num_particles=16,
            warm_start=200,
            seed=seed,
            progress=False,
        ).run(models.Y)
        for seed in (0, 1)
    ]
    agree = to_arviz(fits, models.normal_normal, models.Y, num_samples=500, attrs={"report": "ok"})
    assert agree.posterior["mu"].shape == (2, 500)
    assert agree.sample_stats["lp"].shape == (2, 500)
    assert agree.log_likelihood["obs"].shape == (2, 500, 8)
    assert agree.prior["mu"].shape == (1, 500)
    attrs = agree.attrs
    assert (attrs["seed"], attrs["num_steps"]) == ("0; 1", "2; 2")
    assert attrs["stop_reason"] == "finished; finished" and attrs["report"] == "ok"
    assert attrs["torch_version"] and attrs["pyro_version"]
    assert float(az.rhat(agree)["mu"]) < 1.1
    fits[1].guide.sampler.loc += 5
    apart = to_arviz([fit.guide for fit in fits], models.normal_normal, models.Y, num_samples=500)
    assert float(az.rhat(apart)["mu"]) > 1.5
    assert not {"seed", "stop_reason"} & set(apart.attrs)


def test_the_prior_groups_are_the_model_without_its_data() -> None:
    """Normal-normal: mu ~ N(0, 1) and obs ~ N(0, 2) whatever was observed; 5 standard errors."""
    y = torch.full((3,), 9.0)
    guide = ImplicitGuide(models.normal_normal).setup(y)
    idata = to_arviz(guide, models.normal_normal, y, num_samples=2000)
    mu, obs = idata.prior["mu"].values[0], idata.prior_predictive["obs"].values[0]
    assert abs(mu.mean()) < 5 / 2000**0.5 and abs(mu.var() - 1) < 5 * (2 / 2000) ** 0.5
    assert abs(obs[:, 0].mean()) < 5 * (2 / 2000) ** 0.5
    assert abs(np.cov(mu, obs[:, 0])[0, 1] - 1) < 5 * (3 / 2000) ** 0.5
    assert "constant_data" not in groups_of(idata)
    without = to_arviz(guide, models.normal_normal, y, num_samples=5, prior=False)
    assert not {"prior", "prior_predictive"} & groups_of(without)


def test_a_prior_that_cannot_be_sampled_is_left_out_with_a_warning() -> None:
    def flat(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("obs", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)

    guide = ImplicitGuide(flat, init_loc_fn=lambda site: torch.tensor(0.0)).setup(models.Y)
    with pytest.warns(UserWarning, match="prior cannot be sampled"):
        idata = to_arviz(guide, flat, models.Y, num_samples=4)
    assert not {"prior", "prior_predictive"} & groups_of(idata)
    assert "posterior" in groups_of(idata)


def test_assignments_are_drawn_from_their_exact_conditional() -> None:
    """The mean of each assignment given each draw is its responsibility: 5 standard errors over 600 draws."""
    y = torch.tensor([-1.5, -0.2, 0.3, 1.8])
    guide = ImplicitGuide(models.mixture).setup(y)
    idata = to_arviz(guide, models.mixture, y, num_samples=600, prior=False)
    share = idata.posterior["share"].values[0][:, None, None]
    loc = idata.posterior["loc"].values[0][:, None, :]
    weight = np.concatenate([1 - share, share], -1) * np.exp(-0.5 * (y.numpy()[:, None] - loc) ** 2)
    responsibility = weight[..., 1] / weight.sum(-1)
    k = idata.posterior["k"].values[0]
    error = np.sqrt((responsibility * (1 - responsibility)).mean(0) / 600)
    assert (abs(k.mean(0) - responsibility.mean(0)) < 5 * error).all()
    residual = (k - responsibility) * (responsibility - responsibility.mean(0))
    assert (abs(residual.mean(0)) < 5 * residual.std(0) / 600**0.5).all()


def switched(labels: Tensor, flat: bool = False) -> None:
    """A discrete site beside labels, with a deterministic site of it and, where it is flat, an improper prior."""
    prior = (
        dist.ImproperUniform(dist.constraints.real, (2,), ()).to_event(1)
        if flat
        else dist.Normal(torch.zeros(2), 1.0).to_event(1)
    )
    logit = pyro.sample("logit", prior)
    with pyro.plate("data", len(labels)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        pyro.deterministic("chosen", logit[k])
        pyro.sample("label", dist.Bernoulli(logits=logit[k]), obs=labels)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_discrete_sites_are_drawn_beside_labels_of_any_dtype(dtype: torch.dtype) -> None:
    """As beside the same labels as numbers."""
    guide, labels = ImplicitGuide(switched).setup(torch.tensor([0.0, 1.0, 1.0])), torch.tensor([0, 1, 1])
    found = []
    for each in (labels.float(), labels.to(dtype)):
        torch.manual_seed(0)
        found.append(to_arviz(guide, switched, each, num_samples=20, prior=False).posterior)
    for name in ("k", "chosen"):
        assert (found[0][name].values == found[1][name].values).all()
    logit, k = found[0]["logit"].values[0], found[0]["k"].values[0]
    assert np.allclose(found[0]["chosen"].values[0], np.take_along_axis(logit, k, 1))


def test_discrete_sites_are_drawn_under_an_improper_prior() -> None:
    labels = torch.tensor([0.0, 1.0, 1.0])
    guide = ImplicitGuide(switched).setup(labels, flat=True)
    assert to_arviz(guide, switched, labels, flat=True, num_samples=3, prior=False).posterior["k"].shape == (1, 3, 3)


@pytest.fixture
def numpys_generator() -> Iterator[None]:
    """ArviZ draws from numpy's global generator."""
    state = np.random.get_state()
    yield
    np.random.set_state(state)


@pytest.mark.usefixtures("numpys_generator")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_workflow_of_arviz_runs(guide: ImplicitGuide, tmp_path: Path) -> None:
    """Tables, comparison and plots work, and a file restores everything."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    idata = to_arviz(guide, models.eight_schools, *ARGS, num_samples=200, attrs={"report": "fine"})
    loo = az.loo(idata, reff=1.0, pointwise=True)
    table = az.compare({"one": idata, "other": idata})
    assert set(table.index) == {"one", "other"}
    assert np.isfinite(table[ELPD]).all()
    predictive: list[Callable[[], Any]] = (
        [
            lambda: az.plot_ppc_dist(idata, num_samples=10),
            lambda: az.plot_ppc_dist(idata, group="prior_predictive", num_samples=10),
        ]
        if RECENT
        else [
            lambda: az.plot_ppc(idata, num_pp_samples=10),
            lambda: az.plot_ppc(idata, group="prior", num_pp_samples=10),
        ]
    )
    for plot in (
        lambda: az.plot_pair(idata, var_names=["mu", "tau"]),
        lambda: az.plot_forest(idata),
        lambda: az.plot_trace(idata, var_names=["mu"]),
        *predictive,
        lambda: az.plot_khat(loo),
    ):
        assert plot() is not None
        pyplot.close("all")
    path = tmp_path / "fit.nc"
    idata.to_netcdf(str(path))
    back = az.from_netcdf(str(path))
    assert groups_of(back) == groups_of(idata) and back.attrs["report"] == "fine"
    for group in groups_of(idata):
        for name, value in idata[group].items():
            assert np.array_equal(value, back[group][name]), (group, name)


@pytest.mark.parametrize("source", [3, [], ["guide"], None])
def test_anything_but_a_fit_is_refused(source: Any) -> None:
    with pytest.raises(
        OptionError, match="source must be an ImplicitGuide, a Fit, or several of them, got .*az.from_pyro"
    ):
        to_arviz(source, models.normal_normal, models.Y)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # the guide is hardly trained
def test_arviz_reads_it(guide: ImplicitGuide) -> None:
    idata = to_arviz(guide, models.eight_schools, *ARGS, num_samples=200)
    assert set(az.summary(idata, kind="stats").index) >= {"mu", "tau", "eta[0]"}
    assert np.isfinite(getattr(az.loo(idata, reff=1.0), ELPD))


def test_the_log_likelihood_is_not_scaled() -> None:
    scaled = pyro.poutine.scale(models.normal_normal, 25.0)
    y = torch.randn(5)
    idata = to_arviz(ImplicitGuide(scaled).setup(y), scaled, y, num_samples=6)
    assert idata.log_likelihood["obs"].min() > -20  # a factor of 25 would show


def test_a_minibatch_is_refused() -> None:
    """Each group would use other rows."""
    y = torch.randn(50)
    guide = ImplicitGuide(models.global_latents_in_minibatches).setup(y)
    with pytest.raises(ModelError, match="all of its data, got 2 of 50 in plate 'data'"):
        to_arviz(guide, models.global_latents_in_minibatches, y, num_samples=6)


def test_without_observations_or_adversary_there_are_fewer_groups() -> None:
    def prior(y: Tensor | None = None) -> None:
        pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))

    idata = to_arviz(ImplicitGuide(prior).setup(), prior, num_samples=4)
    assert groups_of(idata) == {"posterior", "prior", "sample_stats"}
    assert set(idata.sample_stats) == {"lp"}


@pytest.mark.parametrize("release", ["0.23.4", "1.0.0", "1.3.0"])
def test_each_generation_of_arviz_gets_its_call(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested groups since 1.0, one keyword for each group before; the wrong form does not raise an error."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def from_dict(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))

    fake = SimpleNamespace(__version__=release, from_dict=from_dict)
    monkeypatch.setitem(__import__("sys").modules, "arviz", fake)
    groups = {"posterior": {"mu": np.zeros((1, 3))}}
    _container(groups, {"a": [1]}, {"mu": ["a"]}, {"seed": "1"})
    (args, kwargs), *rest = calls
    assert not rest
    assert kwargs["coords"] == {"a": [1]} and kwargs["dims"] == {"mu": ["a"]}
    if release < "1":
        assert args == () and "mu" in kwargs["posterior"]
        assert kwargs["attrs"] == {"seed": "1"}
    else:
        assert args == (groups,) and "posterior" not in kwargs
        assert kwargs["attrs"] == {"/": {"seed": "1"}}


NAMES = {
    "a latent called chain": {"site": "chain"},
    "a latent called draw": {"site": "draw"},
    "data called chain": {"obs": "chain"},
    "data called lp": {"obs": "lp"},
    "a plate called chain": {"plate": "chain"},
    "a plate called draw": {"plate": "draw"},
}


@pytest.mark.parametrize("case", NAMES)
def test_names_that_arviz_keeps_are_changed_with_a_warning_and_nothing_is_lost(case: str) -> None:
    names = {"site": "mu", "obs": "obs", "plate": "data"} | NAMES[case]

    def model(y: Tensor) -> None:
        mu = pyro.sample(names["site"], dist.Normal(0.0, 1.0))
        with pyro.plate(names["plate"], len(y)):
            pyro.sample(names["obs"], dist.Normal(mu, 1.0), obs=y)

    y = torch.tensor([0.5, -0.3, 1.0])
    (old,) = NAMES[case].values()
    with pytest.warns(UserWarning, match=f"ArviZ keeps for itself, got '{old}'"):
        idata = to_arviz(ImplicitGuide(model).setup(y), model, y, num_samples=4, coords={names["plate"]: list("abc")})
    site, obs, plate = (f"{name}_" if name == old else name for name in names.values())
    assert idata.posterior[site].shape == (1, 4)
    for group in ("posterior_predictive", "log_likelihood", "prior_predictive"):
        assert idata[group][obs].dims == ("chain", "draw", plate)
        assert list(idata[group][obs].coords[plate].values) == list("abc")
    assert idata.observed_data[obs].dims == (plate,)
    assert idata.sample_stats["lp"].shape == (1, 4)


def test_an_argument_with_the_name_of_a_site_in_a_plate_is_kept_beside_it() -> None:
    def model(mu: Tensor) -> None:
        with pyro.plate("data", 3):
            pyro.sample("mu", dist.Normal(mu.sum(), 1.0))

    idata = to_arviz(ImplicitGuide(model).setup(torch.ones(2, 2)), model, torch.ones(2, 2), num_samples=4)
    assert idata.constant_data["mu_"].shape == (2, 2)
    assert idata.posterior["mu"].dims == ("chain", "draw", "data")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.complex64])
def test_arguments_of_every_dtype_are_exported(dtype: torch.dtype) -> None:
    def model(y: Tensor, x: Tensor) -> None:
        models.normal_normal(y)

    x = torch.tensor([1.0, 0.0]).to(dtype)
    idata = to_arviz(ImplicitGuide(model).setup(models.Y, x), model, models.Y, x, num_samples=4)
    assert idata.constant_data["x"].values.tolist() == x.tolist()


LABELS: dict[str, tuple[dict[str, Any], str]] = {
    "coordinates of a wrong length": ({"coords": {"data": [1, 2]}}, r"coords\['data'\] must be 8 values.*got 2"),
    "coordinates in a list": ({"coords": [1]}, "coords must be a dict"),
    "one coordinate": ({"coords": {"data": 3}}, r"coords\['data'\] must be values, got 3. Write a list"),
    "a name in place of a list": ({"dims": {"obs": "data"}}, r"dims\['obs'\] must be a list of names, got 'data'"),
    "dimensions that are a number": ({"dims": 3}, "dims must be a dict"),
    "dimensions of no site": ({"dims": {"osb": ["data"]}}, "dims must be of .*, got 'osb'. Did you mean 'obs'"),
    "too many dimensions": ({"dims": {"mu": ["a"]}}, r"dims\['mu'\] must be 0 different names"),
    "a dimension called chain": ({"dims": {"obs": ["chain"]}}, r"dims\['obs'\] must be 1 different names"),
    "a dimension called like a site": ({"dims": {"obs": ["mu"]}}, "none of them of a site"),
    "attributes that are a number": ({"attrs": 3}, "attrs must be a dict"),
    "half a draw": ({"num_samples": 1.5}, "num_samples must be an int"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_do_not_fit_are_refused(case: str) -> None:
    options, message = LABELS[case]
    guide = ImplicitGuide(models.normal_normal).setup(models.Y)
    with pytest.raises((OptionError, ShapeError), match=message):
        to_arviz(guide, models.normal_normal, models.Y, **{"num_samples": 4} | options)


def test_data_and_models_that_do_not_fit_are_refused_as_in_a_run(guide: ImplicitGuide) -> None:
    single = ImplicitGuide(models.normal_normal).setup(models.Y)
    with pytest.raises(ModelError, match="data of site 'obs' must be the shape of its plates"):
        to_arviz(single, models.normal_normal, models.Y[:, None], num_samples=4)
    with pytest.raises(ModelError, match="no longer visits its latent sites: 'mu'|did not have before: 'other'"):
        to_arviz(single, lambda y: pyro.sample("other", dist.Normal(0.0, 1.0)), models.Y, num_samples=4)
    with pytest.raises(ModelError, match="shape of site 'eta' has changed from \\(8,\\) to \\(5,\\)"):
        to_arviz(guide, models.eight_schools, *(each[:5] for each in ARGS), num_samples=4)
    with pytest.raises(OptionError, match="model must be a Pyro model, which is a function, got None"):
        to_arviz(single, None, models.Y)  # type: ignore[arg-type]
