"""Which latent sites of a model a guide can draw, and what is refused before anything is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import (
    ImproperUniform,
    Independent,
    MaskedDistribution,
    NanMaskedMultivariateNormal,
    NanMaskedNormal,
)
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint, is_dependent

from implicitvi.errors import ModelError
from implicitvi.pyro_model.enumeration import is_enumerated, is_finite
from implicitvi.pyro_model.sites import bijection
from implicitvi.pyro_model.subsampling import check_subsample
from implicitvi.pyro_model.tracing import is_scored


def check_site(name: str, fn: Any) -> None:
    """Raise `ModelError` unless a latent site that is not summed out is continuous and maps to the real line."""
    try:
        discrete = fn.support.is_discrete
    except (AttributeError, NotImplementedError):
        discrete = False
    if not discrete:
        bijection(name, fn)
        return
    if is_finite(fn):
        raise ModelError(
            f"the discrete latent site {name!r} is not marked to be summed out",
            do=f'Write pyro.sample({name!r}, ..., infer={{"enumerate": "parallel"}}), or decorate the model with '
            "@pyro.infer.config_enumerate.",
            faq="a-discrete-latent-is-refused",
        )
    if isinstance(fn, Independent):
        raise ModelError(
            f"the discrete latent site {name!r} joins several discrete values with to_event, which Pyro cannot "
            "enumerate",
            do="Declare them independent: a pyro.plate in place of to_event.",
            faq="a-discrete-latent-is-refused",
        )
    raise ModelError(
        f"the discrete latent site {name!r} has infinitely many values, or too many to list, and cannot be summed out",
        got=type(fn).__name__,
        do="Integrate it out by hand (dist.GammaPoisson for a Poisson with a Gamma rate), or condition on it.",
        faq="a-discrete-latent-is-refused",
    )


def check_observed(node: Any) -> None:
    """Raise `ModelError` unless data have the shape of their plates and lie where their distribution can give them."""
    name, fn, value = node["name"], node["fn"], node["value"]
    batch = value.shape[: value.dim() - fn.event_dim]
    if any(frame.vectorized for frame in node["cond_indep_stack"]):
        # a column beside a row would be compared with it each with each
        together = torch.broadcast_shapes(fn.batch_shape, batch)
        if together != fn.batch_shape:
            raise ModelError(
                f"the data of site {name!r} do not have the shape of its plates",
                got=f"{tuple(batch)}, which makes {tuple(together)} log densities",
                expected=f"a shape that fits into {tuple(fn.batch_shape)}",
                do="Drop their dimensions of size 1, or declare all of their dimensions: a plate for each.",
            )
    support, masks = _base(fn)
    masks += [node["mask"]]
    if support is None or value.is_meta or any(mask is False for mask in masks):
        return
    inside = support.check(value)
    while inside.dim() > len(batch):
        inside = inside.all(-1)
    for mask in masks:
        inside = inside | ~mask if isinstance(mask, Tensor) else inside
    if not inside.all():
        inside = inside.expand(batch)
        raise ModelError(
            f"data of site {name!r} lie outside the support of their distribution",
            got=f"{int((~inside).sum())} of {inside.numel()}, the first of them {value[~inside][0].tolist()}",
            expected=str(support),
            do="Correct the data, or take a distribution that can give them. Missing data are left out by obs_mask.",
        )


def _base(fn: Any) -> tuple[Constraint | None, list[Any]]:
    """Support of a distribution, where its parameters have no part in it, and the masks around it."""
    masks = []
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        if isinstance(fn, MaskedDistribution):
            masks.append(fn._mask)
        fn = fn.base_dist
    support = getattr(type(fn), "support", None)
    takes_nan = isinstance(fn, NanMaskedNormal | NanMaskedMultivariateNormal)
    fixed = isinstance(support, Constraint) and not is_dependent(support) and not takes_nan
    return (support if fixed else None), masks


class Readable(Messenger):
    """Shows a model to an autoguide: sequential plates unrolled, a value for sites that cannot be drawn.

    Refuses sites of which a continuous guide can make nothing, before anything asks for their support, and data that
    are no tensors, which Pyro cannot score.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not isinstance(msg["value"], Tensor):
            raise ModelError(
                f"the data of site {msg['name']!r} are not a tensor",
                got=type(msg["value"]).__name__,
                do="Pass torch.as_tensor(y) in place of y to the model.",
            )
        if site_is_subsample(msg):
            check_subsample(msg)
        elif not is_hidden(msg):
            check_site(msg["name"], msg["fn"])
        msg["cond_indep_stack"] = tuple(
            frame for frame in msg["cond_indep_stack"] if frame.vectorized or frame.full_size not in (None, frame.size)
        )
        if isinstance(msg["fn"], ImproperUniform) and msg["value"] is None:
            shape = msg["fn"].shape()
            transform = biject_to(msg["fn"].support)
            msg["value"] = transform(torch.zeros(transform.inverse_shape(shape)))


class CheckedData(Messenger):
    """Holds the data of a model against its plates and distributions."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and is_scored(msg):
            check_observed(msg)


def is_hidden(msg: Any) -> bool:
    """Whether a guide of the continuous latent sites passes over a site."""
    return bool(prototype_hide_fn(msg)) or is_enumerated(msg)


def latent_trace(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Trace of the model's unobserved sample sites, those aside that are summed out; its data are checked."""
    traced = poutine.trace(poutine.block(CheckedData()(Readable()(model)), is_hidden))
    try:
        with poutine.block():
            return traced.get_trace(*args, **kwargs)
    except ModelError as error:  # Pyro raises errors again, with a table of shapes
        raise error.__cause__ if isinstance(error.__cause__, ModelError) else error from None


def check_latents(trace: Any, amortized: str | None = None) -> None:
    """Raise `ModelError` unless every latent site can be drawn: no minibatch of latents but in an amortized plate."""
    sites = dict(trace.iter_stochastic_nodes())
    if not sites:
        raise ModelError(
            "the model has no latent site to draw",
            do="Check that the sites to infer are not observed, and that observed ones get obs=.",
            faq="the-model-has-no-latent-site",
        )
    local = {
        frame.name
        for node in sites.values()
        for frame in node["cond_indep_stack"]
        if frame.full_size and frame.full_size != frame.size and frame.name != amortized
    }
    if local:
        raise ModelError(
            f"latent sites stand in a subsampled plate: {', '.join(sorted(local))}",
            do=f"Amortize the guide over it, ImplicitGuide(model, amortize={{{min(local)!r}: features}}) with a "
            "function of the model's arguments that returns a row for each element; or run the plate in full.",
            faq="a-latent-for-every-row",
        )
