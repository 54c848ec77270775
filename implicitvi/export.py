"""From a guide to ArviZ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.distributions import Unit
from pyro.infer import Predictive
from torch import Tensor

from implicitvi.enumeration import (
    Enumerate,
    SharedSiteError,
    batchable,
    discrete_draw,
    is_enumerated,
    log_sum_of,
)
from implicitvi.errors import check_at_least
from implicitvi.guide import ImplicitGuide
from implicitvi.layout import plate_names
from implicitvi.log_joint import LogJoint
from implicitvi.scoring import plate_nesting, run_at, trace_at, unvalidated

Groups = dict[str, dict[str, NDArray[Any]]]


def to_arviz(
    guide: ImplicitGuide,
    model: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    **kwargs: Any,
) -> Any:
    """Draws of a fitted guide, and what the model makes of them, as ArviZ's container.

    Groups: ``posterior``, with discrete sites that the model sums out drawn from their exact conditional given each
    draw; ``posterior_predictive`` (the observed sites drawn anew); ``log_likelihood`` (of every observation, unscaled,
    discrete sites summed out; left out with a warning where a discrete site is shared by several observations);
    ``observed_data``; ``sample_stats`` with ``lp`` (log joint of the constrained values,
    nats) and, where an adversary was trained, ``log_q_learned`` and ``log_weight`` on the unconstrained space.
    Draws are independent, so they stand as one chain: pass ``reff=1.0`` to ``az.loo``, and read nothing into R-hat.

    Args:
        guide: A fitted guide.
        model: Its model.
        *args: The model's arguments, as in training.
        num_samples: Number of draws.
        coords: Coordinates of the dimensions, as ArviZ takes them.
        dims: Names of the dimensions of each site; the default is the names of its plates.
        **kwargs: The model's keyword arguments.

    Returns:
        An ``InferenceData`` (ArviZ before 1.0) or a ``DataTree``.
    """
    check_at_least("num_samples", num_samples, 1)
    u = guide.sample_unconstrained(num_samples, *args, **kwargs)
    continuous, log_det = guide.layout.unpack(u)
    nodes = _nodes(model, continuous, *args, **kwargs)
    observed = {name: node for name, node in nodes.items() if _is_data(node, name in continuous)}
    discrete = {name: node for name, node in nodes.items() if is_enumerated(node)}
    nesting = plate_nesting(nodes.values())
    posterior = continuous | _discrete(model, continuous, discrete, nesting, *args, **kwargs)
    log_joint = LogJoint(model, guide.layout)
    with torch.no_grad():
        stats = {"lp": log_joint(u, *args, **kwargs) - log_det}
        if guide.has_log_density:
            stats["log_q_learned"] = guide.get_posterior().log_prob(u)
            stats["log_weight"] = stats["lp"] + log_det - stats["log_q_learned"]
    groups: Groups = {
        "posterior": _chain(posterior),
        "posterior_predictive": _chain(_predict(model, posterior, observed, *args, **kwargs)),
        "log_likelihood": _chain(
            _log_likelihood(
                model, continuous, observed, nesting if discrete else None, *args, **kwargs
            )
        ),
        "observed_data": {name: node["value"].numpy(force=True) for name, node in observed.items()},
        "sample_stats": _chain(stats),
    }
    named = {site.name: site.dims for site in guide.layout.sites}
    named |= {name: plate_names(node) for name, node in (discrete | observed).items()}
    given = {} if dims is None else {name: list(value) for name, value in dims.items()}
    all_dims = {name: list(d) for name, d in named.items() if d and None not in d} | given
    return _container({k: v for k, v in groups.items() if v}, coords, all_dims)


def _nodes(
    model: Callable[..., Any], draws: dict[str, Tensor], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Sample nodes of one run of the model at the first draw, by name."""
    first = {name: value[0] for name, value in draws.items()}
    with unvalidated():
        nodes = run_at(model, first, *args, **kwargs).nodes
    return {name: node for name, node in nodes.items() if node["type"] == "sample"}


def _is_data(node: dict[str, Any], latent: bool) -> bool:
    return node["is_observed"] and not latent and not isinstance(node["fn"], Unit)


def _discrete(
    model: Callable[..., Any],
    draws: dict[str, Tensor],
    discrete: dict[str, Any],
    nesting: int,
    *args: Any,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """The enumerated sites given each draw and the data: ``{site: [S, *site shape]}``."""
    if not discrete:
        return {}
    with torch.no_grad(), unvalidated():
        size = len(next(iter(draws.values())))
        each = [
            discrete_draw(model, {k: v[i] for k, v in draws.items()}, nesting, *args, **kwargs)
            for i in range(size)
        ]
    return {
        name: torch.stack([draw[name].reshape(node["value"].shape) for draw in each])
        for name, node in discrete.items()
    }


def _predict(
    model: Callable[..., Any],
    draws: dict[str, Tensor],
    observed: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """The observed sites drawn from the model at each draw of its latents: ``{site: [S, *site shape]}``."""
    free = poutine.uncondition(model)
    predictive = Predictive(free, posterior_samples=draws, return_sites=list(observed))
    with torch.no_grad():
        return dict(predictive(*args, **kwargs)) if observed else {}


def _log_likelihood(
    model: Callable[..., Any],
    draws: dict[str, Tensor],
    observed: dict[str, Any],
    nesting: int | None,
    *args: Any,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Log density of every observation at each draw, without scales: ``{site: [S, *batch shape]}``, nats.

    ``nesting`` is ``None`` for a model without discrete sites. A model whose discrete sites are shared by several
    observations gets a warning and nothing.
    """
    enumerated = model if nesting is None else Enumerate(-1 - nesting)(model)

    def one(values: dict[str, Tensor]) -> dict[str, Tensor]:
        trace = trace_at(enumerated, values, *args, **kwargs)
        return {name: log_sum_of(trace, name) for name in observed}

    with torch.no_grad(), unvalidated():
        try:
            with batchable():
                scores: dict[str, Tensor] = torch.func.vmap(one, randomness="same")(draws)
        except SharedSiteError as error:
            warnings.warn(f"no log_likelihood in the export: {error}", stacklevel=3)
            return {}
        except Exception:  # a model that cannot be batched goes draw by draw
            size = len(next(iter(draws.values())))
            each = [one({name: value[i] for name, value in draws.items()}) for i in range(size)]
            scores = {name: torch.stack([score[name] for score in each]) for name in observed}
    return {
        name: scores[name].reshape(len(scores[name]), *node["fn"].batch_shape)
        for name, node in observed.items()
    }


def _chain(values: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Draws ``[S, …]`` as one chain ``[1, S, …]``."""
    return {name: value.numpy(force=True)[None] for name, value in values.items()}


def _container(groups: Groups, coords: Any, dims: Any) -> Any:
    """The groups in the container of the installed ArviZ: one call shape before 1.0, another since."""
    import arviz

    attrs = {"inference_library": "implicitvi", "inference_library_version": version("implicitvi")}
    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict(groups, coords=coords, dims=dims, attrs={"/": attrs})
    return arviz.from_dict(**groups, coords=coords, dims=dims, attrs=attrs)
