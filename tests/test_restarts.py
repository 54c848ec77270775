"""Restarts are independent fits, each what it would be alone, and disagreement is said aloud."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from implicitvi import AVBSVI, Fit, ImplicitGuide
from implicitvi.diagnostics.agreement import Agreement
from implicitvi.errors import ModelError, OptionError
from implicitvi.inference.modes import Mode
from implicitvi.inference.restarts import agreement, warn_of_disagreement
from implicitvi.rng import derived_seed
from models import normal_normal

DATA = torch.tensor([1.0, 2.0, 0.5])


def fitted(restarts: int, seed: int | None = 0, num_steps: int = 3) -> Fit:
    guide = ImplicitGuide(normal_normal)
    options = {"num_steps": num_steps, "warm_start": 200, "max_modes": 1, "progress": False}
    return AVBSVI(normal_normal, guide, restarts=restarts, seed=seed, **options).run(DATA)


def placed(*locs: float, weights: tuple[float, ...] | None = None) -> ImplicitGuide:
    """A guide with a Gaussian of scale 0.1, about, at each of these places."""
    guide = ImplicitGuide(normal_normal).setup(DATA)
    shares = weights or (1.0,) * len(locs)
    scale = torch.full((1, 1), 0.1)
    guide.split([Mode(w, torch.tensor([x]), scale) for w, x in zip(shares, locs, strict=True)])
    return guide


def test_each_restart_is_the_fit_that_it_would_be_alone() -> None:
    together = fitted(3)
    assert len(together.fits) == 3
    alone = [fitted(1), *(fitted(1, seed=derived_seed(0, key)) for key in (1, 2))]
    for one, other in zip(together.fits, alone, strict=True):
        assert (one.losses == other.losses).all()
    assert len({fit.losses[0] for fit in together.fits}) == 3
    assert len({id(fit.guide) for fit in together.fits}) == 3
    assert together.agreement is not None and together.agreement.ok
    assert "3 fits agree" in str(together)


def test_one_fit_has_no_restarts() -> None:
    fit = fitted(1)
    assert fit.restarts == () and fit.agreement is None and fit.fits == (fit,)


def test_r_hat_sees_a_mean_that_differs() -> None:
    """Three fits at one place agree; a fit whose mean is half a standard deviation off does not."""
    torch.manual_seed(0)
    assert agreement([placed(0.0) for _ in range(3)]).ok
    off = agreement([placed(0.0), placed(0.0), placed(0.05)])
    assert not off.ok and off.worst[0] == "mu"
    assert "DISAGREE" in str(off)


def test_shares_of_modes_are_compared() -> None:
    torch.manual_seed(0)
    both = placed(-2.0, 2.0, weights=(0.3, 0.7))
    found = agreement([both, both, placed(2.0)])
    torch.testing.assert_close(found.shares, torch.tensor([[0.3, 0.7], [0.3, 0.7], [0.0, 1.0]]), atol=0.01, rtol=0)
    assert abs(found.spread - 0.3) < 0.01
    assert not found.ok and "shares of 2 far modes" in str(found)
    with pytest.warns(UserWarning, match="one of fit.fits that has every mode"):
        warn_of_disagreement(found)


def test_fits_that_disagree_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second fit's guide is moved after it has been trained."""
    run = AVBSVI._run

    def moved(self: AVBSVI, *args: Tensor) -> Fit:
        fit = run(self, *args)
        if not self._restarts:
            self.guide.sampler.loc.add_(1.0)
        return fit

    monkeypatch.setattr(AVBSVI, "_run", moved)
    with pytest.warns(UserWarning, match="2 fits DISAGREE.*more steps, or fit.best"):
        assert not fitted(2).agreement.ok  # type: ignore[union-attr]


def test_the_best_is_chosen_by_a_criterion() -> None:
    fit = fitted(3)
    order = {id(one.guide): value for one, value in zip(fit.fits, (2.0, torch.nan, 1.0), strict=True)}
    assert fit.best(lambda one: order[id(one.guide)]) is fit.restarts[1]
    with pytest.raises(OptionError, match="not finite"):
        fit.best(lambda one: torch.nan)


def test_without_a_criterion_the_draws_decide() -> None:
    """The first fit is moved by three standard deviations after training."""
    fit = fitted(2)
    loc, scale_tril = fit.guide.sampler.loc, fit.guide.sampler.scale_tril
    fit.guide.sampler.set_affine(loc + 3 * scale_tril.diagonal(), scale_tril)
    assert fit.best() is fit.restarts[0]


def test_a_diagnosis_says_whether_fits_agree() -> None:
    fit = fitted(2)
    other = Agreement({"mu": 1.4}, torch.ones(2, 1))
    for found, state in ((fit.agreement, "ok"), (other, "failed"), (None, "left out")):
        report = replace(fit, agreement=found).diagnose(num_samples=200)
        assert report["restarts"].state == state


def test_a_mixture_draws_from_every_fit() -> None:
    fit = fitted(1)
    other = replace(fit, guide=placed(-2.0, 2.0, weights=(0.5, 0.5)))
    both = replace(fit, guide=placed(8.0), restarts=(other,)).mixture(DATA)
    mu = both.sample(4000)["mu"]
    for place, share in ((8.0, 0.5), (-2.0, 0.25), (2.0, 0.25)):
        assert abs(((mu - place).abs() < 1).double().mean().item() - share) < 0.03


def with_parameter(y: Tensor) -> None:
    scale = pyro.param("restarts_scale", torch.tensor(1.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("obs", dist.Normal(mu, scale.exp()).expand([len(y)]).to_event(1), obs=y)


@pytest.mark.uses_param_store
def test_misuse_is_named() -> None:
    guide = ImplicitGuide(with_parameter)
    with pytest.raises(OptionError, match="restarts must be"):
        AVBSVI(with_parameter, guide, restarts=0)
    svi = AVBSVI(with_parameter, guide, restarts=2, progress=False, seed=0)
    with pytest.raises(OptionError, match="Call run"):
        svi.step(DATA)
    with pytest.raises(ModelError, match="'restarts_scale'"):
        svi.run(DATA)


@pytest.mark.filterwarnings("ignore:3 fits DISAGREE:UserWarning")  # after so few steps they do
def test_restarts_are_saved_and_loaded_with_the_fit(tmp_path: Path) -> None:
    """Every fit draws as before, and all of them go on as if they had never stopped."""
    guide = ImplicitGuide(normal_normal)
    options: dict[str, Any] = {"num_steps": 6, "num_particles": 16, "warm_start": 5, "seed": 0}
    svi = AVBSVI(normal_normal, guide, restarts=3, progress=False, **options)
    svi.run(DATA).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"restart-1", "restart-2"}
    again = AVBSVI.load(tmp_path, normal_normal, progress=False).setup(DATA)
    for mine, theirs in zip(svi.fit.fits, again.fit.fits, strict=True):
        assert mine.losses.tolist() == theirs.losses.tolist()
    assert again.fit.agreement is not None and svi.fit.agreement is not None
    assert again.fit.agreement.r_hat == svi.fit.agreement.r_hat
    for mine, theirs in zip(svi.run(DATA).fits, again.run(DATA).fits, strict=True):
        assert mine.num_steps == theirs.num_steps == 12
        assert mine.losses.tolist() == theirs.losses.tolist()


def test_a_restart_says_with_which_seed_it_can_be_had_alone() -> None:
    fit = fitted(2)
    assert fit.seed == 0 and fit.restarts[0].seed == derived_seed(0, 1)
    again = fitted(1, seed=fit.restarts[0].seed)
    assert again.losses.tolist() == fit.restarts[0].losses.tolist()
