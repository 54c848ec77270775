"""A model with its arguments as a density on the unconstrained vector, for whoever judges or moves draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.autoguide.initialization import InitMessenger, init_to_value
from torch import Tensor

from implicitvi.errors import ModelError, ShapeError
from implicitvi.numerics.optimise import gradients
from implicitvi.numerics.types import Draws
from implicitvi.pyro_model.checks import check_latents, latent_trace
from implicitvi.pyro_model.log_joint import LogJoint
from implicitvi.pyro_model.prior import ModelPrior
from implicitvi.pyro_model.sites import SiteLayout
from implicitvi.pyro_model.tracing import sites_without_density
from implicitvi.rng import RandomStream

_PROBES = 64  # draws among which some are looked for that have a density


@dataclass(frozen=True)
class Target:
    """``log p(x, u)`` of a model at its arguments, on the unconstrained vector ``u [D]``.

    Attributes:
        model: The Pyro model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        trace: A trace of its latent sites.
        layout: These sites on the vector.
        log_joint: What scores it.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    trace: Any
    layout: SiteLayout
    log_joint: LogJoint

    @classmethod
    def of(
        cls,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        first: dict[str, Tensor],
        seed: int,
    ) -> Target:
        """Read the model's latent sites, at the values of a draw where those fit: not every prior allows a run."""
        there = InitMessenger(init_to_value(values=first))(model)
        with torch.no_grad(), RandomStream(seed):
            try:
                trace = latent_trace(there, *args, **kwargs)
                for name, node in trace.iter_stochastic_nodes():
                    fn, value = node["fn"], node["value"]
                    if value.shape != fn.shape() or not fn.support.check(value).all():
                        raise ValueError(f"the first draw is no value of {name!r}")
            except (RuntimeError, ValueError, NotImplementedError):
                trace = latent_trace(model, *args, **kwargs)
            check_latents(trace)
            layout = SiteLayout.from_trace(trace)
            values = {name: trace.nodes[name]["value"] for name in layout.names}
            implicit = sites_without_density(model, values, *args, **kwargs)
        if implicit:
            raise ModelError(
                f"the prior of {', '.join(map(repr, implicit))} has no density, so there is no posterior density to "
                "hold draws against",
                do="Compare with draws of a reference: implicitvi.metrics.c2st.",
            )
        return cls(model, args, kwargs, trace, layout, LogJoint(model, layout))

    def __call__(self, u: Tensor) -> Tensor:
        """``log p [S]`` of points ``[S, D]``."""
        return self.log_joint(u, *self.args, **self.kwargs)

    def score(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``log p [S]`` and its gradient ``[S, D]`` at ``u [S, D]``, after `choose`."""
        self.choose(u)
        return gradients(self, u, chunk=500)

    def choose(self, u: Tensor) -> None:
        """Choose the way of scoring by what agrees with the loop at some of ``u [S, D]``.

        Raises:
            ModelError: The model looks at a minibatch.
        """
        with torch.no_grad():
            few = u[:_PROBES]
            scored = few[self.log_joint.loop(few, *self.args, **self.kwargs).isfinite()]
        self.log_joint.choose((scored if len(scored) else few)[:3], *self.args, **self.kwargs)
        for name, (size, part) in self.log_joint.minibatches.items():
            raise ModelError(
                f"the model looks at a minibatch of plate {name!r}, so its density is another at every look",
                got=f"{part} of {size}",
                do="Pass arguments under which it looks at all of its data.",
            )

    def unconstrain(self, draws: Draws) -> Tensor:
        """Draws ``{site: [S, *site shape]}`` as ``u [S, D]``, checked."""
        names, given = set(self.layout.names), set(draws)
        if names != given:
            wrong = [f"missing {name!r}" for name in self.layout.names if name not in given]
            wrong += [f"unknown {name!r}" for name in draws if name not in names]
            raise ShapeError(
                "the draws are not of the model's latent sites",
                got=", ".join(wrong),
                expected=", ".join(map(repr, self.layout.names)),
                do="Leave out deterministic and observed sites, and discrete ones that the model sums out.",
            )
        values, counts = {}, {}
        for site in self.layout.sites:
            node = self.trace.nodes[site.name]
            value = torch.as_tensor(draws[site.name]).detach().to(node["value"])
            if tuple(value.shape[1:]) != site.shape:
                raise ShapeError(
                    f"the draws of site {site.name!r} have the wrong shape",
                    got=tuple(value.shape),
                    expected=f"[S, {', '.join(map(str, site.shape))}]" if site.shape else "[S]",
                    do="Put the draws of all chains behind each other along the first axis.",
                )
            valid = (node["fn"].support.check(value), value.isfinite())
            inside = torch.stack([v.reshape(len(value), -1).all(1) for v in valid]).all(0)
            if not inside.all():
                outside = int((~inside).sum())
                raise ModelError(
                    f"draws of site {site.name!r} lie outside its support",
                    got=f"{outside} of {len(value)}",
                    expected=str(node["fn"].support),
                    do="Pass constrained values, as guide.sample or MCMC.get_samples give them.",
                )
            values[site.name], counts[site.name] = value, len(value)
        if len(set(counts.values())) > 1:
            raise ShapeError("sites have different numbers of draws", got=counts)
        with torch.no_grad():
            return self.layout.pack(values)

    def prior_draws(self, count: int, like: Tensor, seed: int) -> Tensor | None:
        """Draws ``[count, D]`` of the prior; ``None`` where it cannot be drawn from, as a flat one cannot."""
        prior = ModelPrior(LogJoint(self.model, self.layout, only=self.layout.names), self.args, self.kwargs, like)
        try:
            with warnings.catch_warnings(), RandomStream(seed):
                warnings.simplefilter("ignore")
                return prior.sample((count,))
        except (ModelError, NotImplementedError, RuntimeError, ValueError):
            return None
