"""Several loops in step: fits whose steps are computed together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from implicitvi.training.player import Metrics
from implicitvi.training.schedule import Stage
from implicitvi.training.trainer import Trainer

Losses = Sequence[tuple[Tensor | None, Metrics]]
Turns = Callable[[Stage], Iterator[Losses]]


class Lockstep:
    """Steps several trainers together, so that what they compute can be computed at once.

    Every fit keeps its own parameters, optimisers, guards, random numbers and history. One pass backward through the
    sum of their losses gives the gradients of all, as no loss depends on another fit's parameters.

    Args:
        trainers: The loops, of one schedule, at the same step, with players of the same names.
        turns: For each player, the losses of all fits at a stage, as in `Player.losses`.
    """

    def __init__(self, trainers: Sequence[Trainer], turns: Sequence[Turns]):
        self.trainers = tuple(trainers)
        self._turns = tuple(turns)
        self._players = list(zip(*(trainer.players for trainer in trainers), strict=True))
        self._parameters = [[p.parameters() for p in players] for players in self._players]

    def step(self) -> None:
        """Let every player of every fit take its turns."""
        stages = [trainer.begin() for trainer in self.trainers]
        metrics: list[Metrics] = [{"beta": stage.beta} for stage in stages]
        for players, parameters, turns in zip(
            self._players, self._parameters, self._turns, strict=True
        ):
            for losses in turns(stages[0]):
                gradients = _gradients([loss for loss, _ in losses], parameters)
                for i, (player, (loss, seen)) in enumerate(zip(players, losses, strict=True)):
                    loss = None if loss is None else loss.detach()
                    took = self.trainers[i].descend(player, loss, gradients[i], stages[i])
                    metrics[i] |= seen | {player.name: took}
        for trainer, seen in zip(self.trainers, metrics, strict=True):
            trainer.end(seen)


def _gradients(
    losses: Sequence[Tensor | None], parameters: Sequence[Sequence[Tensor]]
) -> list[Sequence[Tensor | None]]:
    """Of each loss in its own parameters."""
    known = [loss for loss in losses if loss is not None]
    if not known:
        return [[None] * len(each) for each in parameters]
    flat = [tensor for each in parameters for tensor in each]
    found = iter(torch.autograd.grad(torch.stack(known).sum(), flat, allow_unused=True))
    return [[next(found) for _ in each] for each in parameters]
