"""Discrete latent sites, summed out exactly: ``log Σ_k p(x, z, k)`` of an enumerated trace.

A site is *enumerated* if it is marked ``infer={"enumerate": "parallel"}``, as with `pyro.infer.config_enumerate`, and
its support is finite. Pyro's `EnumMessenger` runs the model at all values of such sites at once, each along a dimension
to the left of all plates, and Pyro's contraction sums over them, plate by plate.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer import infer_discrete
from pyro.ops import packed, special
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine import block, condition, trace
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from implicitvi.errors import ImplicitVIError, ModelError
from implicitvi.pyro_model.tracing import is_summed

FALLBACK = "There is a performance drop because we have not yet implemented the batching rule"


def is_finite(fn: Any) -> bool:
    """Whether all values of a discrete distribution can be listed."""
    if not getattr(fn, "has_enumerate_support", False):
        return False
    try:
        fn.enumerate_support(expand=False)
    except NotImplementedError:  # a product of discrete distributions, made with to_event
        return False
    return True


def is_enumerated(node: dict[str, Any]) -> bool:
    """Whether a sample site is marked to be summed out, and can be."""
    infer = node["infer"]
    return (
        infer.get("enumerate") == "parallel"
        and infer.get("num_samples") is None
        and not node["is_observed"]
        and is_finite(node["fn"])
    )


class SharedSiteError(ImplicitVIError, ValueError):
    """Several observations hang on one discrete site, so that none has a log density of its own."""


class Enumerate(EnumMessenger):
    """Pyro's messenger, with shapes read in a way that a batch of particles allows too."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value, infer = msg["value"], msg["infer"]
        if value is None or not isinstance(msg["fn"], TorchDistributionMixin):
            return
        shape = value.shape[: value.dim() - msg["fn"].event_dim]
        ids = infer.setdefault("_dim_to_id", {})
        ids.update(self._param_dims.get(msg["name"], {}))
        self._value_dims[msg["name"]] = {dim: id_ for dim, id_ in ids.items() if len(shape) >= -dim and shape[dim] > 1}


def log_sum(trace: Any) -> Tensor:
    """``log Σ_k`` of the density of a scored trace over its enumerated sites: a scalar, in nats.

    Sites that depend on no enumerated one are simply added. Of the others masks are applied inside the sum and the
    scale, which they must share, outside of it, as in `pyro.infer.TraceEnum_ELBO`.

    Raises:
        ModelError: The sum is not defined, or is exponential in the size of the data.
    """
    dependent = _dependent_terms(trace)
    nodes = trace.nodes
    rest = [n["log_prob_sum"] for k, n in nodes.items() if "log_prob_sum" in n and k not in dependent]
    if not dependent:
        return sum(rest, torch.zeros(()))
    scales = {name: nodes[name]["scale"] for name in dependent}
    if any(isinstance(s, Tensor) and s.dim() for s in scales.values()) or (
        len({float(scale) for scale in scales.values()}) > 1
    ):
        raise ModelError(
            "sites that depend on one enumerated site have different scales",
            got=", ".join(f"{name}: {scale}" for name, scale in scales.items()),
            expected="one number",
            do="Keep minibatches and poutine.scale away from discrete sites that all data share, or pass all data.",
            faq="a-discrete-latent-is-refused",
        )
    try:
        total = _contract(trace, dependent, frozenset())
    except NotImplementedError as error:
        raise ModelError(
            "the discrete sites of the model cannot be summed out exactly",
            got=str(error),
            faq="a-discrete-latent-is-refused",
        ) from error
    summed: Tensor = scales[next(iter(scales))] * total
    return sum(rest, summed)


def log_sum_of(trace: Any, name: str) -> Tensor:
    """Log density of each observation of one site with its discrete sites summed out, without the scale.

    Returns:
        In nats; its shape broadcasts with the batch shape of the site.

    Raises:
        SharedSiteError: It is not defined observation by observation, because a discrete site stands outside the
            plates of the observations or other sites depend on it too.
    """
    dependent = _dependent_terms(trace)
    node = trace.nodes[name]
    if name not in dependent:
        plain: Tensor = node["masked_log_prob"]
        return plain
    family = _family(trace, dependent, name)
    plates = _plates(trace, name)
    for other in sorted(family - {name}):
        if not is_summed(trace.nodes[other]):
            raise SharedSiteError(f"{name!r} and {other!r} depend on the same discrete site")
        if _plates(trace, other) != plates:
            raise SharedSiteError(f"observations of {name!r} share the discrete site {other!r}")
    total = _contract(trace, {k: v for k, v in dependent.items() if k in family}, plates)
    summed: Tensor = packed.unpack(total, trace.symbol_to_dim)
    return summed


def discrete_draw(
    model: Callable[..., Any], values: dict[str, Tensor], nesting: int, /, *args: Any, **kwargs: Any
) -> dict[str, Tensor]:
    """The enumerated sites, drawn together from their exact conditional at ``values`` and the data."""
    sampler = infer_discrete(condition(model, data=values), first_available_dim=-1 - nesting)
    with block():
        nodes = trace(sampler).get_trace(*args, **kwargs).nodes
    return {name: node["value"] for name, node in nodes.items() if node["type"] == "sample" and is_enumerated(node)}


class _SafeLog(torch.autograd.Function):
    """Pyro's logarithm with a bounded gradient, in the form that `torch.func.vmap` asks for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.log()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        smallest = torch.finfo(x.dtype).eps
        gradient: Tensor = grads[0] / x.clamp(min=smallest)
        return gradient


@contextmanager
def batchable(*, quiet: bool = False) -> Iterator[None]:
    """Let Pyro's sums over discrete values, hidden Markov models' too, run under `torch.func.vmap`.

    ``quiet`` hides the warning that vmap loops inside an operation, which it repeats for every call.
    """
    original = special._SafeLog
    setattr(special, "_SafeLog", _SafeLog)  # noqa: B010
    try:
        with warnings.catch_warnings() if quiet else nullcontext():
            if quiet:
                warnings.filterwarnings("ignore", FALLBACK)
            yield
    finally:
        setattr(special, "_SafeLog", original)  # noqa: B010


def _dependent_terms(trace: Any) -> dict[str, Tensor]:
    """Packed log densities of the sites that an enumerated value reaches, by name."""
    trace.symbolize_dims()
    plates = set(trace.plate_to_symbol.values())
    terms = {}
    for name, node in trace.nodes.items():
        if "masked_log_prob" not in node:
            continue
        symbols = node["infer"]["_dim_to_symbol"]
        log_prob = node["masked_log_prob"]
        enumerated = [dim for dim, symbol in symbols.items() if symbol not in plates]
        if any(-dim <= log_prob.dim() and log_prob.shape[dim] > 1 for dim in enumerated):
            terms[name] = packed.pack(log_prob[...], symbols)
    return terms


def _contract(trace: Any, terms: dict[str, Tensor], plates: frozenset[str]) -> Tensor:
    """Sum the product of densities over all enumerated values, and multiply over all plates but ``plates``."""
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    sizes: dict[str, int] = {}
    for name, term in terms.items():
        tree.setdefault(_plates(trace, name), []).append(term)
        sizes |= zip(_dims(term), term.shape, strict=True)
    sum_dims = set(sizes) - set(trace.plate_to_symbol.values())
    ring = LogRing(dim_to_size=sizes)
    total: Tensor = contract_to_tensor(tree, sum_dims, target_ordinal=plates, ring=ring)
    return total


def _plates(trace: Any, name: str) -> frozenset[str]:
    """Symbols of the vectorised plates of a site."""
    return frozenset(
        trace.plate_to_symbol[frame.name] for frame in trace.nodes[name]["cond_indep_stack"] if frame.vectorized
    )


def _family(trace: Any, terms: dict[str, Tensor], name: str) -> set[str]:
    """Names of the sites that are tied to one by enumerated values, itself included."""
    plates = set(trace.plate_to_symbol.values())
    symbols = {other: set(_dims(term)) - plates for other, term in terms.items()}
    family, frontier = {name}, [name]
    while frontier:
        reached = symbols[frontier.pop()]
        near = {other for other in symbols if symbols[other] & reached} - family
        family |= near
        frontier.extend(near)
    return family


def _dims(term: Tensor) -> str:
    dims: str = term._pyro_dims  # type: ignore[attr-defined]
    return dims
