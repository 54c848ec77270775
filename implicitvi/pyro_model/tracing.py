"""Run a Pyro model at given values of its latent sites, and score each of its sites."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from threading import Lock
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, ExpandedDistribution, Independent, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from implicitvi.errors import ImplicitVIError, ModelError
from implicitvi.numerics.types import Model

SAME_SITES = "Give the model the same sites in every call, whatever the values of its latents."
CHECKS = (  # the switches of Pyro and torch that check arguments
    "validate_distributions_pyro",
    "validate_distributions_torch",
    "validate_infer",
    "validate_poutine",
)
PARTICLE_ERRORS = (ValueError, ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


def run_at(model: Model, values: dict[str, Tensor], /, *args: Any, **kwargs: Any) -> Any:
    """Return the Pyro trace of ``model`` with its latent sites fixed to ``values``; nothing is scored yet."""
    with poutine.block():
        return poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs)


def score(trace: Any, latent: Collection[str], exclude: Collection[str] = ()) -> None:
    """Write ``masked_log_prob``, ``log_prob`` (with the scale) and ``log_prob_sum`` into every sample node of a trace.

    A mask removes entries of *observed* sites. A masked entry of a latent site is scored by its own distribution: it
    then integrates to one and leaves every other posterior unchanged; a log density of zero would be improper, and a
    sampler would follow it to infinity. The exception is a plain ``False``, Pyro's way to write a flat prior.

    Raises:
        ModelError: A site has no density.
    """
    for name, node in trace.nodes.items():
        if name in exclude or not is_scored(node):
            continue
        fn, mask, value = node["fn"], node["mask"], node["value"]
        if not node["is_observed"] or name in latent:
            fn, mask = _unmasked(fn), (False if mask is False else None)
        else:
            value = _filled_in(value, fn, mask)
        try:
            log_prob = _log_prob(node, fn, value)
        except NotImplementedError as error:
            raise _no_density(name, error, latent=name in latent) from error
        node["masked_log_prob"] = scale_and_mask(log_prob, mask=mask)
        node["log_prob"] = scale_and_mask(log_prob, node["scale"], mask)
        node["log_prob_sum"] = node["log_prob"].sum()


def sites_without_density(model: Model, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> tuple[str, ...]:
    """Return the names of the latent sites in ``values`` that can be sampled but not scored."""
    implicit = []
    nodes = run_at(model, values, *args, **kwargs).nodes
    for name in values:
        try:
            nodes[name]["fn"].log_prob(nodes[name]["value"])
        except NotImplementedError:
            implicit.append(name)
    return tuple(implicit)


def latent_nodes(trace: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and nodes of the unobserved sites of a Pyro trace."""
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node):
            yield name, node


def is_scored(node: Any) -> bool:
    """Return whether a node has a log density that counts: not a parameter, minibatch or `pyro.deterministic`."""
    return node["type"] == "sample" and not site_is_subsample(node) and not node["infer"].get("_deterministic")


def is_deterministic(node: Any) -> bool:
    """Return whether a sample node is a `pyro.deterministic`, or the one that a reparameterised site leaves behind."""
    return bool(node["is_observed"]) and isinstance(unwrapped(node["fn"])[0], Delta)


def is_summed(node: Any) -> bool:
    """Return whether a node of an enumerated trace stands for all values of its site."""
    return node["type"] == "sample" and "_enumerate_dim" in node["infer"]


def check_sites(trace: Any, shapes: Mapping[str, tuple[int, ...]], *, wider: bool) -> None:
    """Raise `ModelError` unless a trace has latent sites of these shapes; ``wider`` ones have more axes in front."""
    for change in _changes(trace, shapes, wider):
        raise ModelError(change, faq="sites-or-shapes-have-changed")


def _changes(trace: Any, shapes: Mapping[str, tuple[int, ...]], wider: bool) -> Iterator[str]:
    """Yield the reasons why the latent sites of a trace are not the known ones; the caller raises at the first."""
    known = ", ".join(shapes)
    for name, node in latent_nodes(trace):
        if name not in shapes and not is_summed(node):
            yield f"The model has a latent site that it did not have before: {name!r}, beside {known}. {SAME_SITES}"
    missing = [repr(name) for name in shapes if name not in trace.nodes]
    if missing:
        yield f"The model no longer visits its latent sites: {', '.join(missing)}. {SAME_SITES}"
    for name, expected in shapes.items():
        shape = tuple(trace.nodes[name]["fn"].shape())
        if shape != expected and not (wider and shape[len(shape) - len(expected) :] == expected):
            change = f"The shape of site {name!r} has changed from {expected} to {shape}."
            yield f"{change} Give the model data of the same size in every call, or make a new guide."


def unwrapped(fn: Any) -> tuple[Any, list[Any]]:
    """Return the distribution inside `Independent`, expanded and masked ones, and the masks."""
    masks = []
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        if isinstance(fn, MaskedDistribution):
            masks.append(fn._mask)
        fn = fn.base_dist
    return fn, masks


def vectorized_plates(node: Any) -> list[Any]:
    """Return the frames of a node's plates that take a dimension each."""
    return [frame for frame in node["cond_indep_stack"] if frame.vectorized]


def plate_nesting(nodes: Iterable[Any]) -> int:
    """Return the number of dimensions that the vectorized plates of sample nodes take."""
    return max((-frame.dim for node in nodes for frame in vectorized_plates(node)), default=0)


def _unmasked(fn: Any) -> Any:
    """Return a distribution without its masks; a flat one, masked by a plain ``False``, is returned unchanged."""
    if isinstance(fn, MaskedDistribution):
        return fn if fn._mask is False else _unmasked(fn.base_dist)
    if isinstance(fn, Independent):
        base = _unmasked(fn.base_dist)
        return fn if base is fn.base_dist else base.to_event(fn.reinterpreted_batch_ndims)
    return fn


def _log_prob(node: Any, fn: Any, value: Any) -> Tensor:
    """Return the log density of a node's value; truth values and whole numbers count as numbers if need be."""
    try:
        log_prob: Tensor = fn.log_prob(value, *node["args"], **node["kwargs"])
    except (RuntimeError, TypeError) as error:
        if isinstance(error, NotImplementedError) or value.is_floating_point() or value.is_complex():
            raise
        log_prob = fn.log_prob(value.to(torch.get_default_dtype()), *node["args"], **node["kwargs"])
    return log_prob


def _filled_in(value: Tensor, fn: Any, mask: Any) -> Tensor:
    """Return data with other data in place of NaN under a mask: a mask removes the density of NaN, not its gradient."""
    base, masks = unwrapped(fn)
    masks = [each for each in (*masks, mask) if isinstance(each, Tensor)]
    if not masks or not value.is_floating_point():
        return value
    batch = value.shape[: value.dim() - base.event_dim]
    seen = torch.ones(batch, dtype=torch.bool, device=value.device)
    for each in masks:
        joined = fn.event_dim - base.event_dim if each is mask else 0
        seen = seen & each[(..., *[None] * joined)]
    if seen.shape != batch or not seen.numel():
        return value
    there = value.isfinite().reshape(*batch, -1).all(-1)
    rows = value.reshape(-1, *value.shape[len(batch) :])
    first = rows.index_select(0, (seen & there).flatten().to(torch.int8).argmax()[None])[0]
    missing = ~(seen | there)[(..., *[None] * base.event_dim)]
    return torch.where(missing, first, value)


def _no_density(name: str, error: NotImplementedError, *, latent: bool) -> ModelError:
    problem = f"The distribution of site {name!r} has no density"
    do = "Observe it through a distribution with a log_prob, or reparameterise it (pyro.infer.reparam)."
    if latent:
        problem = f"The prior of site {name!r} can be drawn from but has no density"
        do = "Use contrast='prior', which needs no density, or give the site a distribution with a log_prob."
    why = f", got {error}" if str(error) else ""
    return ModelError(f"{problem}{why}. {do}", faq="a-distribution-has-no-density")


class _Unvalidated:
    """A context without argument checks that several threads may share: the last to leave restores every switch."""

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._before: dict[str, Any] = {}

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = {name: pyro.settings.get(name) for name in CHECKS}
                pyro.settings.set(**dict.fromkeys(CHECKS, False))
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                pyro.settings.set(**self._before)


_UNVALIDATED = _Unvalidated()


def unvalidated() -> AbstractContextManager[None]:
    """Run model code without argument checks: these branch on values, which a batch of particles cannot do."""
    return _UNVALIDATED


def is_particles_fault(error: Exception) -> bool:
    """Return whether an error may come from the values of one particle, as a failed Cholesky factorisation does."""
    return isinstance(error, PARTICLE_ERRORS) and not isinstance(error, ImplicitVIError)


def first_line(error: Exception) -> str:
    """Return the kind and the first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
