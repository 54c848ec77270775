"""`AVBSVI`, which trains an `ImplicitGuide` by itself, and `AVB_ELBO`, which does inside `pyro.infer.SVI`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor, nn

from implicitvi.avb.adversaries import GatedAdversary
from implicitvi.avb.contrasts import Contrast
from implicitvi.avb.ratios import RatioLoss
from implicitvi.diagnostics.agreement import agreement
from implicitvi.errors import ModelError, OptionError, check_whole
from implicitvi.inference.amortized_objective import AmortizedProblem
from implicitvi.inference.fit import Fit
from implicitvi.inference.guide import ImplicitGuide
from implicitvi.inference.minibatches import dataset
from implicitvi.inference.objective import Arguments, Problem
from implicitvi.inference.persistence import (
    OF_GUIDE,
    SavedFit,
    as_written,
    belongings,
    check_density,
    decisive,
    log_density,
    save,
)
from implicitvi.inference.restarts import restart_folder, warn_of_disagreement
from implicitvi.inference.settings import ProblemOptions, check_guide
from implicitvi.inference.setup import Engine
from implicitvi.numerics.types import Model
from implicitvi.pyro_model.log_joint import LogJoint
from implicitvi.pyro_model.parameters import parameter_values, show_parameters
from implicitvi.rng import RandomStream
from implicitvi.training import Callback, Checkpoint, History, Progress, Schedule, Trainer
from implicitvi.training.callbacks import as_callbacks
from implicitvi.training.checkpoint import as_folder, check_same, holds_checkpoint

UNFINISHED: dict[str, Any] = {"seconds": 0.0, "setup_seconds": 0.0, "stop_reason": "unfinished"}


class AVBSVI:
    """Adversarial variational Bayes for a Pyro model, with the contract of `pyro.infer.SVI`.

    Two players take turns: the adversary learns ``log q - log r``, the guide's sampler raises the ELBO that follows
    from it. All options belong here, so that the arguments of `run` and `step` are the model's own. Where an
    option takes a pair, `Schedule` says what its two numbers mean.

    Args:
        model: The Pyro model.
        guide: An `ImplicitGuide` of it.
        num_steps: Steps of the sampler that `run` takes, and the horizon of every schedule.
        num_particles: Draws a step.
        adversary_steps: Steps of the adversary before each of the sampler.
        lr: Rate of the sampler.
        adversary_lr: Rate of the adversary and of a flow contrast.
        tempering: Share of the log joint at the first step, rising to 1 over a third of them: the fit sets out from
            a wide Gaussian. ``None`` for none. It would mislead the parameters of a model, amortized guides, and
            the modes that are known before the first step.
        contrast: ``"mixture"`` (of Gaussians that follow the draws), ``"gaussian"`` (adaptive contrast, full
            covariance), ``"diagonal"`` (as in the paper), ``"flow"``, ``"prior"`` (plain AVB; it needs no density of
            the prior), or a function of the latent dimension that returns a `Contrast`. For an amortized guide all but
            ``"prior"`` stand in the place and scale that its encoder gives each datum, and ``"moments"`` has the
            closed-form moments of ``sampler="noise_basis"``.
        adversary: Function of the latent dimension, and of ``context_dim`` for an amortized guide, that returns the
            adversary.
        informed: Whether the adversary is shown ``log p - log r`` beside the draws (`InformedAdversary`).
        ratio: ``"logistic"``, ``"fgan_kl"``, ``"least_squares"``, or a `RatioLoss`.
        averaging: Share of a running average of the adversary's weights that outlives each of its steps; the
            sampler is shown the average. 0 for the current weights.
        warm_start: Steps of the Gaussian fit that gives the sampler its location and scale; 0 for none.
        max_modes: Far modes to look for after the warm start (`find_modes`); each that is found gets a place and scale
            of its own (`MixtureSampler`). 1 looks for none. Nothing is looked for without a warm start, where the model
            has parameters, is scored in a loop or sees minibatches, or where the contrast is the prior.
        num_importance: Draws in each importance-weighted bound (`importance_weighted`); 1 for the ELBO. More of them pay where the
            model has parameters or the guide is amortized; for a posterior alone they do not.
        mode: How the model is scored: ``"auto"``, ``"vmap"``, ``"plate"`` or ``"loop"`` (`LogJoint`).
        compile: ``"graph"`` records the model's log joint once and runs it without Pyro; ``"inductor"`` turns that
            into machine code, in some seconds before the first step, and needs a C++ compiler. ``None`` for neither.
            Results agree to rounding; a model that cannot be recorded is scored as it is, with a warning. On a CUDA
            device ``"inductor"`` compiles the networks too.
        clip_norm: Bound of the global norm of each player's gradient; ``None`` for four times what is usual. A bound
            that cuts most gradients biases the fit: it cuts where the posterior pulls hardest.
        max_skips: Non-finite turns in a row that end the fit.
        restarts: Independent fits that `run` makes, to see whether they agree (`Fit.agreement`). ``guide`` is the first
            one's; the others have fresh copies of it and seeds that follow from ``seed``.
        seed: Seed of the fit's own random numbers; ``None`` takes one from torch's default generator, so that
            ``pyro.set_rng_seed`` decides.
        progress: Whether `run` shows a bar.
        callbacks: Called after every step of `run` with the trainer; `StopTraining` ends it.

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
        num_steps: int = Schedule.num_steps,
        num_particles: int | tuple[int, int] = Schedule.num_particles,
        adversary_steps: int | tuple[int, int] = Schedule.adversary_steps,
        lr: float | tuple[float, float] = Schedule.lr,
        adversary_lr: float | tuple[float, float] = Schedule.adversary_lr,
        tempering: float | None = Schedule.tempering,
        contrast: str | Callable[[int], Contrast] = ProblemOptions.contrast,
        adversary: Callable[..., nn.Module] = GatedAdversary,
        informed: bool = ProblemOptions.informed,
        ratio: str | RatioLoss = ProblemOptions.ratio,
        averaging: float = ProblemOptions.averaging,
        warm_start: int = ProblemOptions.warm_start,
        max_modes: int = ProblemOptions.max_modes,
        num_importance: int = ProblemOptions.num_importance,
        mode: str = ProblemOptions.mode,
        compile: str | None = ProblemOptions.compile,
        clip_norm: float | None = None,
        max_skips: int = 20,
        restarts: int = 1,
        seed: int | None = None,
        progress: bool = True,
        callbacks: Iterable[Callback] = (),
    ):
        check_guide(guide)
        self.model = model
        self.guide = guide
        schedule = Schedule(
            num_steps=num_steps,
            num_particles=num_particles,
            adversary_steps=adversary_steps,
            lr=lr,
            adversary_lr=adversary_lr,
            tempering=tempering,
        )
        options = ProblemOptions(
            contrast=contrast,
            adversary=adversary,
            informed=informed,
            ratio=ratio,
            averaging=averaging,
            warm_start=warm_start,
            max_modes=max_modes,
            num_importance=num_importance,
            mode=mode,
            compile=compile,
        )
        self.progress = progress
        self.callbacks = as_callbacks(callbacks)
        self._options = as_written(
            guide,
            num_steps=num_steps,
            num_particles=num_particles,
            adversary_steps=adversary_steps,
            lr=lr,
            adversary_lr=adversary_lr,
            tempering=tempering,
            **vars(options),
            clip_norm=clip_norm,
            max_skips=max_skips,
            restarts=restarts,
            seed=seed,
        )
        self._saved: SavedFit | None = None  # to be taken up
        self._record: dict[str, Any] = dict(UNFINISHED)
        self._engine = Engine(
            schedule, options, moves_sampler=True, clip_norm=clip_norm, max_skips=max_skips, seed=seed
        )
        check_whole("restarts", restarts)
        self._twins = [self._twin(key) for key in range(1, restarts)]

    def setup(self, *args: Any, **kwargs: Any) -> AVBSVI:
        """Everything that precedes the first step, the warm start included; does nothing the second time.

        Raises:
            ModelError: The model cannot be fitted by this guide.
            CheckpointError: What `load` has read belongs to another model or other options.
        """
        self._engine.setup(self.model, self.guide, Arguments(args, kwargs))
        if self._twins and self.problem.parameters:
            raise ModelError(
                "restarts of a model with parameters would share them",
                got=", ".join(map(repr, self.problem.parameters)),
                do="Use restarts=1, or fit copies of the model.",
            )
        self.trainer.write = self._write
        if self._saved is not None:
            check_same(self._saved.config, belongings(self.guide, self.trainer))
            self.trainer.load_state_dict(self._saved.state["fit"])
            self._record = self._saved.state["record"]
            self._saved = None
        for twin in self._twins:
            if twin._saved is not None:
                twin.setup(*args, **kwargs)
        return self

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one step on the schedule with the model's arguments; returns the loss in nats.

        The loss is the negative learned ELBO. It is an estimate and no bound: an adversary that lags makes it look
        better than it is.
        """
        if self._twins:
            raise OptionError("a step is taken by one fit", got=f"restarts={1 + len(self._twins)}", do="Call run.")
        self.setup(*args, **kwargs)
        return float(self.trainer.step()["sampler"])

    def run(self, *args: Any, checkpoint: str | Path | None = None, every: int | None = None, **kwargs: Any) -> Fit:
        """Train to the horizon with the model's arguments; an interrupt keeps what has been learned.

        A run that was cut short is continued by the next one. A run after the horizon takes ``num_steps`` more steps
        with the settings of the last.

        With ``checkpoint`` that holds across processes too: where the folder has a later state of this fit than this
        object, the run goes on from there, bit for bit on the CPU as if it had never stopped; where that state is at
        the horizon, it is returned. So a script may simply be started again.

        Args:
            *args: The model's arguments.
            checkpoint: Folder that keeps the state, each restart's in a folder of its own inside; made where there is
                none.
            every: Steps between two states that are kept, the last always is; ``None`` for a twentieth of the fit.
            **kwargs: The model's keyword arguments.

        Raises:
            ModelError: The model cannot be fitted by this guide.
            CheckpointError: The folder has a checkpoint that is damaged, or of another model or other options.
        """
        fits = [self._run(args, kwargs, checkpoint, every)]
        for key, twin in enumerate(self._twins, 1):
            if fits[-1].stop_reason == "interrupted":
                break
            folder = None if checkpoint is None else restart_folder(checkpoint, key)
            fits.append(twin._run(args, kwargs, folder, every))
        fit = _together(*fits)
        if fit.agreement is not None:
            warn_of_disagreement(fit.agreement)
        return fit

    def _train(self, *watchers: Callback) -> str:
        """Steps up to the horizon, after it as many again; returns why they stopped."""
        num_steps, taken = self.schedule.num_steps, self.trainer.step_count
        ahead = num_steps - taken if taken < num_steps else num_steps
        if not self.progress:
            return self.trainer.run(ahead, watchers)
        bar = Progress(ahead, {"sampler": "loss", "adversary": "adversary"})
        try:
            return self.trainer.run(ahead, (bar, *watchers))
        finally:
            bar.close()

    def _twin(self, key: int) -> AVBSVI:
        """The same options around another guide and other random numbers."""
        other = copy(self)
        other.guide = self.guide.fresh_copy()
        other._engine = self._engine.fresh_copy(key)
        other._twins = []
        other._options = self._options | {"restarts": 1, "seed": other._engine.seed}
        return other

    def _run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], checkpoint: str | Path | None, every: int | None
    ) -> Fit:
        """`run` of this fit alone."""
        began = time.perf_counter()
        keeper = self._keeper(checkpoint, every)
        resumed = checkpoint is not None and self._take_up_later(as_folder(checkpoint))
        then = nan if self._saved is None else self._saved.log_density
        self.setup(*args, **kwargs)
        if resumed:
            check_density(then, self._log_density())
        setup_seconds = time.perf_counter() - began
        if resumed and self.trainer.step_count >= self.schedule.num_steps:
            return self._alone()
        self._record = UNFINISHED | {"setup_seconds": setup_seconds}
        stop_reason = self._train(*self.callbacks, *([] if keeper is None else [keeper]))
        self._record = {
            "seconds": time.perf_counter() - began,
            "setup_seconds": setup_seconds,
            "stop_reason": stop_reason,
        }
        if checkpoint is not None:
            self.save(checkpoint)
        return self._alone()

    @property
    def fit(self) -> Fit:
        """The fit as it stands: what the last `run` returned, here or before it was saved."""
        begun = [twin for twin in self._twins if twin._engine.is_set_up]
        return _together(self._alone(), *(twin._alone() for twin in begun))

    def _alone(self) -> Fit:
        trainer = self.trainer
        return Fit(
            guide=self.guide,
            history=trainer.history,
            num_steps=trainer.step_count,
            skipped=trainer.skipped,
            log_joint=self.problem.how(),
            parameters=parameter_values(self.problem.parameters),
            model=self.model,
            args=self._engine.arguments.args,
            kwargs=self._engine.arguments.kwargs,
            seed=self._options["seed"],
            write=self.save,
            **self._record,
        )

    def save(self, folder: str | Path) -> None:
        """Write everything that training and drawing need into a folder, whole or not at all.

        Raises:
            SetupError: The fit has not seen its model yet.
        """
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
        """Make a fit again that `Fit.save` or `run` wrote; nothing in the folder is executed.

        The guide draws as soon as it is given the model's arguments, ``svi.guide.sample(1000, *args)``. With `setup`
        or `run`, which take them too, training can go on.

        Args:
            folder: Where the fit was saved.
            model: The model of the fit.
            guide: The guide, where it was made with a sampler or features of your own: such functions have to be
                passed again.
            contrast: Likewise.
            adversary: Likewise.
            ratio: Likewise.
            progress: As in `AVBSVI`.
            callbacks: As in `AVBSVI`.

        Raises:
            CheckpointError: The checkpoint is damaged, renamed, of a newer version, or needs functions that were not
                passed. That it belongs to another model is found out when the guide sees the model's arguments.

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
            >>> again.guide.sample(5, torch.ones(3))["mu"].shape
            torch.Size([5])
        """
        saved = SavedFit.read(as_folder(folder))
        given = {"contrast": contrast, "adversary": adversary, "ratio": ratio}
        options = saved.options_with(given | dict.fromkeys(OF_GUIDE, guide))
        made_by = {name: options.pop(name) for name in OF_GUIDE}
        if options["adversary"] == "gated":
            del options["adversary"]
        guide = ImplicitGuide(model, **made_by) if guide is None else guide
        svi = cls(model, guide, **options, progress=progress, callbacks=callbacks)
        svi._take_up(saved)
        for key, twin in enumerate(svi._twins, 1):
            own = restart_folder(folder, key)
            if holds_checkpoint(own):
                twin._take_up(SavedFit.read(own))
        return svi

    def _keeper(self, checkpoint: str | Path | None, every: int | None) -> Checkpoint | None:
        if checkpoint is None:
            if every is None:
                return None
            raise OptionError(
                "every is given without a checkpoint",
                got=repr(every),
                do="Pass checkpoint=folder too; an argument of the model that is called so has to be passed by "
                "position.",
            )
        default = max(1, self.schedule.num_steps // 20)
        return Checkpoint(checkpoint, every=default if every is None else every)

    def _take_up_later(self, folder: Path) -> bool:
        """Take up the state in a folder if it is later than the present one."""
        if not holds_checkpoint(folder):
            return False
        saved = SavedFit.read(folder)
        present = 0
        if self._saved is not None:
            present = self._saved.step
        elif self._engine.is_set_up:
            present = self.trainer.step_count
        if saved.step <= present:
            return False
        self._take_up(saved)
        return True

    def _take_up(self, saved: SavedFit) -> None:
        """Let the guide, and at the set-up the trainer, go on from a state."""
        mine = {k: v for k, v in decisive(self._options).items() if k in saved.options}
        check_same({"options": decisive(saved.options)}, {"options": mine})
        self._saved = saved
        self.guide.restore_with(saved.restore)

    def _log_density(self) -> float:
        """`log_density` of the model with the arguments of the run, of the first of several datasets."""
        args, kwargs = self._engine.arguments.args, self._engine.arguments.kwargs
        amortization = self.guide.amortization
        if amortization is not None and amortization.plate is None:
            args, kwargs = dataset(0, args, kwargs)
        return log_density(self.guide, self.model, *args, **kwargs)

    def _write(self, folder: Path, notes: dict[str, Any]) -> None:
        save(
            folder,
            options=self._options,
            guide=self.guide,
            trainer=self.trainer,
            record=self._record,
            density=self._log_density(),
            notes=notes,
        )

    @torch.no_grad()
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss of fresh draws, untempered, in nats; changes nothing but the stream of random numbers."""
        self.setup(*args, **kwargs)
        last = self.schedule.at(self.schedule.num_steps)
        with self._engine.stream:
            loss, _ = self.problem.sampler_loss(self._engine.arguments, last)
        return nan if loss is None else loss.item()

    @property
    def schedule(self) -> Schedule:
        """Settings of every step."""
        return self._engine.schedule

    @property
    def trainer(self) -> Trainer:
        """The loop, with its players, step count and history."""
        return self._engine.trainer

    @property
    def problem(self) -> Problem | AmortizedProblem:
        """The objective and the log joint."""
        return self._engine.problem

    @property
    def log_joint(self) -> LogJoint:
        """The model's `LogJoint`; its ``mode`` and ``reason`` say how the model is scored."""
        return self.problem.log_joint

    @property
    def history(self) -> History:
        """Metrics of every step so far."""
        return self.trainer.history

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: networks, optimisers, step, random numbers, history."""
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` gave; call `setup` with the model's arguments first."""
        self.trainer.load_state_dict(state)


def _together(fit: Fit, *others: Fit) -> Fit:
    """A fit with its restarts, and how far they agree."""
    if not others:
        return fit
    found = None
    if fit.guide.amortization is None:
        with RandomStream(0):  # looking leaves the fits as they are
            found = agreement([each.guide for each in (fit, *others)])
    return replace(fit, restarts=others, agreement=found)


class AVB_ELBO(ELBO):
    """Adversarial variational Bayes as a loss for `pyro.infer.SVI`, whose optimiser moves the sampler.

    Before each gradient the loss lets its own adversary take its steps, with an optimiser of its own. Options are
    those of `AVBSVI`; the sampler's rate is the Pyro optimiser's. Use one instance for one guide.

    Args:
        num_steps: Horizon of the schedules: tempering, batch growth, adversary's rate.
        num_particles: Draws a step.
        adversary_steps: Steps of the adversary before each of the sampler.
        adversary_lr: Rate of the adversary and of a flow contrast.
        tempering: As in `AVBSVI`.
        contrast: As in `AVBSVI`.
        adversary: As in `AVBSVI`.
        informed: As in `AVBSVI`.
        ratio: As in `AVBSVI`.
        averaging: As in `AVBSVI`.
        warm_start: As in `AVBSVI`.
        max_modes: As in `AVBSVI`.
        num_importance: As in `AVBSVI`.
        mode: As in `AVBSVI`.
        compile: As in `AVBSVI`.
        clip_norm: Bound of the global norm of the adversary's gradient; ``None`` for four times what is usual.
        max_skips: Non-finite turns in a row that end the fit.
        seed: As in `AVBSVI`.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from implicitvi import ImplicitGuide
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)
        >>> guide = ImplicitGuide(model)
        >>> optim = pyro.optim.Adam({"lr": 1e-3, "betas": (0.5, 0.999)})
        >>> svi = pyro.infer.SVI(model, guide, optim, loss=AVB_ELBO(num_steps=3, seed=0))
        >>> losses = [svi.step(torch.ones(3)) for _ in range(3)]
    """

    def __init__(
        self,
        *,
        num_steps: int = Schedule.num_steps,
        num_particles: int | tuple[int, int] = Schedule.num_particles,
        adversary_steps: int | tuple[int, int] = Schedule.adversary_steps,
        adversary_lr: float | tuple[float, float] = Schedule.adversary_lr,
        tempering: float | None = Schedule.tempering,
        contrast: str | Callable[[int], Contrast] = ProblemOptions.contrast,
        adversary: Callable[..., nn.Module] = GatedAdversary,
        informed: bool = ProblemOptions.informed,
        ratio: str | RatioLoss = ProblemOptions.ratio,
        averaging: float = ProblemOptions.averaging,
        warm_start: int = ProblemOptions.warm_start,
        max_modes: int = ProblemOptions.max_modes,
        num_importance: int = ProblemOptions.num_importance,
        mode: str = ProblemOptions.mode,
        compile: str | None = ProblemOptions.compile,
        clip_norm: float | None = None,
        max_skips: int = 20,
        seed: int | None = None,
    ):
        schedule = Schedule(
            num_steps=num_steps,
            num_particles=num_particles,
            adversary_steps=adversary_steps,
            adversary_lr=adversary_lr,
            tempering=tempering,
        )
        super().__init__(num_particles=schedule.at(0).num_particles)
        options = ProblemOptions(
            contrast=contrast,
            adversary=adversary,
            informed=informed,
            ratio=ratio,
            averaging=averaging,
            warm_start=warm_start,
            max_modes=max_modes,
            num_importance=num_importance,
            mode=mode,
            compile=compile,
        )
        self._guide: ImplicitGuide | None = None
        self._engine = Engine(
            schedule, options, moves_sampler=False, clip_norm=clip_norm, max_skips=max_skips, seed=seed
        )

    def loss(self, model: Model, guide: ImplicitGuide, *args: Any, **kwargs: Any) -> float:
        """The loss of fresh draws at the current stage, in nats; trains nothing."""
        with torch.no_grad():
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
        return loss.item()

    def loss_and_grads(self, model: Model, guide: ImplicitGuide, *args: Any, **kwargs: Any) -> float:
        """Let the adversary take its steps, then back-propagate the sampler's loss; returns it in nats.

        A step without a finite loss leaves no gradient.
        """
        self._setup(model, guide, Arguments(args, kwargs)).step()
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.isfinite():
            loss.backward()
        return loss.item()

    def differentiable_loss(self, model: Model, guide: ImplicitGuide, *args: Any, **kwargs: Any) -> Tensor:
        """The sampler's loss at the current stage, a scalar with gradients for the sampler only."""
        trainer = self._setup(model, guide, Arguments(args, kwargs))
        engine = self._engine
        pyro.module(f"{guide._pyro_name}.sampler", guide.sampler)
        show_parameters(engine.problem.parameters)
        with poutine.block(), engine.stream:
            stage = engine.schedule.at(max(trainer.step_count - 1, 0))
            loss, _ = engine.problem.sampler_loss(engine.arguments, stage)
        return torch.tensor(nan) if loss is None else loss

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        """Pyro's hook for losses made of traces, which this one is not."""
        raise NotImplementedError("AVB_ELBO scores particles without traces of the guide")

    def _setup(self, model: Model, guide: ImplicitGuide, arguments: Arguments) -> Trainer:
        if self._guide is not guide and self._guide is not None:
            raise OptionError("this AVB_ELBO already belongs to another guide", do="Make one for each guide.")
        with poutine.block():
            self._engine.setup(model, guide, arguments)
        self._guide = guide
        return self._engine.trainer
