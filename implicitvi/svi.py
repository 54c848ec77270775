"""`AVBSVI`, which trains an `ImplicitGuide` by itself, and `AVB_ELBO`, which does inside `pyro.infer.SVI`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from math import nan
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor, nn

from implicitvi.adversaries import GatedAdversary
from implicitvi.amortized_problem import AmortizedProblem
from implicitvi.contrasts import Contrast
from implicitvi.engine import Engine, start_of
from implicitvi.errors import OptionError
from implicitvi.fit import Fit
from implicitvi.guide import ImplicitGuide
from implicitvi.log_joint import LogJoint
from implicitvi.options import ProblemOptions, check_guide
from implicitvi.parameters import parameter_values, show_parameters
from implicitvi.problem import Arguments, Model, Problem
from implicitvi.ratios import RatioLoss
from implicitvi.training import (
    Callback,
    History,
    Progress,
    Schedule,
    Trainer,
)


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
        tempering: Power of the log joint at the first step, rising to 1; ``None`` for none. It balances modes
            that one Gaussian start would not. ``"auto"`` is 0.1 for one posterior, and none where the guide is
            amortized or the model has parameters: those would climb the tempered bound, which is another.
        contrast: ``"mixture"`` (of Gaussians that follow the draws), ``"gaussian"`` (adaptive contrast, full
            covariance), ``"diagonal"`` (as in the paper), ``"flow"``, ``"prior"`` (plain AVB; it needs no density of
            the prior), or a function of the latent dimension that returns a `Contrast`. For an amortized guide all but
            ``"prior"`` stand in the place and scale that its encoder gives each datum, and ``"moments"`` has the
            closed-form moments of ``sampler="noise_basis"``.
        adversary: Function of the latent dimension, and of ``context_dim`` for an amortized guide, that returns the
            adversary.
        informed: Whether the adversary sees ``log p - log r`` (`InformedAdversary`).
        ratio: ``"logistic"``, ``"fgan_kl"``, ``"least_squares"``, or a `RatioLoss`.
        averaging: Share of a running average of the adversary's weights that outlives each of its steps; the
            sampler is shown the average. 0 for the current weights.
        warm_start: Steps of the Gaussian fit that gives the sampler its location and scale; 0 for none.
        num_importance: Draws in each importance-weighted bound (`tighten`); 1 for the ELBO. More of them pay where the
            model has parameters or the guide is amortized; for a posterior alone they do not.
        mode: How the model is scored: ``"auto"``, ``"vmap"``, ``"plate"`` or ``"loop"`` (`LogJoint`).
        compile: ``"graph"`` records the model's log joint once and runs it without Pyro; ``"inductor"`` turns that
            into machine code, in some seconds before the first step, and needs a C++ compiler. ``None`` for neither.
            Results agree to rounding; a model that cannot be recorded is scored as it is, with a warning. On a CUDA
            device ``"inductor"`` compiles the networks too.
        clip_norm: Bound of the global norm of each player's gradient; ``None`` for four times what is usual. A bound
            that cuts most gradients biases the fit: it cuts where the posterior pulls hardest.
        max_skips: Non-finite turns in a row that end the fit.
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
        section 4. The paper's own settings: ``contrast="diagonal"`` or ``"prior"``, ``informed=False``,
        ``averaging=0``, ``tempering=None``, ``warm_start=0``, ``lr=1e-4``, ``adversary_lr=2e-4``,
        ``num_particles=512``, ``adversary_steps=2``, ``num_steps=10_000``.
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
        tempering: float | str | None = "auto",
        contrast: str | Callable[[int], Contrast] = ProblemOptions.contrast,
        adversary: Callable[..., nn.Module] = GatedAdversary,
        informed: bool = ProblemOptions.informed,
        ratio: str | RatioLoss = ProblemOptions.ratio,
        averaging: float = ProblemOptions.averaging,
        warm_start: int = ProblemOptions.warm_start,
        num_importance: int = ProblemOptions.num_importance,
        mode: str = ProblemOptions.mode,
        compile: str | None = ProblemOptions.compile,
        clip_norm: float | None = None,
        max_skips: int = 20,
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
            tempering=start_of(tempering),
        )
        options = ProblemOptions(
            contrast=contrast,
            adversary=adversary,
            informed=informed,
            ratio=ratio,
            averaging=averaging,
            warm_start=warm_start,
            num_importance=num_importance,
            mode=mode,
            compile=compile,
        )
        self.progress = progress
        self.callbacks = tuple(callbacks)
        self._engine = Engine(
            schedule,
            options,
            tempering=tempering,
            moves_sampler=True,
            clip_norm=clip_norm,
            max_skips=max_skips,
            seed=seed,
        )

    def setup(self, *args: Any, **kwargs: Any) -> AVBSVI:
        """Everything that precedes the first step, the warm start included; does nothing the second time.

        Raises:
            ModelError: The model cannot be fitted by this guide.
        """
        self._engine.setup(self.model, self.guide, Arguments(args, kwargs))
        return self

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one step on the schedule with the model's arguments; returns the loss in nats.

        The loss is the negative learned ELBO. It is an estimate and no bound: an adversary that lags makes it look
        better than it is.
        """
        self.setup(*args, **kwargs)
        return float(self.trainer.step()["sampler"])

    def run(self, *args: Any, **kwargs: Any) -> Fit:
        """Train to the horizon with the model's arguments; an interrupt keeps what has been learned.

        A run that was cut short is continued by the next one. A run after the horizon takes ``num_steps`` more steps
        with the settings of the last.
        """
        began = time.perf_counter()
        self.setup(*args, **kwargs)
        setup_seconds = time.perf_counter() - began
        trainer = self.trainer
        num_steps = self.schedule.num_steps
        ahead = num_steps - trainer.step_count if trainer.step_count < num_steps else num_steps
        bar = Progress(ahead, {"elbo": "elbo", "adversary": "adversary"}) if self.progress else None
        watchers = self.callbacks if bar is None else (bar, *self.callbacks)
        try:
            stop_reason = trainer.run(ahead, watchers)
        finally:
            if bar is not None:
                bar.close()
        return Fit(
            guide=self.guide,
            history=trainer.history,
            num_steps=trainer.step_count,
            seconds=time.perf_counter() - began,
            setup_seconds=setup_seconds,
            stop_reason=stop_reason,
            skipped=trainer.skipped,
            log_joint=self.problem.how(),
            parameters=parameter_values(self.problem.parameters),
            model=self.model,
            args=args,
            kwargs=kwargs,
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
        """Settings of every step; the tempering of ``"auto"`` is settled by `setup`."""
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
        tempering: float | str | None = "auto",
        contrast: str | Callable[[int], Contrast] = ProblemOptions.contrast,
        adversary: Callable[..., nn.Module] = GatedAdversary,
        informed: bool = ProblemOptions.informed,
        ratio: str | RatioLoss = ProblemOptions.ratio,
        averaging: float = ProblemOptions.averaging,
        warm_start: int = ProblemOptions.warm_start,
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
            tempering=start_of(tempering),
        )
        super().__init__(num_particles=schedule.at(0).num_particles)
        options = ProblemOptions(
            contrast=contrast,
            adversary=adversary,
            informed=informed,
            ratio=ratio,
            averaging=averaging,
            warm_start=warm_start,
            num_importance=num_importance,
            mode=mode,
            compile=compile,
        )
        self._guide: ImplicitGuide | None = None
        self._engine = Engine(
            schedule,
            options,
            tempering=tempering,
            moves_sampler=False,
            clip_norm=clip_norm,
            max_skips=max_skips,
            seed=seed,
        )

    def loss(self, model: Model, guide: ImplicitGuide, *args: Any, **kwargs: Any) -> float:
        """The loss of fresh draws at the current stage, in nats; trains nothing."""
        with torch.no_grad():
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
        return loss.item()

    def loss_and_grads(
        self, model: Model, guide: ImplicitGuide, *args: Any, **kwargs: Any
    ) -> float:
        """Let the adversary take its steps, then back-propagate the sampler's loss; returns it in nats.

        A step without a finite loss leaves no gradient.
        """
        self._setup(model, guide, Arguments(args, kwargs)).step()
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.isfinite():
            loss.backward()
        return loss.item()

    def differentiable_loss(
        self, model: Model, guide: ImplicitGuide, *args: Any, **kwargs: Any
    ) -> Tensor:
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
            raise OptionError(
                "this AVB_ELBO already belongs to another guide", do="Make one for each guide."
            )
        with poutine.block():
            self._engine.setup(model, guide, arguments)
        self._guide = guide
        return self._engine.trainer
