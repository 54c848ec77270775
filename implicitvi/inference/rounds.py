"""Train in rounds, each a whole schedule, until a judgement of fresh draws finds nothing wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from implicitvi.diagnostics.judgement import judge
from implicitvi.diagnostics.report import Check, Report
from implicitvi.errors import FitWarning
from implicitvi.inference.objective import PosteriorObjective
from implicitvi.numerics.gaussian import GaussianMixture
from implicitvi.pyro_model.target import Target
from implicitvi.rng import RandomStream, derived_seed
from implicitvi.training import Callback, Progress, Trainer
from implicitvi.training.schedule import HORIZON, Schedule

DRAWS = 10_000  # to judge
JUDGEMENT = 0x6A  # key of their seeds
NOT_GAUSSIAN = Check("start", "failed", None, None, "not the sampler's own draws", "This sampler cannot be Gaussian.")
JUDGED = CONVERGED, NOT_CONVERGED = "converged", "not converged"


def settled(schedule: Schedule, target: Target, objective: PosteriorObjective) -> Schedule:
    """Return a schedule in rounds as it is where draws can be judged, else with the default number of steps.

    There is no judgement of an amortized guide, which has many posteriors, of one that depends on parameters,
    minibatches or a prior without a density, and of a model that is scored one draw at a time.
    """
    if schedule.num_steps is None and not _can_be_judged(target, objective):
        return replace(schedule, num_steps=HORIZON)
    return schedule


def _can_be_judged(target: Target, objective: PosteriorObjective) -> bool:
    if objective.source is not None or objective.parameters:  # the model is not looked at: it may not run as a whole
        return False
    return not (target.log_joint.mode == "loop" or target.log_joint.minibatches or target.sites_without_density)


def has_ended(trainer: Trainer, stop_reason: str) -> bool:
    """Return whether a fit is at its horizon, or its last round has been judged to be the last."""
    horizon = trainer.schedule.num_steps
    return stop_reason in JUDGED if horizon is None else trainer.step_count >= horizon


def train(
    trainer: Trainer,
    watchers: Iterable[Callback],
    bar: Progress | None,
    *,
    max_steps: int,
    judged: bool,
    judgement: Callable[[int], Report],
) -> tuple[str, Report | None]:
    """Train to the horizon, or in rounds until the judgement is good; return the reason to stop, and the judgement.

    Args:
        trainer: The loop.
        watchers: Functions to call after every step.
        bar: Progress bar; ``None`` for none.
        max_steps: Steps after which no further round begins.
        judged: Whether the present state has been judged before.
        judgement: Function of the number of steps taken that judges fresh draws.
    """
    schedule, taken = trainer.schedule, trainer.step_count
    if schedule.num_steps is not None:
        # up to the horizon, after it as many steps again
        ahead = schedule.num_steps - taken if taken < schedule.num_steps else schedule.num_steps
        if bar is not None:
            bar.begin(ahead)
        return trainer.run(ahead, watchers), None
    words = ""
    while True:
        whole = schedule.round_at(trainer.step_count)
        if whole.first == trainer.step_count and not judged:
            report = judgement(trainer.step_count)
            if report.ok:
                return CONVERGED, report
            worst = report.failed[0]
            words = f", {worst.name}: {worst.found}"
            if trainer.step_count >= max_steps:
                _warn(trainer.step_count, report)
                return NOT_CONVERGED, report
        if bar is not None:
            bar.begin(whole.end - trainer.step_count, f"round {whole.number + 1}{words}")
        reason = trainer.run(whole.end - trainer.step_count, watchers)
        if reason != "finished":
            return reason, None
        judged = False


@torch.no_grad()
def judge_fit(target: Target, objective: PosteriorObjective, seed: int, steps: int) -> Report:
    """Judge fresh draws of a guide of one posterior after so many steps.

    Before the first step these are draws of the Gaussians of the start, whose density is known, so that importance
    weights are honest. If they are good, sampler and contrast become these Gaussians.
    """
    sampler, avb = objective.sampler, objective.avb
    seed = derived_seed(seed, JUDGEMENT, steps)
    with RandomStream(seed):
        if steps:
            u = sampler.draws(DRAWS)
            log_r, log_ratio = avb.log_r_and_ratio(u, objective.scorer(target))
            return judge(target, u, log_r + log_ratio, log_ratio, seed=seed)
        locs, scale_trils = sampler.frames()
        weights = getattr(sampler, "weights", locs.new_ones(1))
        start = GaussianMixture(weights, locs, scale_trils)
        u = start.sample((DRAWS,))
        report = judge(target, u, start.log_prob(u), seed=seed)
        if report.ok and sampler.be_gaussian():
            avb.contrast.be_gaussian(weights, locs, scale_trils)
            return report
        return replace(report, checks=(*report.checks, NOT_GAUSSIAN)) if report.ok else report


def _warn(steps: int, report: Report) -> None:
    off = "; ".join(f"{check.name}: {check.found} (limit {check.limit:g})" for check in report.failed)
    advice = report.failed[0].advice
    warnings.warn(f"The fit has not converged after {steps} steps. {off}. {advice}", FitWarning, stacklevel=6)
