"""Train a latent variable model on data: the part of `LatentModel.fit` that is the same for every objective."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast
from warnings import warn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from implicitvi import distributed
from implicitvi.errors import CheckpointError, ImplicitVIError, ModelError, OptionError
from implicitvi.numerics.doors import exclusive
from implicitvi.rng import RandomStream, derived_seed
from implicitvi.training import Callback, History, Player, Progress, Trainer
from implicitvi.training.checkpoint import check_same, holds_checkpoint, read_state, save_state
from implicitvi.training.html import table
from implicitvi.training.options import values_of
from implicitvi.training.trainer import LOOK_EVERY
from implicitvi.vae.acceleration import compiled, in_precision
from implicitvi.vae.data import Batches, TensorBatches, batches_of, tensor_of
from implicitvi.vae.identity import name_of, settings_of
from implicitvi.vae.settings import FitSettings

ORDER, NOISE = 0, 1  # the purposes of the two seeds of an epoch


class Trainable(nn.Module, ABC):
    """A model that `run_fit` trains: it has players, figures of held-out data, and checks of its data."""

    encoder: nn.Module
    decoder: nn.Module

    @abstractmethod
    def players(self, batch: Callable[[], Tensor]) -> list[Player]:
        """Return the players in the order of their turns; ``batch()`` is the present batch ``x [B, *x_shape]``."""

    @abstractmethod
    def validate(self, x: Tensor) -> dict[str, Tensor]:
        """Return figures of held-out data ``x [B, *x_shape]``: means over the rows, logs in nats."""

    @abstractmethod
    def check_data(self, x: Tensor) -> None:
        """Raise an error unless the model can take the data ``x [N, *x_shape]``."""

    @abstractmethod
    def suits(self, x: Tensor) -> Tensor:
        """Return whether the model can take ``x [N, *x_shape]``: a scalar on its device, which is not waited for."""

    def check_weights(self) -> None:
        """Raise `ModelError` unless the weights are ordinary tensors of 32 or 64 bits."""
        if (dtype := self.like.dtype) not in (torch.float32, torch.float64):
            do = "Call model.float(); fit(precision='bfloat16') lets the networks alone compute in 16 bits."
            raise ModelError.must_be("The model's weights", "float32 or float64", str(dtype), do)
        if any(p.is_inference() for p in self.parameters()):
            do = "Make the model outside of torch.inference_mode()."
            raise ModelError(f"The model's weights must be ordinary tensors, got inference tensors. {do}")

    @property
    def like(self) -> Tensor:
        """An empty tensor on the model's device and in its dtype."""
        weights = (p for p in self.parameters() if p.is_floating_point())
        return next((p.new_empty(0) for p in weights), torch.empty(0))

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return self.like.device


M = TypeVar("M", bound=Trainable)


@dataclass(frozen=True)
class VAEFit(Generic[M]):
    """A trained model and the record of its training.

    Attributes:
        model: The trained model, on the device where it was trained.
        averaged: Its running average if ``ema`` was given, else ``None``.
        history: Metrics of every step: the loss of each player by its name, and other metrics of the objective.
        validation: Figures of the validation data after every epoch, by name.
        epochs: Whole passes through the data, including those before a resume.
        seconds: Wall time of this run.
        rows_per_second: Rows of training data per second of this run's steps, over all processes.
        stop_reason: ``"finished"``, ``"interrupted"`` or a callback's message.
        skipped: Turns skipped because a loss or gradient was not finite.
        resumed: Epoch of the checkpoint from which the fit resumed; 0 for a start from scratch.
    """

    model: M
    averaged: M | None
    history: History
    validation: dict[str, list[float]]
    epochs: int
    seconds: float
    rows_per_second: float
    stop_reason: str
    skipped: int
    resumed: int = 0

    def __str__(self) -> str:
        figures = "".join(f"; validation {name} {values[-1]:.3f}" for name, values in self.validation.items() if values)
        resumed = f" (from epoch {self.resumed})" if self.resumed else ""
        return (
            f"{type(self.model).__name__}: {self.stop_reason} after {self.epochs} epochs{resumed}, "
            f"{self.seconds:.1f} s, {self.rows_per_second:.0f} rows/s; {self.skipped} turns skipped{figures}"
        )

    def _repr_html_(self) -> str:
        """Return the record as HTML, with every metric in the first and in the last tenth of the fit."""
        metrics = {n: self.history[n] for n in self.history.names() if n not in ("beta", "dropped")}
        metrics |= {f"validation {n}": np.array(v) for n, v in self.validation.items() if v}
        rows = []
        for name, values in metrics.items():
            tenth = max(1, len(values) // 10)
            ends = [part[np.isfinite(part)] for part in (values[:tenth], values[-tenth:])]
            rows.append([name, *(f"{end.mean():.3f}" if end.size else "" for end in ends)])
        return table(str(self), ("", "first tenth", "last tenth"), rows)


def run_fit(model: M, data: Any, validation: Any, settings: FitSettings) -> VAEFit[M]:
    """Train a model on data, with all processes of a group; see `LatentModel.fit`."""
    device = device_of(settings.device)
    model.check_weights()
    with exclusive(), distributed.join(device), torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        run = _Run(model.to(device), data, validation, settings)
        if settings.precision == "bfloat16":
            stack.enter_context(in_precision(model, torch.bfloat16))
        if settings.compile:
            stack.enter_context(compiled(model, None if settings.compile is True else settings.compile))
        return run.run()


class _Run(Generic[M]):
    """One call of `run_fit`."""

    def __init__(self, model: M, data: Any, validation: Any, settings: FitSettings):
        self.model, self.settings = model, settings
        several = distributed.count() > 1
        with RandomStream(settings.seed):
            seed = torch.randint(2**62, (), device="cpu").to(model.device)
        distributed.broadcast([seed])
        self.seed = int(seed)
        self.batches = self._checked(data)
        self.held_out = None if validation is None else self._checked(validation, shuffle=False)
        self.trainer = Trainer(
            _learning(model.players(lambda: self.x)),
            schedule=settings.schedule(self.batches.steps),
            stream=RandomStream(self.seed),
            clip_norm=settings.clip_norm,
            max_skips=settings.max_skips,
            explain=self._explain,
            prepare=self._next,
            average=distributed.average if several else None,
            agree=distributed.agree if several else None,
        )
        self.trainer.write = self._write
        distributed.broadcast(list(self._tensors().values()))
        self.average = settings.ema and AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        self.normalised = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        if several and any(not isinstance(m, nn.SyncBatchNorm) for m in self.normalised):
            do = "torch.nn.SyncBatchNorm.convert_sync_batchnorm makes them common to all (on GPUs)"
            warn(f"batch normalisation takes its statistics from each process's own rows; {do}", stacklevel=4)
        self.validation: dict[str, list[float]] = {}
        self.rows, self.seconds = 0, 0.0
        self.settled = {} if settings.checkpoint is None else self._identity()

    def run(self) -> VAEFit[M]:
        """Take all epochs, or those that are left after a resume."""
        began = time.perf_counter()
        first = epoch = self._resume()
        bar = None
        if self.settings.progress and not distributed.rank():
            names = {player.name: player.name for player in self.trainer.players}
            bar = Progress((self.settings.epochs - first) * self.batches.steps, names)
        callbacks = tuple(c for c in (bar, self._update_average, *self.settings.callbacks) if c is not None)
        reason = "finished"
        self.model.train()
        try:
            if not epoch:
                self._keep(epoch)
            while reason == "finished" and epoch < self.settings.epochs:
                reason = self._epoch(epoch, callbacks)
                if reason == "finished":
                    epoch += 1
                    self._validate(epoch)
                    self._keep(epoch)
        except KeyboardInterrupt:  # between two epochs
            reason = "interrupted"
        finally:
            self.model.eval()
            if bar is not None:
                bar.close()
        return VAEFit(
            model=self.model,
            averaged=cast("M", self.average.module.eval()) if self.average else None,
            history=self.trainer.history,
            validation=self.validation,
            epochs=epoch,
            seconds=time.perf_counter() - began,
            rows_per_second=self.rows * distributed.count() / self.seconds if self.rows else 0.0,
            stop_reason=reason,
            skipped=self.trainer.skipped,
            resumed=first,
        )

    def _epoch(self, epoch: int, callbacks: tuple[Callback, ...]) -> str:
        """Pass through the data once; the order and the noise depend on the seed and the epoch alone."""
        at_once = self.model.device.type == "cpu" and distributed.count() == 1
        self._look = _Look(self.model, f"of epoch {epoch + 1}", at_once=at_once)
        self.trainer.stream = RandomStream(derived_seed(self.seed, NOISE, epoch, distributed.rank()))
        self._batches = self.batches.epoch(derived_seed(self.seed, ORDER, epoch))
        began = time.perf_counter()
        try:
            reason = self.trainer.run(self.batches.steps, callbacks)
            self._look.read()
        finally:
            self._batches.close()
            self.seconds += time.perf_counter() - began
        statistics = [b for m in self.normalised for b in m.buffers() if b.is_floating_point()]
        for own, mean in zip(statistics, distributed.average(statistics), strict=True):
            own.copy_(mean)
        return reason

    def _next(self) -> None:
        self.x = self._transformed(next(self._batches))
        if not self._is_known(self.batches):
            self._look(self.x)
        self.rows += len(self.x)

    def _transformed(self, x: Tensor) -> Tensor:
        if self.settings.transform is None:
            return x
        return tensor_of(self.settings.transform(x), "The value of transform").to(self.model.like)

    def _is_known(self, batches: Batches) -> bool:
        """Return whether all rows have been checked before the first step."""
        return isinstance(batches, TensorBatches) and self.settings.transform is None

    def _checked(self, data: Any, *, shuffle: bool = True) -> Batches:
        """Return batches of data that the model can take: all rows of a tensor are checked, else the first batch."""
        batches = batches_of(data, self.settings.batch_size, self.model.like, shuffle=shuffle)
        if self._is_known(batches):
            self.model.check_data(cast("TensorBatches", batches).data)
            return batches
        before = batches.state_dict()
        with RandomStream(0), closing(batches.all()) as every:
            x = self._transformed(next(every))
        batches.load_state_dict(before)
        self.model.check_data(x)
        return batches

    def _update_average(self, trainer: Trainer) -> None:
        if self.average:
            self.average.update_parameters(self.model)

    @torch.no_grad()
    def _validate(self, epoch: int) -> None:
        """Record figures of all held-out rows, each process's share weighted by its size."""
        if self.held_out is None:
            return
        totals: dict[str, Tensor] = {"rows": torch.zeros((), device=self.model.device)}
        self.model.eval()
        look = _Look(self.model, f"of the validation data after epoch {epoch}", at_once=True)
        with self.trainer.stream, closing(self.held_out.all()) as every:
            for x in map(self._transformed, every):
                if not self._is_known(self.held_out):
                    look(x)
                own = x.tensor_split(distributed.count())[distributed.rank()]
                # a process without rows of its own still has to exchange with the others
                figures = self.model.validate(own if len(own) else x[:1])
                for name, value in {**figures, "rows": torch.ones(())}.items():
                    totals[name] = totals.get(name, 0.0) + value * len(own)
        self.model.train()
        rows, *sums = distributed.average(list(totals.values()))
        for name, total in zip(list(totals)[1:], sums, strict=True):
            self.validation.setdefault(name, []).append(float(total / rows))

    def _resume(self) -> int:
        """Load the checkpoint if there is one, and return its epoch, else 0."""
        epoch, folder = 0, self.settings.checkpoint
        if folder is not None and holds_checkpoint(Path(folder)):
            config, state = read_state(Path(folder))
            mine = {name: value for name, value in self._config().items() if config.get(name) is not None}
            if state["epoch"] == 0 and any(config[name] != value for name, value in mine.items()):
                return 0  # no epoch is lost
            check_same(config, mine)
            if state["epoch"] is None:
                do = "Resume from the folder of fit(checkpoint=...); this one holds weights only."
                raise CheckpointError(f"A fit cannot resume from {folder}, written in the middle of an epoch. {do}")
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
            self.validation, self.seed, epoch = state["validation"], state["seed"], state["epoch"]
        epochs = distributed.gather(torch.tensor([epoch], device=self.model.device)).tolist()
        if len(set(epochs)) > 1:
            do = "Give them one folder on a disk that they share."
            raise CheckpointError(f"All processes must find the same checkpoint, got epochs {epochs}. {do}")
        return epoch

    def _keep(self, epoch: int) -> None:
        """Write the state after an epoch, or before the first, if a checkpoint is asked for."""
        if self.settings.checkpoint is not None:
            self._write(Path(self.settings.checkpoint), {}, epoch)

    def _write(self, folder: Path, notes: dict[str, Any], epoch: int | None = None) -> None:
        """Write the state after an epoch, or in the middle of one (``None``), from which a fit cannot resume."""
        if epoch is None:
            self.settings.check_folder(folder)
        if distributed.rank():
            return
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"validation": self.validation, "seed": self.seed, "epoch": epoch}
        save_state(folder, state, config={**self._config(), "notes": notes})

    def _parts(self) -> dict[str, Any]:
        """Return the parts that have a state."""
        parts = {"model": self.model, "trainer": self.trainer, "batches": self.batches}
        return {**parts, "average": self.average} if self.average else parts

    def _config(self) -> dict[str, Any]:
        """Return everything in which a checkpoint and a fit that resumes from it must agree."""
        return {
            "system": type(self.model).__name__,
            "weights": {name: list(tensor.shape) for name, tensor in self._tensors().items()},
            "options": values_of(self.settings, decisive=True),
            "steps of an epoch": self.batches.steps,
            **self.settled,
        }

    def _identity(self) -> dict[str, Any]:
        """Return texts by which a checkpoint recognises data, transform and model, as they are at the start."""
        identity = {
            "data": self.batches.fingerprint(),
            "transform": name_of(self.settings.transform),
            "model": settings_of(self.model),
            "frozen weights": [name for name, weight in self.model.named_parameters() if not weight.requires_grad],
        }
        return identity if self.held_out is None else identity | {"validation": self.held_out.fingerprint()}

    def _tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a fit may change, by name: those of the model and of its players."""
        states = {player.name: player.state_dict()["modules"] for player in self.trainer.players}
        players = {f"{player}: {name}": tensor for player, state in states.items() for name, tensor in state.items()}
        return {**self.model.state_dict(), **players}

    @torch.no_grad()
    def _explain(self) -> str:
        """Say which values of the last batch are not finite: data, codes or log densities."""
        x, size = self.x, len(self.x)
        if bad := infinite_rows(x):
            return f"{bad} of the {size} rows of the batch are not finite"
        with self.trainer.stream:
            z = self.model.encoder(x).sample()
        if bad := infinite_rows(z):
            return f"the encoder gives codes that are not finite for {bad} of {size} rows"
        try:
            bad = infinite_rows(self.model.decoder(z).log_prob(x))
        except (NotImplementedError, ModelError):  # it has no density
            return ""
        return f"the decoder gives no finite log density to {bad} of {size} rows" if bad else ""


def _learning(players: Sequence[Player]) -> list[Player]:
    """Return the players with weights that are not frozen; raise `ModelError` if none but an adversary has any."""
    frozen = [player.name for player in players if not player.parameters()]
    learning = [player for player in players if player.name not in frozen]
    if "adversary" in frozen or {player.name for player in learning} <= {"adversary", "contrast"}:
        of = "adversary" if "adversary" in frozen else "model"
        do = "Call requires_grad_(True) on the parts that should learn."
        raise ModelError(f"The {of} must have weights to train, and all of them are frozen. {do}")
    return learning


class _Look:
    """A check of every batch: at once, or after ten, so that no accelerator waits and all processes raise together."""

    def __init__(self, model: Trainable, of: str, *, at_once: bool):
        self.model, self.of, self.at_once = model, of, at_once
        self.number = 0
        self.verdicts: list[Tensor] = []

    def __call__(self, x: Tensor) -> None:
        self.number += 1
        try:
            if self.at_once:
                self.model.check_data(x)
            else:
                self.verdicts.append(self.model.suits(x))
        except ImplicitVIError as error:
            raise type(error)(f"Batch {self.number} {self.of} cannot be used. {error}", faq="") from error
        if len(self.verdicts) == LOOK_EVERY:
            self.read()

    def read(self) -> None:
        """Raise `ModelError` if one of the last batches does not suit the model."""
        count = len(self.verdicts)
        verdicts = distributed.gather(torch.stack(self.verdicts).float()).tolist() if count else []
        self.verdicts = []
        if not all(verdicts):
            number = self.number - count + verdicts.index(0.0) % count + 1
            rows = "must have finite values, within the limits of the likelihood, in all rows"
            raise ModelError(f"Batch {number} {self.of} {rows}. Check the data, or what transform makes of them.")


def infinite_rows(x: Tensor) -> int:
    """Count the rows of ``x [B, ...]`` that have an entry that is not finite."""
    return int((~x.isfinite()).reshape(len(x), -1).any(1).sum())


def device_of(device: str | torch.device) -> torch.device:
    """Return a device; ``"auto"`` is the process's own GPU, or the CPU if there is no GPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if not torch.zeros(1, device=found).item() == 0:  # "meta" has no values
            raise RuntimeError
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        got, reason = repr(str(device)), next(iter(str(error).splitlines()), "")
        raise OptionError.must_be("device", "'auto', 'cpu' or a GPU that is present", got, reason) from error
    return found
