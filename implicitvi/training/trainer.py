"""Run the one training loop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import nan
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from implicitvi.errors import ImplicitVIError, NonFiniteError, reason_of
from implicitvi.rng import RandomStream
from implicitvi.training.checkpoint import as_folder, save_state, well_formed
from implicitvi.training.clipping import Clip
from implicitvi.training.history import History
from implicitvi.training.player import Metrics, Player
from implicitvi.training.schedule import Schedule, Stage

LIN_ALG_ERROR = torch.linalg.LinAlgError  # type: ignore[attr-defined]
LOOK_EVERY = 10  # steps between two reads of the skip counts on an accelerator; on the CPU reading is free


class StopTraining(Exception):
    """An exception that a callback raises to end the fit; its message becomes the stop reason."""


class Callback(Protocol):
    """A function called after every step; may read everything, should change nothing, may raise `StopTraining`."""

    def __call__(self, trainer: Trainer) -> None:
        """Read ``trainer.step_count``, ``trainer.history`` and ``trainer.players``."""


class _Skips:
    """A count of a player's skipped turns, in all and in a row; tensors on the device of its losses."""

    def __init__(self) -> None:
        self.total: float | Tensor = 0.0
        self.in_a_row: float | Tensor = 0.0

    def count(self, skipped: float | Tensor) -> None:
        """Add a turn: 1 if it was skipped, else 0."""
        self.total = self.total + skipped
        self.in_a_row = (self.in_a_row + 1) * skipped


class Trainer:
    """A loop that steps players in order, each with its own Adam, on a schedule.

    A turn whose loss or gradient is not finite changes neither parameters nor optimiser and is counted; after
    ``max_skips`` in a row the last good state is restored and `NonFiniteError` raised.

    A step is taken as a whole or not at all: Ctrl-C waits for its end. A second Ctrl-C, or any error in a step,
    restores the last good state, at most 2 % of the round earlier.

    A step never waits for the device, which decides whether a turn is taken. On an accelerator the counts are read at
    every tenth step: the error comes up to ten steps late, and not at all if the fit has recovered by then.

    Args:
        players: The players, in the order of their turns.
        schedule: Settings of every step.
        stream: Source of all random numbers.
        clip_norm: Bound on the global norm of each player's gradient; ``None`` for a multiple of recent ones (`Clip`).
        max_skips: Skipped turns of one player in a row that end the fit.
        explain: Returns a description of the non-finite values, for the error.
        betas: Adam's moment decays. A low first one suits a game, whose older gradients answer older opponents.
        prepare: Called before the players of each step, inside the stream; fetches a batch.
        average: Averages the loss and gradients of a turn over several processes; ``None`` for a single process.
        agree: Turns a process's reason to stop, or ``None``, into one for all: they stop at the same step.

    Attributes:
        write: Writes the whole fit into a folder, with notes; see `save`.
        guide: The guide that the players train, for functions of callbacks; ``None`` where there is no guide.
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
        self.players, self.schedule, self.stream = tuple(players), schedule, stream
        self.max_skips, self.explain, self.prepare = max_skips, explain, prepare
        self.average, self.agree = average, agree
        self.step_count = 0
        self.history = History()
        self.write = self._write
        self.guide: Any = None
        self._turn = ""  # name of the player whose turn it is
        self._earlier_skips = 0
        self._skips = {player.name: _Skips() for player in self.players}
        self._clips = {player.name: Clip(clip_norm) for player in self.players}
        adam = partial(torch.optim.Adam, lr=1.0, betas=betas, fused=True)
        self._optimisers = {player.name: adam(player.parameters()) for player in self.players}
        on_cpu = all(p.is_cpu for player in self.players for p in player.parameters())
        self._look_every = 1 if on_cpu else LOOK_EVERY
        self._good: dict[str, Any] | None = None

    @property
    def skipped(self) -> int:
        """Number of turns skipped so far because a loss or gradient was not finite."""
        return self._earlier_skips + int(sum(float(s.total) for s in self._skips.values()))

    def step(self) -> Metrics:
        """Let every player take its turns; returns each one's last loss, NaN if skipped, and metrics, maybe tensors."""
        if self._good is None:
            self._good = self.state_dict()
        with held_interrupt() as interrupts:
            try:
                metrics = self._take_turns(self.schedule.at(self.step_count))
            except BaseException as error:
                self._undo(error)
                raise
        if interrupts:
            raise KeyboardInterrupt
        return metrics

    def _take_turns(self, stage: Stage) -> Metrics:
        metrics: Metrics = {"beta": stage.beta}
        with self.stream:
            self.prepare()
            for player in self.players:
                self._turn = player.name
                for loss, extra in player.losses(stage):
                    metrics |= extra | {player.name: self._descend(player, *self._gradients(player, loss), stage)}
        self.history.append(**metrics)
        if self.step_count % self._look_every == 0:
            self._raise_if_stuck()
        length = self.schedule.round_at(self.step_count).length
        self.step_count += 1
        if self.step_count % max(1, length // 50) == 0:
            if not any(skips.in_a_row for skips in self._skips.values()):
                self._good = self.state_dict()
        return metrics

    def _undo(self, error: BaseException) -> None:
        """Restore the last good state; raise `NonFiniteError` where numbers that are not finite made the error."""
        weights = (weight for player in self.players for weight in player.parameters())
        other = isinstance(error, ImplicitVIError) or not isinstance(error, Exception)
        found: NonFiniteError | None = None
        if isinstance(error, LIN_ALG_ERROR) or not (other or all(w.isfinite().all() for w in weights)):
            reason = reason_of(error)
            found = self._non_finite(
                f"The turn of the {self._turn} failed at step {self.step_count}: {reason}", self._turn
            )
        assert self._good is not None
        self.load_state_dict(self._good)
        if found is not None:
            raise found from error

    def run(self, num_steps: int, callbacks: Iterable[Callback] = ()) -> str:
        """Take ``num_steps`` steps; returns the reason for stopping. An interrupt keeps the state of a whole step."""
        callbacks, reason = tuple(callbacks), None
        with held_interrupt() as interrupts:
            for left in reversed(range(num_steps)):
                try:
                    self.step()
                    for callback in callbacks:
                        callback(self)
                except KeyboardInterrupt:
                    interrupts.append(self.step_count)
                except StopTraining as stop:
                    reason = reason or str(stop) or "stopped by a callback"
                if interrupts:
                    reason = reason or "interrupted"
                if self.agree is not None:
                    if left and self.step_count % self._look_every:
                        continue
                    reason = self.agree(reason)
                if reason is not None:
                    return reason
        return "finished"

    def save(self, folder: str | Path, **notes: Any) -> None:
        """Write the fit of this loop into a folder, with notes, by `write`: the `state_dict` unless it is replaced."""
        self.write(as_folder(folder), notes)

    def _write(self, folder: Path, notes: dict[str, Any]) -> None:
        save_state(folder, self.state_dict(), config={"kind": "Trainer", "notes": notes})

    def _gradients(self, player: Player, loss: Tensor | None) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """Return a loss and its gradients, averaged over the processes if there are several.

        No loss then counts as a NaN: the others wait for this process, and all must come to the same decision.
        """
        parameters = self._optimisers[player.name].param_groups[0]["params"]
        gradients: Sequence[Tensor | None] = [None] * len(parameters)
        if loss is not None:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            loss = loss.detach()
        if self.average is None:
            return loss, gradients
        own = parameters[0].new_full((), nan) if loss is None else loss
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        mean, *means = self.average([own, *filled])
        return mean, means

    def _descend(
        self, player: Player, loss: Tensor | None, gradients: Sequence[Tensor | None], stage: Stage
    ) -> float | Tensor:
        """Take one step of one player on a loss and its gradients; returns the loss, or NaN if the step was skipped."""
        if loss is None:
            self._skips[player.name].count(1.0)
            return nan
        optimiser = self._optimisers[player.name]
        group = optimiser.param_groups[0]
        known = [g for g in gradients if g is not None]
        norm = torch.nn.utils.get_total_norm(known)
        finite = (loss + norm).isfinite()
        shrink = self._clips[player.name].shrink(norm)
        # reading the factor on the CPU saves a pass over all gradients; not in place: two of them may be one tensor
        if self._look_every > 1 or shrink != 1:
            known = list(torch._foreach_mul(known, shrink))
        clipped = iter(known)
        for parameter, gradient in zip(group["params"], gradients, strict=True):
            parameter.grad = None if gradient is None else _laid_out(next(clipped), parameter)
        group["lr"] = player.lr(stage)
        # a fused optimiser takes no step if this is 1, as for torch.amp.GradScaler
        skipped = optimiser.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]
        optimiser.step()
        for parameter in group["params"]:
            parameter.grad = None
        player.after_step()
        self._skips[player.name].count(skipped)
        return torch.where(finite, loss, nan)

    def _raise_if_stuck(self) -> None:
        """Raise `NonFiniteError` if a player has skipped too many turns in a row."""
        for name, skips in self._skips.items():
            if skips.in_a_row >= self.max_skips:
                why, in_a_row = self.explain(), int(skips.in_a_row)
                wrong = f"was not finite {in_a_row} times in a row, up to step {self.step_count}"
                raise self._non_finite(f"The loss or gradient of the {name} {wrong}{': ' + why if why else ''}", name)

    def _non_finite(self, wrong: str, player: str) -> NonFiniteError:
        """Return the error of a step that is about to be undone."""
        assert self._good is not None
        message = (
            f"{wrong.rstrip('.')}. The state of step {self._good['step']} has been restored. "
            "Lower the rates, or check where the model's log density is not finite."
        )
        return NonFiniteError(message, player=player, step=self.step_count)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything that the next step depends on."""
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
        """Take over a state that `state_dict` returned.

        Raises:
            CheckpointError: The state is not one of these players; then nothing has changed.
        """
        before = self.state_dict()
        try:
            with well_formed(f"one of this fit, with players {', '.join(p.name for p in self.players)}"):
                self._load(state)
        except BaseException:
            self._load(before)
            raise

    def _load(self, state: dict[str, Any]) -> None:
        check_step(state)
        self.step_count = state["step"]
        self._earlier_skips = state["skipped"]
        self._skips = {player.name: _Skips() for player in self.players}
        for player in self.players:
            player.load_state_dict(state["players"][player.name])
            self._optimisers[player.name].load_state_dict(_copy(state["optimisers"][player.name]))
            self._clips[player.name].load_state_dict(state["clips"][player.name], player.parameters()[0])
        self.stream.load_state_dict(state["stream"])
        self.history.load_state_dict(state["history"])
        self._good = None


def check_step(state: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless the step of a trainer's state is the number of steps in its history."""
    step, taken = state["step"], max((len(values) for values in state["history"].values()), default=0)
    if type(step) is not int or step != taken:
        raise ValueError(f"step {step!r} with a history of {taken} steps")


@contextmanager
def held_interrupt() -> Iterator[list[int]]:
    """Append a first Ctrl-C to a list instead of raising it; a second one is raised at once.

    Only where Ctrl-C raises a `KeyboardInterrupt` in this thread: another handler stays as it is.
    """
    held: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield held
        return

    def hold(number: int, _: Any) -> None:
        held.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, hold)
    try:
        yield held
    finally:
        if signal.getsignal(signal.SIGINT) is hold:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient in the memory layout of its parameter: a fused Adam pairs entries by their place in memory."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _copy(state: Any) -> Any:
    """Return a deep copy of nested containers of tensors."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    return [_copy(value) for value in state] if isinstance(state, list) else state
