"""One run of a Pyro model at given values of its latent sites, and the log density of each of its sites."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, Independent, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from implicitvi.errors import ImplicitVIError, ModelError
from implicitvi.numerics.types import Model

SAME_SITES = "Give the model the same sites in every call, whatever the values of its latents."
PARTICLE_ERRORS = (ValueError, ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


def run_at(model: Model, values: dict[str, Tensor], /, *args: Any, **kwargs: Any) -> Any:
    """Pyro trace of ``model`` with its latent sites fixed to ``values``, nothing scored yet."""
    with poutine.block():
        return poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs)


def score(trace: Any, latent: Collection[str], exclude: Collection[str] = ()) -> None:
    """Write ``masked_log_prob``, ``log_prob`` (with the scale) and ``log_prob_sum`` into every sample node of a trace.

    A mask takes entries of *observed* sites out. A masked entry of a latent site is scored by its own
    distribution all the same: it then integrates to one and leaves every other posterior as it is, where a log
    density of zero would be improper, and a sampler would follow it to infinity. The one exception is a latent
    masked by a plain ``False``, Pyro's way to write a flat prior.

    Raises:
        ModelError: A site has no density.
    """
    for name, node in trace.nodes.items():
        if name in exclude or not is_scored(node):
            continue
        fn, mask = node["fn"], node["mask"]
        if not node["is_observed"] or name in latent:
            fn, mask = _unmasked(fn), (False if mask is False else None)
        try:
            log_prob = fn.log_prob(node["value"], *node["args"], **node["kwargs"])
        except NotImplementedError as error:
            raise _no_density(name, latent=name in latent, got=str(error) or None) from error
        node["masked_log_prob"] = scale_and_mask(log_prob, mask=mask)
        node["log_prob"] = scale_and_mask(log_prob, node["scale"], mask)
        node["log_prob_sum"] = node["log_prob"].sum()


def sites_without_density(model: Model, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> tuple[str, ...]:
    """Names of the latent sites, of those in ``values``, that can be drawn from but not scored."""
    implicit = []
    trace = run_at(model, values, *args, **kwargs)
    for name in values:
        node = trace.nodes[name]
        try:
            node["fn"].log_prob(node["value"])
        except NotImplementedError:
            implicit.append(name)
    return tuple(implicit)


def flat_sites(model: Model, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> tuple[str, ...]:
    """Names of the latent sites, of those in ``values``, with a flat prior: masked by a plain ``False``."""
    nodes = run_at(model, values, *args, **kwargs).nodes
    return tuple(name for name in values if _is_flat(nodes[name]))


def _is_flat(node: Any) -> bool:
    fn = _unmasked(node["fn"])
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return node["mask"] is False or isinstance(fn, MaskedDistribution)


def is_scored(node: Any) -> bool:
    """Whether a node of a trace has a log density that counts: not a parameter, minibatch or `pyro.deterministic`."""
    return node["type"] == "sample" and not site_is_subsample(node) and not node["infer"].get("_deterministic")


def is_deterministic(node: Any) -> bool:
    """Whether a sample node is a `pyro.deterministic`, or what a reparameterisation left in place of its site."""
    fn = node["fn"]
    while isinstance(fn, MaskedDistribution | Independent):
        fn = fn.base_dist
    return bool(node["is_observed"]) and isinstance(fn, Delta)


def is_summed(node: Any) -> bool:
    """Whether a node of an enumerated trace stands for all values of its site."""
    return node["type"] == "sample" and "_enumerate_dim" in node["infer"]


def check_sites(trace: Any, shapes: Mapping[str, tuple[int, ...]], *, wider: bool) -> None:
    """Raise `ModelError` unless every random site of a trace is accounted for.

    Args:
        trace: The trace.
        shapes: The latent sites that the model is known for: ``{name: shape}``.
        wider: Whether sites may have further dimensions on the left.
    """
    visited = 0
    for name, node in trace.nodes.items():
        known = shapes.get(name)
        if known is not None:
            visited += 1
            shape = node["fn"].batch_shape + node["fn"].event_shape
            if shape != known and not (wider and shape[len(shape) - len(known) :] == known):
                raise ModelError(
                    f"the shape of site {name!r} has changed",
                    got=tuple(shape),
                    expected=known,
                    do="Give the model data of the same size in every call, or make a new guide.",
                    faq="sites-or-shapes-have-changed",
                )
        elif (
            node["type"] == "sample" and not node["is_observed"] and not is_summed(node) and not site_is_subsample(node)
        ):
            raise ModelError(
                f"the model visits a latent site that it did not have before: {name!r}",
                expected=", ".join(shapes),
                do=SAME_SITES,
                faq="sites-or-shapes-have-changed",
            )
    if visited < len(shapes):
        missing = ", ".join(repr(name) for name in shapes if name not in trace.nodes)
        raise ModelError(
            f"the model does not visit its latent sites any more: {missing}",
            do=SAME_SITES,
            faq="sites-or-shapes-have-changed",
        )


def plate_nesting(nodes: Iterable[Any]) -> int:
    """How many dimensions the vectorised plates of sample nodes take."""
    frames = (frame for node in nodes for frame in node["cond_indep_stack"])
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)


def _unmasked(fn: Any) -> Any:
    """A distribution without its masks; a flat one, masked by a plain ``False``, stays as it is."""
    if isinstance(fn, MaskedDistribution):
        return fn if fn._mask is False else _unmasked(fn.base_dist)
    if isinstance(fn, Independent):
        base = _unmasked(fn.base_dist)
        return fn if base is fn.base_dist else base.to_event(fn.reinterpreted_batch_ndims)
    return fn


def _no_density(name: str, *, latent: bool, got: str | None) -> ModelError:
    if latent:
        return ModelError(
            f"the prior of site {name!r} can be drawn from but has no density",
            got=got,
            do="Use contrast='prior', which needs none, or give the site a distribution with a log_prob.",
            faq="a-distribution-has-no-density",
        )
    return ModelError(
        f"the distribution of site {name!r} has no density",
        got=got,
        do="Observe it through a distribution with a log_prob, or reparameterise it (pyro.infer.reparam).",
        faq="a-distribution-has-no-density",
    )


@contextmanager
def unvalidated() -> Iterator[None]:
    """Run model code without argument checks: they branch on values, which a batch of particles cannot."""
    with pyro.validation_enabled(False):
        yield


def is_particles_fault(error: Exception) -> bool:
    """Whether an error may come from the values of one particle, as a failed Cholesky factorisation does."""
    return isinstance(error, PARTICLE_ERRORS) and not isinstance(error, ImplicitVIError)


def first_line(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
