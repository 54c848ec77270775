"""A posterior whose draws are known, whatever it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from implicitvi import ImplicitGuide
from implicitvi.pyro_model.log_joint import LogJoint
from implicitvi.pyro_model.sites import SiteLayout

Sites = dict[str, Tensor]


class Missing(Exception):
    """The data or the reference draws of a posterior are not at hand."""


@dataclass(frozen=True)
class Target:
    """A Pyro model, and draws of its exact posterior in the coordinates in which fits are judged.

    Attributes:
        name: As in the table.
        model: The Pyro model; any batch of particles may stand to the left of its sites.
        args: Its arguments.
        draw: Exact or reference draws: ``draw(num_samples, generator) -> x [N, D]`` in float64, independent and in
            random order; a finite reference gives what it has.
        compare: From the values of the sites ``{name: [S, *shape]}`` to the coordinates of judgement ``[S, D]``.
        sites: The inverse of ``compare``.
        modes: Number of the mode that each draw belongs to, ``x [S, D] -> [S]``; ``None`` where there is one.
        num_draws: Draws of a method to judge.
        num_reference: Draws to judge by.
        log_evidence: Log integral of the model in nats, where it is known.
    """

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    draw: Callable[[int, torch.Generator], Tensor]
    compare: Callable[[Sites], Tensor]
    sites: Callable[[Tensor], Sites]
    modes: Callable[[Tensor], Tensor] | None = None
    num_draws: int = 5000
    num_reference: int = 100_000
    log_evidence: float | None = field(default=None, kw_only=True)

    @cached_property
    def reference(self) -> Tensor:
        """Draws of the posterior ``[N, D]`` in float64, the same in every process."""
        return self.draw(self.num_reference, torch.Generator().manual_seed(10**6))

    @cached_property
    def layout(self) -> SiteLayout:
        """The sites of the model on the flat unconstrained vector ``u``."""
        with torch.random.fork_rng():
            return ImplicitGuide(self.model).setup(*self.args).layout

    def score(self, u: Tensor, chunk: int = 1000) -> tuple[Tensor, Tensor]:
        """``log p(x, u) + log|J|`` ``[N]`` of points ``u [N, D]`` in nats, and its gradient ``[N, D]``."""
        log_joint = LogJoint(self.model, self.layout)
        parts = []
        for piece in u.split(chunk):
            v = piece.detach().requires_grad_()
            value = log_joint(v, *self.args)
            parts.append((value.detach(), torch.autograd.grad(value.sum(), v)[0]))
        values, gradients = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(gradients)

    def unconstrain(self, x: Tensor) -> Tensor:
        """From the coordinates of judgement ``[N, D]`` to ``u [N, D]``."""
        return self.layout.pack(self.sites(x))
