"""The objective of a guide of one posterior, and its players."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, nan
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from implicitvi.avb.objective import AVBObjective
from implicitvi.avb.players import Turn, adversary_players
from implicitvi.numerics.gaussian import GaussianMixture
from implicitvi.pyro_model.log_joint import LogJoint
from implicitvi.training import Player, Stage
from implicitvi.training.player import Metrics

REACH = 3.0  # of a tempered start, in scales of the sampler's frame


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def devices(self) -> set[str]:
        """Where their tensors are."""
        leaves = tree_leaves((self.args, self.kwargs))
        return {str(leaf.device) for leaf in leaves if isinstance(leaf, Tensor)}


@dataclass(frozen=True)
class Problem:
    """A model, its guide set up for it, and the objective that fits one to the other.

    Attributes:
        log_joint: The model's log joint, its mode chosen.
        avb: The objective.
        arguments: The arguments that it was made with.
        parameters: Unconstrained leaves of the model's parameters, trained with the sampler.
    """

    log_joint: LogJoint
    avb: AVBObjective
    arguments: Arguments
    parameters: dict[str, Tensor]

    def scorer(self, arguments: Arguments, beta: float = 1.0) -> Callable[[Tensor], Tensor]:
        """``β log p(x, z)``, tempered with `base`, of particles ``[S, D]`` at the model's arguments: ``[S]``."""

        def score(u: Tensor) -> Tensor:
            log_p = self.log_joint(u, *arguments.args, **arguments.kwargs)
            return self.temper(log_p, u, beta)

        return score

    def temper(self, log_p: Tensor, u: Tensor, beta: float) -> Tensor:
        """``β log_p + (1 - β) base`` of particles ``u [S, D]`` with the log joint ``log_p [S]``."""
        return log_p if beta == 1 else beta * log_p + (1 - beta) * self.base(u)

    def base(self, u: Tensor) -> Tensor:
        """Log density ``[S]`` that a tempered fit sets out from: the Gaussian of the warm start, `REACH` times as wide.

        A power of a density alone may be another posterior altogether: that of a funnel lies in its mouth, far out.
        """
        locs, scale_trils = self.avb.sampler.frames()
        weights = locs.new_full((len(locs),), 1 / len(locs))
        return GaussianMixture(weights, locs, REACH * scale_trils).log_prob(u)

    def opponents(self, arguments: Callable[[], Arguments]) -> list[Player]:
        """The players that follow the sampler: a fitted contrast, where there is one, and the adversary.

        Args:
            arguments: Gives the model's arguments at the time of a turn.
        """
        avb = self.avb

        def contrast_losses(stage: Stage) -> Turn:
            for _ in range(stage.adversary_steps):
                yield avb.contrast_loss(stage.num_particles), {}

        def adversary_losses(stage: Stage) -> Turn:
            scorer = self.scorer(arguments(), stage.beta)
            for loss in avb.adversary_losses(stage.num_particles, stage.adversary_steps, scorer):
                yield loss, {}

        return adversary_players("adversary", avb, contrast_losses, adversary_losses)

    def sampler_player(self, arguments: Callable[[], Arguments]) -> Player:
        """The player that raises the ELBO. Arguments as for `opponents`."""

        def losses(stage: Stage) -> Turn:
            yield with_metrics(*self.sampler_loss(arguments(), stage))

        return Player("sampler", self.avb.sampler, losses, lambda stage: stage.lr, tensors=self.parameters)

    def sampler_loss(self, arguments: Arguments, stage: Stage) -> tuple[Tensor | None, int]:
        """`loss_of` fresh draws, and how many were dropped."""
        scorer = self.scorer(arguments, stage.beta)
        elbo, dropped = self.avb.elbo(self.num_particles(stage), scorer)
        return loss_of(elbo), dropped

    def num_particles(self, stage: Stage) -> int:
        """Draws of the sampler in a turn: whole groups of those that share an importance-weighted bound."""
        return ceil(stage.num_particles / self.avb.num_importance) * self.avb.num_importance

    def how(self) -> str:
        """How the model is scored, and why."""
        return f"{self.log_joint.mode} ({self.log_joint.reason})"

    def explain(self, arguments: Arguments) -> str:
        """The sites that are not finite at a draw of the sampler, with values, in words."""
        with torch.no_grad():
            u = self.avb.sampler(1)[0]
        return self.log_joint.describe(u, *arguments.args, **arguments.kwargs)

    def log_q(self, u: Tensor) -> Tensor:
        """The learned ``log q(u)`` of draws ``[S, D]`` in nats, at the arguments of the set-up."""
        return self.avb.log_q(u, self.scorer(self.arguments))

    def log_ratio(self, u: Tensor) -> Tensor:
        """The learned ``log q(u) - log r(u)`` of draws ``[S, D]`` in nats, as in `log_q`."""
        return self.avb.log_r_and_ratio(u, self.scorer(self.arguments))[1]


def loss_of(elbo: Tensor) -> Tensor | None:
    """The sampler's loss: the negative mean bound, ``None`` where no draw has one in ``elbo [S']``."""
    return -elbo.mean() if len(elbo) else None


def with_metrics(loss: Tensor | None, dropped: int) -> tuple[Tensor | None, Metrics]:
    """A loss of the sampler, with what the history keeps of its turn."""
    return loss, {"elbo": nan if loss is None else -loss.detach(), "dropped": float(dropped)}
