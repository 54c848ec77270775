"""The only loop there is."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from implicitvi.errors import NonFiniteError
from implicitvi.rng import RandomStream
from implicitvi.training.callbacks import Callback, StopTraining
from implicitvi.training.checkpoint import as_folder, save_state
from implicitvi.training.clipping import Clip
from implicitvi.training.player import Metrics, Player
from implicitvi.training.schedule import Schedule, Stage

LOOK_EVERY = 10  # steps between two looks at the counts of an accelerator; the CPU's are free


class History:
    """Metrics of every step, by name. Tensors stay where they are until a metric is read, then come all at once.

    >>> history = History()
    >>> history.append(loss=2.0); history.append(loss=torch.tensor(1.0))
    >>> history["loss"]
    array([2., 1.])
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float | Tensor]] = defaultdict(list)
        self._fetched: dict[str, array[float]] = defaultdict(_doubles)

    def append(self, **metrics: float | Tensor) -> None:
        """Add one step."""
        for name, value in metrics.items():
            value = value.detach().clone() if isinstance(value, Tensor) else float(value)
            self._values[name].append(value)

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        if name not in self.names():
            raise KeyError(f"no metric {name!r}; there are {sorted(self.names())}")
        return np.array(self._fetch(name))

    def names(self) -> list[str]:
        """Names of the metrics."""
        return list(self._values)

    def last(self, name: str, count: int = 1) -> float:
        """Mean of the last ``count`` values that are finite, NaN where there is none."""
        values = np.array(self._fetch(name)[-count:])
        finite = values[np.isfinite(values)]
        return float(finite.mean()) if finite.size else float("nan")

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of all values, in double precision."""
        return {name: torch.from_numpy(self[name]) for name in self.names()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self._fetched = defaultdict(_doubles, {n: _doubles(v.tolist()) for n, v in state.items()})
        self._values = defaultdict(list, {name: [] for name in state})

    def _fetch(self, name: str) -> array[float]:
        """All values of a metric as floats; those that are still tensors in one transfer."""
        fetched, waiting = self._fetched[name], self._values.get(name, [])
        tensors = [value for value in waiting if isinstance(value, Tensor)]
        arrived = iter(torch.stack(tensors).tolist() if tensors else [])
        fetched.extend(next(arrived) if isinstance(value, Tensor) else value for value in waiting)
        waiting.clear()
        return fetched


def _doubles(values: Iterable[float] = ()) -> array[float]:
    """Eight bytes a value: a long fit takes millions of steps."""
    return array("d", values)


class _Skips:
    """How many turns of a player were skipped, in all and in a row; tensors where its losses are."""

    def __init__(self) -> None:
        self.total: float | Tensor = 0.0
        self.in_a_row: float | Tensor = 0.0

    def count(self, skipped: float | Tensor) -> None:
        """Add a turn: 1 where it was skipped, 0 where it was taken."""
        self.total = self.total + skipped
        self.in_a_row = (self.in_a_row + 1) * skipped


class Trainer:
    """Steps players in order, each with its own Adam, on a schedule.

    A turn whose loss or gradient is not finite changes neither parameters nor optimiser and is counted; after
    ``max_skips`` in a row the last good state is restored and `NonFiniteError` raised. All random numbers come from
    ``stream``.

    No step waits for the device: whether a turn is taken is decided there, and the counts and metrics stay there
    until they are read. On an accelerator the counts are read at every tenth step, so that the error comes up to ten
    steps late, and not at all where the fit has recovered by then.

    Args:
        players: Who takes turns, in this order.
        schedule: Settings of every step.
        stream: Source of random numbers.
        clip_norm: Bound of the global norm of each player's gradient; ``None`` for one by what is usual (`Clip`).
        max_skips: Skipped turns of one player in a row that end the fit.
        explain: Says, in words, what is not finite, for the error.
        betas: Adam's moment decays. A low first one suits a game, where yesterday's gradient answers
            yesterday's opponent.
        prepare: Called before the players of each step, inside the stream: where a batch is taken.
        average: Means of the loss and gradients of a turn over several processes, ``None`` for a process by itself.
        agree: A reason to stop, or ``None``, to what all processes make of it: all of them stop at the same step.

    Attributes:
        write: Writes the whole fit into a folder, with notes; see `save`.
    """

    def __init__(
        self,
        players: Sequence[Player],
        *,
        schedule: Schedule,
        stream: RandomStream,
        clip_norm: float | None = None,
        max_skips: int = 20,
        explain: Callable[[], str] = str,
        betas: tuple[float, float] = (0.5, 0.999),
        prepare: Callable[[], None] = lambda: None,
        average: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
        agree: Callable[[str | None], str | None] | None = None,
    ):
        self.players = tuple(players)
        self.schedule = schedule
        self.stream = stream
        self._clips = {player.name: Clip(clip_norm) for player in self.players}
        self.max_skips = max_skips
        self.step_count = 0
        self.history = History()
        self.explain = explain
        self.prepare = prepare
        self.average = average
        self.agree = agree
        self.write = self._write
        self._earlier_skips = 0
        self._skips = {player.name: _Skips() for player in self.players}
        self._optimisers = {
            player.name: torch.optim.Adam(player.parameters(), lr=1.0, betas=betas, fused=True)
            for player in self.players
        }
        on_cpu = all(p.is_cpu for player in self.players for p in player.parameters())
        self._look_every = 1 if on_cpu else LOOK_EVERY
        self._good: dict[str, Any] | None = None

    @property
    def skipped(self) -> int:
        """Turns skipped so far because a loss or gradient was not finite."""
        return self._earlier_skips + int(sum(float(s.total) for s in self._skips.values()))

    def step(self) -> Metrics:
        """Let every player take its turns; returns each one's last loss, NaN where skipped, and metrics.

        Metrics may be tensors: reading them as numbers waits for the device.
        """
        stage = self.begin()
        with self.stream:
            self.prepare()
            metrics: Metrics = {"beta": stage.beta}
            for player in self.players:
                for loss, seen in player.losses(stage):
                    loss, gradients = self._gradients(player, loss)
                    metrics |= seen | {player.name: self.descend(player, loss, gradients, stage)}
        self.end(metrics)
        return metrics

    def begin(self) -> Stage:
        """The first part of a step: its settings."""
        if self._good is None:
            self._good = self.state_dict()
        return self.schedule.at(self.step_count)

    def end(self, metrics: Metrics) -> None:
        """The last part of a step: its metrics are kept, and it counts."""
        self.history.append(**metrics)
        if self.step_count % self._look_every == 0:
            self._raise_if_stuck()
        self.step_count += 1
        if self.step_count % max(1, self.schedule.num_steps // 50) == 0:
            if not any(skips.in_a_row for skips in self._skips.values()):
                self._good = self.state_dict()

    def run(self, num_steps: int, callbacks: Iterable[Callback] = ()) -> str:
        """Take ``num_steps`` steps; returns why it stopped. An interrupt keeps what has been learned."""
        callbacks, reason = tuple(callbacks), None
        for left in reversed(range(num_steps)):
            try:
                self.step()
                for callback in callbacks:
                    callback(self)
            except KeyboardInterrupt:
                reason = reason or "interrupted"
            except StopTraining as stop:
                reason = reason or str(stop) or "stopped by a callback"
            if self.agree is not None:
                if left and self.step_count % self._look_every:
                    continue
                reason = self.agree(reason)
            if reason is not None:
                return reason
        return "finished"

    def save(self, folder: str | Path, **notes: Any) -> None:
        """Write the fit that this loop belongs to into a folder, whole or not at all, with notes about it.

        What is written is up to whoever made the loop and set ``write``; by itself it writes its `state_dict`.
        """
        self.write(as_folder(folder), notes)

    def _write(self, folder: Path, notes: dict[str, Any]) -> None:
        save_state(folder, self.state_dict(), config={"kind": "Trainer", "notes": notes})

    def descend(
        self, player: Player, loss: Tensor | None, gradients: Sequence[Tensor | None], stage: Stage
    ) -> float | Tensor:
        """One step of one player on a loss and its gradients; returns it, or NaN where the step was skipped."""
        optimiser = self._optimisers[player.name]
        group = optimiser.param_groups[0]
        if loss is None:
            self._skips[player.name].count(1.0)
            return nan
        known = [g for g in gradients if g is not None]
        norm = torch.nn.utils.get_total_norm(known)
        finite = (loss + norm).isfinite()
        shrink = self._clips[player.name].shrink(norm)
        # the CPU looks first, and saves a pass over all gradients; not in place, as two of them may be one tensor
        if self._look_every > 1 or shrink != 1:
            known = list(torch._foreach_mul(known, shrink))
        clipped = iter(known)
        for parameter, gradient in zip(group["params"], gradients, strict=True):
            parameter.grad = None if gradient is None else _laid_out(next(clipped), parameter)
        group["lr"] = player.lr(stage)
        # a fused optimiser takes no step where this is 1, as for torch.amp.GradScaler
        skipped = optimiser.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]
        optimiser.step()
        for parameter in group["params"]:
            parameter.grad = None
        player.after_step()
        self._skips[player.name].count(skipped)
        return torch.where(finite, loss, nan)

    def _gradients(self, player: Player, loss: Tensor | None) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """A loss and its gradients, averaged over the processes where there are several.

        Then a process without a loss counts as one whose loss is not finite: the others wait for its part, and all
        must come to the same decision.
        """
        parameters = self._optimisers[player.name].param_groups[0]["params"]
        gradients: Sequence[Tensor | None] = [None] * len(parameters)
        if loss is not None:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            loss = loss.detach()
        if self.average is None:
            return loss, gradients
        mine = parameters[0].new_full((), nan) if loss is None else loss
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        mean, *means = self.average([mine, *filled])
        return mean, means

    def _raise_if_stuck(self) -> None:
        """End the fit where a player has skipped too many turns in a row, in the last good state."""
        for name, skips in self._skips.items():
            if skips.in_a_row < self.max_skips:
                continue
            step, why, in_a_row = self.step_count, self.explain(), int(skips.in_a_row)
            if self._good is not None:
                self.load_state_dict(self._good)
            raise NonFiniteError(
                f"the loss or gradient of the {name} was not finite {in_a_row} times in a row, "
                f"up to step {step}{': ' + why if why else ''}",
                player=name,
                step=step,
                do=f"The state of step {self.step_count} has been restored. Lower the rates, or look at "
                "the model where its log density is not finite.",
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, copied."""
        return {
            "step": self.step_count,
            "skipped": self.skipped,
            "players": {p.name: _copy(p.state_dict()) for p in self.players},
            "optimisers": {name: _copy(o.state_dict()) for name, o in self._optimisers.items()},
            "clips": {name: clip.state_dict() for name, clip in self._clips.items()},
            "stream": self.stream.state_dict(),
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back, or on, to a state that `state_dict` gave."""
        self.step_count = state["step"]
        self._earlier_skips = state["skipped"]
        self._skips = {player.name: _Skips() for player in self.players}
        for player in self.players:
            player.load_state_dict(state["players"][player.name])
        for name, optimiser in self._optimisers.items():
            optimiser.load_state_dict(_copy(state["optimisers"][name]))
        for player in self.players:
            clip = self._clips[player.name]
            clip.load_state_dict(state["clips"][player.name], player.parameters()[0])
        self.stream.load_state_dict(state["stream"])
        self.history.load_state_dict(state["history"])
        self._good = None


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient in the memory layout of its parameter: a fused Adam pairs their entries as they lie in memory."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _copy(state: Any) -> Any:
    """A deep copy of nested containers of tensors."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copy(value) for value in state]
    return state
