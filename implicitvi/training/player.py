"""Define a player: parameters, the loss that they minimise, and how often."""

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
    """A network that takes turns with others in training.

    Args:
        name: Its name in the history and in errors.
        module: The module that it trains. Gradients of its losses reach these parameters and ``tensors`` only.
        losses: The losses of its turn at a stage, each with metrics for the history: a scalar, lower is better, or
            ``None`` to skip a step. The trainer asks for the next loss after the step.
        lr: Its learning rate at a stage.
        after_step: Called after each step that had a loss.
        averaged_modules: Modules that change in its turn without gradients; part of the state of a fit.
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
        """Return the tensors that its steps change: those that are not frozen."""
        return [weight for weight in (*self.module.parameters(), *self.tensors.values()) if weight.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of its modules and tensors, not copied."""
        return {"modules": dict(self._modules().state_dict()), "tensors": dict(self.tensors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `state_dict` returned."""
        self._modules().load_state_dict(state["modules"])
        with torch.no_grad():
            for name, leaf in self.tensors.items():
                leaf.copy_(state["tensors"][name])

    def _modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"module": self.module, "averaged_modules": nn.ModuleList(self.averaged_modules)})
