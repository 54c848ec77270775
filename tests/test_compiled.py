"""A compiled log joint gives the numbers of the eager one, for any data and any number of particles."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import models
from implicitvi import AVB_ELBO, AVBSVI, ImplicitGuide
from implicitvi.avb.samplers import GatedSampler
from implicitvi.errors import ModelError, OptionError
from implicitvi.pyro_model.compiled import CompiledScore, compile_networks
from implicitvi.pyro_model.log_joint import LogJoint

Model = Callable[..., Any]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
BACKENDS = ["graph", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])]
MODELS: dict[str, tuple[Model, tuple[Tensor, ...]]] = {
    "eight_schools": (models.eight_schools, (models.SIGMA, models.Y)),
    "every_support": (models.every_support, (torch.arange(3.0),)),  # one number of rows only
}


def made(model: Model, *args: Any, backend: str = "graph", **kwargs: Any) -> LogJoint:
    log_joint = LogJoint(model, ImplicitGuide(model).setup(*args, **kwargs).layout)
    points = 0.3 * torch.randn(3, log_joint.layout.dim, dtype=tensors(args, kwargs)[0].dtype)
    log_joint.compile(backend, points, *args, **kwargs)
    return log_joint


def tensors(*of: Any) -> list[Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(of)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def agree(log_joint: LogJoint, count: int, *args: Any, **kwargs: Any) -> None:
    """Compare values, with and without gradients, and weighted gradients with those of the loop."""
    like = tensors(args, kwargs)[0]
    u = torch.randn(count, log_joint.layout.dim, dtype=like.dtype, requires_grad=True)
    weights = torch.randn(count, dtype=like.dtype)
    assert "; compiled" in log_joint.reason, log_joint.reason
    rtol = 1e-9 if like.dtype == torch.float64 else 1e-3
    fast, slow = log_joint(u, *args, **kwargs), log_joint.loop(u, *args, **kwargs)
    torch.testing.assert_close(fast, slow, rtol=rtol, atol=rtol)
    with torch.no_grad():
        torch.testing.assert_close(log_joint(u, *args, **kwargs), slow, rtol=rtol, atol=rtol)
    (fast_grad,) = torch.autograd.grad(weights @ fast, u)
    (slow_grad,) = torch.autograd.grad(weights @ slow, u)
    torch.testing.assert_close(fast_grad, slow_grad, rtol=rtol, atol=10 * rtol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_compiled_equals_eager_for_any_number_of_particles(name: str, dtype: torch.dtype, backend: str) -> None:
    model, args = MODELS[name]
    args = tuple(arg.to(dtype) for arg in args)
    log_joint = made(model, *args, backend=backend)
    for count in (1, 2, 7, 300):
        agree(log_joint, count, *args)
    assert log_joint._compiled is not None and len(log_joint._compiled._graphs) == 1


def regression(data: dict[str, Any], power: int, *, prior: tuple[Tensor, ...]) -> None:
    w = pyro.sample("w", dist.Normal(prior[0], prior[1]).to_event(1))
    with pyro.plate("data", len(data["y"])):
        pyro.sample("obs", dist.Normal((data["x"][0] @ w) ** power, 1.0), obs=data["y"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_new_data_give_new_answers(backend: str) -> None:
    """Tensors in containers are inputs, changed in place or replaced; numbers and shapes decide the graph."""

    def data(count: int = 5) -> dict[str, Any]:
        return {"x": [torch.randn(count, 2).double()], "y": torch.randn(count).double()}

    prior, first = (torch.zeros(2).double(), torch.ones(2).double()), data()
    log_joint = made(regression, first, 1, prior=prior, backend=backend)
    agree(log_joint, 4, data(), 1, prior=prior)
    first["x"][0].mul_(3.0)
    first["y"].zero_()
    agree(log_joint, 4, first, 1, prior=prior)
    agree(log_joint, 4, first, 1, prior=(torch.ones(2).double(), torch.ones(2).double()))
    agree(log_joint, 4, first, 2, prior=prior)
    agree(log_joint, 4, data(6), 1, prior=prior)
    assert log_joint._compiled is not None and len(log_joint._compiled._graphs) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_that_is_not_an_argument_may_change_in_place(backend: str) -> None:
    hidden = torch.zeros(3).double()

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(hidden, 1.0).to_event(1))
        pyro.sample("obs", dist.Normal(mu, 1.0).to_event(1), obs=y)

    y = torch.randn(3).double()
    log_joint = made(model, y, backend=backend)
    agree(log_joint, 4, y)
    hidden += 1.0
    agree(log_joint, 4, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_minibatches_stay_random_and_are_shared_by_all_particles(backend: str) -> None:
    """Two of fifty rows are drawn: the same for every particle, others in every call."""
    y = torch.randn(50).double()
    log_joint = made(models.global_latents_in_minibatches, y, backend=backend)
    assert log_joint._compiled is not None
    log_joint._compiled._graphs[0].rows = 4  # several passes for the particles of a call
    u = torch.full((10, 1), 0.3, dtype=torch.float64)
    scores = torch.stack([log_joint(u, y) for _ in range(400)])
    torch.testing.assert_close(scores, scores[:, :1].expand_as(scores))
    assert scores[:, 0].unique().numel() > 300
    whole = torch.distributions.Normal(0.3, 1.0).log_prob(y).sum()
    likelihood = scores[:, 0] - torch.distributions.Normal(0.0, 1.0).log_prob(u[0, 0])
    assert (likelihood.mean() - whole).abs() < 5 * likelihood.std() / 400**0.5


def learns(y: Tensor) -> None:
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, scale))
    pyro.sample("obs", dist.Normal(mu, 1.0).expand([3]).to_event(1), obs=y)


def draws(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("obs", dist.Normal(mu + torch.randn(3), 1.0).to_event(1), obs=y)


def looks_at_the_data(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, y.std().item()))
    pyro.sample("obs", dist.Normal(mu, 1.0).expand([3]).to_event(1), obs=y)


class Decoder(nn.Module):
    """A network that learns, among the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 3)


def network(y: Tensor, decoder: Decoder | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    assert decoder is not None
    pyro.sample("obs", dist.Normal(decoder.net(mu), 1.0).to_event(1), obs=y)


def array(y: Tensor, other: Any = None) -> None:
    models.normal_normal(y)


REFUSED: dict[str, tuple[Model, tuple[Any, ...], str]] = {
    "pyro.param": (learns, (), "parameters that learn"),
    "a network that learns": (network, (Decoder(),), "parameters that learn"),
    "random numbers": (draws, (), "draws random numbers of its own"),
    "numbers read off the data": (looks_at_the_data, (), "Tracing raised RuntimeError"),
    "mode loop": (models.branches_on_a_latent, (), "mode must be 'vmap' to be traced, got 'loop'"),
    "an array": (array, (np.ones(3),), "must be a tensor or a number, got ndarray"),
    "an argument that learns": (array, (torch.ones(3, requires_grad=True),), "An argument needs a gradient"),
}


@pytest.mark.uses_param_store
@pytest.mark.filterwarnings("ignore:the model is scored one particle at a time")
@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_a_graph_would_freeze_stays_eager_and_says_why(case: str) -> None:
    model, others, why = REFUSED[case]
    args = (torch.tensor([0.5, -0.3, 1.0]), *others)
    with pytest.warns(UserWarning, match=f"without compiling it.*{why}"):
        log_joint = made(model, *args)
    assert "not compiled" in log_joint.reason
    u = torch.randn(4, 1)
    if case != "random numbers":
        torch.testing.assert_close(log_joint(u, *args), log_joint.loop(u, *args))


def test_too_many_forms_of_arguments_go_back_to_eager() -> None:
    log_joint = made(models.normal_normal, torch.zeros(1))
    u = torch.randn(2, 1)
    for count in range(2, 9):
        log_joint(u, torch.zeros(count))
    with pytest.warns(UserWarning, match="more than 8 forms"):
        log_joint(u, torch.zeros(9))
    assert "not compiled" in log_joint.reason


def test_a_graph_that_gives_other_numbers_is_refused() -> None:
    """A score that counts its calls is not a function of its arguments; the comparison detects it."""
    calls = iter(range(1000))

    def score(u: Tensor, args: Any, kwargs: Any) -> Tensor:
        return u.sum(-1) * next(calls)

    close = torch.allclose
    with pytest.raises(ModelError, match="disagree"):
        CompiledScore(score, torch.ones(3, 2), agree=close)(torch.ones(3, 2), (), {})


def test_a_particle_that_fails_does_not_disturb_others() -> None:
    log_joint = made(models.fragile_cholesky, torch.zeros(2).double())
    u = torch.tensor([[0.1], [2.0], [-0.5], [-3.0]], dtype=torch.float64)
    scores = log_joint(u, torch.zeros(2).double())
    assert scores.isfinite().tolist() == [True, False, True, False]
    torch.testing.assert_close(scores, log_joint.loop(u, torch.zeros(2).double()))


def fit(compile: str | None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    guide = ImplicitGuide(models.eight_schools)
    options = {"num_steps": 8, "num_particles": (16, 24), "warm_start": 10} | options
    svi = AVBSVI(models.eight_schools, guide, compile=compile, seed=0, progress=False, **options)
    return svi.run(models.SIGMA.to(dtype), models.Y.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-3), (torch.float64, 1e-8)])
def test_compiled_and_eager_fits_agree(dtype: torch.dtype, rtol: float, backend: str) -> None:
    eager, compiled = fit(None, dtype), fit(backend, dtype)
    assert f"compiled ({backend})" in str(compiled) and "compiled" not in str(eager)
    np.testing.assert_allclose(compiled.losses, eager.losses, rtol=rtol)
    np.testing.assert_allclose(compiled.history["adversary"], eager.history["adversary"], rtol=rtol)


@pytest.mark.filterwarnings("ignore:.*leave the posterior:UserWarning")
def test_compiled_and_eager_fits_draw_the_same_minibatches() -> None:
    y, model = torch.randn(50).double(), models.global_latents_in_minibatches
    losses = []
    for backend in (None, "graph"):
        options: dict[str, Any] = {"num_steps": 6, "num_particles": 16, "warm_start": 5, "seed": 0}
        svi = AVBSVI(model, ImplicitGuide(model), compile=backend, progress=False, **options)
        losses.append(svi.run(y).losses)
    np.testing.assert_allclose(*losses, rtol=1e-8)


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler triggers its own warnings
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compiled_networks_are_the_same_networks() -> None:
    """Compare the names in the state, draws and gradients."""
    sampler = GatedSampler(2)
    names, weights = list(sampler.state_dict()), list(sampler.parameters())
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        draws = sampler(5)
        results.append((draws, *torch.autograd.grad(draws.square().sum(), weights)))
        compile_networks(sampler, None)
    assert list(sampler.state_dict()) == names
    torch.testing.assert_close(*results)


@pytest.mark.uses_param_store
def test_pyros_own_loop_takes_the_option() -> None:
    guide = ImplicitGuide(models.eight_schools)
    loss = AVB_ELBO(num_steps=5, num_particles=16, warm_start=5, seed=0, compile="graph")
    svi = pyro.infer.SVI(models.eight_schools, guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss)
    assert np.isfinite([svi.step(models.SIGMA, models.Y) for _ in range(2)]).all()
    assert "compiled (graph)" in loss._training.target.log_joint.reason  # type: ignore[union-attr]


def test_options_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="compile must be one of.*Did you mean 'graph'"):
        fit("grap")
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    with pytest.raises(OptionError, match="needs a C.. compiler.*use compile='graph'"):
        fit("inductor")
