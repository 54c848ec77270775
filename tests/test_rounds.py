"""Training in rounds: what a round is, when it ends a fit, and that nothing is lost between two of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import models
import planted
from implicitvi import AVBSVI, ImplicitGuide, StopTraining
from implicitvi.avb.samplers import SemiImplicitSampler
from implicitvi.diagnostics.judgement import judge
from implicitvi.diagnostics.report import Report
from implicitvi.errors import FitWarning
from implicitvi.inference.rounds import settled
from implicitvi.pyro_model.target import Target
from implicitvi.rng import RandomStream
from implicitvi.training import schedule
from implicitvi.training.schedule import Schedule
from test_saved import digest

Y = torch.tensor([0.5, -0.3, 1.0])
SMALL: dict[str, Any] = {"num_steps": None, "num_particles": 64, "adversary_steps": 1, "progress": False, "seed": 0}


def curved(y: Tensor) -> None:
    """A posterior that no Gaussian is."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("z", dist.Normal(x**2, 0.5))


def test_a_round_is_a_whole_schedule() -> None:
    """The rounds follow each other without a gap; each is a schedule of its own, from a lower peak."""
    rounds, step = Schedule(num_steps=None), 0
    for number in range(6):
        whole = rounds.round_at(step)
        assert whole == (number, step, 100 * 2**number)
        alone = Schedule(num_steps=whole.length, lr=(max(1e-5, 1e-3 * 0.7**number), 1e-5))
        for inside in {0, whole.length // 3, whole.length // 2, whole.length - 1}:
            assert rounds.round_at(step + inside) == whole
            assert rounds.at(step + inside) == alone.at(inside)
        assert rounds.within(whole, whole.end) == alone.at(whole.length)
        step = whole.end


def test_a_number_of_steps_is_one_round() -> None:
    once = Schedule(num_steps=50, tempering=0.1)
    assert once.round_at(0) == once.round_at(49) == once.round_at(500) == (0, 0, 50)
    assert once.at(500) == once.at(50) == once.within(once.round_at(0), 50)
    assert replace(once, num_steps=None).at(120).beta == 1.0, "later rounds are not tempered"


def test_a_gaussian_posterior_needs_no_step() -> None:
    """Its start is exact: so are draws and density, ``N(Σy / 4, 1 / 4)``."""
    fit = AVBSVI(models.normal_normal, ImplicitGuide(models.normal_normal), **SMALL).run(Y)
    assert (fit.num_steps, fit.stop_reason) == (0, "converged")
    assert fit.report is not None and fit.report.ok and fit.report["ELBO spread"].value < 0.05
    mu = fit.guide.sample(20_000)["mu"]
    assert abs(mu.mean() - 0.3) < 0.015 and abs(mu.std() - 0.5) < 0.015
    assert abs(mu.sub(mu.mean()).div(mu.std()).pow(4).mean() - 3) < 0.15, "the draws are Gaussian"
    u = torch.linspace(-1, 1.5, 20)[:, None]
    own = dist.Normal(fit.guide.sampler.loc, fit.guide.sampler.scale_tril[0])
    torch.testing.assert_close(fit.guide.get_posterior().log_prob(u), own.log_prob(u).squeeze(1), atol=1e-4, rtol=0)
    assert "converged after 0 steps" in str(fit)


def test_a_run_after_the_judgement_begins_with_one_more_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "FIRST_ROUND", 10)
    svi = AVBSVI(models.normal_normal, ImplicitGuide(models.normal_normal), **SMALL)
    assert svi.run(Y).num_steps == 0
    assert svi.run(Y).num_steps in (10, 30, 70)
    locs = svi.objective.avb.contrast.locs
    assert locs.unique().numel() == len(locs), "the components of the contrast have spread"


def test_a_loaded_fit_without_steps_goes_on_like_the_one_that_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its contrast is one Gaussian, whose components spread at the first draws, once."""
    monkeypatch.setattr(schedule, "FIRST_ROUND", 10)
    svi = AVBSVI(models.normal_normal, ImplicitGuide(models.normal_normal), **SMALL)
    svi.run(Y).save(tmp_path)
    loaded = AVBSVI.load(tmp_path, models.normal_normal, progress=False).setup(Y)
    for made in (svi, loaded):
        made.trainer.run(3)
    assert digest(loaded) == digest(svi)


def test_rounds_go_on_until_the_draws_are_good() -> None:
    fit = AVBSVI(curved, ImplicitGuide(curved), num_steps=None, num_particles=256, progress=False, seed=0).run(Y)
    assert fit.stop_reason == "converged" and fit.num_steps in (100, 300, 700)
    x, z = fit.guide.sample(20_000).values()
    assert abs(x.std() - 1) < 0.1 and abs(z.mean() - 1) < 0.15 and abs(z.std() - 1.5) < 0.15


def test_a_sampler_that_does_not_learn_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: a rate of almost 0. The warning names what is wrong, and by how much."""
    monkeypatch.setattr(schedule, "FIRST_ROUND", 10)
    svi = AVBSVI(curved, ImplicitGuide(curved), **SMALL, lr=1e-9, max_steps=10)
    with pytest.warns(FitWarning, match=r"not converged after 10 steps\. .*\(limit "):
        fit = svi.run(Y)
    assert (fit.num_steps, fit.stop_reason) == (10, "not converged")
    assert fit.report is not None and not fit.report.ok


def test_a_sampler_that_cannot_be_gaussian_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "FIRST_ROUND", 10)
    guide = ImplicitGuide(models.normal_normal, sampler=SemiImplicitSampler)
    fit = AVBSVI(models.normal_normal, guide, **SMALL).run(Y)
    assert fit.num_steps > 0


@pytest.mark.filterwarnings("ignore:The fit has not converged")
@pytest.mark.parametrize("stop", [6, 10, 15])
def test_a_stopped_fit_ends_like_one_that_was_not(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a round, between round and judgement, in the second round: equal to the last bit."""
    monkeypatch.setattr(schedule, "FIRST_ROUND", 10)

    def until(trainer: Any) -> None:
        if trainer.step_count == stop:
            raise StopTraining("enough")

    options = SMALL | {"max_steps": 30, "num_particles": 16, "lr": 1e-9}
    never = AVBSVI(curved, ImplicitGuide(curved), **options)
    whole = never.run(Y)
    first = AVBSVI(curved, ImplicitGuide(curved), **options, callbacks=[until])
    assert first.run(Y, checkpoint=tmp_path).stop_reason == "enough"
    second = AVBSVI(curved, ImplicitGuide(curved), **options)
    again = second.run(Y, checkpoint=tmp_path)
    assert (again.num_steps, again.stop_reason) == (whole.num_steps, whole.stop_reason) == (30, "not converged")
    assert digest(second) == digest(never) and again.report == whole.report
    third = AVBSVI(curved, ImplicitGuide(curved), **options)
    assert third.run(Y, checkpoint=tmp_path).report == whole.report and third.trainer.step_count == 30
    assert AVBSVI.load(tmp_path, curved).setup(Y).fit.report == whole.report


def test_a_judgement_leaves_the_fit_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged or not, a round makes the same numbers."""
    monkeypatch.setattr(schedule, "FIRST_ROUND", 10)
    judged = AVBSVI(curved, ImplicitGuide(curved), **SMALL, max_steps=10, lr=1e-9)
    with pytest.warns(FitWarning):
        judged.run(Y)
    alone = AVBSVI(curved, ImplicitGuide(curved), **SMALL, max_steps=10, lr=1e-9).setup(Y)
    alone.trainer.run(10)
    assert digest(alone) == digest(judged)


def test_what_cannot_be_judged_is_trained_for_the_default_number_of_steps() -> None:
    def groups(y: Tensor) -> None:
        with pyro.plate("groups", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=y)

    svi = AVBSVI(groups, ImplicitGuide(groups, amortize="groups"), **SMALL, warm_start=0).setup(Y)
    assert svi.schedule.num_steps == Schedule.num_steps
    single = AVBSVI(groups, ImplicitGuide(groups), **SMALL, warm_start=0).setup(Y)
    assert single.schedule.num_steps is None
    assert settled(Schedule(num_steps=7), single.target, single.objective).num_steps == 7


def judged(name: str, u: Tensor, log_q: Tensor, log_ratio: Tensor | None = None) -> Report:
    target = planted.TARGETS[name]
    layout = ImplicitGuide(target.model).setup().layout
    first = {site: value[0] for site, value in layout.unpack(u[:1])[0].items()}
    return judge(Target.of(target.model, (), {}, first, 0), u, log_q, log_ratio)


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("name", planted.TARGETS)
def test_exact_draws_are_good_enough(name: str, explicit: bool) -> None:
    """With their density, or with one learned to a fifth of a nat."""
    target = planted.TARGETS[name]
    for seed in range(3):
        with RandomStream(seed):
            u = target.draw(10_000)
            error = 0.2 * torch.randn(len(u))
        log_q = target.log_prob(u)
        report = judged(name, u, log_q) if explicit else judged(name, u, log_q + error, error)
        assert report.ok, report


PLANTED = {
    "too narrow": ("several sites", lambda: planted.scaled(0.85)(10_000), "spread identity"),
    "too wide": ("several sites", lambda: planted.scaled(1.15)(10_000), "spread identity"),
    "shifted": ("several sites", lambda: planted.draw_several(10_000) + 0.15, "mean identity"),
    "one mode missing": ("two modes", lambda: one_mode(10_000), "other modes"),
    "tails cut": ("heavy tails", lambda: without_tails(10_000), "mean identity|spread identity|spread"),
    "a funnel without its neck": ("funnel", lambda: without_neck(10_000), "spread identity|spread|mean"),
}


def one_mode(count: int) -> Tensor:
    u = planted.draw_two_modes(3 * count)
    return u[u[:, 0] > 0][:count]


def without_tails(count: int) -> Tensor:
    u = planted.draw_tails(4 * count)
    return u[(u.abs() < 2).all(1)][:count]


def without_neck(count: int) -> Tensor:
    u = planted.draw_funnel(4 * count)
    return u[u[:, 0] > -2][:count]


@pytest.mark.parametrize("name", PLANTED)
def test_planted_failures_are_seen(name: str) -> None:
    """Draws that claim the posterior's own density: only draws and score can show what is wrong."""
    target, draw, seen = PLANTED[name]
    for seed in range(3):
        with RandomStream(seed):
            u = draw()
        report = judged(target, u, planted.TARGETS[target].log_prob(u), torch.zeros(len(u)))
        assert not report.ok and {check.name for check in report.failed} & set(seen.split("|")), report


def test_wrong_shares_of_modes_are_seen() -> None:
    """No chain crosses between them, and the score is the same on both; the draws' own density tells."""
    with RandomStream(0):
        u = planted.draw_two_modes(14_000)
    kept = torch.cat([u[u[:, 0] > 0][:6000], u[u[:, 0] < 0][:4000]])
    log_q = planted.log_two_modes(kept) + torch.where(kept[:, 0] > 0, 1.2, 0.8).log()
    report = judged("two modes", kept, log_q, torch.zeros(len(kept)))
    assert report["weighted mean"].state == "failed", report


@pytest.mark.parametrize("share", [0.4, 0.0, -1.0])
def test_an_adversary_that_lags_is_seen(share: float) -> None:
    """Exact draws, and a Gaussian contrast with a share of its true log ratio."""
    with RandomStream(0):
        u = planted.draw_banana(10_000)
        r = planted.gaussian_of(u)
    gap = planted.log_banana(u) - r.log_prob(u)
    report = judged("banana", u, r.log_prob(u) + share * gap, share * gap)
    assert not report.ok and report["ELBO spread"].state == "failed", report
