"""From data and options to a trained model: the part of `LatentModel.fit` that no system sees."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from implicitvi import processes
from implicitvi.errors import OptionError, check_at_least, check_choice
from implicitvi.training import (
    Callback,
    History,
    Player,
    Progress,
    RandomStream,
    Schedule,
    Stage,
    Trainer,
)
from implicitvi.training.checkpoint import load_state, save_state
from implicitvi.training.player import Metrics
from implicitvi.vae.batches import Transform, batches_of

if TYPE_CHECKING:
    from implicitvi.vae.model import LatentModel

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class VAEFit:
    """A trained model and the record of its training.

    Attributes:
        model: The trained model, on the device where it was trained.
        averaged: Its running average where ``ema`` was given, else ``None``.
        history: Metrics of every step: the loss of each player by its name, and what the system shows besides.
        validation: Figures of the validation data after every epoch, by name.
        epochs: Passes through the data, those before a resume included.
        seconds: Wall time of this run.
        rows_per_second: Rows of training data a second in this run, over all processes.
        stop_reason: ``"finished"``, ``"interrupted"`` or a callback's message.
        skipped: Turns skipped because a loss or gradient was not finite.
        resumed: Epoch from which a checkpoint was taken up; 0 for a start from scratch.
    """

    model: LatentModel
    averaged: LatentModel | None
    history: History
    validation: dict[str, list[float]]
    epochs: int
    seconds: float
    rows_per_second: float
    stop_reason: str
    skipped: int
    resumed: int = 0

    def __str__(self) -> str:
        shown = {name: values[-1] for name, values in self.validation.items() if values}
        figures = "".join(f"; validation {name} {value:.3f}" for name, value in shown.items())
        resumed = f" (from epoch {self.resumed})" if self.resumed else ""
        return (
            f"{type(self.model).__name__}: {self.stop_reason} after {self.epochs} epochs{resumed}, "
            f"{self.seconds:.1f} s, {self.rows_per_second:.0f} rows/s; {self.skipped} turns skipped{figures}"
        )


@dataclass(frozen=True)
class Fitting:
    """The options of `LatentModel.fit`, which documents them."""

    epochs: int
    batch_size: int
    transform: Transform | None
    num_particles: int
    adversary_steps: int | tuple[int, int]
    lr: float | tuple[float, float]
    adversary_lr: float | tuple[float, float]
    device: str | torch.device
    precision: str
    compile: bool | str
    ema: float | None
    clip_norm: float
    max_skips: int
    checkpoint: str | None
    seed: int | None
    progress: bool
    callbacks: tuple[Callback, ...] = field(default=())

    def __post_init__(self) -> None:
        check_at_least("epochs", self.epochs, 1)
        check_at_least("num_particles", self.num_particles, 1)
        check_choice("precision", self.precision, PRECISIONS)
        if self.ema is not None and not 0 < self.ema < 1:
            raise OptionError("ema is out of range", got=self.ema, expected="between 0 and 1")

    def run(self, model: LatentModel, train: Any, validation: Any) -> VAEFit:
        """Train ``model``."""
        device = device_of(self.device)
        with processes.join(device):
            return _Run(self, model.to(device), train, validation, device).run()


class _Run:
    """One call of `Fitting.run`."""

    def __init__(
        self,
        options: Fitting,
        model: LatentModel,
        train: Any,
        validation: Any,
        device: torch.device,
    ):
        self.options = options
        self.model = model
        stream = RandomStream(options.seed)
        with stream:
            seed = torch.randint(2**62, (), device="cpu").to(device)
        processes.share([seed, *model.parameters(), *model.buffers()])
        self.train = batches_of(train, options.batch_size, device, int(seed))
        self.held_out = (
            None if validation is None else batches_of(validation, options.batch_size, device, 0)
        )
        if processes.count() > 1:
            stream = RandomStream((int(seed) + processes.rank()) % 2**62)
        self.x = self._first()
        self.trainer = Trainer(
            [self._in_precision(p, device) for p in model.players(lambda: self.x)],
            schedule=Schedule(
                num_steps=options.epochs * self.train.steps,
                num_particles=options.num_particles,
                adversary_steps=options.adversary_steps,
                lr=options.lr,
                adversary_lr=options.adversary_lr,
                tempering=None,
            ),
            stream=stream,
            clip_norm=options.clip_norm,
            max_skips=options.max_skips,
            explain=self._explain,
            prepare=self._next,
            average=processes.average,
        )
        self.validation: dict[str, list[float]] = defaultdict(list)
        self.average = options.ema and AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=True
        )
        if options.compile:
            for arrow in (model.encoder, model.decoder):
                arrow.compile(mode=None if options.compile is True else options.compile)

    def run(self) -> VAEFit:
        options, steps = self.options, self.train.steps
        began = time.perf_counter()
        first = self._resume()
        bar = self._bar((options.epochs - first) * steps)
        watchers = tuple(c for c in (bar, self._follow, *options.callbacks) if c is not None)
        epoch, reason = first, "finished"
        self.model.train()
        try:
            while epoch < options.epochs and reason == "finished":
                reason = self.trainer.run(steps, watchers)
                if reason == "finished":
                    epoch += 1
                    self._validate()
                    self._save(epoch)
        finally:
            self.model.eval()
            if bar is not None:
                bar.close()
        seconds = time.perf_counter() - began
        rows = (self.trainer.step_count - first * steps) * self.train.rows * processes.count()
        return VAEFit(
            model=self.model,
            averaged=cast("LatentModel", self.average.module.eval()) if self.average else None,
            history=self.trainer.history,
            validation=dict(self.validation),
            epochs=epoch,
            seconds=seconds,
            rows_per_second=rows / seconds,
            stop_reason=reason,
            skipped=self.trainer.skipped,
            resumed=first,
        )

    def _first(self) -> Tensor:
        """The first batch, looked at before the first step; all data where they are one tensor."""
        data = getattr(self.train, "data", None)
        if data is None:
            data = self.train.at(0)
        self.model.check_data(data)
        return self._transformed(data[:2])

    def _next(self) -> None:
        self.x = self._transformed(self.train.at(self.trainer.step_count))

    def _transformed(self, x: Tensor) -> Tensor:
        return x if self.options.transform is None else self.options.transform(x)

    def _in_precision(self, player: Player, device: torch.device) -> Player:
        dtype = PRECISIONS[self.options.precision]
        if dtype is None:
            return player

        def losses(stage: Stage) -> Iterator[tuple[Tensor | None, Metrics]]:
            turns = player.losses(stage)
            while True:
                with torch.autocast(device.type, dtype=dtype):
                    turn = next(turns, None)
                if turn is None:
                    return
                yield turn

        return replace(player, losses=losses)

    def _follow(self, trainer: Trainer) -> None:
        if self.average:
            self.average.update_parameters(self.model)

    @torch.no_grad()
    def _validate(self) -> None:
        if self.held_out is None:
            return
        totals: dict[str, float] = defaultdict(float)
        self.model.eval()
        with self.trainer.stream:
            for step in range(self.held_out.steps):
                x = self._transformed(self.held_out.at(step))
                for name, value in self.model.validate(x).items():
                    totals[name] += float(value) / self.held_out.steps
        self.model.train()
        for name, total in totals.items():
            self.validation[name].append(total)

    def _resume(self) -> int:
        """Take up the checkpoint, if there is one; returns its epoch."""
        folder = self.options.checkpoint
        if folder is None or not (Path(folder) / "state.pt").exists():
            return 0
        state = load_state(Path(folder), like=self._config())
        self.trainer.load_state_dict(state["trainer"])
        self.validation.update(state["validation"])
        if self.average:
            self.average.load_state_dict(state["average"])
        return int(state["epoch"])

    def _save(self, epoch: int) -> None:
        if self.options.checkpoint is None or processes.rank():
            return
        state = {
            "trainer": self.trainer.state_dict(),
            "validation": dict(self.validation),
            "average": self.average.state_dict() if self.average else None,
            "epoch": epoch,
        }
        save_state(Path(self.options.checkpoint), state, config=self._config())

    def _config(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the fit that takes it up."""
        weights = {name: list(w.shape) for name, w in self.model.state_dict().items()}
        return {
            "system": type(self.model).__name__,
            "weights": weights,
            "epochs": self.options.epochs,
            "steps of an epoch": self.train.steps,
        }

    def _bar(self, total: int) -> Progress | None:
        if not self.options.progress or processes.rank():
            return None
        labels = {p.name: p.name for p in self.trainer.players}
        return Progress(total, labels)

    def _explain(self) -> str:
        bad = int((~self.x.isfinite()).flatten(1).any(1).sum())
        return f"{bad} rows of the batch are not finite" if bad else ""


def device_of(device: str | torch.device) -> torch.device:
    """The device that a word means; ``"auto"`` is the process's own GPU, or the CPU where there is none."""
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(
            "the device cannot be used",
            got=repr(str(device)),
            expected="'auto', 'cpu', or a GPU that is there",
            do=str(error).splitlines()[0],
        ) from error
    return found
