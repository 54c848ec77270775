"""List small Pyro models: one for each feature that a model may have, and one for each family of priors.

Each states how `LogJoint` is expected to score it, or the words of the error that refuses it. ``test_zoo.py`` holds all
of them to the same laws; add a new feature or family to the list below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import config_enumerate
from pyro.infer.reparam import (
    HaarReparam,
    LatentStableReparam,
    LocScaleReparam,
    ProjectedNormalReparam,
    TransformReparam,
)
from pyro.nn import PyroModule, PyroSample
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

import models
from models import SUMMED_OUT

Model = Callable[..., Any]
Args = tuple[Any, ...]


def five(dtype: torch.dtype) -> Args:
    """Return five observations."""
    return (torch.tensor([-1.2, 0.3, 1.9, 0.1, 2.2], dtype=dtype),)


@dataclass(frozen=True)
class Animal:
    """A model with the expected way to score it, or the error that refuses it.

    Attributes:
        name: Its name in the list.
        model: The model.
        args: The model's arguments in a dtype.
        mode: The mode in which `LogJoint` scores it; ``"fast"`` for any but the loop.
        refused: Regular expression of the error that refuses it, ``None`` for a model that can be fitted.
    """

    name: str
    model: Model
    args: Callable[[torch.dtype], Args] = five
    mode: str = "fast"
    refused: str | None = None


def observe(mean: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)


def prior(family: Callable[[Tensor], Any]) -> Model:
    """Return a model with one latent, distributed as ``family(one)``, whose bounded sum is observed."""

    def model(y: Tensor) -> None:
        z = pyro.sample("z", family(y.new_ones(())))
        observe((z / (1 + z.abs())).sum(), y)

    return model


FAMILIES: dict[str, Callable[[Tensor], Any]] = {
    "Normal": lambda one: dist.Normal(one, 2 * one),
    "StudentT": lambda one: dist.StudentT(4 * one, one, one),
    "Laplace": lambda one: dist.Laplace(one, one),
    "AsymmetricLaplace": lambda one: dist.AsymmetricLaplace(one, one, 2 * one),
    "SoftAsymmetricLaplace": lambda one: dist.SoftAsymmetricLaplace(one, one, 2 * one),
    "Cauchy": lambda one: dist.Cauchy(0 * one, one),
    "Gumbel": lambda one: dist.Gumbel(one, one),
    "Logistic": lambda one: dist.Logistic(one, one),
    "SkewLogistic": lambda one: dist.SkewLogistic(one, one, 2 * one),
    "LogNormal": lambda one: dist.LogNormal(0 * one, one),
    "Gamma": lambda one: dist.Gamma(2 * one, one),
    "InverseGamma": lambda one: dist.InverseGamma(3 * one, one),
    "Beta": lambda one: dist.Beta(2 * one, 3 * one),
    "AffineBeta": lambda one: dist.AffineBeta(2 * one, 3 * one, -one, 4 * one),
    "Kumaraswamy": lambda one: dist.Kumaraswamy(2 * one, 3 * one),
    "Exponential": lambda one: dist.Exponential(one),
    "HalfNormal": lambda one: dist.HalfNormal(one),
    "HalfCauchy": lambda one: dist.HalfCauchy(one),
    "Chi2": lambda one: dist.Chi2(3 * one),
    "FisherSnedecor": lambda one: dist.FisherSnedecor(3 * one, 5 * one),
    "Pareto": lambda one: dist.Pareto(one, 2 * one),
    "Weibull": lambda one: dist.Weibull(one, 2 * one),
    "Uniform": lambda one: dist.Uniform(-one, 2 * one),
    "ContinuousBernoulli": lambda one: dist.ContinuousBernoulli(0.3 * one),
    "Dirichlet": lambda one: dist.Dirichlet(2 * one.expand(3)),
    "LogisticNormal": lambda one: dist.LogisticNormal(0 * one.expand(3), one.expand(3)),
    "MultivariateNormal": lambda one: dist.MultivariateNormal(
        0 * one.expand(3), covariance_matrix=torch.eye(3).to(one) + 0.5
    ),
    "LowRankMultivariateNormal": lambda one: dist.LowRankMultivariateNormal(
        0 * one.expand(3), one.expand(3, 1), one.expand(3)
    ),
    "MultivariateStudentT": lambda one: dist.MultivariateStudentT(4 * one, 0 * one.expand(3), torch.eye(3).to(one)),
    "OMTMultivariateNormal": lambda one: dist.OMTMultivariateNormal(0 * one.expand(3), torch.eye(3).to(one)),
    "MixtureOfDiagNormals": lambda one: dist.MixtureOfDiagNormals(
        torch.tensor([[-1.0, 0.0], [2.0, 1.0]]).to(one), one.expand(2, 2), 0 * one.expand(2)
    ),
    "MixtureOfDiagNormalsSharedCovariance": lambda one: dist.MixtureOfDiagNormalsSharedCovariance(
        torch.tensor([[-1.0, 0.0], [2.0, 1.0]]).to(one), one.expand(2), 0 * one.expand(2)
    ),
    "GaussianScaleMixture": lambda one: dist.GaussianScaleMixture(
        one.expand(2), 0 * one.expand(2), torch.tensor([1.0, 3.0]).to(one)
    ),
    "LKJ": lambda one: dist.LKJ(3, one),
    "LKJCholesky": lambda one: dist.LKJCholesky(3, one),
    "Wishart": lambda one: dist.Wishart(5 * one, torch.eye(2).to(one)),
    "NormalMatrix": lambda one: dist.Normal(one, one).expand([2, 2]).to_event(2),
    "RelaxedBernoulli": lambda one: dist.RelaxedBernoulli(one, 0.4 * one),
    "RelaxedOneHotCategorical": lambda one: dist.RelaxedOneHotCategorical(one, torch.tensor([0.2, 0.3, 0.5]).to(one)),
    "TruncatedPolyaGamma": lambda one: dist.TruncatedPolyaGamma(one),
    "ImproperUniform": lambda one: dist.ImproperUniform(constraints.positive, (), (2,)),
    "FlatByMask": lambda one: dist.Normal(one, one).expand([2]).to_event(1).mask(False),
    "OrderedVector": lambda one: dist.TransformedDistribution(
        dist.Normal(0 * one, one).expand([3]), dist.transforms.OrderedTransform()
    ),
    "TransformedByAffine": lambda one: dist.TransformedDistribution(
        dist.Normal(0 * one, one).expand([2]),
        dist.transforms.LowerCholeskyAffine(0 * one.expand(2), torch.tensor([[1.0, 0.0], [0.5, 2.0]]).to(one)),
    ),
    "Folded": lambda one: dist.FoldedDistribution(dist.Normal(one, one)),
    "SineBivariateVonMises": lambda one: dist.SineBivariateVonMises(0 * one, 0 * one, one, one, 0.1 * one),
    "SineSkewed": lambda one: dist.SineSkewed(dist.VonMises(0 * one, one).expand([2]).to_event(1), 0.1 * one.expand(2)),
    "VonMises": lambda one: dist.VonMises(0 * one, one),
    "VonMises3D": lambda one: dist.VonMises3D(torch.tensor([1.0, 0.0, 0.0]).to(one)),
    "ProjectedNormal": lambda one: dist.ProjectedNormal(one.expand(3)),
    "Stable": lambda one: dist.Stable(1.5 * one, 0 * one),
    "Delta": lambda one: dist.Delta(one),
    "MixtureSameFamily": lambda one: dist.MixtureSameFamily(
        dist.Categorical(one.expand(2)), dist.Normal(torch.tensor([-1.0, 2.0]).to(one), one)
    ),
    "GaussianHMM": lambda one: dist.GaussianHMM(
        dist.MultivariateNormal(0 * one.expand(1), torch.eye(1).to(one)),
        torch.eye(1).to(one),
        dist.MultivariateNormal(0 * one.expand(1), torch.eye(1).to(one)),
        torch.eye(1).to(one),
        dist.MultivariateNormal(0 * one.expand(1), torch.eye(1).to(one)),
        duration=3,
    ),
    "LinearHMM": lambda one: dist.LinearHMM(
        dist.Normal(0 * one.expand(1), 1.0).to_event(1),
        torch.eye(1).to(one),
        dist.Normal(0 * one.expand(1), 1.0).to_event(1),
        torch.eye(1).to(one),
        dist.Normal(0 * one.expand(1), 1.0).to_event(1),
        duration=3,
    ),
    "PowerOfGamma": lambda one: dist.TransformedDistribution(
        dist.Gamma(2 * one, one), [dist.transforms.PowerTransform(-one)]
    ),
}
ANGLE = "'z' is an angle: its density repeats along the whole real line"
NO_MAP = "'z' cannot be mapped to the real line, got {}"
REFUSED_FAMILIES = {
    "VonMises": ANGLE,
    "SineSkewed": ANGLE,
    "SineBivariateVonMises": ANGLE,
    "VonMises3D": NO_MAP.format("VonMises3D"),
    "ProjectedNormal": NO_MAP.format("ProjectedNormal") + ".*ProjectedNormalReparam",
    "Wishart": NO_MAP.format("Wishart") + ".*LKJCholesky",
    "MixtureSameFamily": NO_MAP.format("MixtureSameFamily") + ".*Sample the component too",
    "GaussianScaleMixture": NO_MAP.format("GaussianScaleMixture"),
    "Delta": "'z' takes single values only, so it has no density, got Delta",
    "LinearHMM": "prior of site 'z' can be drawn from but has no density.*contrast='prior'",
}


def deterministic_and_factor(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * y[0], 1.0))
    square = pyro.deterministic("square", mu**2)
    pyro.factor("potential", -0.1 * square)
    with pyro.plate("data", len(y)):
        pyro.deterministic("shifted", mu + y)
        pyro.factor("each", -0.1 * (mu - y).abs())
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)


def scaled(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * y[0], 1.0))
    with poutine.scale(scale=0.3):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        observe(z, y)


def masked_data(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * y[0], 1.0))
    with pyro.plate("data", len(y)), poutine.mask(mask=y > 0):
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)


def missing_data(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * y[0], 1.0))
    with pyro.plate("data", len(y)):
        x = pyro.sample("x", dist.Normal(mu, 1.0), obs=y, obs_mask=y > 0)
        pyro.sample("obs", dist.Normal(x, 1.0), obs=y)


def masked_latent(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0 * y, 1.0).mask(y > 0))
        with poutine.mask(mask=y > 0):
            pyro.sample("obs", dist.Normal(z, 1.0), obs=y)


def nan_data(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * y[0], 1.0))
    with pyro.plate("data", len(y)):
        holes = torch.where(y > 2, torch.full_like(y, torch.nan), y)
        pyro.sample("obs", dist.NanMaskedNormal(mu, 1.0), obs=holes)


def centred(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * y[0], 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1 + 0 * y[0]))
    with pyro.plate("data", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("obs", dist.Normal(theta, 1.0), obs=y)


def reparameterised(model: Model, **config: Any) -> Model:
    return poutine.reparam(model, config=config)


def log_normal_by_transform(y: Tensor) -> None:
    normal = dist.Normal(0 * y[0], 1.0)
    z = pyro.sample("z", dist.TransformedDistribution(normal, [dist.transforms.ExpTransform()]))
    observe(z, y)


class BayesianNetwork(PyroModule):  # type: ignore[misc]
    """One hidden layer whose weights are latent."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        zero = torch.zeros((), dtype=dtype)
        self.inner = PyroModule[nn.Linear](1, 3, dtype=dtype)
        self.inner.weight = PyroSample(dist.Normal(zero, 1.0).expand([3, 1]).to_event(2))
        self.inner.bias = PyroSample(dist.Normal(zero, 1.0).expand([3]).to_event(1))
        self.outer = PyroModule[nn.Linear](3, 1, bias=False, dtype=dtype)
        self.outer.weight = PyroSample(dist.Normal(zero, 1.0).expand([1, 3]).to_event(2))

    def forward(self, y: Tensor) -> None:
        observe(self.outer(self.inner(y[:, None]).tanh()).squeeze(-1), y)


def nested_plates(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfCauchy(1 + 0 * y[0]))
    with pyro.plate("rows", 2, dim=-2):
        row = pyro.sample("row", dist.Normal(0 * y[0], scale))
        with pyro.plate("columns", 5, dim=-1):
            cell = pyro.sample("cell", dist.Normal(row, 1.0))
            pyro.sample("obs", dist.Normal(cell, 1.0), obs=y.expand(2, 5))


def matrix_product(y: Tensor) -> None:
    """``X @ w`` and an index into a vector, which a plate of particles would get wrong."""
    w = pyro.sample("w", dist.Normal(0 * y[:2], 1.0).to_event(1))
    group = pyro.sample("group", dist.Normal(0 * y[:3], 1.0).to_event(1))
    observe(torch.stack([y, y**2], -1) @ w + group[torch.tensor([0, 1, 2, 1, 0])], y)


def undeclared_batch(y: Tensor) -> None:
    """Batch dimensions without a plate."""
    z = pyro.sample("z", dist.Normal(0 * y, 1.0))
    pyro.sample("obs", dist.Normal(z, 1.0), obs=y)


def sums_over_all(y: Tensor) -> None:
    """A sum that in a plate of particles would run over particles too."""
    with pyro.plate("parts", len(y)):
        theta = pyro.sample("theta", dist.Normal(0 * y, 1.0))
    observe(theta.sum(), y)


def gaussian_process(y: Tensor) -> None:
    length = pyro.sample("length", dist.LogNormal(0 * y[0], 1.0))
    x = torch.arange(len(y)).to(y)
    kernel = (-0.5 * ((x[:, None] - x) / length) ** 2).exp() + 0.5 * torch.eye(len(y)).to(y)
    root = torch.linalg.cholesky(kernel)
    pyro.sample("obs", dist.MultivariateNormal(0 * y, scale_tril=root), obs=y)


def discrete_hmm(y: Tensor) -> None:
    stay = y.new_ones(2, 2) + torch.eye(2).to(y)
    transition = pyro.sample("transition", dist.Dirichlet(stay).to_event(1))
    loc = pyro.sample("loc", dist.Normal(0 * y[:2], 1.0).to_event(1))
    hmm = dist.DiscreteHMM(0 * y[:2], transition.log(), dist.Normal(loc, 1.0), duration=len(y))
    pyro.sample("obs", hmm, obs=y)


def gaussian_hmm(y: Tensor) -> None:
    noise = pyro.sample("noise", dist.HalfNormal(1 + 0 * y[0]))
    eye = torch.eye(1).to(y)
    wide = dist.MultivariateNormal(0 * y[:1], eye)
    step = dist.MultivariateNormal(0 * y[:1], scale_tril=noise * eye)
    pyro.sample("obs", dist.GaussianHMM(wide, eye, step, eye, wide, duration=5), obs=y[:, None])


def truncated(y: Tensor) -> None:
    """A normal below zero, by its quantiles."""
    u = pyro.sample("u", dist.Uniform(0 * y[0], 0.5))
    observe(pyro.deterministic("z", torch.special.ndtri(u)), y)


def multinomial(y: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(1 + 0 * y[:3]))
    pyro.sample("obs", dist.Multinomial(6, p), obs=torch.tensor([1.0, 0.0, 5.0]).to(y))


def ordered_logistic(y: Tensor) -> None:
    normal = dist.Normal(0 * y[:3], 1.0)
    cuts = pyro.sample("cuts", dist.TransformedDistribution(normal, dist.transforms.OrderedTransform()))
    slope = pyro.sample("slope", dist.Normal(0 * y[0], 1.0))
    with pyro.plate("data", len(y)):
        seen = torch.tensor([0, 1, 3, 2, 3])
        pyro.sample("obs", dist.OrderedLogistic(slope * y, cuts), obs=seen)


def counts(y: Tensor) -> None:
    """Discrete observations of three kinds."""
    share = pyro.sample("share", dist.Beta(1 + 0 * y[0], 1.0))
    rate = pyro.sample("rate", dist.Gamma(2 + 0 * y[0], 1.0))
    with pyro.plate("data", len(y)):
        seen = y.abs().round()
        pyro.sample("bernoulli", dist.Bernoulli(share), obs=(y > 0).to(y))
        pyro.sample("poisson", dist.ZeroInflatedPoisson(rate=rate, gate=share), obs=seen)
        pyro.sample("binomial", dist.BetaBinomial(rate, 1.0, 5), obs=seen)


def correlated_effects(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1 + 0 * y[:2]).to_event(1))
    root = pyro.sample("root", dist.LKJCholesky(2, 1 + 0 * y[0]))
    with pyro.plate("groups", len(y)):
        tril = scale[:, None] * root
        effect = pyro.sample("effect", dist.MultivariateNormal(0 * y[:2], scale_tril=tril))
        pyro.sample("obs", dist.Normal(effect.sum(-1), 1.0), obs=y)


def with_param(y: Tensor) -> None:
    scale = pyro.param("scale", 1 + 0 * y[0], constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0 * y[0], scale))
    observe(mu, y)


def sequential_plate(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * y[0], 1.0))
    for i in pyro.plate("data", len(y)):
        z = pyro.sample(f"z_{i}", dist.Normal(mu, 1.0))
        pyro.sample(f"obs_{i}", dist.Normal(z, 1.0), obs=y[i])


def time_series(y: Tensor) -> None:
    """A latent state for each time, each with a site of its own."""
    z = 0 * y[0]
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 1.0))
        pyro.sample(f"obs_{t}", dist.Normal(z, 1.0), obs=y[t])


def minibatch(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * y[0], 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as index:
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=y[index])


def reads_a_number(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * y[0], 1.0))
    observe(mu + 0 * mu.item(), y)  # without losing the gradient


def fills_a_buffer(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * y[0], 1.0))
    mean = torch.zeros_like(y)
    for i in range(len(y)):
        mean[i] = i * mu
    observe(mean, y)


def buffer_with_particles(y: Tensor) -> None:
    """In-place writes that broadcast: a plate of particles can score them, vmap cannot."""
    p = pyro.sample("p", dist.Beta(1 + 0 * y[0], 1.0))
    total = torch.zeros(p.shape).to(y)
    total += p
    observe(total, y)


@config_enumerate
def mixture_of_three(y: Tensor) -> None:
    """A mixture marked as a whole, its means indexed with Vindex."""
    weights = pyro.sample("weights", dist.Dirichlet(1 + 0 * y[:3]))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(0 * y[0], 2.0))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(Vindex(loc)[..., k], 1.0), obs=y)


def switch_for_all(y: Tensor) -> None:
    """A discrete site that all data share, and a latent that depends on it."""
    k = pyro.sample("k", dist.Bernoulli(0.3 + 0 * y[0]), infer=SUMMED_OUT)
    z = pyro.sample("z", dist.Normal(3 * k, 1.0))
    observe(z + k, y)


def unmarked(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * y[0], 1.0))
    observe(mu + pyro.sample("k", dist.Bernoulli(0.3)), y)


def latent_count(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2 + 0 * y[0], 1.0))
    observe(pyro.sample("k", dist.Poisson(rate)), y)


def moving_support(y: Tensor) -> None:
    top = pyro.sample("top", dist.LogNormal(0 * y[0], 1.0))
    observe(pyro.sample("z", dist.Uniform(0.0, top)), y)


def support_by_switch(y: Tensor) -> None:
    k = pyro.sample("k", dist.Bernoulli(0.3 + 0 * y[0]), infer=SUMMED_OUT)
    observe(pyro.sample("z", dist.Uniform(0.0, 1 + k)), y)


def other_site(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * y[0] + 1.0, 0.01))
    scale = pyro.sample("wide" if mu > 0.5 else "narrow", dist.HalfNormal(1 + 0 * y[0]))
    observe(mu * scale, y)


def fewer_sites(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * y[0] + 1.0, 0.01))
    observe(mu * pyro.sample("scale", dist.HalfNormal(1 + 0 * y[0])) if mu > 0.5 else mu, y)


def other_shape(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0 * y[0] + 1.0, 0.01))
    with pyro.plate("parts", 2 if mu > 0.5 else 1):
        z = pyro.sample("z", dist.Normal(0 * y[0], 1.0))
    observe(mu + z.sum(), y)


class Unscored(dist.TorchDistribution):  # type: ignore[misc]
    """An implicit prior, which can be drawn from but has no density."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, like: Tensor):
        self.like = like
        super().__init__(validate_args=False)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return torch.randn(sample_shape).to(self.like) ** 3


def implicit_prior(y: Tensor) -> None:
    observe(pyro.sample("z", Unscored(y)), y)


def two(dtype: torch.dtype) -> Args:
    return (five(dtype)[0][:2],)


def with_network(dtype: torch.dtype) -> Args:
    return BayesianNetwork(dtype), *five(dtype)


def schools(dtype: torch.dtype) -> Args:
    return models.SIGMA.to(dtype), models.Y.to(dtype)


def table(dtype: torch.dtype) -> Args:
    (y,) = five(dtype)
    return (y[:4, None] - y[1:4],)


CHANGES = "Give the model the same sites in every call"
ZOO: tuple[Animal, ...] = (
    *(
        Animal(name, prior(family), mode="loop" if name == "Stable" else "fast", refused=REFUSED_FAMILIES.get(name))
        for name, family in FAMILIES.items()
    ),
    Animal("eight schools", models.eight_schools, schools),
    Animal("every support", models.every_support),
    Animal("deterministic and factor", deterministic_and_factor),
    Animal("scale", scaled),
    Animal("masked data", masked_data),
    Animal("obs_mask", missing_data),
    Animal("masked latent", masked_latent),
    Animal("NaN data", nan_data),
    Animal("centred", centred),
    Animal("LocScaleReparam", reparameterised(centred, theta=LocScaleReparam(0.0))),
    Animal("LocScaleReparam, learned", reparameterised(centred, theta=LocScaleReparam())),
    Animal("TransformReparam", reparameterised(log_normal_by_transform, z=TransformReparam())),
    Animal(
        "ProjectedNormalReparam",
        reparameterised(prior(FAMILIES["ProjectedNormal"]), z=ProjectedNormalReparam()),
        mode="loop",  # Pyro writes into ``.data`` there
    ),
    Animal("LatentStableReparam", reparameterised(prior(FAMILIES["Stable"]), z=LatentStableReparam()), mode="loop"),
    Animal(
        "HaarReparam",
        reparameterised(prior(lambda one: dist.Normal(0 * one.expand(4), 1.0).to_event(1)), z=HaarReparam(dim=-1)),
    ),
    Animal("Bayesian network", lambda network, y: network(y), with_network),
    Animal("nested plates", nested_plates),
    Animal("matrix product", matrix_product),
    Animal("undeclared batch", undeclared_batch),
    Animal("sum over all", sums_over_all),
    Animal("Gaussian process", gaussian_process),
    Animal("Cholesky factor that can fail", models.fragile_cholesky, two),
    Animal("hard constraint", models.half_line),
    Animal("DiscreteHMM", discrete_hmm),
    Animal("GaussianHMM data", gaussian_hmm),
    Animal("truncated", truncated),
    Animal("Multinomial", multinomial),
    Animal("OrderedLogistic", ordered_logistic),
    Animal("counts", counts),
    Animal("correlated effects", correlated_effects),
    Animal("param", with_param),
    Animal("sequential plate", sequential_plate),
    Animal("time series", time_series),
    Animal("minibatch", minibatch),
    Animal("branch on a latent", models.branches_on_a_latent, mode="loop"),
    Animal("reads a number", reads_a_number, mode="loop"),
    Animal("fills a buffer", fills_a_buffer, mode="loop"),
    Animal("buffer with particles", buffer_with_particles, mode="plate"),
    Animal("mixture", models.mixture),
    Animal("config_enumerate", mixture_of_three),
    Animal("hidden Markov", models.hidden_markov),
    Animal("nested discrete", models.nested_discrete, table),
    Animal("switch for all", switch_for_all),
    Animal("unmarked discrete", unmarked, refused="'k' is not marked to be summed out"),
    Animal("latent count", latent_count, refused="'k' has infinitely many values"),
    Animal("local latents in minibatches", models.local_latents, refused="subsampled plate: data"),
    Animal("moving support", moving_support, refused="support of site 'z' must not depend on other"),
    Animal("support by switch", support_by_switch, refused="support of site 'z' must not depend on other"),
    Animal("other site", other_site, refused=f"did not have before: 'narrow'.*{CHANGES}"),
    Animal("fewer sites", fewer_sites, refused=f"no longer visits its latent sites: 'scale'.*{CHANGES}"),
    Animal("other shape", other_shape, refused="shape of site 'z' has changed"),
    Animal("implicit prior", implicit_prior, refused="can be drawn from but has no density"),
)
