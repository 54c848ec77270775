"""The objective of an amortized guide: shared latents, and one network for the latents of every datum.

    elbo = log p(g) - log q(g) + Σ_i [log p(x_i, z_i | g) - log q(z_i | x_i, g)]

with ``log q = log r + T`` for each of the two, so every term is the one of `objectives`. A minibatch of ``B`` of the
``N`` data weighs ``N / B``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, nan

import torch
from torch import Tensor

from implicitvi.avb.objective import AVBObjective, importance_weighted
from implicitvi.avb.players import Turn, adversary_players
from implicitvi.inference.amortization import AmortizedSampler
from implicitvi.inference.gaussian_fit import parameter_groups
from implicitvi.inference.minibatches import Minibatch, Source
from implicitvi.inference.objective import Arguments
from implicitvi.numerics.optimise import descend, finite_draws
from implicitvi.pyro_model.log_joint import LogJoint
from implicitvi.training import Player, Stage

LEAST_DRAWS = 4  # of every datum, so that its own evidence can be taken out of the adversary's hint


@dataclass(frozen=True)
class AmortizedProblem:
    """A model, its amortized sampler, and the objectives that fit one to the other.

    Attributes:
        source: Minibatches, and the log joint of each.
        sampler: Draws shared and local latents.
        local: Objective of the latents of one datum.
        shared: Objective of the shared ones, ``None`` where there are none.
        parameters: Unconstrained leaves of the model's parameters, trained with the sampler.
    """

    source: Source
    sampler: AmortizedSampler
    local: AVBObjective
    shared: AVBObjective | None
    parameters: dict[str, Tensor]

    def opponents(self, arguments: Callable[[], Arguments]) -> list[Player]:
        """The adversary of each objective, with its contrast where that is fitted.

        Args:
            arguments: Gives the model's arguments at the time of a turn.
        """

        def batch() -> Minibatch:
            now = arguments()
            return self.source.batch(*now.args, **now.kwargs)

        def local_contrast(stage: Stage) -> Turn:
            for _ in range(stage.adversary_steps):
                rows = batch().pick(stage.num_particles // LEAST_DRAWS).rows
                count = self._draws(stage, rows)
                with torch.no_grad():
                    g, z = self.sampler(count, rows)
                yield self.local.contrast.loss(z, self.sampler.context(rows, g)), {}

        def shared_contrast(stage: Stage) -> Turn:
            assert self.shared is not None
            for _ in range(stage.adversary_steps):
                yield self.shared.contrast_loss(stage.num_particles), {}

        def local_adversary(stage: Stage) -> Turn:
            rows = stage.num_particles // LEAST_DRAWS
            for loss in self._local_losses(batch().pick(rows), stage):
                yield loss, {}

        def shared_adversary(stage: Stage) -> Turn:
            assert self.shared is not None
            count, steps = stage.num_particles, stage.adversary_steps
            for loss in self.shared.adversary_losses(count, steps):
                yield loss, {}

        players = adversary_players("adversary", self.local, local_contrast, local_adversary)
        if self.shared is not None:
            players += adversary_players("shared", self.shared, shared_contrast, shared_adversary)
        return players

    def _local_losses(self, batch: Minibatch, stage: Stage) -> Iterator[Tensor]:
        """The ratio losses of the local adversary on one minibatch."""
        count, steps = self._draws(stage, batch.rows), stage.adversary_steps
        with torch.no_grad():
            g = None if self.sampler.shared is None else self.sampler.shared(count * steps)
            x = self.sampler.context(batch.rows, g)

        def log_joint(z: Tensor) -> Tensor:
            beside = None if g is None else g.repeat(len(z) // len(g), 1)
            return stage.beta * self.source.terms(beside, z, batch)[:, 1:]

        yield from self.local.adversary_losses(count, steps, log_joint, x)

    def sampler_player(self, arguments: Callable[[], Arguments]) -> Player:
        """The player that raises the bound. Arguments as for `opponents`."""

        def losses(stage: Stage) -> Turn:
            loss, dropped = self.sampler_loss(arguments(), stage)
            yield loss, {"elbo": nan if loss is None else -loss.detach(), "dropped": float(dropped)}

        return Player("sampler", self.sampler, losses, lambda stage: stage.lr, tensors=self.parameters)

    def sampler_loss(self, arguments: Arguments, stage: Stage) -> tuple[Tensor | None, int]:
        """Negative mean bound of fresh draws, ``None`` where none has a density, and how many were dropped."""
        batch = self.source.batch(*arguments.args, **arguments.kwargs)
        sampler, num_importance = self.sampler, self.local.num_importance
        count = self._draws(stage, batch.rows)
        seen = None if sampler.shared is None else sampler.shared(max(count, stage.num_particles))
        g = None if seen is None else seen[: count // num_importance].repeat(num_importance, 1)
        x = sampler.context(batch.rows, g)
        z = sampler.local(count, x)
        terms = stage.beta * self.source.terms(g, self.local.without_hint_gradient(z), batch)
        kept = finite_draws(terms, num_importance)
        if not kept.all():
            z, g = z[kept], None if g is None else g[kept]
            if not len(z):
                return None, count
            x = x[kept] if x.dim() == z.dim() else x
            terms = stage.beta * self.source.terms(g, self.local.without_hint_gradient(z), batch)
        scores = self.local.score(z, self.local.contrast(z, x), terms[:, 1:], x)
        bound = batch.weight * importance_weighted(scores, z, num_importance).sum(-1)
        first = len(bound)
        outside = terms[:first, 0]
        if self.shared is not None and g is not None and seen is not None:
            outside = self.shared.score(g[:first], self.shared.contrast(seen), outside)
        return -(outside + bound).mean(), count - len(z)

    def warm_start(self, arguments: Arguments, *, num_steps: int, num_draws: int = LEAST_DRAWS) -> None:
        """Fit Gaussians: one of the shared latents, and one of every datum's, its place and scale by the encoder.

        The local sampler starts as this Gaussian; its shape is what adversarial training adds.
        """
        sampler = self.sampler
        shared = sampler.shared
        groups = [{"params": list(sampler.local.encoder.parameters()), "lr": 0.01}]
        groups += parameter_groups(list(self.parameters.values()))
        if shared is not None:
            dim = shared.latent_dim
            loc = shared.loc.clone().requires_grad_()
            log_diagonal = loc.new_full((dim,), 0.1).log().requires_grad_()
            lower = loc.new_zeros(dim, dim).requires_grad_()
            groups.append({"params": [loc, log_diagonal, lower], "lr": 0.05})

        def scale_tril() -> Tensor:
            return log_diagonal.exp()[:, None] * (torch.eye(dim).to(loc) + lower.tril(-1))

        def loss() -> Tensor | None:
            batch = self.source.batch(*arguments.args, **arguments.kwargs)
            g, frame, log_scale = None, None, torch.zeros(())
            if shared is not None:
                frame = loc, scale_tril()
                g = loc + torch.randn(num_draws, dim).to(loc) @ frame[1].mT
                log_scale = log_diagonal.sum()
            x = sampler.context(batch.rows, g, frame)
            place, scales = sampler.local.frame(x)
            eps = torch.randn(num_draws, *place.shape[-2:]).to(place)
            z = place + (scales @ eps[..., None]).squeeze(-1)
            terms = self.source.terms(g, z, batch)
            weights = terms.new_full(terms.shape[1:], batch.weight)
            weights[0] = 1.0
            scores = terms @ weights
            scores = scores[scores.isfinite()]
            if not len(scores):
                return None
            log_scales = scales.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            per_draw = log_scales.expand(num_draws, -1).sum(-1)
            return -scores.mean() - log_scale - batch.weight * per_draw.mean()

        descend(loss, groups, num_steps, normalised=True)
        sampler.local.initialised.fill_(True)
        if shared is not None:
            shared.set_affine(loc.detach(), scale_tril().detach())

    def how(self) -> str:
        """How the model is scored, and why."""
        return self.source.how()

    @property
    def log_joint(self) -> LogJoint:
        """The model's `LogJoint`."""
        return self.source.log_joint

    def explain(self, arguments: Arguments) -> str:
        """Which terms are not finite at a draw of the sampler, in words."""
        batch = self.source.batch(*arguments.args, **arguments.kwargs)
        with torch.no_grad():
            g, z = self.sampler(1, batch.rows)
            bad = (~self.source.terms(g, z, batch)[0].isfinite()).nonzero().flatten().tolist()
        return f"the log density of rows {bad} (0: what is shared) is not finite" if bad else ""

    def _draws(self, stage: Stage, rows: Tensor) -> int:
        """Draws of each datum in a step, so that about ``num_particles`` are drawn in all."""
        groups = max(LEAST_DRAWS, stage.num_particles // len(rows)) / self.local.num_importance
        return ceil(groups) * self.local.num_importance
