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
from implicitvi.errors import ImplicitVIError, ModelError, check_at_least
from implicitvi.guide import ImplicitGuide
from implicitvi.layout import plate_names
from implicitvi.log_joint import LogJoint
from implicitvi.minibatch import Minibatch
from implicitvi.scoring import (
    is_deterministic,
    plate_nesting,
    run_at,
    score,
    sites_without_density,
    unvalidated,
)

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

    Groups: ``posterior``, with the deterministic sites, and with discrete sites that the model sums out drawn from
    their exact conditional given each draw; ``posterior_predictive`` (the observed sites drawn anew);
    ``log_likelihood`` (of every observation, unscaled, discrete sites summed out; left out with a warning where
    several observations share a discrete site); ``observed_data``; ``sample_stats`` with ``lp`` (log joint of the
    constrained values, nats) and, where an adversary was trained, ``log_q_learned`` and ``log_weight`` on the
    unconstrained space.
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

    Raises:
        ModelError: The model looks at a minibatch of its data.
    """
    check_at_least("num_samples", num_samples, 1)
    u, layout = guide.draw(num_samples, *args, **kwargs)
    draws, log_det = layout.unpack(u)
    run = _Run(model, draws, args, kwargs)
    posterior = draws | run.discrete()
    stats = {}
    if run.implicit:
        warnings.warn(
            f"the prior of {', '.join(map(repr, run.implicit))} has no density, so there is no log joint: "
            "the group sample_stats is left out",
            stacklevel=2,
        )
    else:
        with torch.no_grad():
            stats["lp"] = LogJoint(model, layout)(u, *args, **kwargs) - log_det
            if guide.has_log_density:
                stats["log_q_learned"] = guide.get_posterior().log_prob(u)
                stats["log_weight"] = stats["lp"] + log_det - stats["log_q_learned"]
    groups: Groups = {
        "posterior": _chain(posterior | run.deterministic(posterior)),
        "posterior_predictive": _chain(run.predictive(posterior)),
        "log_likelihood": _chain(run.log_likelihood()),
        "observed_data": {k: node["value"].numpy(force=True) for k, node in run.observed.items()},
        "sample_stats": _chain(stats),
    }
    named = {site.name: site.dims for site in layout.sites}
    named |= {
        name: plate_names(node)
        for name, node in (run.summed_out | run.computed | run.observed).items()
    }
    given = {} if dims is None else {name: list(value) for name, value in dims.items()}
    all_dims = {name: list(d) for name, d in named.items() if d and None not in d} | given
    return _container({k: v for k, v in groups.items() if v}, coords, all_dims)


class _Run:
    """A model at draws ``{site: [S, *site shape]}`` of its continuous latents, and what its other sites are there.

    Attributes:
        observed: Nodes of the observed sites, by name.
        summed_out: Nodes of the enumerated sites.
        computed: Nodes of the deterministic sites.
        implicit: Names of the latent sites whose prior has no density.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        draws: dict[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ):
        self.model, self.draws, self.args, self.kwargs = model, draws, args, kwargs
        minibatch = Minibatch()
        try:
            with unvalidated(), minibatch.pinned():
                trace = run_at(minibatch(model), _at(draws, 0), *args, **kwargs)
        finally:
            _refuse_minibatches(minibatch)
        nodes = {name: n for name, n in trace.nodes.items() if n["type"] == "sample"}
        self.summed_out = {name: node for name, node in nodes.items() if is_enumerated(node)}
        self.computed = {name: node for name, node in nodes.items() if is_deterministic(node)}
        self.observed = {
            name: node
            for name, node in nodes.items()
            if node["is_observed"]
            and name not in draws | self.computed
            and not isinstance(node["fn"], Unit)
        }
        self.implicit = sites_without_density(model, _at(draws, 0), *args, **kwargs)
        self._nesting = plate_nesting(nodes.values())

    def discrete(self) -> dict[str, Tensor]:
        """The enumerated sites given each draw and the data: ``{site: [S, *site shape]}``."""
        if not self.summed_out:
            return {}
        with torch.no_grad(), unvalidated():
            each = [
                discrete_draw(
                    self.model, _at(self.draws, i), self._nesting, *self.args, **self.kwargs
                )
                for i in range(_size(self.draws))
            ]
        return {
            name: torch.stack([draw[name].reshape(node["value"].shape) for draw in each])
            for name, node in self.summed_out.items()
        }

    def deterministic(self, posterior: dict[str, Tensor]) -> dict[str, Tensor]:
        """The deterministic sites at each draw: ``{site: [S, *site shape]}``."""

        def one(values: dict[str, Tensor]) -> dict[str, Tensor]:
            nodes = run_at(self.model, values, *self.args, **self.kwargs).nodes
            return {name: nodes[name]["value"] for name in self.computed}

        return _each(one, posterior) if self.computed else {}

    def predictive(self, posterior: dict[str, Tensor]) -> dict[str, Tensor]:
        """The observed sites drawn from the model at each draw of its latents: ``{site: [S, *site shape]}``."""
        if not self.observed:
            return {}
        # Predictive first runs the model by itself, which not every prior allows: hence the first draw.
        free = poutine.condition(poutine.uncondition(self.model), data=_at(posterior, 0))
        predictive = Predictive(free, posterior_samples=posterior, return_sites=list(self.observed))
        with torch.no_grad():
            drawn = predictive(*self.args, **self.kwargs)
        return {
            name: drawn[name].reshape(-1, *node["value"].shape)
            for name, node in self.observed.items()
        }

    def log_likelihood(self) -> dict[str, Tensor]:
        """Log density of every observation, unscaled, discrete sites summed out: ``{site: [S, *batch shape]}``, nats.

        Where discrete sites are shared by several observations there is a warning and nothing.
        """
        enumerated = Enumerate(-1 - self._nesting)(self.model) if self.summed_out else self.model

        def one(values: dict[str, Tensor]) -> dict[str, Tensor]:
            trace = run_at(enumerated, values, *self.args, **self.kwargs)
            score(trace, values, self.implicit)
            return {name: log_sum_of(trace, name) for name in self.observed}

        try:
            scores = _each(one, self.draws)
        except SharedSiteError as error:
            warnings.warn(f"no log_likelihood in the export: {error}", stacklevel=3)
            return {}
        return {
            name: scores[name].reshape(-1, *node["fn"].batch_shape)
            for name, node in self.observed.items()
        }


def _each(
    one: Callable[[dict[str, Tensor]], dict[str, Tensor]], draws: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Apply a function to each draw: under vmap, or draw by draw where the model cannot be batched."""
    with torch.no_grad(), unvalidated():
        try:
            with batchable(quiet=True):
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


def _refuse_minibatches(minibatch: Minibatch) -> None:
    """Raise `ModelError` where the model looked at a part of its data: every group would be of another part."""
    for name, (size, subsample_size, _) in minibatch.plates.items():
        raise ModelError(
            f"the model looks at a minibatch of plate {name!r}",
            got=f"{subsample_size} of {size}",
            do="Call to_arviz with arguments under which it looks at all of its data.",
        )


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
