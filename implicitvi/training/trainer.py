"""The only loop there is."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import isfinite, nan
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from implicitvi.errors import NonFiniteError
from implicitvi.training.callbacks import Callback, StopTraining
from implicitvi.training.player import Metrics, Player
from implicitvi.training.rng import RandomStream
from implicitvi.training.schedule import Schedule, Stage


class History:
    """Metrics of every step, by name.

    >>> history = History()
    >>> history.append(loss=2.0); history.append(loss=torch.tensor(1.0))
    >>> history["loss"]
    array([2., 1.])
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def append(self, **metrics: float | Tensor) -> None:
        """Add one step."""
        for name, value in metrics.items():
            self._values[name].append(float(value))

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        if name not in self._values:
            raise KeyError(f"no metric {name!r}; there are {sorted(self._values)}")
        return np.array(self._values[name])

    def names(self) -> list[str]:
        """Names of the metrics."""
        return list(self._values)

    def last(self, name: str, count: int = 1) -> float:
        """Mean of the last ``count`` values that are finite, NaN where there is none."""
        values = np.array(self._values.get(name, [])[-count:])
        finite = values[np.isfinite(values)]
        return float(finite.mean()) if finite.size else float("nan")

    def state_dict(self) -> dict[str, list[float]]:
        """A copy of all values."""
        return {name: list(values) for name, values in self._values.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Take over what `state_dict` gave."""
        self._values = defaultdict(list, {name: list(values) for name, values in state.items()})


class Trainer:
    """Steps players in order, each with its own Adam, on a schedule.

    A step whose loss or gradient is not finite is skipped and counted; after ``max_skips`` in a row the last good
    state is restored and `NonFiniteError` raised. All random numbers come from ``stream``.

    Args:
        players: Who takes turns, in this order.
        schedule: Settings of every step.
        stream: Source of random numbers.
        clip_norm: Bound of the global norm of each player's gradient.
        max_skips: Skipped steps of one player in a row that end the fit.
        explain: Says, in words, what is not finite, for the error.
        betas: Adam's moment decays. A low first one suits a game, where yesterday's gradient answers
            yesterday's opponent.
    """

    def __init__(
        self,
        players: Sequence[Player],
        *,
        schedule: Schedule,
        stream: RandomStream,
        clip_norm: float = 10.0,
        max_skips: int = 20,
        explain: Callable[[], str] = str,
        betas: tuple[float, float] = (0.5, 0.999),
    ):
        self.players = tuple(players)
        self.schedule = schedule
        self.stream = stream
        self.clip_norm = clip_norm
        self.max_skips = max_skips
        self.step_count = 0
        self.skipped = 0
        self.history = History()
        self.explain = explain
        self._skips = Counter[str]()
        self._optimisers = {
            player.name: torch.optim.Adam(player.parameters(), lr=1.0, betas=betas, fused=True)
            for player in self.players
        }
        self._good: dict[str, Any] | None = None

    def step(self) -> Metrics:
        """Let every player take its turns; returns each one's last loss, NaN where skipped, and metrics."""
        if self._good is None:
            self._good = self.state_dict()
        stage = self.schedule.at(self.step_count)
        with self.stream:
            metrics: Metrics = {"beta": stage.beta}
            for player in self.players:
                for loss, seen in player.losses(stage):
                    metrics |= seen | {player.name: self._descend(player, loss, stage)}
        self.step_count += 1
        self.history.append(**metrics)
        if (
            not any(self._skips.values())
            and self.step_count % max(1, self.schedule.num_steps // 50) == 0
        ):
            self._good = self.state_dict()
        return metrics

    def run(self, num_steps: int, callbacks: Iterable[Callback] = ()) -> str:
        """Take ``num_steps`` steps; returns why it stopped. An interrupt keeps what has been learned."""
        callbacks = tuple(callbacks)
        try:
            for _ in range(num_steps):
                self.step()
                for callback in callbacks:
                    callback(self)
        except KeyboardInterrupt:
            return "interrupted"
        except StopTraining as stop:
            return str(stop) or "stopped by a callback"
        return "finished"

    def _descend(self, player: Player, loss: Tensor | None, stage: Stage) -> float:
        """One gradient step of one player on a loss; returns it, or NaN where the step was skipped."""
        if loss is None:
            return self._skip(player)
        optimiser = self._optimisers[player.name]
        parameters = optimiser.param_groups[0]["params"]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        known = [g for g in gradients if g is not None]
        norm = torch.nn.utils.get_total_norm(known)
        value = loss.item()
        if not isfinite(value + norm.item()):
            return self._skip(player)
        self._skips[player.name] = 0
        if norm > self.clip_norm:
            torch._foreach_mul_(known, self.clip_norm / norm)
        optimiser.param_groups[0]["lr"] = player.lr(stage)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        optimiser.zero_grad()
        player.follow()
        return value

    def _skip(self, player: Player) -> float:
        self.skipped += 1
        self._skips[player.name] += 1
        if self._skips[player.name] >= self.max_skips:
            step, why = self.step_count, self.explain()
            if self._good is not None:
                self.load_state_dict(self._good)
            raise NonFiniteError(
                f"the loss or gradient of the {player.name} was not finite {self.max_skips} times in a row, "
                f"up to step {step}{': ' + why if why else ''}",
                player=player.name,
                step=step,
                do=f"The state of step {self.step_count} has been restored. Lower the rates, or look at "
                "the model where its log density is not finite.",
            )
        return nan

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, copied."""
        return {
            "step": self.step_count,
            "skipped": self.skipped,
            "players": {p.name: _copy(p.state_dict()) for p in self.players},
            "optimisers": {name: _copy(o.state_dict()) for name, o in self._optimisers.items()},
            "stream": self.stream.state_dict(),
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back, or on, to a state that `state_dict` gave."""
        self.step_count = state["step"]
        self.skipped = state["skipped"]
        self._skips.clear()
        for player in self.players:
            player.load_state_dict(state["players"][player.name])
        for name, optimiser in self._optimisers.items():
            optimiser.load_state_dict(_copy(state["optimisers"][name]))
        self.stream.load_state_dict(state["stream"])
        self.history.load_state_dict(state["history"])
        self._good = None


def _copy(state: Any) -> Any:
    """A deep copy of nested containers of tensors."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copy(value) for value in state]
    return state
