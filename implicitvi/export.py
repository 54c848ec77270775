"""Export fits to ArviZ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from inspect import signature
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.distributions import Unit
from pyro.infer import Predictive
from torch import Tensor, nn

from implicitvi.diagnostics.posterior import TrainedGuide, as_array, check_model, is_guide
from implicitvi.errors import (
    ImplicitVIError,
    ModelError,
    OptionError,
    ShapeError,
    check_flag,
    check_whole,
    did_you_mean,
)
from implicitvi.pyro_model import enumeration, tracing
from implicitvi.pyro_model.checks import CheckData, latent_trace
from implicitvi.pyro_model.log_joint import LogJoint
from implicitvi.pyro_model.sites import plate_names
from implicitvi.pyro_model.subsampling import PinnedSubsample, own_minibatches
from implicitvi.rng import RandomStream

Groups = dict[str, dict[str, NDArray[Any]]]
Shapes = dict[str, tuple[int, ...]]
# dimensions of ArviZ and names of sample_stats, whose dimensions a site of the same name would change
KEPT = ("chain", "draw", "lp", "log_ratio", "log_q_learned", "log_weight")


class HasGuide(Protocol):
    """A fit: it has a trained guide."""

    @property
    def guide(self) -> Any:
        """The guide."""


def to_arviz(
    source: TrainedGuide | HasGuide | Sequence[TrainedGuide | HasGuide],
    model: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    prior: bool = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    attrs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Convert posterior draws, predictive draws and log likelihoods to ArviZ's container.

    Groups:

    - ``posterior``: with the deterministic sites, and the enumerated ones drawn from their exact conditionals;
    - ``posterior_predictive``: the observed sites drawn from the model;
    - ``log_likelihood`` of every observation in nats, unscaled, discrete sites summed out; left out with a warning
      where several observations share a discrete site;
    - ``prior`` and ``prior_predictive``; left out with a warning where the prior cannot be sampled;
    - ``observed_data``, and ``constant_data``: the tensors among the model's arguments that it does not observe;
    - ``sample_stats``: ``lp`` (log joint of the constrained values, nats) and, if an adversary was trained, on the
      unconstrained space ``log_ratio`` (learned ``log q - log r`` to the contrast), ``log_q_learned`` and
      ``log_weight`` (``log p - log q``).

    Draws are independent: pass ``reff=1.0`` to ``az.loo``. One guide is one chain, for which R-hat is meaningless.
    Several guides, restarts of one fit, become one chain each, and R-hat measures their agreement. Sites and plates
    with a name that ArviZ keeps for itself, such as ``chain`` or ``draw``, get a ``_`` at the end, with a warning; so
    does, without one, an argument with the name of a site that has plates.

    Args:
        source: A trained `ImplicitGuide`, its `Fit`, or several of either.
        model: The Pyro model.
        *args: The model's arguments, as in training.
        num_samples: Number of draws of each guide.
        prior: Whether to sample the prior too.
        coords: Coordinates of the dimensions, as in ArviZ.
        dims: Names of the dimensions of each site; by default the names of its plates, if every dimension has one.
        attrs: More attributes than the versions and a `Fit`'s seed, steps, seconds and stop reason.
        **kwargs: The model's keyword arguments.

    Returns:
        An ``InferenceData`` (ArviZ before 1.0) or a ``DataTree``.

    Raises:
        ModelError: The model has other latent sites than the guide, uses a minibatch of its data, or observes data that
            do not fit its plates and distributions.
        OptionError: ``source`` is empty or holds anything other than guides and fits, or another argument has a value
            that cannot work.
        ShapeError: ``coords`` and ``dims`` do not fit the shapes of the sites.
    """
    check_whole("num_samples", num_samples)
    check_flag("prior", prior)
    check_model(model)
    _check_labels(coords, dims, attrs)
    sources = list(source) if isinstance(source, Sequence) else [source]
    chains, named, run = [], {}, None
    for guide in _guides(sources):
        u, layout = guide.draw(num_samples, *args, **kwargs)
        draws, log_det = layout.unpack(u)
        run = _Run(model, draws, args, kwargs)
        posterior = draws | run.discrete()
        stats = {}
        if not run.implicit:
            with torch.no_grad():
                stats = _stats(guide, LogJoint(model, layout)(u, *args, **kwargs), u, log_det)
        chain = {"posterior": posterior | run.deterministic(posterior)}
        chain |= {"posterior_predictive": run.predictive(posterior), "log_likelihood": run.log_likelihood()}
        chains.append(chain | {"sample_stats": stats})
        named = {site.name: site.dims for site in layout.sites}
    assert run is not None
    if run.implicit:
        without = f"The prior of {', '.join(map(repr, run.implicit))} does not have a density"
        warnings.warn(f"{without}, so sample_stats, which needs the log joint, is left out.", stacklevel=2)
    groups: Groups = {name: _chains([chain[name] for chain in chains]) for name in chains[0]}
    if prior:
        groups |= {name: _chains([drawn]) for name, drawn in run.prior(num_samples).items()}
    groups["observed_data"] = {k: as_array(n["value"]) for k, n in run.observed.items()}
    groups["constant_data"] = {k: as_array(v) for k, v in run.constant().items()}
    named |= {name: plate_names(node) for name, node in (run.summed_out | run.observed).items()}
    named |= {name: _computed_dims(node) for name, node in run.computed.items()}
    given = {name: list(value) for name, value in (dims or {}).items()}
    all_dims = {name: list(d) for name, d in named.items() if d and None not in d} | given
    _check_dims(_shapes(groups), dict(coords or {}), all_dims, given)
    about = _about(sources) | dict(attrs or {})
    renamed = _renamed({*named, *run.draws, *run.computed}, all_dims)
    if renamed:
        what = "Sites and plates must have other names than those that ArviZ keeps for itself"
        warnings.warn(f"{what}, got {', '.join(map(repr, renamed))}. They get a '_' at the end.", stacklevel=2)
    return _container(*_with_names(renamed, groups, dict(coords or {}), all_dims), about)


def _check_labels(coords: object, dims: object, attrs: object) -> None:
    """Raise `OptionError` unless coordinates, dimensions and attributes are those of ArviZ."""
    for option, value, kind in (
        ("coords", coords, "values"),
        ("dims", dims, "a list of names"),
        ("attrs", attrs, "value"),
    ):
        expected = f"a dict {{name: {kind}}}"
        if not isinstance(value, Mapping | None) or not all(isinstance(name, str) for name in value or ()):
            raise OptionError.must_be(option, expected, repr(value))
        for name, entry in (value or {}).items():
            listed = isinstance(entry, Sequence | np.ndarray | Tensor) and not isinstance(entry, str)
            named = listed and (option != "dims" or all(isinstance(each, str) for each in entry))
            if option != "attrs" and not named:
                raise OptionError.must_be(f"{option}[{name!r}]", kind, repr(entry), "Write a list, also for one.")


def _shapes(groups: Groups) -> Shapes:
    """Return the shape of each variable, without chains and draws."""
    per_draw = {
        name: value.shape[2:]
        for group in ("posterior", "posterior_predictive")
        for name, value in groups.get(group, {}).items()
    }
    return {name: value.shape for name, value in groups["constant_data"].items()} | per_draw


def _check_dims(
    shapes: Shapes, coords: dict[str, Any], dims: dict[str, list[str]], given: dict[str, list[str]]
) -> None:
    """Raise an error unless the dimensions ``given`` are of sites, and coordinates as long as their dimensions."""
    for name, names in dims.items():
        if name not in shapes:
            raise OptionError.must_be("dims", f"of {', '.join(shapes)}", repr(name), did_you_mean(name, shapes))
        clash = [each for each in names if each in shapes or each in KEPT[:2] or names.count(each) > 1]
        if name in given and (clash or len(names) > len(shapes[name])):
            expected = f"{len(shapes[name])} different names at most, none of them of a site"
            raise ShapeError.must_be(f"dims[{name!r}]", expected, names)
        for each, size in zip(names, shapes[name], strict=False):
            if each in coords and len(coords[each]) != size:
                raise ShapeError.must_be(
                    f"coords[{each!r}]", f"{size} values, as {name!r} has there", len(coords[each])
                )


def _renamed(sites: set[str], dims: dict[str, list[str]]) -> dict[str, str]:
    """Return new names of the sites and plates whose names ArviZ keeps for itself."""
    names = sites | {each for own in dims.values() for each in own}
    return {name: f"{name}_" for name in KEPT if name in names}


def _with_names(
    renamed: dict[str, str], groups: Groups, coords: dict[str, Any], dims: dict[str, list[str]]
) -> tuple[Groups, dict[str, Any], dict[str, list[str]]]:
    """Return groups that are not empty, coordinates and dimensions under new names; ``sample_stats`` keeps its own."""

    def new(name: str) -> str:
        return renamed.get(name, name)

    sites = groups["posterior"] | groups["posterior_predictive"]
    own: Groups = {group: {new(name): value for name, value in each.items()} for group, each in groups.items()}
    own["sample_stats"] = groups["sample_stats"]
    clashes = dims.keys() & sites.keys() & groups["constant_data"].keys()
    own["constant_data"] = {k + "_" * (k in clashes): v for k, v in groups["constant_data"].items()}
    filled = {group: each for group, each in own.items() if each}
    return filled, {new(k): v for k, v in coords.items()}, {new(k): [new(d) for d in v] for k, v in dims.items()}


def _guides(sources: Sequence[Any]) -> list[Any]:
    """Return the guides among guides and fits; raise `OptionError` for anything else."""
    guides = [getattr(source, "guide", source) for source in sources]
    if not guides or not all(map(is_guide, guides)):
        got = ", ".join(type(each).__name__ for each in sources) or "none"
        advice = "Write to_arviz(fit, model, *args); for MCMC use az.from_pyro."
        raise OptionError.must_be("source", "an ImplicitGuide, a Fit, or several of them", got, advice)
    return guides


def _computed_dims(node: dict[str, Any]) -> tuple[str | None, ...]:
    """Return the `plate_names` of a deterministic site, whose whole value is one event to Pyro by default."""
    value, frames = node["value"], node["cond_indep_stack"]
    if node["fn"].event_dim < value.dim():
        return plate_names(node)
    names = {
        frame.dim: frame.name
        for frame in frames
        if frame.vectorized and -frame.dim <= value.dim() and value.shape[frame.dim] == frame.size
    }
    return tuple(names.get(dim) for dim in range(-value.dim(), 0))


def _stats(guide: Any, log_p: Tensor, u: Tensor, log_det: Tensor) -> dict[str, Tensor]:
    """Return the group ``sample_stats`` from the log joint ``log_p [S]`` of unconstrained draws ``u [S, D]``."""
    stats = {"lp": log_p - log_det}
    if guide.has_log_density:
        log_q = guide.get_posterior().log_prob(u)
        ratio = guide.log_ratio(u)
        stats |= {} if ratio is None else {"log_ratio": ratio}
        stats |= {"log_q_learned": log_q, "log_weight": log_p - log_q}
    return stats


def _about(sources: Sequence[Any]) -> dict[str, Any]:
    """Return the attributes: versions and, for each fit, how it was trained."""
    about: dict[str, Any] = {
        "inference_library": "implicitvi",
        "inference_library_version": version("implicitvi"),
        "pyro_version": version("pyro-ppl"),
        "torch_version": version("torch"),
    }
    fits = [source for source in sources if not is_guide(source)]
    for name in ("seed", "num_steps", "seconds", "stop_reason"):
        values = [str(getattr(fit, name)) for fit in fits]
        about |= {name: "; ".join(values)} if values else {}
    return about


class _Run:
    """A model run at draws ``{site: [S, *site shape]}`` of its continuous latents, with its other sites.

    Attributes:
        observed: Nodes of the observed sites, by name.
        summed_out: Nodes of the enumerated sites.
        computed: Nodes of the deterministic sites.
        implicit: Names of the latent sites whose prior does not have a density.
    """

    def __init__(
        self, model: Callable[..., Any], draws: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ):
        self.model, self.draws, self.args, self.kwargs = model, draws, args, kwargs
        minibatch = PinnedSubsample()
        shapes = {name: tuple(value.shape[1:]) for name, value in draws.items()}
        try:
            with tracing.unvalidated(), minibatch.pinned():
                trace = tracing.run_at(CheckData()(minibatch(model)), _at(draws, 0), *args, **kwargs)
                same = {name: node["value"] for name, node in tracing.latent_nodes(trace)} | _at(draws, 0)
                with RandomStream(0):  # a model that draws its own minibatch shows other data
                    again = tracing.run_at(minibatch(model), same, *args, **kwargs)
        except (ValueError, RuntimeError, TypeError, AttributeError):
            with RandomStream(0):  # a model of other sites, sizes or data may fail at the draws
                tracing.check_sites(latent_trace(model, *args, **kwargs), shapes, wider=False)
            raise
        finally:
            _refuse_minibatches(minibatch.plates)
        _refuse_minibatches(own_minibatches(trace, again))
        nodes = {name: n for name, n in trace.nodes.items() if n["type"] == "sample"}
        self.summed_out = {name: node for name, node in nodes.items() if enumeration.is_enumerated(node)}
        discrete = {name: tuple(node["fn"].shape()) for name, node in self.summed_out.items()}
        tracing.check_sites(trace, shapes | discrete, wider=False)
        self.computed = {name: node for name, node in nodes.items() if tracing.is_deterministic(node)}
        self.observed = {
            name: node
            for name, node in nodes.items()
            if node["is_observed"] and name not in draws | self.computed and not isinstance(node["fn"], Unit)
        }
        self.implicit = tracing.sites_without_density(model, _at(draws, 0), *args, **kwargs)
        self._nesting = tracing.plate_nesting(nodes.values())

    def discrete(self) -> dict[str, Tensor]:
        """Draw the enumerated sites given each draw and the data: ``{site: [S, *site shape]}``."""
        if not self.summed_out:
            return {}
        # one by one: Pyro's sampling through contractions cannot run under vmap
        with torch.no_grad(), tracing.unvalidated():
            each = [
                enumeration.discrete_draw(
                    self.model, _at(self.draws, i), self._nesting, self.implicit, *self.args, **self.kwargs
                )
                for i in range(_size(self.draws))
            ]
        return {
            name: torch.stack([draw[name].reshape(node["value"].shape) for draw in each])
            for name, node in self.summed_out.items()
        }

    def deterministic(self, posterior: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the deterministic sites at each draw: ``{site: [S, *site shape]}``."""

        def one(values: dict[str, Tensor]) -> dict[str, Tensor]:
            nodes = tracing.run_at(self.model, values, *self.args, **self.kwargs).nodes
            return {name: nodes[name]["value"] for name in self.computed}

        return _each(one, posterior) if self.computed else {}

    def predictive(self, posterior: dict[str, Tensor]) -> dict[str, Tensor]:
        """Draw the observed sites from the model at each draw of its latents: ``{site: [S, *site shape]}``."""
        if not self.observed:
            return {}
        # Predictive first runs the model unconditioned, which some priors forbid: hence the first draw
        free = poutine.condition(poutine.uncondition(self.model), data=_at(posterior, 0))
        predictive = Predictive(free, posterior_samples=posterior, return_sites=list(self.observed))
        with torch.no_grad():
            drawn = predictive(*self.args, **self.kwargs)
        return {name: drawn[name].reshape(-1, *node["value"].shape) for name, node in self.observed.items()}

    def prior(self, num_samples: int) -> dict[str, dict[str, Tensor]]:
        """Draw the groups of the prior: latent and deterministic sites, and the observed sites."""
        groups = {
            "prior": {
                **{name: value.shape[1:] for name, value in self.draws.items()},
                **{k: n["value"].shape for k, n in (self.summed_out | self.computed).items()},
            },
            "prior_predictive": {name: node["value"].shape for name, node in self.observed.items()},
        }
        names = [name for shapes in groups.values() for name in shapes]
        predictive = Predictive(poutine.uncondition(self.model), num_samples=num_samples, return_sites=names)
        try:
            with torch.no_grad():
                drawn = predictive(*self.args, **self.kwargs)
        except (NotImplementedError, ValueError, RuntimeError) as error:
            why = f"The prior cannot be sampled ({tracing.first_line(error)})"
            warnings.warn(f"{why}, so prior and prior_predictive are left out.", stacklevel=3)
            return {}
        return {
            group: {name: drawn[name].reshape(-1, *shape) for name, shape in shapes.items()}
            for group, shapes in groups.items()
        }

    def constant(self) -> dict[str, Tensor]:
        """Return the tensors among the model's named arguments that no site observes."""
        run = self.model.forward if isinstance(self.model, nn.Module) else self.model
        try:
            bound = signature(run).bind(*self.args, **self.kwargs).arguments
        except (TypeError, ValueError):  # the callable does not have a signature
            return {}
        seen = [node["value"] for node in self.observed.values()]
        return {
            name: value
            for name, value in bound.items()
            if isinstance(value, Tensor) and not any(value.shape == y.shape and torch.equal(value, y) for y in seen)
        }

    def log_likelihood(self) -> dict[str, Tensor]:
        """Score every observation in nats, unscaled, discrete sites summed out: ``{site: [S, *batch shape]}``.

        Warn and return nothing where observations share a discrete site.
        """
        enumerated = enumeration.Enumerate(-1 - self._nesting)(self.model) if self.summed_out else self.model

        def one(values: dict[str, Tensor]) -> dict[str, Tensor]:
            trace = tracing.run_at(enumerated, values, *self.args, **self.kwargs)
            tracing.score(trace, values, self.implicit)
            return {name: enumeration.log_sum_of(trace, name) for name in self.observed}

        try:
            scores = _each(one, self.draws)
        except enumeration.SharedSiteError as error:
            warnings.warn(f"log_likelihood is left out: {error}", stacklevel=3)
            return {}
        return {name: scores[name].reshape(-1, *node["fn"].batch_shape) for name, node in self.observed.items()}


def _each(one: Callable[[dict[str, Tensor]], dict[str, Tensor]], draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """Apply a function to each draw: under vmap, or in a loop if the model cannot be batched."""
    with torch.no_grad(), tracing.unvalidated():
        try:
            with enumeration.batchable(quiet=True):
                results: dict[str, Tensor] = torch.func.vmap(one, randomness="same")(draws)
        except ImplicitVIError:
            raise
        except Exception:
            each = [one(_at(draws, i)) for i in range(_size(draws))]
            results = {name: torch.stack([result[name] for result in each]) for name in each[0]}
    return results


def _at(draws: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: value[index] for name, value in draws.items()}


def _size(draws: dict[str, Tensor]) -> int:
    return len(next(iter(draws.values())))


def _refuse_minibatches(plates: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise `ModelError` if the model used part of its data: each group would be of another part."""
    for name, (size, part, *_) in plates.items():
        seen = f"got {part} of {size} in plate {name!r}" if size else f"got other data of {name!r} in each run"
        raise ModelError(f"The model must use all of its data, {seen}. Pass arguments with which it does.")


def _chains(chains: Sequence[dict[str, Tensor]]) -> dict[str, NDArray[Any]]:
    """Stack draws ``[S, …]`` of each chain as ``[chains, S, …]``."""
    return {name: np.stack([as_array(chain[name]) for chain in chains]) for name in chains[0]}


def _container(groups: Groups, coords: Any, dims: Any, attrs: dict[str, Any]) -> Any:
    """Build the container of the installed ArviZ, whose call changed in 1.0."""
    import arviz

    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict(groups, coords=coords, dims=dims, attrs={"/": attrs})
    return arviz.from_dict(**groups, coords=coords, dims=dims, attrs=attrs)
