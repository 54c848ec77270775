"""From data and options to a trained model: the part of `LatentModel.fit` that no system sees."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from warnings import warn

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from implicitvi import distributed
from implicitvi.avb.samplers import Sampler
from implicitvi.errors import CheckpointError, ModelError, OptionError, check_choice, check_positive, check_whole
from implicitvi.rng import RandomStream, derived_seed
from implicitvi.training import Callback, History, Progress, Schedule, Trainer
from implicitvi.training.checkpoint import holds_checkpoint, load_state, save_state
from implicitvi.training.html import table
from implicitvi.vae.data import Batches, TensorBatches, Transform, batches_of

if TYPE_CHECKING:
    from implicitvi.vae.model import LatentModel

WARM_UP = 0.05  # share of the steps over which the rates rise from 0
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# options that decide the numbers of a fit: a checkpoint is taken up with the same ones only
DECISIVE = (
    "epochs",
    "batch_size",
    "num_particles",
    "adversary_steps",
    "lr",
    "adversary_lr",
    "precision",
    "ema",
    "clip_norm",
    "seed",
)
ORDER, NOISE = 0, 1  # what the two seeds of an epoch are for


@dataclass(frozen=True)
class VAEFit:
    """A trained model and the record of its training.

    Attributes:
        model: The trained model, on the device where it was trained.
        averaged: Its running average where ``ema`` was given, else ``None``.
        history: Metrics of every step: the loss of each player by its name, and what the system shows besides.
        validation: Figures of the validation data after every epoch, by name.
        epochs: Whole passes through the data, those before a resume included.
        seconds: Wall time of this run.
        rows_per_second: Rows of training data a second while this run took steps, over all processes.
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

    def _repr_html_(self) -> str:
        """For a notebook: the record, and every metric in the first and in the last tenth of the fit."""
        metrics = {n: self.history[n] for n in self.history.names() if n not in ("beta", "dropped")}
        figures = {f"validation {n}": np.array(v) for n, v in self.validation.items() if v}
        rows = []
        for name, values in {**metrics, **figures}.items():
            tenth = max(1, len(values) // 10)
            ends = [part[np.isfinite(part)] for part in (values[:tenth], values[-tenth:])]
            rows.append([name, *(f"{end.mean():.3f}" if end.size else "" for end in ends)])
        return table(str(self), ("", "first tenth", "last tenth"), rows)


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
    clip_norm: float | None
    max_skips: int
    checkpoint: str | Path | None
    seed: int | None
    progress: bool
    callbacks: tuple[Callback, ...]

    def __post_init__(self) -> None:
        for option in ("epochs", "batch_size", "num_particles", "max_skips"):
            check_whole(option, getattr(self, option))
        if not (callable(self.transform) or self.transform is None):
            raise OptionError("transform cannot be called", got=repr(self.transform))
        if self.clip_norm is not None:
            check_positive("clip_norm", self.clip_norm)
        check_choice("precision", self.precision, PRECISIONS)
        if not isinstance(self.compile, bool):
            check_choice("compile", self.compile, MODES)
        if self.ema is not None and not 0 < self.ema < 1:
            raise OptionError("ema is out of range", got=self.ema, expected="between 0 and 1")
        self.schedule(1)

    def schedule(self, steps: int) -> Schedule:
        """The schedule of all epochs, of so many steps each."""
        return Schedule(
            num_steps=self.epochs * steps,
            num_particles=self.num_particles,
            adversary_steps=self.adversary_steps,
            lr=self.lr,
            adversary_lr=self.adversary_lr,
            tempering=None,
            warm_up=WARM_UP,
        )

    def run(self, model: LatentModel, train: Any, validation: Any) -> VAEFit:
        """Train ``model``."""
        device = device_of(self.device)
        with distributed.join(device), ExitStack() as while_it_lasts:
            run = _Run(self, model.to(device), train, validation)
            dtype = PRECISIONS[self.precision]
            if dtype is not None:
                while_it_lasts.enter_context(in_precision(model, dtype))
            if self.compile:
                mode = None if self.compile is True else self.compile
                while_it_lasts.enter_context(compiled(model, mode))
            return run.run()


class _Run:
    """One call of `Fitting.run`."""

    def __init__(self, options: Fitting, model: LatentModel, train: Any, validation: Any):
        self.options = options
        self.model = model
        several = distributed.count() > 1
        with RandomStream(options.seed):
            seed = torch.randint(2**62, (), device="cpu").to(model.device)
        distributed.broadcast([seed])
        self.seed = int(seed)
        self.train = batches_of(train, options.batch_size, model.like)
        self.held_out = (
            None if validation is None else batches_of(validation, options.batch_size, model.like, shuffle=False)
        )
        for batches in (self.train, self.held_out):
            if batches is not None:
                self._check(batches)
        self.trainer = Trainer(
            model.players(lambda: self.x),
            schedule=options.schedule(self.train.steps),
            stream=RandomStream(self.seed),
            clip_norm=options.clip_norm,
            max_skips=options.max_skips,
            explain=self._explain,
            prepare=self._next,
            average=distributed.average if several else None,
            agree=distributed.agree if several else None,
        )
        self.trainer.write = self._write
        distributed.broadcast(list(self._tensors().values()))
        self.average = options.ema and AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
        self.normalised = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        if several and any(not isinstance(m, nn.SyncBatchNorm) for m in self.normalised):
            warn(
                "batch normalisation takes its statistics from each process's own rows; "
                "torch.nn.SyncBatchNorm.convert_sync_batchnorm makes them common to all (on GPUs)",
                stacklevel=4,
            )
        self.validation: dict[str, list[float]] = {}
        self.rows, self.seconds = 0, 0.0

    def run(self) -> VAEFit:
        began = time.perf_counter()
        first = epoch = self._resume()
        bar = self._bar((self.options.epochs - first) * self.train.steps)
        watchers = tuple(c for c in (bar, self._follow, *self.options.callbacks) if c is not None)
        reason = "finished"
        self.model.train()
        try:
            while reason == "finished" and epoch < self.options.epochs:
                reason = self._epoch(epoch, watchers)
                if reason == "finished":
                    epoch += 1
                    self._validate(epoch)
                    self._save(epoch)
        except KeyboardInterrupt:  # between two epochs
            reason = "interrupted"
        finally:
            self.model.eval()
            if bar is not None:
                bar.close()
        return VAEFit(
            model=self.model,
            averaged=cast("LatentModel", self.average.module.eval()) if self.average else None,
            history=self.trainer.history,
            validation=self.validation,
            epochs=epoch,
            seconds=time.perf_counter() - began,
            rows_per_second=self.rows * distributed.count() / self.seconds if self.rows else 0.0,
            stop_reason=reason,
            skipped=self.trainer.skipped,
            resumed=first,
        )

    def _epoch(self, epoch: int, watchers: tuple[Callback, ...]) -> str:
        """One pass through the data; the order and the noise depend on the seed and the epoch alone."""
        noise = derived_seed(self.seed, NOISE, epoch, distributed.rank())
        self.trainer.stream = RandomStream(noise)
        self._batches = self.train.epoch(derived_seed(self.seed, ORDER, epoch))
        began = time.perf_counter()
        try:
            reason = self.trainer.run(self.train.steps, watchers)
        finally:
            self.seconds += time.perf_counter() - began
        statistics = [b for m in self.normalised for b in m.buffers() if b.is_floating_point()]
        for mine, mean in zip(statistics, distributed.average(statistics), strict=True):
            mine.copy_(mean)
        return reason

    def _next(self) -> None:
        self.x = self._transformed(next(self._batches))
        self.rows += len(self.x)

    def _transformed(self, x: Tensor) -> Tensor:
        return x if self.options.transform is None else self.options.transform(x)

    def _check(self, batches: Batches) -> None:
        """Refuse data that the model cannot take: all of one tensor, the first batch where they come one by one."""
        if isinstance(batches, TensorBatches) and self.options.transform is None:
            self.model.check_data(batches.data)
            return
        before = batches.state_dict()
        with RandomStream(0):
            x = self._transformed(next(batches.all()))
        batches.load_state_dict(before)
        self.model.check_data(x)

    def _follow(self, trainer: Trainer) -> None:
        if self.average:
            self.average.update_parameters(self.model)

    @torch.no_grad()
    def _validate(self, epoch: int) -> None:
        """Figures of all held-out rows, each process's share weighted by its size."""
        if self.held_out is None:
            return
        totals: dict[str, Tensor] = {"rows": torch.zeros((), device=self.model.device)}
        self.model.eval()
        with self.trainer.stream:
            for x in map(self._transformed, self.held_out.all()):
                own = x.tensor_split(distributed.count())[distributed.rank()]
                # without rows of its own a process still takes its part in what the model exchanges
                figures = self.model.validate(own if len(own) else x[:1])
                for name, value in {**figures, "rows": torch.ones(())}.items():
                    totals[name] = totals.get(name, 0.0) + value * len(own)
        self.model.train()
        rows, *sums = distributed.average(list(totals.values()))
        for name, total in zip(list(totals)[1:], sums, strict=True):
            self.validation.setdefault(name, []).append(float(total / rows))

    def _resume(self) -> int:
        """Take up the checkpoint, if there is one; returns its epoch."""
        epoch, folder = 0, self.options.checkpoint
        if folder is not None and holds_checkpoint(Path(folder)):
            state = load_state(Path(folder), like=self._config())
            if state["epoch"] is None:
                raise CheckpointError(
                    "the checkpoint was written in the middle of an epoch, from which no fit can go on",
                    got=str(folder),
                    do="Resume from the folder that fit(checkpoint=...) kept; this one has weights to look at.",
                )
            self.model.load_state_dict(state["model"])
            self.trainer.load_state_dict(state["trainer"])
            self.train.load_state_dict(state["batches"])
            if self.average:
                self.average.load_state_dict(state["average"])
            self.validation, self.seed, epoch = state["validation"], state["seed"], state["epoch"]
        everyones = distributed.gather(torch.tensor([epoch], device=self.model.device)).tolist()
        if len(set(everyones)) > 1:
            raise CheckpointError(
                "the processes do not find the same checkpoint",
                got=f"epochs {everyones}",
                do="Give all of them one folder, on a disk that they share.",
            )
        return epoch

    def _save(self, epoch: int) -> None:
        if self.options.checkpoint is not None:
            self._write(Path(self.options.checkpoint), {}, epoch)

    def _write(self, folder: Path, notes: dict[str, Any], epoch: int | None = None) -> None:
        """The state after an epoch; ``None`` in the middle of one, whose weights can be used and no more."""
        if distributed.rank():
            return
        state = {
            "model": self.model.state_dict(),
            "trainer": self.trainer.state_dict(),
            "batches": self.train.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "validation": self.validation,
            "seed": self.seed,
            "epoch": epoch,
        }
        save_state(folder, state, config={**self._config(), "notes": notes})

    def _config(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the fit that takes it up."""
        return {
            "system": type(self.model).__name__,
            "weights": {name: list(tensor.shape) for name, tensor in self._tensors().items()},
            "options": {name: getattr(self.options, name) for name in DECISIVE},
            "steps of an epoch": self.train.steps,
            "data": self.train.fingerprint(),
        }

    def _tensors(self) -> dict[str, Tensor]:
        """All that a fit may change, by name: the model's, and what its players have besides."""
        players = {
            f"{player.name}: {name}": tensor
            for player in self.trainer.players
            for name, tensor in player.state_dict()["modules"].items()
        }
        return {**self.model.state_dict(), **players}

    def _bar(self, total: int) -> Progress | None:
        if not self.options.progress or distributed.rank():
            return None
        return Progress(total, {p.name: p.name for p in self.trainer.players})

    @torch.no_grad()
    def _explain(self) -> str:
        """Where the values of the last batch cease to be finite."""
        x, size = self.x, len(self.x)
        if bad := _rows(x):
            return f"{bad} of the {size} rows of the batch are not finite"
        with self.trainer.stream:
            z = self.model.encoder(x).sample()
        if bad := _rows(z):
            return f"the encoder gives codes that are not finite for {bad} of {size} rows"
        try:
            log_p = self.model.decoder(z).log_prob(x)
        except (NotImplementedError, ModelError):  # it has no density
            return ""
        bad = _rows(log_p)
        return f"the decoder gives no finite log density to {bad} of {size} rows" if bad else ""


@contextmanager
def in_precision(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let the networks inside every arrow compute in ``dtype`` and answer in the precision of their weights.

    Distributions, densities and contrasts are left out: a sum over a thousand pixels needs more than eight bits.
    """
    networks = _networks(model)
    for network in networks:
        network.forward = _in_precision(network.forward, network, dtype)
    try:
        yield
    finally:
        for network in networks:
            del network.forward


@contextmanager
def compiled(model: nn.Module, mode: str | None) -> Iterator[None]:
    """Let torch compile the networks inside every arrow that have not been compiled yet.

    Noise is drawn outside of them. torch's compiler turns argument checks off for every distribution of the process;
    here they come back.
    """
    networks = [n for n in _networks(model) if n._compiled_call_impl is None]
    checks = Distribution._validate_args
    for network in networks:
        network._compiled_call_impl = _compiled_call(network, mode)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(checks)
        for network in networks:
            network._compiled_call_impl = None


def _compiled_call(network: nn.Module, mode: str | None) -> Callable[..., Any]:
    """A compiled call of a network. `nn.Module.compile` leaves torch's own containers as they are, without a word."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return network._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace()  # a copy: torch's compiler keeps few graphs of one code
    compiled: Callable[..., Any] = torch.compile(call, mode=mode)
    return compiled


def _networks(model: nn.Module) -> list[nn.Module]:
    """The networks with weights that a model's arrows call, each once."""

    def inside(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if isinstance(child, nn.ModuleList | nn.ModuleDict | Sampler):
                yield from inside(child)
            elif any(True for _ in child.parameters()):
                yield child

    return list(dict.fromkeys(network for arrow in model.children() for network in inside(arrow)))


def _in_precision(forward: Callable[..., Any], network: nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
    def computed(*args: Any, **kwargs: Any) -> Any:
        weight = next(network.parameters())
        with torch.autocast(weight.device.type, dtype=dtype):
            out = forward(*args, **kwargs)
        return out.to(weight.dtype) if isinstance(out, Tensor) else out

    return computed


def _rows(x: Tensor) -> int:
    """How many rows ``x [B, ...]`` has an entry in that is not finite."""
    return int((~x.isfinite()).view(len(x), -1).any(1).sum())


def device_of(device: str | torch.device) -> torch.device:
    """The device that a word means; ``"auto"`` is the process's own GPU, or the CPU where there is none."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if not torch.zeros(1, device=found).item() == 0:  # "meta" has no values
            raise RuntimeError
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise OptionError(
            "the device cannot be used",
            got=repr(str(device)),
            expected="'auto', 'cpu', or a GPU that is there",
            do=str(error).splitlines()[0],
        ) from error
    return found
