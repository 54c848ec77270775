"""A player: parameters, the loss that they minimise, and how often."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from implicitvi.training.schedule import Stage

Metrics = dict[str, float | Tensor]


@dataclass(frozen=True)
class Player:
    """One of the networks that take turns.

    Args:
        name: Its name in the history and in errors.
        module: What it trains. Gradients of its losses reach these parameters, its tensors, and no others.
        losses: The losses of its turn at a stage, one for each step that it takes, each with metrics for the
            history. A scalar, lower is better, or ``None`` where there is nothing to learn from. The next loss is
            asked for after the step on the last.
        lr: Its rate at a stage.
        after_step: Called after each of its turns that had a loss.
        averaged_modules: Modules that change in its turn without gradients, part of the state of a fit.
        tensors: Leaves outside any module that it trains too, by name: the parameters of a Pyro model.
    """

    name: str
    module: nn.Module
    losses: Callable[[Stage], Iterator[tuple[Tensor | None, Metrics]]]
    lr: Callable[[Stage], float]
    after_step: Callable[[], None] = lambda: None
    averaged_modules: tuple[nn.Module, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def parameters(self) -> list[Tensor]:
        """What its steps change."""
        return [*self.module.parameters(), *self.tensors.values()]

    def state_dict(self) -> dict[str, Any]:
        """Its modules and tensors, not copied."""
        return {"modules": dict(self._modules().state_dict()), "tensors": dict(self.tensors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._modules().load_state_dict(state["modules"])
        with torch.no_grad():
            for name, leaf in self.tensors.items():
                leaf.copy_(state["tensors"][name])

    def _modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"module": self.module, "averaged_modules": nn.ModuleList(self.averaged_modules)})
