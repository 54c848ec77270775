"""Describe the latent sites of a guide by plain values, so that a stored guide draws without the model's arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from implicitvi.inference.guide import ImplicitGuide
from implicitvi.pyro_model.sites import Site, SiteLayout

# The supports that a file can hold: their names in Pyro, with the names of their arguments.
SUPPORTS: dict[str, tuple[str, ...]] = {
    "real": (),
    "simplex": (),
    "corr_cholesky": (),
    "lower_cholesky": (),
    "positive_definite": (),
    "ordered_vector": (),
    "positive_ordered_vector": (),
    "softplus_positive": (),
    "softplus_lower_cholesky": (),
    "greater_than": ("lower_bound",),
    "greater_than_eq": ("lower_bound",),
    "less_than": ("upper_bound",),
    "interval": ("lower_bound", "upper_bound"),
    "half_open_interval": ("lower_bound", "upper_bound"),
    "independent": ("base_constraint", "reinterpreted_batch_ndims"),
    "stack": ("cseq", "dim"),
    "cat": ("cseq", "dim", "lengths"),
}


def describe_sites(guide: ImplicitGuide) -> list[dict[str, Any]] | None:
    """Return the sites of a guide as numbers, words and tensors; ``None`` where they cannot be described.

    That is so for an amortized guide, whose draws need data, and for a support that is not among `SUPPORTS`.
    """
    if guide.amortization is not None:
        return None
    trace: Any = guide.prototype_trace
    supports = [describe(trace.nodes[name]["fn"].support) for name in guide.layout.names]
    if any(support is None for support in supports):
        return None
    fields = ("name", "shape", "unconstrained_shape", "event_dim", "dims")
    return [
        {name: getattr(site, name) for name in fields} | {"support": support}
        for site, support in zip(guide.layout.sites, supports, strict=True)
    ]


def layout_of(sites: Sequence[Mapping[str, Any]] | None) -> SiteLayout | None:
    """Return the layout that `describe_sites` described; ``None`` for ``None``."""
    if sites is None:
        return None
    return SiteLayout(
        tuple(
            Site(**{k: v for k, v in site.items() if k != "support"}, transform=biject_to(support_of(site["support"])))
            for site in sites
        )
    )


def describe(value: Any) -> Any:
    """Return a support, or an argument of one, as a plain value; ``None`` where it is not among `SUPPORTS`.

    >>> describe(constraints.interval(0.0, 2.0))
    {'interval': [0.0, 2.0]}
    >>> support_of(_)
    Interval(lower_bound=0.0, upper_bound=2.0)
    """
    if isinstance(value, int | float | Tensor):
        return value
    if isinstance(value, list | tuple):
        found = [describe(each) for each in value]
        return None if any(each is None for each in found) else found
    for name, arguments in SUPPORTS.items():
        kind = getattr(constraints, name)
        if type(value) is (kind if isinstance(kind, type) else type(kind)):
            found = [describe(getattr(value, argument)) for argument in arguments]
            return None if any(each is None for each in found) else {name: found}
    return None


def support_of(value: Any) -> Any:
    """Return the support that `describe` described."""
    if isinstance(value, list):
        return [support_of(each) for each in value]
    if not isinstance(value, dict):
        return value
    ((name, arguments),) = value.items()
    if name not in SUPPORTS:
        raise ValueError(f"support {name!r}")
    kind = getattr(constraints, name)
    return kind if isinstance(kind, Constraint) else kind(*map(support_of, arguments))
