"""The options of `LatentModel.fit`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch

from implicitvi.errors import OptionError, check_choice, check_positive, check_seed, check_whole
from implicitvi.training import Callback, Checkpoint, Schedule
from implicitvi.training.callbacks import as_callbacks
from implicitvi.training.checkpoint import as_folder
from implicitvi.training.options import check_options, documented, option, optional
from implicitvi.vae.data import Transform

WARM_UP = 0.05  # share of the steps over which the rates rise from 0
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def _check_ema(name: str, value: float) -> None:
    if not isinstance(value, int | float) or not 0 < value < 1:
        raise OptionError.must_be(name, "between 0 and 1", repr(value))


def _check_transform(name: str, value: object) -> None:
    if not callable(value):
        raise OptionError.must_be(name, "a function of a batch", repr(value))


def _check_compile(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        check_choice(name, value, MODES)


@documented
@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """The options of `LatentModel.fit` as a value."""

    epochs: int = option(50, "Passes through the data, and the horizon of every schedule.", check=check_whole)
    batch_size: int = option(128, "Rows of a batch over all processes; a loader has its own.", check=check_whole)
    num_particles: int = option(1, "Codes drawn for each datum of a step.", check=check_whole)
    adversary_steps: int | tuple[int, int] = option(1, "Steps of each adversary before each step of the other players.")
    lr: float | tuple[float, float] = option((3e-3, 2e-4), "Learning rate of encoder and decoder, or (first, last).")
    adversary_lr: float | tuple[float, float] = option((4e-3, 2e-3), "Learning rate of the adversaries, or a pair.")
    transform: Transform | None = option(
        None,
        "Applied to every batch on the device, such as `torch.bernoulli` for dynamic binarisation.",
        check=optional(_check_transform),
        decisive=False,
    )
    device: str | torch.device = option("auto", '``"auto"`` for a GPU where there is one, or a device.', decisive=False)
    precision: str = option(
        "float32",
        '``"float32"``; ``"bfloat16"`` for networks that compute in it, while weights, densities and losses do not.',
        check=partial(check_choice, choices=("float32", "bfloat16")),
    )
    compile: bool | str = option(
        False,
        "Whether torch compiles encoder, decoder and adversaries for this fit, or the compiler's mode.",
        check=_check_compile,
        decisive=False,
    )
    ema: float | None = option(
        None,
        "Decay of a running average of all weights, per step; `VAEFit.averaged` is the model with them.",
        check=optional(_check_ema),
    )
    clip_norm: float | None = option(
        None,
        "Bound of the norm of each player's gradient; ``None``: four times the usual norm (`Clip`).",
        check=optional(check_positive),
    )
    max_skips: int = option(20, "Non-finite turns in a row that end the fit.", check=check_whole, decisive=False)
    checkpoint: str | Path | None = option(
        None,
        "Folder for the state at the start and after every epoch. If it holds a state already, the fit continues from "
        "there, with the numbers of an uninterrupted fit; a loader must then draw its own randomness from torch's "
        "generators. Other data or another transform are refused (docs/vae.md).",
        decisive=False,
    )
    seed: int | None = option(
        None, "Random seed of the fit; ``None`` takes one from torch's default generator.", check=optional(check_seed)
    )
    progress: bool = option(True, "Whether to show a progress bar.", decisive=False)
    callbacks: Iterable[Callback] = option(
        (), "Called after every step with the trainer, in every process; may raise `StopTraining`.", decisive=False
    )

    def __post_init__(self) -> None:
        # a pair may come as a list
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(self).items()}
        values["callbacks"] = as_callbacks(self.callbacks)
        if self.checkpoint is not None:
            values["checkpoint"] = as_folder(self.checkpoint, writable=True)
        self.__dict__.update(values)
        check_options(self)
        self.schedule(1)
        for callback in self.callbacks:
            if isinstance(callback, Checkpoint):
                self.check_folder(callback.folder)
                if callback.best is not None:
                    self.check_folder(callback.folder / "best")

    def check_folder(self, folder: Path) -> None:
        """Raise `OptionError` if a folder, to which a callback saves, is the one of the states after every epoch."""
        if self.checkpoint is not None and folder.resolve() == Path(self.checkpoint).resolve():
            do = "Its states are of the middle of an epoch, from which no fit can resume: give them another folder."
            raise OptionError(f"checkpoint must not be the folder of a callback, got {folder} for both. {do}")

    def schedule(self, steps: int) -> Schedule:
        """Return the schedule of all epochs, each of ``steps`` steps."""
        return Schedule(
            num_steps=self.epochs * steps,
            num_particles=self.num_particles,
            adversary_steps=self.adversary_steps,
            lr=self.lr,
            adversary_lr=self.adversary_lr,
            tempering=None,
            warm_up=WARM_UP,
        )


class FitOptions(TypedDict, total=False):
    """Names and types of `FitSettings`, for the keywords of `LatentModel.fit`."""

    epochs: int
    batch_size: int
    num_particles: int
    adversary_steps: int | tuple[int, int]
    lr: float | tuple[float, float]
    adversary_lr: float | tuple[float, float]
    transform: Transform | None
    device: str | torch.device
    precision: str
    compile: bool | str
    ema: float | None
    clip_norm: float | None
    max_skips: int
    checkpoint: str | Path | None
    seed: int | None
    progress: bool
    callbacks: Iterable[Callback]
