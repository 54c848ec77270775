"""`AVBSVI` and `AVB_ELBO`: what a Pyro user types, and what happens when it goes wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import models
from implicitvi import AVB_ELBO, AVBSVI, ImplicitGuide, StopTraining
from implicitvi.avb.contrasts import GaussianContrast
from implicitvi.avb.ratios import FGanKL
from implicitvi.errors import ImplicitVIError, ModelError, NonFiniteError, OptionError, SetupError
from implicitvi.inference.fit import COLUMNS

Y = torch.tensor([0.5, -0.3, 1.0])
SMALL: dict[str, Any] = {"num_steps": 6, "num_particles": 16, "warm_start": 10, "progress": False}


def small(model: Callable[..., Any] = models.normal_normal, **options: Any) -> AVBSVI:
    return AVBSVI(model, ImplicitGuide(model), **(SMALL | {"seed": 0} | options))


@pytest.mark.parametrize("contrast", ["mixture", "gaussian", "diagonal", "flow", "prior"])
@pytest.mark.parametrize("informed", [True, False])
def test_every_contrast_trains(contrast: str, informed: bool) -> None:
    svi = small(models.eight_schools, contrast=contrast, informed=informed)
    fit = svi.run(models.SIGMA, models.Y)
    assert fit.stop_reason == "finished" and fit.num_steps == 6 and fit.skipped == 0
    assert np.isfinite(fit.losses).all()
    assert svi.log_joint.mode == "vmap"
    assert fit.guide.get_posterior().log_prob(fit.guide.sample_unconstrained(50)).isfinite().all()


@pytest.mark.parametrize("ratio", ["logistic", "fgan_kl", "least_squares", FGanKL()])
def test_every_ratio_loss_trains(ratio: Any) -> None:
    assert np.isfinite(small(ratio=ratio).run(Y).losses).all()


@pytest.mark.parametrize("sampler", ["gated", "dense", "residual", "noise_basis", "semi_implicit"])
def test_every_sampler_trains_on_every_support(sampler: str) -> None:
    guide = ImplicitGuide(models.every_support, sampler=sampler)
    fit = AVBSVI(models.every_support, guide, **SMALL, seed=0).run(Y)
    assert all(value.isfinite().all() for value in guide.sample(20).values())
    assert "effect[1,2]" in fit.summary(100)


def test_a_contrast_of_ones_own() -> None:
    seen: list[int] = []

    def make(dim: int) -> GaussianContrast:
        seen.append(dim)
        return GaussianContrast()

    small(contrast=make).run(Y)
    assert seen == [1]


def test_the_conjugate_posterior_is_found() -> None:
    """Normal–normal, short run: mean and sd within 0.15 posterior sds, 15 %. A sampler left at its prior start
    (mean 0, sd 1) is 0.6 and 100 % off; with the warm start off, the players alone must get there."""
    guide = ImplicitGuide(models.normal_normal)
    options = {"num_steps": 500, "num_particles": 256, "warm_start": 0, "progress": False}
    AVBSVI(models.normal_normal, guide, **options, seed=0).run(Y)
    mu = guide.sample(20_000)["mu"]
    sd = (1 / 4) ** 0.5
    assert abs(mu.mean().item() - Y.sum().item() / 4) < 0.15 * sd
    assert abs(mu.std().item() / sd - 1) < 0.15


def test_step_and_run_are_one_schedule() -> None:
    """Stepping by hand gives the numbers of a run, and keeps pyro.infer.SVI's contract: a float, a loss."""
    by_run, by_hand = small(), small()
    fit = by_run.run(Y)
    losses = [by_hand.step(Y) for _ in range(6)]
    assert np.array_equal(fit.losses, losses)
    assert isinstance(losses[0], float)
    assert isinstance(by_hand.evaluate_loss(Y), float)


def test_stop_and_resume_is_never_stopped() -> None:
    whole = small(num_steps=8)
    expected = whole.run(Y).losses

    def stop(trainer: Any) -> None:
        if trainer.step_count == 3:
            raise StopTraining("tea")

    halted = small(num_steps=8, callbacks=[stop])
    assert halted.run(Y).stop_reason == "tea"
    assert np.array_equal(halted.run(Y).losses, expected)
    assert halted.trainer.step_count == 8
    halted.run(Y)  # beyond the horizon: as many steps again
    assert halted.trainer.step_count == 16

    other = small(num_steps=8, callbacks=[stop])
    other.run(Y)
    again = small(num_steps=8, seed=99).setup(Y)
    again.load_state_dict(other.state_dict())
    assert np.array_equal(again.run(Y).losses, expected)


def test_an_interrupt_returns_what_there_is() -> None:
    def interrupt(trainer: Any) -> None:
        raise KeyboardInterrupt

    fit = small(callbacks=[interrupt]).run(Y)
    assert (fit.stop_reason, fit.num_steps) == ("interrupted", 1)
    assert fit.guide.sample(3)["mu"].shape == (3,)


def test_the_seed_decides() -> None:
    a, b, c = (small(seed=seed).run(Y).losses for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    torch.manual_seed(3)  # as pyro.set_rng_seed does
    d = small(seed=None).run(Y).losses
    torch.manual_seed(3)
    assert np.array_equal(small(seed=None).run(Y).losses, d)


def test_random_numbers_of_the_process_are_left_alone() -> None:
    svi = small()
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    svi.run(Y)
    svi.evaluate_loss(Y)
    assert torch.equal(torch.rand(2), expected)


ALONE = """
import sys; sys.path.insert(0, {tests!r})
import models, torch
from implicitvi import AVBSVI, ImplicitGuide
torch.set_num_threads(1)
y = torch.tensor([0.5, -0.3, 1.0])
svi = AVBSVI(models.normal_normal, ImplicitGuide(models.normal_normal), num_steps=6, num_particles=16,
             warm_start=10, progress=False, seed={seed})
print(*[svi.step(y).hex() for _ in range(6)])
"""


@pytest.mark.parametrize("interleaved", [False, True])
def test_two_fits_in_one_process_are_two_fits_in_two(interleaved: bool) -> None:
    """Bit for bit, one after the other or taking turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pair = [small(seed=seed) for seed in (0, 1)]
    together: list[list[float]] = [[], []]
    for i in range(12):
        which = i % 2 if interleaved else i // 6
        together[which].append(pair[which].step(Y))
    torch.set_num_threads(threads)
    for seed in (0, 1):
        code = ALONE.format(tests=str(Path(__file__).parent), seed=seed)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == [loss.hex() for loss in together[seed]]


@pytest.mark.uses_param_store
def test_pyros_own_loop_trains_the_sampler() -> None:
    """AVB_ELBO inside pyro.infer.SVI; a second guide in the same process trains too."""
    for seed in (0, 1):
        guide = ImplicitGuide(models.eight_schools)
        loss = AVB_ELBO(num_steps=5, num_particles=16, warm_start=10, seed=seed)
        svi = pyro.infer.SVI(models.eight_schools, guide, pyro.optim.Adam({"lr": 1e-2}), loss=loss)
        first = svi.step(models.SIGMA, models.Y)
        before = [p.detach().clone() for p in guide.sampler.parameters()]
        losses = [svi.step(models.SIGMA, models.Y) for _ in range(4)]
        assert np.isfinite([first, *losses]).all()
        moved = zip(before, guide.sampler.parameters(), strict=True)
        assert all(not torch.equal(a, b) for a, b in moved)
        assert isinstance(svi.evaluate_loss(models.SIGMA, models.Y), float)
        assert all("adversary" not in name for name in pyro.get_param_store())


@pytest.mark.uses_param_store
def test_both_doors_lead_to_one_objective() -> None:
    """With rates of zero effect the first losses of AVBSVI and of AVB_ELBO are the same number."""
    options = {"num_steps": 5, "num_particles": 16, "warm_start": 10, "seed": 0}
    guide = ImplicitGuide(models.eight_schools)
    svi = pyro.infer.SVI(models.eight_schools, guide, pyro.optim.Adam({"lr": 1e-3}), loss=AVB_ELBO(**options))
    own = AVBSVI(models.eight_schools, ImplicitGuide(models.eight_schools), **options, progress=False)
    assert svi.step(models.SIGMA, models.Y) == own.step(models.SIGMA, models.Y)


@pytest.mark.uses_param_store
def test_one_avb_elbo_is_for_one_guide() -> None:
    loss = AVB_ELBO(num_steps=5, num_particles=16, warm_start=0, seed=0)
    for guide in (ImplicitGuide(models.normal_normal), ImplicitGuide(models.normal_normal)):
        svi = pyro.infer.SVI(models.normal_normal, guide, pyro.optim.Adam({}), loss=loss)
        if loss._guide is None:
            svi.step(Y)
        else:
            with pytest.raises(OptionError, match="one guide, got another"):
                svi.step(Y)


def test_particles_without_density_are_dropped_and_counted() -> None:
    y = torch.tensor([0.2, 0.4])
    fit = small(models.half_line, num_particles=64, warm_start=0).run(y)
    assert fit.dropped > 0 and fit.skipped == 0
    assert np.isfinite(fit.losses).all()
    broken = small(models.fragile_cholesky, num_particles=64, warm_start=0).run(torch.zeros(2))
    assert broken.dropped > 0 and np.isfinite(broken.losses).all()


def test_a_model_that_becomes_impossible_ends_with_a_named_error() -> None:
    """Every draw without density: turns are skipped, counted, and end in an error that names the player."""
    svi = small(max_skips=5)
    svi.step(Y)
    with pytest.raises(NonFiniteError, match="obs: log density nan.*restored") as caught:
        for _ in range(20):
            svi.step(Y * torch.nan)
    assert caught.value.player == "sampler"
    assert np.isfinite(svi.step(Y))


def test_arguments_need_not_be_tensors() -> None:
    """A model may make its tensors itself, of whatever it is given."""

    def model(y: Any) -> None:
        models.normal_normal(torch.as_tensor(y))

    for y in (Y.tolist(), Y.numpy()):
        assert np.array_equal(small(model).run(y).losses, small().run(Y).losses)


@pytest.mark.filterwarnings("ignore:.*leave the posterior:UserWarning")
def test_minibatches_share_the_plan() -> None:
    fit = small(models.global_latents_in_minibatches).run(torch.randn(50))
    assert np.isfinite(fit.losses).all() and fit.log_joint.startswith("vmap")


def plain(y: Any) -> None:
    """It asks no tensor of ``y``, before Pyro does."""
    mu = pyro.sample("mu", pyro.distributions.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", pyro.distributions.Normal(mu, 1.0), obs=y)


MISUSES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no latent": (lambda: small(models.no_latent).run(Y), ModelError, "no latent site"),
    "all discrete": (lambda: small(models.all_discrete).run(Y), ModelError, "discrete latent"),
    "local latents": (lambda: small(models.local_latents).run(Y), ModelError, "subsampled plate"),
    "nan in the data": (
        lambda: small().run(torch.tensor([0.1, torch.nan])),
        ModelError,
        "data of site 'obs' lie outside the support.*got 1 of 2, the first of them nan",
    ),
    "an array": (
        lambda: small(plain).run(Y.numpy()),
        ModelError,
        r"data of site 'obs' must be a tensor, got ndarray. Pass torch\.as_tensor",
    ),
    "a list": (lambda: small(plain).run(Y.tolist()), ModelError, "'obs' must be a tensor, got list"),
    "impossible model": (lambda: small(models.impossible).run(Y), ModelError, "never: log density -inf"),
    "misspelt option": (lambda: small(num_particels=3), TypeError, "num_particels"),
    "no particles": (lambda: small(num_particles=0), OptionError, "num_particles"),
    "no steps": (lambda: small(num_steps=0), OptionError, "num_steps"),
    "unknown contrast": (lambda: small(contrast="guassian"), OptionError, "Did you mean 'gaussian'"),
    "unknown ratio": (lambda: small(ratio="logit"), OptionError, "ratio must be one of"),
    "unknown mode": (lambda: small(mode="fast").run(Y), OptionError, "mode must be one of"),
    "negative rate": (lambda: small(lr=-1.0), OptionError, "lr"),
    "averaging of one": (lambda: small(averaging=1.0), OptionError, "averaging"),
    "negative warm start": (lambda: small(warm_start=-1), OptionError, "warm_start"),
    "another guide": (
        lambda: AVBSVI(models.normal_normal, AutoNormal(models.normal_normal)),  # type: ignore[arg-type]
        OptionError,
        "ImplicitGuide",
    ),
    **{
        f"{option} of {value}": (partial(small, **{option: value}), OptionError, f"{option} must be an int >= .*, got ")
        for option, value in {
            "num_steps": 1e2,
            "num_particles": (64, 64.5),
            "adversary_steps": 2.5,
            "warm_start": 50.5,
            "max_modes": 1.5,
            "num_importance": 1.5,
            "restarts": 2.5,
            "max_skips": 1.5,
        }.items()
    },
    "an adversary that never learns": (
        lambda: small(adversary_steps=0),
        OptionError,
        "adversary_steps must be .* >= 1, got 0",
    ),
    "nor at the end": (lambda: small(adversary_steps=(3, 0)), OptionError, "adversary_steps must be .*, got 0"),
    "one callback": (
        lambda: small(callbacks=print),
        OptionError,
        r"callbacks must be a list of functions, got .*callbacks=\[callback\]",
    ),
    "a callback that is none": (
        lambda: small(callbacks=[3]),
        OptionError,
        "callbacks must be a function of the trainer, got 3",
    ),
    "before the first step": (lambda: small().state_dict(), SetupError, "must see its model first"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuses_are_named(misuse: str) -> None:
    call, error, message = MISUSES[misuse]
    with pytest.raises(error, match=message) as caught:
        call()
    assert error is TypeError or isinstance(caught.value, ImplicitVIError)


def test_a_guide_of_another_model_is_refused() -> None:
    guide = ImplicitGuide(models.normal_normal).setup(Y)

    def other(y: Tensor) -> None:
        models.every_support(y)

    with pytest.raises(ModelError, match="must be the guide's"):
        AVBSVI(other, guide, **SMALL).run(Y)


def test_a_trained_guide_is_not_moved_by_a_second_svi() -> None:
    """A warm start belongs to a fresh guide: another AVBSVI goes on from where the sampler stands."""
    svi = small()
    svi.run(Y)
    frame = svi.guide.sampler.loc.clone()
    weights = [p.detach().clone() for p in svi.guide.sampler.parameters()]
    AVBSVI(models.normal_normal, svi.guide, **SMALL, seed=1).setup(Y)
    assert torch.equal(svi.guide.sampler.loc, frame)
    assert all(torch.equal(a, b) for a, b in zip(weights, svi.guide.sampler.parameters(), strict=True))


def test_the_bar_says_what_happens(capsys: pytest.CaptureFixture[str]) -> None:
    small(progress=True).run(Y)
    shown = capsys.readouterr().err
    assert "6/6" in shown and "loss=" in shown and "adversary=" in shown


def test_a_fit_prints_itself() -> None:
    fit = small().run(Y)
    assert "not a bound" in str(fit) and "vmap" in str(fit)
    assert "mu" in fit.summary(50)


def test_the_columns_of_a_summary_stay_apart() -> None:
    """Of ordinary numbers they are ten characters wide; of others as wide as it takes."""
    fit = small().run(Y)
    header, row = fit.summary(50).splitlines()[1:]
    assert header == f"{'':16}" + "".join(f"{name:>10}" for name in COLUMNS[1:])
    assert len(row) == len(header) and len(row.split()) == 6
    fit.guide.sampler.loc.fill_(-2.5e13)
    fit.guide.sampler.scale_tril.fill_(123456.0)
    header, row = fit.summary(50).splitlines()[1:]
    assert len(row) == len(header) and len(row.split()) == 6
    assert row.split()[1] == "-2.5e+13"


def test_a_guide_that_was_set_up_by_hand_is_warm_started_all_the_same() -> None:
    by_hand, by_svi = ImplicitGuide(models.normal_normal), ImplicitGuide(models.normal_normal)
    by_hand.setup(Y)
    for guide in (by_hand, by_svi):
        AVBSVI(models.normal_normal, guide, **SMALL, seed=0).setup(Y)
    assert (by_hand.sampler.scale_tril != 1).all()
    torch.testing.assert_close(by_hand.sampler.scale_tril, by_svi.sampler.scale_tril, rtol=0.5, atol=0)
    frame = by_hand.sampler.scale_tril.clone()
    AVBSVI(models.normal_normal, by_hand, **SMALL, seed=1).run(Y)  # goes on from where it is
    assert torch.equal(by_hand.sampler.scale_tril, frame)


def test_arguments_on_another_device_are_refused_by_name() -> None:
    """The meta device stands for any other."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", pyro.distributions.Normal(0.0, 1.0))
        pyro.sample("obs", pyro.distributions.Normal(mu, 1.0).expand([3]).to_event(1), obs=y)

    with pytest.raises(ModelError, match="must be on one device, got .*meta"):
        small(model).run(Y.to("meta"))
    svi = small(model)
    svi.step(Y)
    with pytest.raises(ModelError, match="must be on cpu, got meta"):
        svi.step(Y.to("meta"))


def test_a_minibatch_larger_than_its_plate_is_refused_by_name() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", pyro.distributions.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=9) as index:
            pyro.sample("obs", pyro.distributions.Normal(mu, 1.0), obs=y[index])

    with pytest.raises(ModelError, match="subsample_size of plate 'data' must be at most 3, got 9"):
        small(model).run(Y)


def test_minibatches_too_small_for_the_data_are_pointed_out() -> None:
    with pytest.warns(UserWarning, match="6 steps with 2 of the 600 rows of 'data' leave"):
        small(models.global_latents_in_minibatches).run(torch.randn(600))


def test_a_control_variate_is_not_taken_for_noise() -> None:
    """The same minibatches, with each row's term at a fixed centre taken out and all of them put back."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", pyro.distributions.Normal(0.0, 1.0))
        centre = y.mean()
        with pyro.plate("data", len(y), subsample_size=2) as index:
            rows = y[index]
            linear = (rows - centre) * (mu - centre)
            pyro.factor("likelihood", -0.5 * (rows - mu).square() - linear)
        pyro.factor("all", ((y - centre) * (mu - centre)).sum())

    small(model, num_steps=200).setup(0.1 * torch.randn(600))


def test_a_model_whose_sites_change_between_calls_is_refused() -> None:
    changes: list[int] = []

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", pyro.distributions.Normal(0.0, 1.0))
        if changes:
            mu = mu + pyro.sample("extra", pyro.distributions.Normal(0.0, 1.0))
        pyro.sample("obs", pyro.distributions.Normal(mu, 1.0).expand([3]).to_event(1), obs=y)

    svi = small(model)
    svi.step(Y)
    changes.append(1)
    with pytest.raises(ModelError, match="did not have before: 'extra'"):
        svi.step(Y)
