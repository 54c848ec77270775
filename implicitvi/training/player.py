"""A player: parameters, the loss that they minimise, and how often."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from implicitvi.training.schedule import Stage

Metrics = dict[str, float | Tensor]


@dataclass(frozen=True)
class Player:
    """One of the networks that take turns.

    Args:
        name: Its name in the history and in errors.
        module: What it trains. Gradients of its losses reach these parameters and no others.
        losses: The losses of its turn at a stage, one for each step that it takes, each with metrics for the
            history. A scalar, lower is better, or ``None`` where there is nothing to learn from. The next loss is
            asked for after the step on the last.
        lr: Its rate at a stage.
        follow: Called after each of its turns that had a loss.
        followers: Modules that change in its turn without gradients, part of the state of a fit.
    """

    name: str
    module: nn.Module
    losses: Callable[[Stage], Iterator[tuple[Tensor | None, Metrics]]]
    lr: Callable[[Stage], float]
    follow: Callable[[], None] = lambda: None
    followers: tuple[nn.Module, ...] = ()

    def state(self) -> nn.ModuleDict:
        """Its modules by role."""
        return nn.ModuleDict({"module": self.module, "followers": nn.ModuleList(self.followers)})
