"""From a Pyro model and a guide to an `AVB` objective: the options that `AVBSVI` and `AVB_ELBO` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, nan
from typing import Any

import torch
from torch import Tensor, nn

from implicitvi.adversaries import GatedAdversary, InformedAdversary
from implicitvi.compiled import check_compile, compile_networks
from implicitvi.contrasts import (
    Contrast,
    DiagonalGaussianContrast,
    FlowContrast,
    GaussianContrast,
    MixtureContrast,
    PriorContrast,
)
from implicitvi.errors import ModelError, OptionError, check_at_least, check_choice
from implicitvi.guide import ImplicitGuide, check_latents, latent_trace
from implicitvi.layout import SiteLayout
from implicitvi.log_joint import LogJoint, ModelPrior
from implicitvi.objectives import AVB
from implicitvi.parameters import model_parameters
from implicitvi.ratios import RATIOS, RatioLoss
from implicitvi.training import Player, Stage
from implicitvi.training.player import Metrics
from implicitvi.warm_start import gaussian_fit, starting_point

CONTRASTS = ("mixture", "gaussian", "diagonal", "flow", "prior")
Model = Callable[..., Any]
Turn = Iterator[tuple[Tensor | None, Metrics]]


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """A model, its guide set up for it, and the objective that fits one to the other.

    Attributes:
        log_joint: The model's log joint, its mode chosen.
        avb: The objective.
        arguments: The arguments that it was made with.
        parameters: Unconstrained leaves of the model's parameters, trained with the sampler.
    """

    log_joint: LogJoint
    avb: AVB
    arguments: Arguments
    parameters: dict[str, Tensor]

    def scorer(self, arguments: Arguments, beta: float = 1.0) -> Callable[[Tensor], Tensor]:
        """``β log p(x, z)`` of particles ``[S, D]`` at the model's arguments: ``[S]``."""
        return lambda u: beta * self.log_joint(u, *arguments.args, **arguments.kwargs)

    def opponents(self, arguments: Callable[[], Arguments]) -> list[Player]:
        """The players that follow the sampler: a fitted contrast, where there is one, and the adversary.

        Args:
            arguments: Gives the model's arguments at the time of a turn.
        """
        avb = self.avb

        def contrast_losses(stage: Stage) -> Turn:
            for _ in range(stage.adversary_steps):
                yield avb.contrast_loss(stage.num_particles), {}

        def adversary_losses(stage: Stage) -> Turn:
            scorer = self.scorer(arguments(), stage.beta)
            for loss in avb.adversary_losses(stage.num_particles, stage.adversary_steps, scorer):
                yield loss, {}

        def rate(stage: Stage) -> float:
            return stage.adversary_lr

        fitted = any(True for _ in avb.contrast.parameters())
        return [
            *([Player("contrast", avb.contrast, contrast_losses, rate)] if fitted else []),
            Player(
                "adversary",
                avb.adversary,
                adversary_losses,
                rate,
                follow=avb.keep_average,
                followers=(avb.contrast, *([] if avb.average is None else [avb.average])),
            ),
        ]

    def sampler(self, arguments: Callable[[], Arguments]) -> Player:
        """The player that raises the ELBO. Arguments as for `opponents`."""

        def losses(stage: Stage) -> Turn:
            loss, dropped = self.sampler_loss(arguments(), stage)
            yield loss, {"elbo": nan if loss is None else -loss.detach(), "dropped": float(dropped)}

        return Player(
            "sampler", self.avb.sampler, losses, lambda stage: stage.lr, tensors=self.parameters
        )

    def sampler_loss(self, arguments: Arguments, stage: Stage) -> tuple[Tensor | None, int]:
        """Negative mean bound of fresh draws, ``None`` where none has a density, and how many were dropped."""
        num_groups = ceil(stage.num_particles / self.avb.num_importance)
        num_particles = num_groups * self.avb.num_importance
        elbo, dropped = self.avb.elbo(num_particles, self.scorer(arguments, stage.beta))
        return (-elbo.mean() if len(elbo) else None), dropped

    def explain(self, arguments: Arguments) -> str:
        """The sites that are not finite at a draw of the sampler, with values, in words."""
        with torch.no_grad():
            u = self.avb.sampler(1)[0]
        return self.log_joint.describe(u, *arguments.args, **arguments.kwargs)

    def log_q(self, u: Tensor) -> Tensor:
        """The learned ``log q(u)`` of draws ``[S, D]`` in nats, at the arguments of the set-up."""
        return self.avb.log_q(u, self.scorer(self.arguments))


@dataclass(frozen=True)
class ProblemOptions:
    """What the objective is made of; the words are those of `AVBSVI`."""

    contrast: str | Callable[[int], Contrast] = "mixture"
    adversary: Callable[[int], nn.Module] = GatedAdversary
    informed: bool = True
    ratio: str | RatioLoss = "logistic"
    averaging: float = 0.9
    warm_start: int = 600
    num_importance: int = 1
    mode: str = "auto"
    compile: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.contrast, str):
            check_choice("contrast", self.contrast, CONTRASTS)
        if isinstance(self.ratio, str):
            check_choice("ratio", self.ratio, RATIOS)
        check_at_least("warm_start", self.warm_start, 0)
        check_at_least("num_importance", self.num_importance, 1)
        check_compile(self.compile)
        if not 0 <= self.averaging < 1:
            raise OptionError(
                "averaging is out of range", got=self.averaging, expected="0 to below 1"
            )

    def build(self, model: Model, guide: ImplicitGuide, arguments: Arguments) -> Problem:
        """Set the guide up, choose how to score the model, place the sampler, make the networks.

        Raises:
            ModelError: The model cannot be fitted, or is not the guide's.
        """
        args, kwargs = arguments.args, arguments.kwargs
        fresh = not guide.is_set_up
        guide.setup(*args, **kwargs)
        check_match(model, guide, arguments)
        sampler, layout = guide.sampler, guide.layout
        values, _ = layout.unpack(sampler.loc)
        parameters = model_parameters(model, values, *args, **kwargs)
        log_joint = LogJoint(model, layout, mode=self.mode)

        def score(u: Tensor) -> Tensor:
            return log_joint(u, *args, **kwargs)

        start = starting_point(
            lambda u: log_joint.loop(u, *args, **kwargs),
            sampler.loc,
            lambda u: log_joint.describe(u, *args, **kwargs),
        )
        around = start + 0.1 * torch.randn(3, layout.dim).to(start)
        log_joint.choose(around, *args, **kwargs)
        if self.compile is not None:
            log_joint.compile(self.compile, around, *args, **kwargs)
        if fresh:
            unit = torch.eye(layout.dim).to(start)
            sampler.set_frame(start, unit)
            if self.warm_start:
                leaves = list(parameters.values())
                sampler.set_frame(
                    *gaussian_fit(score, start, parameters=leaves, num_steps=self.warm_start)
                )
        network = self.adversary(layout.dim)
        avb = AVB(
            sampler=sampler,
            contrast=self._contrast(model, layout, arguments, start).to(start),
            adversary=(InformedAdversary(network) if self.informed else network).to(start),
            ratio=RATIOS[self.ratio]() if isinstance(self.ratio, str) else self.ratio,
            averaging=self.averaging,
            num_importance=self.num_importance,
        )
        if self.compile == "inductor" and start.is_cuda:
            compile_networks(sampler, avb.adversary, avb.average)  # on the CPU this gains nothing
        problem = Problem(log_joint, avb, arguments, parameters)
        guide.set_log_density(problem.log_q)
        return problem

    def _contrast(
        self, model: Model, layout: SiteLayout, arguments: Arguments, like: Tensor
    ) -> Contrast:
        if not isinstance(self.contrast, str):
            return self.contrast(layout.dim)
        if self.contrast == "prior":
            log_prior = LogJoint(model, layout, mode=self.mode, only=layout.names)
            prior = ModelPrior(log_prior, arguments.args, arguments.kwargs, like)
            draws = prior.sample((1000,))
            return PriorContrast(prior, loc=draws.mean(0), scale=draws.std(0))
        made: dict[str, Callable[[], Contrast]] = {
            "diagonal": DiagonalGaussianContrast,
            "gaussian": GaussianContrast,
            "mixture": lambda: MixtureContrast(layout.dim),
            "flow": lambda: FlowContrast(layout.dim),
        }
        return made[self.contrast]()


def check_guide(guide: Any) -> None:
    """Raise `OptionError` unless ``guide`` is an `ImplicitGuide`."""
    if not isinstance(guide, ImplicitGuide):
        raise OptionError(
            "the guide is not implicit",
            got=type(guide).__name__,
            expected="an ImplicitGuide",
            do="Write guide = ImplicitGuide(model); other guides are trained by pyro.infer.SVI.",
        )


def check_match(model: Model, guide: ImplicitGuide, arguments: Arguments) -> None:
    """Raise `ModelError` unless the latent sites of ``model`` are those of the guide."""
    trace = latent_trace(model, *arguments.args, **arguments.kwargs)
    check_latents(trace)
    found = {name: tuple(node["value"].shape) for name, node in trace.iter_stochastic_nodes()}
    known = {site.name: site.shape for site in guide.layout.sites}
    if found != known:
        raise ModelError(
            "the latent sites of the model are not those of the guide",
            got=found,
            expected=known,
            do="Give ImplicitGuide and AVBSVI the same model, and data of the same size.",
        )
