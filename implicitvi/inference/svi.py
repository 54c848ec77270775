"""Train an `ImplicitGuide` by adversarial variational Bayes in a loop of its own: `AVBSVI`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from math import nan
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from implicitvi.avb.contrasts import Contrast
from implicitvi.avb.ratios import RatioLoss
from implicitvi.diagnostics.amortized_modes import count_lost_modes, warn_of_lost_modes
from implicitvi.errors import ModelError, OptionError, check_flag, check_function
from implicitvi.inference.copies import Copyable
from implicitvi.inference.fit import Fit, restart_folder
from implicitvi.inference.guide import ImplicitGuide
from implicitvi.inference.persistence import SavedFit, check_density, log_density, made_by, present_config, save
from implicitvi.inference.restarts import together, warn_of_disagreement
from implicitvi.inference.rounds import JUDGED, has_ended, judge_fit, train
from implicitvi.inference.settings import Options, Settings
from implicitvi.inference.setup import TrainingHolder, check_guide, set_up
from implicitvi.numerics.doors import exclusive, with_gradients
from implicitvi.numerics.types import Model
from implicitvi.pyro_model.arguments import Arguments
from implicitvi.pyro_model.parameters import parameter_values
from implicitvi.rng import RandomStream, derived_seed
from implicitvi.training import Callback, Checkpoint, Progress
from implicitvi.training.callbacks import as_callbacks, for_restart
from implicitvi.training.checkpoint import as_folder, check_same, holds_checkpoint
from implicitvi.training.options import from_options, with_options
from implicitvi.training.trainer import held_interrupt

UNFINISHED: dict[str, Any] = {"seconds": 0.0, "setup_seconds": 0.0, "stop_reason": "unfinished"}


@with_options(Settings)
class AVBSVI(Copyable, TrainingHolder):
    """An adversarial variational Bayes fit of a Pyro model, with the contract of `pyro.infer.SVI`.

    Two players take turns: the adversary learns ``log q - log r``, the guide's sampler raises the ELBO that follows
    from it. All options are given here, so that the arguments of `run` and `step` are the model's own.

    Args:
        model: The Pyro model.
        guide: An `ImplicitGuide` of it.
        settings: The options as a value; keywords replace its fields.
        progress: Whether `run` shows a progress bar.
        callbacks: Functions that `run` calls with the trainer after every step; `StopTraining` ends the run.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)
        >>> guide = ImplicitGuide(model)
        >>> fit = AVBSVI(model, guide, num_steps=20, progress=False, seed=0).run(torch.ones(3))
        >>> fit.num_steps, fit.stop_reason
        (20, 'finished')

    References:
        Adversarial Variational Bayes, Lars Mescheder, Sebastian Nowozin, Andreas Geiger, 2017; algorithm 1 and
        section 4. The paper's own settings: ``contrast="diagonal"`` or ``"prior"``, ``averaging=0``,
        ``warm_start=0``, ``lr=1e-4``, ``adversary_lr=2e-4``, ``num_particles=512``, ``adversary_steps=2``,
        ``num_steps=10_000``.
    """

    def __init__(
        self,
        model: Model,
        guide: ImplicitGuide,
        *,
        settings: Settings | None = None,
        progress: bool = True,
        callbacks: Iterable[Callback] = (),
        **options: Unpack[Options],
    ):
        check_guide(guide)
        check_function("model", model, "a function, the Pyro model")
        self.model = model
        self.guide = guide
        self.settings = from_options(Settings, options, settings, of=AVBSVI)
        self.progress = check_flag("progress", progress)
        self.callbacks = as_callbacks(callbacks)
        self._stream = RandomStream(self.settings.seed)
        self._saved: SavedFit | None = None  # a state to continue from
        self._record: dict[str, Any] = dict(UNFINISHED)
        self._restarts = [self._restart(key) for key in range(1, self.settings.restarts)]

    @with_gradients()
    def setup(self, *args: Any, **kwargs: Any) -> AVBSVI:
        """Do everything that precedes the first step, the warm start included; later only take the arguments.

        Raises:
            ModelError: The model cannot be fitted by this guide.
            CheckpointError: The state that `load` has read belongs to another model or other options.
        """
        arguments = Arguments(args, kwargs)
        if self._training is None:
            self._training = set_up(self.model, self.guide, self.settings, arguments, self._stream, moves_sampler=True)
        else:
            self._training.bind(arguments)
        if self._restarts and self.objective.parameters:
            got = f"{', '.join(map(repr, self.objective.parameters))}. Use restarts=1, or fit copies of the model"
            raise ModelError.must_be("a model with restarts", "without parameters, which they would share", got)
        self.trainer.write, self.trainer.guide = self._write, self.guide
        if self._saved is not None:
            check_same(self._saved.config, present_config(self.guide, self.trainer))
            self.trainer.load_state_dict(self._saved.state["fit"])
            self._record = self._saved.state["record"]
            self._saved = None
        for other in self._restarts:
            if other._saved is not None:
                other.setup(*args, **kwargs)
        return self

    @with_gradients()
    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one step on the schedule with the model's arguments; return the loss in nats.

        The loss is the negative learned ELBO: an estimate, not a bound. An adversary that lags makes it look better
        than it is.

        Raises:
            OptionError: There are restarts, which only `run` can train.
        """
        if self._restarts:
            raise OptionError.must_be("restarts", "1 to take single steps", self.settings.restarts, "Call run.")
        self.setup(*args, **kwargs)
        return float(self.trainer.step()["sampler"])

    @with_gradients()
    def run(self, *args: Any, checkpoint: str | Path | None = None, every: int | None = None, **kwargs: Any) -> Fit:
        """Train to the horizon with the model's arguments; an interrupt keeps everything learned so far.

        The next run continues one that was interrupted. A run after the horizon takes ``num_steps`` more steps with
        the settings of the last. With ``num_steps=None`` the run ends when a judgement of fresh draws finds nothing
        wrong (`Fit.report`), or with a `FitWarning` at ``max_steps``; a run after it begins with one more round.

        With ``checkpoint`` this holds across processes: if the folder has a later state of this fit, the run continues
        from there, on the CPU bit for bit as if it had never stopped; if that state is at the horizon, the run returns
        it. So you can simply start a script again.

        Args:
            *args: The model's arguments.
            checkpoint: Folder for the state, made if it does not exist; each restart has a folder of its own inside.
            every: Steps between two saved states; ``None`` for a twentieth of the fit, in rounds 100. The last one is
                always saved.
            **kwargs: The model's keyword arguments.

        Raises:
            ModelError: The model cannot be fitted by this guide.
            CheckpointError: The checkpoint in the folder is damaged, or of another model or other options.
        """
        checkpoint = None if checkpoint is None else as_folder(checkpoint, writable=True)
        fits = [self._run(args, kwargs, checkpoint, every)]
        for key, other in enumerate(self._restarts, 1):
            if fits[-1].stop_reason == "interrupted":
                break
            folder = None if checkpoint is None else restart_folder(checkpoint, key)
            fits.append(other._run(args, kwargs, folder, every))
        fit = together(*fits)
        if fit.agreement is not None:
            warn_of_disagreement(fit.agreement)
        return fit

    @property
    def fit(self) -> Fit:
        """The fit as it stands: the result of the last `run`, in this process or before it was saved."""
        return together(self._fit(), *(other._fit() for other in self._restarts if other._training is not None))

    def save(self, folder: str | Path) -> None:
        """Write everything that training and drawing need into a folder, completely or not at all.

        Raises:
            SetupError: The fit has not seen its model yet.
        """
        self.trainer.write = self._write
        self.trainer.save(folder)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: Model,
        *,
        guide: ImplicitGuide | None = None,
        contrast: Callable[[int], Contrast] | None = None,
        adversary: Callable[..., nn.Module] | None = None,
        ratio: RatioLoss | None = None,
        progress: bool = True,
        callbacks: Iterable[Callback] = (),
    ) -> AVBSVI:
        """Load a fit that `Fit.save` or `run` wrote; nothing in the folder is executed.

        The guide draws at once, ``svi.guide.sample(1000)``; it needs the model's arguments if it is amortized or a
        latent site has an unusual support. `setup` or `run`, which take them, continue the training.

        Args:
            folder: Folder of the fit.
            model: The model of the fit.
            guide: The guide, if it was made with a sampler or features of your own: pass such functions again.
            contrast: Likewise.
            adversary: Likewise.
            ratio: Likewise.
            progress: As in `AVBSVI`.
            callbacks: As in `AVBSVI`.

        Raises:
            CheckpointError: The checkpoint is damaged, renamed, of a newer version, or needs functions that were not
                passed. Another model is recognised when the guide sees the model's arguments.

        Example:
            >>> import pyro, pyro.distributions as dist, tempfile, torch
            >>> def model(y):
            ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("data", len(y)):
            ...         pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)
            >>> svi = AVBSVI(model, ImplicitGuide(model), num_steps=20, progress=False, seed=0)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     svi.run(torch.ones(3)).save(folder)
            ...     again = AVBSVI.load(folder, model)
            >>> again.guide.sample(5)["mu"].shape
            torch.Size([5])
        """
        saved = SavedFit.read(folder := as_folder(folder))
        options = saved.options_with({"contrast": contrast, "adversary": adversary, "ratio": ratio}, guide)
        guide = ImplicitGuide(model, **saved.guide_options) if guide is None else guide
        svi = cls(model, guide, **options, progress=progress, callbacks=callbacks)
        svi._continue_from(saved)
        for key, other in enumerate(svi._restarts, 1):
            own = restart_folder(folder, key)
            if holds_checkpoint(own):
                other._continue_from(SavedFit.read(own))
        return svi

    @exclusive()
    @torch.no_grad()
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Return the loss of fresh draws, untempered, in nats; only the stream of random numbers moves on."""
        self.setup(*args, **kwargs)
        whole = self.schedule.round_at(max(self.trainer.step_count - 1, 0))
        with self._stream:
            loss, _ = self.objective.loss(self.target, self.schedule.within(whole, whole.end))
        return nan if loss is None else loss.item()

    def _restart(self, key: int) -> AVBSVI:
        """Return the same options around another guide and other random numbers."""
        other, seed = copy(self), self.settings.seed
        other.guide = self.guide.fresh_copy()
        other.callbacks = for_restart(self.callbacks, restart_folder("", key).name, self.guide)
        seed = None if seed is None else derived_seed(seed, key)
        other.settings = replace(self.settings, restarts=1, seed=seed)
        other._stream = RandomStream(seed)
        other._restarts = []
        return other

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], checkpoint: Path | None, every: int | None) -> Fit:
        """Run this fit without its restarts."""
        began = time.perf_counter()
        keeper = _keeper(checkpoint, every, self.settings.num_steps)
        resumed = checkpoint is not None and self._continue_from_later(checkpoint)
        then = nan if self._saved is None else self._saved.log_density
        labels = {"sampler": "loss", "adversary": "adversary"}
        with closing(Progress(0, labels)) if self.progress else nullcontext() as bar:
            self.setup(*args, **kwargs)
            if resumed:
                check_density(then, log_density(self.guide, self.target))
            if resumed and has_ended(self.trainer, self._record["stop_reason"]):
                return self._fit()
            judged = self._record["stop_reason"] in JUDGED
            self._record = UNFINISHED | {"setup_seconds": time.perf_counter() - began}
            watchers = [*([] if bar is None else [bar]), *self.callbacks, *([] if keeper is None else [keeper])]
            reason, report = train(
                self.trainer,
                watchers,
                bar,
                max_steps=self.settings.max_steps,
                judged=judged,
                judgement=partial(judge_fit, self.target, self.objective, self.settings.seed or 0),
            )
        self._record |= _lost_modes(self) | {"seconds": time.perf_counter() - began, "stop_reason": reason}
        self._record |= {} if report is None else {"report": report}
        if checkpoint is not None:
            with held_interrupt():  # the run is over
                self.save(checkpoint)
        return self._fit()

    def _fit(self) -> Fit:
        trainer, target = self.trainer, self.target
        return Fit(
            guide=self.guide,
            history=trainer.history,
            num_steps=trainer.step_count,
            skipped=trainer.skipped,
            log_joint=self.objective.scoring(target),
            parameters=parameter_values(self.objective.parameters),
            model=self.model,
            args=target.args,
            kwargs=target.kwargs,
            seed=self.settings.seed,
            write=self.save,
            **self._record,
        )

    def _continue_from_later(self, folder: Path) -> bool:
        """Continue from the state in a folder if it is later than the present one; return whether it is."""
        if not holds_checkpoint(folder):
            return False
        saved, present = SavedFit.read(folder), 0
        if self._saved is not None:
            present = self._saved.step
        elif self._training is not None:
            present = self.trainer.step_count
        if saved.step <= present:
            return False
        self._continue_from(saved)
        return True

    def _continue_from(self, saved: SavedFit) -> None:
        """Restore the guide from a state, and the trainer when it is set up."""
        saved.check_options(made_by(self.guide, self.settings))
        self._saved = saved
        self.guide.restore_with(saved.restore, saved.layout)

    def _write(self, folder: Path, notes: dict[str, Any]) -> None:
        save(
            folder,
            options=made_by(self.guide, self.settings),
            guide=self.guide,
            trainer=self.trainer,
            record=self._record,
            density=log_density(self.guide, self.target),
            notes=notes,
        )


def _keeper(checkpoint: Path | None, every: int | None, num_steps: int | None) -> Checkpoint | None:
    """Return the callback that writes the states of a run, ``None`` where they are not wanted."""
    if checkpoint is not None:
        return Checkpoint(checkpoint, every=max(1, (num_steps or 2000) // 20) if every is None else every)
    if every is not None:
        advice = "Pass checkpoint=folder too; pass an argument of the model with that name by position."
        raise OptionError(f"every must be given with checkpoint, got every={every!r} alone. {advice}")
    return None


def _lost_modes(svi: AVBSVI) -> dict[str, Any]:
    """Return the record of the data for which an amortized guide has lost a mode, and warn if there are some."""
    if svi.guide.amortization is None:
        return {}
    found = count_lost_modes(svi.guide.sampler, svi.objective.source, svi.target.arguments)
    warn_of_lost_modes(found)
    return {"lost_modes": found}
