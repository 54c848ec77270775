"""Check a model's sites and data before a guide is built for it."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.distributions import ImproperUniform, Independent, NanMaskedMultivariateNormal, NanMaskedNormal
from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import TransformedDistribution, biject_to
from torch.distributions.constraints import Constraint, is_dependent

from implicitvi.errors import ModelError
from implicitvi.numerics.types import Model
from implicitvi.pyro_model.enumeration import is_enumerated, is_finite
from implicitvi.pyro_model.sites import bijection
from implicitvi.pyro_model.subsampling import check_subsample, is_subsampled
from implicitvi.pyro_model.tracing import is_scored, unwrapped, vectorized_plates


def check_site(name: str, fn: Any) -> None:
    """Raise `ModelError` unless a latent site that is not summed out is continuous and maps to the real line."""
    try:
        discrete = fn.support.is_discrete
    except (AttributeError, NotImplementedError):
        discrete = False
    if not discrete:
        bijection(name, fn)
        return
    if name.endswith("_unobserved"):
        problem = "belongs to a site with obs_mask, where Pyro drops the mark of the site to sum it out"
        do = "Decorate the model with @pyro.infer.config_enumerate."
    elif is_finite(fn):
        problem, do = "is not marked to be summed out", f"Write pyro.sample({name!r}, ..., infer="
        do += '{"enumerate": "parallel"}), or decorate the model with @pyro.infer.config_enumerate.'
    elif isinstance(fn, Independent):
        problem = "joins several discrete values with to_event, which Pyro cannot enumerate"
        do = "Declare them independent: a pyro.plate in place of to_event."
    else:
        problem = (
            f"has infinitely many values, or too many to list, so it cannot be summed out, got {type(fn).__name__}"
        )
        do = "Integrate it out by hand (dist.GammaPoisson for a Poisson with a Gamma rate), or condition on it."
    raise ModelError(f"The discrete latent site {name!r} {problem}. {do}", faq="a-discrete-latent-is-refused")


def check_observed(node: Any) -> None:
    """Raise `ModelError` unless data have the shape of their plates and lie in the support of their distribution."""
    name, fn, value = node["name"], node["fn"], node["value"]
    if value.is_complex():
        do = "Pass real and imaginary part, torch.view_as_real(y), as two real numbers."
        raise ModelError.must_be(f"The data of site {name!r}", "real numbers", value.dtype, do)
    batch = value.shape[: value.dim() - fn.event_dim]
    # a column beside a row would broadcast: each entry scored against every other
    shape = torch.broadcast_shapes(fn.batch_shape, batch) if vectorized_plates(node) else fn.batch_shape
    if shape != fn.batch_shape:
        what, expected = f"The shape of the data of site {name!r}", f"the shape of its plates, {tuple(fn.batch_shape)}"
        got = f"{tuple(batch)}, which makes {tuple(shape)} log densities"
        do = "Drop dimensions of size 1, or declare a plate for each dimension."
        raise ModelError.must_be(what, expected, got, do)
    base, masks = unwrapped(fn)
    masks.append(node["mask"])
    support: Any = getattr(type(base), "support", None)
    is_fixed = isinstance(support, Constraint) and not is_dependent(support)  # by the kind, not by parameters
    allows_nan = isinstance(base, NanMaskedNormal | NanMaskedMultivariateNormal)
    if not is_fixed or allows_nan or value.is_meta or any(mask is False for mask in masks):
        return
    inside = support.check(value)
    while inside.dim() > len(batch):
        inside = inside.all(-1)
    for mask in (mask for mask in masks if isinstance(mask, Tensor)):
        inside = inside | ~mask
    if not inside.all():
        inside = inside.expand(batch)
        found = f"{int((~inside).sum())} of {inside.numel()}, the first of them {value[~inside][0].tolist()}"
        raise ModelError(
            f"The data of site {name!r} lie outside the support of their distribution, {support}, got {found}. Correct "
            "the data, or choose a distribution that can produce them. Leave out missing data with obs_mask."
        )


class FillImproper(Messenger):
    """A messenger that gives a latent site with an improper prior a value to start from, as it has no draws."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and _is_improper(msg["fn"]):
            transform = biject_to(msg["fn"].support)
            msg["value"] = transform(torch.zeros(transform.inverse_shape(msg["fn"].shape())))


class PrepareForGuide(FillImproper):
    """A messenger that prepares a model for an autoguide: it unrolls sequential plates and fills in improper sites.

    It refuses sites that a continuous guide cannot draw, before Pyro asks for their support, and data that are not
    tensors, which Pyro cannot score.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not isinstance(msg["value"], Tensor):
            what, kind = f"The data of site {msg['name']!r}", type(msg["value"]).__name__
            raise ModelError.must_be(what, "a tensor", kind, "Pass torch.as_tensor(y) to the model.")
        if site_is_subsample(msg):
            check_subsample(msg)
        elif not is_hidden(msg):
            check_site(msg["name"], msg["fn"])
        frames = (frame for frame in msg["cond_indep_stack"] if frame.vectorized or is_subsampled(frame))
        msg["cond_indep_stack"] = tuple(frames)
        super()._pyro_sample(msg)


class CheckData(Messenger):
    """A messenger that checks a model's data against its plates and distributions."""

    counts = False  # whether any site has a density: a model may be masked as a whole

    def _pyro_sample(self, msg: Any) -> None:
        self.counts |= is_scored(msg) and msg["mask"] is not False
        if msg["is_observed"] and is_scored(msg):
            check_observed(msg)


def _is_improper(fn: Any) -> bool:
    base, _ = unwrapped(fn)
    is_transformed = isinstance(base, TransformedDistribution)
    return _is_improper(base.base_dist) if is_transformed else isinstance(base, ImproperUniform)


def is_hidden(msg: Any) -> bool:
    """Return whether a guide of the continuous latent sites skips a site."""
    return bool(prototype_hide_fn(msg)) or is_enumerated(msg)


def latent_trace(model: Model, /, *args: Any, **kwargs: Any) -> Any:
    """Trace the model's latent sites, except those that are summed out, and check its data."""
    data = CheckData()
    traced = poutine.trace(poutine.block(data(PrepareForGuide()(model)), is_hidden))
    try:
        with poutine.block():
            trace = traced.get_trace(*args, **kwargs)
    except ModelError as error:  # Pyro raises an error again with a table of shapes
        raise error.__cause__ if isinstance(error.__cause__, ModelError) else error from None
    except ZeroDivisionError as error:  # of pyro.plate
        if "size cannot be zero" not in str(error):
            raise
        raise ModelError.must_be(
            "every plate of the model", "of size 1 or more", 0, "Pass data that have rows."
        ) from error
    if trace.stochastic_nodes and not data.counts:
        advice = "Take poutine.mask(mask=False) away from the model, or from its data."
        raise ModelError.must_be("the density of some site", "part of the model", "all of them masked by False", advice)
    return trace


def check_latents(trace: Any, amortized: str | None = None) -> None:
    """Raise `ModelError` unless there are latent sites, none of them in a subsampled plate, except ``amortized``."""
    sites = dict(trace.iter_stochastic_nodes())
    if not sites:
        message = "The model has no latent site to draw. Check that the sites to infer are not observed, and that "
        raise ModelError(f"{message}observed ones get obs=.", faq="the-model-has-no-latent-site")
    for name, node in sites.items():
        if node["value"].dtype not in (torch.float32, torch.float64):
            do = "Give its prior parameters of these types, as with y.float() in place of y."
            raise ModelError.must_be(f"latent site {name!r}", "of float32 or float64", node["value"].dtype, do)
    frames = (frame for node in sites.values() for frame in node["cond_indep_stack"])
    local = sorted({frame.name for frame in frames if is_subsampled(frame) and frame.name != amortized})
    if local:
        message = f"Latent sites must not be in a subsampled plate: {', '.join(local)}. Run the plate in full, or "
        message += f"amortize it, ImplicitGuide(model, amortize={{{local[0]!r}: features}}), with a function of the "
        message += "model's arguments that returns a row for each element."
        raise ModelError(message, faq="a-latent-for-every-row")
