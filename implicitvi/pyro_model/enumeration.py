"""Sum discrete latent sites out exactly: ``log Σ_k p(x, z, k)`` of an enumerated trace.

A site is *enumerated* if it is marked ``infer={"enumerate": "parallel"}``, as with `pyro.infer.config_enumerate`, and
its support is finite. Pyro's `EnumMessenger` runs the model at all values of such sites at once, each along a dimension
to the left of all plates, and Pyro's contraction sums over them, plate by plate.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from math import log, pi
from typing import Any

import torch
from pyro.distributions import MultivariateNormal, NanMaskedMultivariateNormal, NanMaskedNormal, OrderedLogistic
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.discrete import _sample_posterior_from_trace
from pyro.ops import packed, special
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine import block, condition, trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Multinomial
from torch.distributions.utils import broadcast_all

from implicitvi.errors import ImplicitVIError, ModelError
from implicitvi.numerics.types import Model
from implicitvi.pyro_model.tracing import is_summed, score, vectorized_plates

FALLBACK = "There is a performance drop because we have not yet implemented the batching rule"


def is_finite(fn: Any) -> bool:
    """Return whether all values of a discrete distribution can be listed."""
    if not getattr(fn, "has_enumerate_support", False):
        return False
    try:
        fn.enumerate_support(expand=False)
    except NotImplementedError:  # a product of discrete distributions, made with to_event
        return False
    return True


def is_enumerated(node: dict[str, Any]) -> bool:
    """Return whether a sample site is marked to be summed out, and can be."""
    infer = node["infer"]
    is_marked = infer.get("enumerate") == "parallel" and infer.get("num_samples") is None
    return is_marked and not node["is_observed"] and is_finite(node["fn"])


class SharedSiteError(ImplicitVIError, ValueError):
    """Several observations depend on one discrete site, so none of them has a log density of its own."""


class Enumerate(EnumMessenger):
    """A variant of Pyro's messenger that reads shapes in a way that a batch of particles allows too."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value, infer = msg["value"], msg["infer"]
        if value is None or not isinstance(msg["fn"], TorchDistributionMixin):
            return
        shape = value.shape[: value.dim() - msg["fn"].event_dim]
        ids = infer.setdefault("_dim_to_id", {})
        ids.update(self._param_dims.get(msg["name"], {}))
        self._value_dims[msg["name"]] = {dim: id_ for dim, id_ in ids.items() if len(shape) >= -dim and shape[dim] > 1}


def log_sum(trace: Any) -> Tensor:
    """Return the log density of a scored trace, summed over its enumerated sites: ``log Σ_k``, a scalar in nats.

    Sites that do not depend on an enumerated one are added. For the others, masks apply inside the sum and the scale,
    which they must share, outside, as in `pyro.infer.TraceEnum_ELBO`.

    Raises:
        ModelError: The sum is not defined, or is exponential in the size of the data.
    """
    dependent = _dependent_terms(trace)
    rest = [n["log_prob_sum"] for k, n in trace.nodes.items() if "log_prob_sum" in n and k not in dependent]
    if not dependent:
        return sum(rest, torch.zeros(()))
    scales = {name: trace.nodes[name]["scale"] for name in dependent}
    several = any(isinstance(scale, Tensor) and scale.dim() for scale in scales.values())
    if several or len({float(scale) for scale in scales.values()}) > 1:
        what = "The scale of sites that depend on one enumerated site"
        got = ", ".join(f"{name}: {scale}" for name, scale in scales.items())
        do = "Keep minibatches and poutine.scale away from discrete sites that all data share, or pass all data."
        raise ModelError.must_be(what, "one number", got, do, faq="a-discrete-latent-is-refused")
    try:
        total = _contract(trace, dependent, frozenset())
    except NotImplementedError as error:
        message = f"The discrete sites of the model cannot be summed out exactly, got {error}."
        raise ModelError(message, faq="a-discrete-latent-is-refused") from error
    summed: Tensor = total * next(iter(scales.values()))
    return sum(rest, summed)


def log_sum_of(trace: Any, name: str) -> Tensor:
    """Return the unscaled log density of each observation of a site, in nats, discrete sites summed out.

    Its shape broadcasts with the batch shape of the site.

    Raises:
        SharedSiteError: A discrete site lies outside the plates of the observations, or other sites depend on it too.
    """
    dependent = _dependent_terms(trace)
    if name not in dependent:
        plain: Tensor = trace.nodes[name]["masked_log_prob"]
        return plain
    connected, plates = _connected_sites(trace, dependent, name), _plate_symbols(trace, name)
    for other in sorted(connected - {name}):
        if not is_summed(trace.nodes[other]):
            raise SharedSiteError(f"{name!r} and {other!r} depend on the same discrete site.")
        if _plate_symbols(trace, other) != plates:
            raise SharedSiteError(f"Observations of {name!r} share the discrete site {other!r}.")
    total = _contract(trace, {k: v for k, v in dependent.items() if k in connected}, plates)
    summed: Tensor = packed.unpack(total, trace.symbol_to_dim)
    return summed


def discrete_draw(
    model: Model, values: dict[str, Tensor], nesting: int, exclude: Collection[str], /, *args: Any, **kwargs: Any
) -> dict[str, Tensor]:
    """Draw the enumerated sites jointly from their exact conditional given ``values`` and the data.

    They are scored as in a fit; sites in ``exclude`` are not. The rest is as in `pyro.infer.infer_discrete`.
    """
    given = condition(model, data=values)
    with block(), EnumMessenger(-1 - nesting):
        enumerated: Any = prune_subsample_sites(trace(given).get_trace(*args, **kwargs))
    score(enumerated, values, exclude)
    enumerated.symbolize_dims()
    for node in enumerated.nodes.values():
        if node["type"] == "sample":
            log_prob = node.get("masked_log_prob", torch.zeros(()))
            node["packed"] = {"masked_log_prob": packed.pack(log_prob[...], node["infer"]["_dim_to_symbol"])}
    with block():
        sampler = partial(_sample_posterior_from_trace, given, enumerated, 1, False)
        nodes: dict[str, Any] = trace(sampler).get_trace(*args, **kwargs).nodes
    return {name: node["value"] for name, node in nodes.items() if node["type"] == "sample" and is_enumerated(node)}


class _SafeLog(torch.autograd.Function):
    """A logarithm with a bounded gradient, Pyro's, in the form that `torch.func.vmap` requires."""

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
        return grads[0].div(x.clamp(min=torch.finfo(x.dtype).eps))


def _ordered_logistic(self: Any, predictor: Tensor, cutpoints: Tensor, validate_args: bool | None = None) -> None:
    """Initialise an `OrderedLogistic` from joined, not written, probabilities."""
    q = torch.sigmoid(cutpoints - predictor.unsqueeze(-1))
    self.predictor, self.cutpoints = predictor.expand(q.shape[:-1]), cutpoints.expand(q.shape)
    p = torch.cat([q[..., :1], q[..., 1:] - q[..., :-1], 1 - q[..., -1:]], -1)
    super(OrderedLogistic, self).__init__(p, validate_args=validate_args)


def _multinomial_log_prob(self: Any, value: Tensor) -> Tensor:
    logits, value = broadcast_all(self.logits, value)
    logits = torch.where((value == 0) & (logits == -torch.inf), 0.0, logits)
    return (value.sum(-1) + 1).lgamma() - (value + 1).lgamma().sum(-1) + (logits * value).sum(-1)


def _nan_masked_log_prob(self: Any, value: Tensor) -> Tensor:
    there = value.isfinite()
    log_prob = super(NanMaskedNormal, self).log_prob(torch.where(there, value, 0.0))
    return torch.where(there, log_prob, 0.0)


def _nan_masked_vector_log_prob(self: Any, value: Tensor) -> Tensor:
    """Score a vector with gaps: where an entry is missing, a standard normal of its own takes its place."""
    there = value.isfinite()
    both, count = there[..., :, None] & there[..., None, :], value.shape[-1]
    covariance = torch.where(both, self.covariance_matrix, torch.eye(count).to(self.loc))
    filled = MultivariateNormal(torch.zeros_like(self.loc), covariance, validate_args=False)
    log_prob: Tensor = filled.log_prob(torch.where(there, value - self.loc, 0.0))
    return log_prob + 0.5 * log(2 * pi) * (~there).sum(-1)


# code of Pyro and torch that writes in place or selects by a mask, which vmap refuses, and what gives the same numbers
BATCHABLE = (
    (special, "_SafeLog", _SafeLog),
    (OrderedLogistic, "__init__", _ordered_logistic),
    (Multinomial, "log_prob", _multinomial_log_prob),
    (NanMaskedNormal, "log_prob", _nan_masked_log_prob),
    (NanMaskedMultivariateNormal, "log_prob", _nan_masked_vector_log_prob),
)


@contextmanager
def batchable(*, quiet: bool = False) -> Iterator[None]:
    """Let Pyro's sums over discrete values, and some of its densities, run under `torch.func.vmap`.

    ``quiet`` hides the warning that vmap loops inside an operation, which torch repeats in every call.
    """
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in BATCHABLE]
    for owner, name, batchable in BATCHABLE:
        setattr(owner, name, batchable)
    try:
        with warnings.catch_warnings() if quiet else nullcontext():
            if quiet:
                warnings.filterwarnings("ignore", FALLBACK)
            yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _dependent_terms(trace: Any) -> dict[str, Tensor]:
    """Return the packed log densities of the sites that depend on an enumerated one, by name."""
    trace.symbolize_dims()
    plates = set(trace.plate_to_symbol.values())
    terms = {}
    for name, node in trace.nodes.items():
        if "masked_log_prob" not in node:
            continue
        symbols, log_prob = node["infer"]["_dim_to_symbol"], node["masked_log_prob"]
        enumerated = [dim for dim, symbol in symbols.items() if symbol not in plates]
        if any(-dim <= log_prob.dim() and log_prob.shape[dim] > 1 for dim in enumerated):
            terms[name] = packed.pack(log_prob[...], symbols)
    return terms


def _contract(trace: Any, terms: dict[str, Tensor], plates: frozenset[str]) -> Tensor:
    """Sum the product of densities over all enumerated values, and multiply over all plates but ``plates``."""
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    sizes: dict[str, int] = {}
    for name, term in terms.items():
        tree.setdefault(_plate_symbols(trace, name), []).append(term)
        sizes |= zip(_dims(term), term.shape, strict=True)
    sum_dims = set(sizes) - set(trace.plate_to_symbol.values())
    total: Tensor = contract_to_tensor(tree, sum_dims, target_ordinal=plates, ring=LogRing(dim_to_size=sizes))
    return total


def _plate_symbols(trace: Any, name: str) -> frozenset[str]:
    """Return the symbols of the vectorized plates of a site."""
    return frozenset(trace.plate_to_symbol[frame.name] for frame in vectorized_plates(trace.nodes[name]))


def _connected_sites(trace: Any, terms: dict[str, Tensor], name: str) -> set[str]:
    """Return the names of the sites that enumerated values connect with one, itself included."""
    plates = set(trace.plate_to_symbol.values())
    symbols = {other: set(_dims(term)) - plates for other, term in terms.items()}
    connected, frontier = {name}, [name]
    while frontier:
        reached = symbols[frontier.pop()]
        near = {other for other in symbols if symbols[other] & reached} - connected
        connected |= near
        frontier.extend(near)
    return connected


def _dims(term: Tensor) -> str:
    dims: str = term._pyro_dims  # type: ignore[attr-defined]
    return dims
