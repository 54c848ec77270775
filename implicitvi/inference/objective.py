"""Fit a guide to a target: one objective, with a part for shared latents and one for the latents of every datum.

    elbo = log p(g) - log q(g) + Σ_i [log p(x_i, z_i | g) - log q(z_i | x_i, g)]

A guide of one posterior has the shared part alone, a guide amortized over datasets the local one. With
``log q = log r + T`` each part is the line of `avb.objective`. A minibatch of ``B`` of ``N`` data weighs ``N / B``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import ceil, nan
from typing import Any

import torch
from torch import Tensor

from implicitvi.avb.objective import AVBObjective, importance_weighted
from implicitvi.avb.players import Turn, adversary_players
from implicitvi.inference.minibatches import Minibatch, MinibatchSource
from implicitvi.numerics.gaussian import GaussianMixture
from implicitvi.numerics.optimise import finite_draws
from implicitvi.pyro_model.target import Target
from implicitvi.training import Player, Stage

REACH = 3.0  # of a tempered start, in scales of the sampler's affine map
LEAST_DRAWS = 4  # of every datum, so that its own evidence can be removed from the adversary's hint


@dataclass(frozen=True)
class PosteriorObjective:
    """The objective that fits a guide's sampler to a target, and its players.

    Attributes:
        sampler: The guide's sampler.
        shared: Objective of the latents that all data share, for one posterior of all latents; ``None`` without any.
        local: Objective of the latents of one datum; ``None`` for a guide of one posterior.
        source: Minibatches of an amortized guide, and the log joint of each; ``None`` for a guide of one posterior.
        parameters: Unconstrained leaves of the model's parameters, trained with the sampler.
    """

    sampler: Any
    shared: AVBObjective | None
    local: AVBObjective | None = None
    source: MinibatchSource | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict)

    @property
    def avb(self) -> AVBObjective:
        """The objective of the local latents, or of all."""
        avb = self.shared if self.local is None else self.local
        assert avb is not None
        return avb

    def players(self, target: Callable[[], Target], *, with_sampler: bool) -> list[Player]:
        """Return the players that follow the sampler, fitted contrasts and adversaries, and the sampler last.

        Args:
            target: Function that returns the target at the time of a turn.
            with_sampler: Whether the sampler is a player; otherwise another optimiser moves it.
        """
        players = []
        if self.local is not None:
            players += self._local_opponents(self.local, target)
        if self.shared is not None:
            players += self._shared_opponents(self.shared, target)
        if with_sampler:
            players.append(self._sampler_player(target))
        return players

    def loss(self, target: Target, stage: Stage) -> tuple[Tensor | None, int]:
        """Return the negative mean bound of fresh draws, and how many were dropped.

        The loss is ``None`` where no draw has a finite log density.
        """
        if self.local is not None:
            return self._minibatch_loss(self.local, target, stage)
        elbo, dropped = self.avb.elbo(stage.num_particles, self.scorer(target, stage.beta))
        return (-elbo.mean() if len(elbo) else None), dropped

    def scorer(self, target: Target, beta: float = 1.0) -> Callable[[Tensor], Tensor]:
        """Return ``β log p(x, u) + (1 - β) log base(u)`` as a function of particles ``u [S, D]``: ``[S]`` in nats."""
        return partial(self._score, target, beta)

    def _score(self, target: Target, beta: float, u: Tensor) -> Tensor:
        log_p = target(u)
        return log_p if beta == 1 else beta * log_p + (1 - beta) * self.log_base(u)

    def log_q(self, target: Target, u: Tensor) -> Tensor:
        """Return the learned log density ``[S]`` of a guide of one posterior at ``u [S, D]``, in nats."""
        return self.avb.log_q(u.to(self.sampler.loc), self.scorer(target))

    def log_ratio(self, target: Target, u: Tensor) -> Tensor:
        """Return the learned ``log q - log r`` ``[S]`` of a guide of one posterior at ``u [S, D]``, in nats."""
        return self.avb.log_r_and_ratio(u.to(self.sampler.loc), self.scorer(target))[1]

    def log_base(self, u: Tensor) -> Tensor:
        """Return the log density ``[S]`` that a tempered fit starts from: the warm start, `REACH` times as wide.

        A power of the density alone may be another posterior altogether: that of a funnel lies far out in its mouth.
        """
        locs, scale_trils = self.avb.sampler.frames()
        weights = locs.new_full((len(locs),), 1 / len(locs))
        return GaussianMixture(weights, locs, REACH * scale_trils).log_prob(u)

    def scoring(self, target: Target) -> str:
        """Return the mode of scoring the model, and the reason for it."""
        if self.source is not None:
            return self.source.scoring()
        return f"{target.log_joint.mode} ({target.log_joint.reason})"

    def explain(self, target: Target) -> str:
        """Name the sites or rows that are not finite at a draw of the sampler."""
        if self.source is None:
            with torch.no_grad():
                return target.describe(self.sampler(1)[0])
        batch = self.source.batch(target.arguments)
        with torch.no_grad():
            g, z = self.sampler(1, batch.rows)
            bad = (~self.source.terms(g, z, batch)[0].isfinite()).nonzero().flatten().tolist()
        return f"the log density of rows {bad} (0: the shared part) is not finite" if bad else ""

    def _sampler_player(self, target: Callable[[], Target]) -> Player:
        def losses(stage: Stage) -> Turn:
            loss, dropped = self.loss(target(), stage)
            yield loss, {"elbo": nan if loss is None else -loss.detach(), "dropped": float(dropped)}

        return Player("sampler", self.sampler, losses, lambda stage: stage.lr, tensors=self.parameters)

    def _shared_opponents(self, avb: AVBObjective, target: Callable[[], Target]) -> list[Player]:
        def contrast(stage: Stage) -> Turn:
            for _ in range(stage.adversary_steps):
                yield avb.contrast_loss(stage.num_particles), {}

        def adversary(stage: Stage) -> Turn:
            scorer = self.scorer(target(), stage.beta) if self.local is None else None
            for loss in avb.adversary_losses(stage.num_particles, stage.adversary_steps, scorer):
                yield loss, {}

        return adversary_players("adversary" if self.local is None else "shared", avb, contrast, adversary)

    def _local_opponents(self, avb: AVBObjective, target: Callable[[], Target]) -> list[Player]:
        assert self.source is not None
        source = self.source

        def contrast(stage: Stage) -> Turn:
            for _ in range(stage.adversary_steps):
                rows = source.batch(target().arguments).pick(stage.num_particles // LEAST_DRAWS).rows
                with torch.no_grad():
                    g, z = self.sampler(self._draws(stage, rows), rows)
                yield avb.contrast.loss(z, self.sampler.context(rows, g)), {}

        def adversary(stage: Stage) -> Turn:
            batch = source.batch(target().arguments).pick(stage.num_particles // LEAST_DRAWS)
            for loss in self._local_losses(avb, source, batch, stage):
                yield loss, {}

        return adversary_players("adversary", avb, contrast, adversary)

    def _local_losses(
        self, avb: AVBObjective, source: MinibatchSource, batch: Minibatch, stage: Stage
    ) -> Iterator[Tensor]:
        """Yield the ratio losses of the local adversary on one minibatch."""
        count, steps = self._draws(stage, batch.rows), stage.adversary_steps
        with torch.no_grad():
            g = None if self.sampler.shared is None else self.sampler.shared(count * steps)
            x = self.sampler.context(batch.rows, g)

        def log_joint(z: Tensor) -> Tensor:
            beside = None if g is None else g.repeat(len(z) // len(g), 1)
            return stage.beta * source.terms(beside, z, batch)[:, 1:]

        yield from avb.adversary_losses(count, steps, log_joint, x)

    def _minibatch_loss(self, avb: AVBObjective, target: Target, stage: Stage) -> tuple[Tensor | None, int]:
        """Return the loss of an amortized guide on one minibatch, and how many draws were dropped."""
        assert self.source is not None
        batch = self.source.batch(target.arguments)
        sampler, num_importance = self.sampler, avb.num_importance
        count = self._draws(stage, batch.rows)
        seen = None if sampler.shared is None else sampler.shared(max(count, stage.num_particles))
        g = None if seen is None else seen[: count // num_importance].repeat(num_importance, 1)
        x = sampler.context(batch.rows, g)
        z = sampler.local(count, x)
        terms = stage.beta * self.source.terms(g, avb.without_hint_gradient(z), batch)
        kept = finite_draws(terms, num_importance)
        if not kept.all():
            z, g = z[kept], None if g is None else g[kept]
            if not len(z):
                return None, count
            x = x[kept] if x.dim() == z.dim() else x
            terms = stage.beta * self.source.terms(g, avb.without_hint_gradient(z), batch)
        scores = avb.score(z, avb.contrast(z, x), terms[:, 1:], x)
        bound = batch.weight * importance_weighted(scores, z, num_importance).sum(-1)
        first = len(bound)
        outside = terms[:first, 0]
        if self.shared is not None and g is not None and seen is not None:
            outside = self.shared.score(g[:first], self.shared.contrast(seen), outside)
        return -(outside + bound).mean(), count - len(z)

    def _draws(self, stage: Stage, rows: Tensor) -> int:
        """Return the number of draws of each datum, so that about ``num_particles`` are drawn in all."""
        groups = max(LEAST_DRAWS, stage.num_particles // len(rows)) / self.avb.num_importance
        return ceil(groups) * self.avb.num_importance
