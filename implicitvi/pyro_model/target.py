"""Bind a Pyro model to its arguments: one log density on one unconstrained vector."""

from __future__ import annotations

import warnings
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from pyro.infer.autoguide.initialization import InitMessenger, init_to_value
from torch import Tensor

from implicitvi.errors import ModelError, ShapeError
from implicitvi.numerics.optimise import gradients
from implicitvi.numerics.types import Draws, Model
from implicitvi.pyro_model.arguments import Arguments
from implicitvi.pyro_model.checks import check_latents, latent_trace
from implicitvi.pyro_model.log_joint import LogJoint
from implicitvi.pyro_model.parameters import model_parameters
from implicitvi.pyro_model.prior import ModelPrior
from implicitvi.pyro_model.sites import SiteLayout
from implicitvi.pyro_model.tracing import (
    PARTICLE_ERRORS,
    first_line,
    run_at,
    score,
    sites_without_density,
    unvalidated,
    unwrapped,
)
from implicitvi.rng import RandomStream

PROBES = 64  # draws among which some with a density are wanted


@dataclass(eq=False)
class Target:
    """A Pyro model with its arguments: ``log p(x, u)`` on the unconstrained vector ``u [D]`` of its latent sites.

    The model is read once, when first needed. `at` returns a target of other arguments, with the same scorer.

    Args:
        model: The Pyro model.
        arguments: Its arguments.
        mode: Mode of scoring it, as in `LogJoint`.
        plate: Plate whose latents may be those of a minibatch, for amortized guides.
        values: Values of the latent sites at which the model is known to run, ``{site: [*site shape]}``.
    """

    model: Model
    arguments: Arguments
    mode: str = "auto"
    plate: str | None = None
    values: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], first: dict[str, Tensor], seed: int
    ) -> Target:
        """Read the model's latent sites, at the values of a draw where these fit: not every prior allows a run.

        Raises:
            ModelError: The prior of a site has no density.
        """
        target = cls(model, Arguments(args, kwargs))
        with torch.no_grad(), RandomStream(seed):
            try:
                trace = latent_trace(InitMessenger(init_to_value(values=first))(model), *args, **kwargs)
                for name, node in trace.iter_stochastic_nodes():
                    fn, value = node["fn"], node["value"]
                    if value.shape != fn.shape() or not fn.support.check(value).all():
                        raise ValueError(f"the first draw is not a value of {name!r}")
            except (RuntimeError, ValueError, NotImplementedError):
                trace = latent_trace(model, *args, **kwargs)
            check_latents(trace)
            target.trace = trace
            target.values = {name: trace.nodes[name]["value"] for name in target.layout.names}
            implicit = target.sites_without_density
        if implicit:
            what, expected = f"the prior of {', '.join(map(repr, implicit))}", "a prior with a density to judge draws"
            advice = "Compare draws with those of a reference: implicitvi.metrics.c2st."
            raise ModelError.must_be(what, expected, do=advice)
        return target

    @property
    def args(self) -> tuple[Any, ...]:
        """The model's positional arguments."""
        return self.arguments.args

    @property
    def kwargs(self) -> dict[str, Any]:
        """The model's keyword arguments."""
        return self.arguments.kwargs

    def at(self, arguments: Arguments) -> Target:
        """Return the target of the same model, read and scored as this one, at other arguments."""
        other = copy(self)
        other.arguments = arguments
        return other

    def near(self, values: dict[str, Tensor]) -> Target:
        """Return the same target, which looks at the model where its latent sites have these values."""
        other = copy(self)
        other.values = values
        return other

    @cached_property
    def trace(self) -> Any:
        """A trace of the model's latent sites, checked: a guide can draw them, and the data are in their supports."""
        trace = latent_trace(self.model, *self.args, **self.kwargs)
        check_latents(trace, amortized=self.plate)
        return trace

    @cached_property
    def layout(self) -> SiteLayout:
        """The latent sites on the vector ``u``."""
        return SiteLayout.from_trace(self.trace)

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """The unconstrained leaves of the model's parameters, by name."""
        return model_parameters(self.model, self.values, *self.args, **self.kwargs)

    @cached_property
    def sites_without_density(self) -> tuple[str, ...]:
        """Names of the latent sites that can be drawn but not scored; the log joint leaves them out."""
        return sites_without_density(self.model, self.values, *self.args, **self.kwargs)

    @cached_property
    def flat_sites(self) -> tuple[str, ...]:
        """Names of the latent sites with a flat prior: masked by a plain ``False``."""
        nodes = run_at(self.model, self.values, *self.args, **self.kwargs).nodes
        masks = {name: (nodes[name]["mask"], *unwrapped(nodes[name]["fn"])[1]) for name in self.values}
        return tuple(name for name in self.values if any(mask is False for mask in masks[name]))

    @cached_property
    def log_joint(self) -> LogJoint:
        """The scorer, shared by the targets of all arguments."""
        return LogJoint(self.model, self.layout, mode=self.mode, exclude=self.sites_without_density)

    def __call__(self, u: Tensor) -> Tensor:
        """Return ``log p(x, u) + log|J|`` of points ``u [S, D]``: ``[S]`` in nats."""
        return self.log_joint(u, *self.args, **self.kwargs)

    def loop(self, u: Tensor) -> Tensor:
        """Score points ``u [S, D]`` one by one: ``[S]`` in nats."""
        return self.log_joint.loop(u, *self.args, **self.kwargs)

    def score(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``log p [S]`` and its gradient ``[S, D]`` at ``u [S, D]``, after `choose`."""
        self.choose(u)
        return gradients(self, u, chunk=500)

    def choose(self, u: Tensor) -> None:
        """Choose the mode of scoring that agrees with the loop at some of ``u [S, D]``; refuse minibatches of data."""
        with torch.no_grad():
            few = u[:PROBES]
            scored = few[self.loop(few).isfinite()]
        self.log_joint.choose((scored if len(scored) else few)[:3], *self.args, **self.kwargs)
        for name, (size, part) in self.log_joint.minibatches.items():
            got = f"{part} of {size}" if size else "others in the next run of the model, which draws them itself"
            expected = "whole, or the density changes with every look"
            advice = "Pass arguments under which the model sees all of its data."
            raise ModelError.must_be(
                f"the data of {name!r}", expected, got, advice, faq="the-model-draws-its-own-minibatch"
            )

    def prior(self, like: Tensor) -> ModelPrior:
        """Return the prior of the latent sites on ``u``, with the dtype and device of ``like [D]``."""
        names, without = self.layout.names, self.sites_without_density
        log_prior = LogJoint(self.model, self.layout, mode=self.mode, only=names, exclude=without)
        return ModelPrior(log_prior, self.args, self.kwargs, like)

    def prior_draws(self, count: int, like: Tensor, seed: int) -> Tensor | None:
        """Draw ``[count, D]`` from the prior; ``None`` where that is impossible, as with a flat one."""
        try:
            with warnings.catch_warnings(), RandomStream(seed):
                warnings.simplefilter("ignore")
                return self.prior(like).sample((count,))
        except (ModelError, NotImplementedError, RuntimeError, ValueError):
            return None

    def describe(self, u: Tensor) -> str:
        """Name the sites of ``u [D]`` whose log density is not finite, with value and score."""
        values, _ = self.layout.unpack(u)
        try:
            with unvalidated():
                trace = run_at(self.model, values, *self.args, **self.kwargs)
                score(trace, values, self.log_joint.exclude)
        except PARTICLE_ERRORS as error:
            return f"the model raised {first_line(error)}"
        return "; ".join(
            f"{name}: log density {node['log_prob_sum'].item()}, value {_short(node['value'])}"
            for name, node in trace.nodes.items()
            if "log_prob_sum" in node and not node["log_prob_sum"].isfinite()
        )

    def unconstrain(self, draws: Draws) -> Tensor:
        """Return draws ``{site: [S, *site shape]}`` as ``u [S, D]``; refuse wrong sites, shapes and values."""
        self._check_names(draws)
        values = {site.name: self._checked(site.name, site.shape, draws[site.name]) for site in self.layout.sites}
        counts = {name: len(value) for name, value in values.items()}
        if len(set(counts.values())) > 1:
            raise ShapeError.must_be("the number of draws", "the same for all sites", counts)
        with torch.no_grad():
            return self.layout.pack(values)

    def _check_names(self, draws: Draws) -> None:
        wrong = [f"missing {name!r}" for name in self.layout.names if name not in draws]
        wrong += [f"unknown {name!r}" for name in draws if name not in self.layout.names]
        if wrong:
            expected = f"the draws of the latent sites {', '.join(map(repr, self.layout.names))}"
            advice = "Leave out deterministic and observed sites, and discrete ones that the model sums out."
            raise ShapeError.must_be("draws", expected, ", ".join(wrong), advice)

    def _checked(self, name: str, shape: tuple[int, ...], draws: Any) -> Tensor:
        """Return the draws ``[S, *shape]`` of a site in its dtype and on its device."""
        node = self.trace.nodes[name]
        value = torch.as_tensor(draws).detach().to(node["value"])
        if tuple(value.shape[1:]) != shape:
            expected = f"of shape [{', '.join(['S', *map(str, shape)])}]"
            advice = "Put the draws of all chains one after another along the first axis."
            raise ShapeError.must_be(f"draws of site {name!r}", expected, tuple(value.shape), advice)
        valid = (node["fn"].support.check(value), value.isfinite())
        inside = torch.stack([v.reshape(len(value), -1).all(1) for v in valid]).all(0)
        if not inside.all():
            got = f"{int((~inside).sum())} of {len(value)} outside"
            advice = "Pass constrained values, as guide.sample or MCMC.get_samples return them."
            raise ModelError.must_be(f"draws of site {name!r}", f"in its support, {node['fn'].support}", got, advice)
        return value


def _short(value: Any) -> str:
    if not isinstance(value, Tensor) or value.numel() <= 8:
        return str(value.tolist() if isinstance(value, Tensor) else value)
    bad = (~value.isfinite()).sum().item()
    return f"{tuple(value.shape)} with {bad} non-finite entries, first {value.flatten()[:4].tolist()}"
