"""`AVBSVI` and `AVB_ELBO`: what a Pyro user types, and what happens when it goes wrong."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import models
from implicitvi import AVB_ELBO, AVBSVI, ImplicitGuide, StopTraining
from implicitvi.avb.contrasts import GaussianContrast
from implicitvi.avb.ratios import FGanKL
from implicitvi.errors import ImplicitVIError, ModelError, NonFiniteError, OptionError, SetupError
from implicitvi.inference import setup
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
    assert svi.log_joint.mode == "plate"
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
    assert set(seen) == {1}  # made once on trial


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

    def model(y: Tensor, scale: float) -> None:
        mu = pyro.sample("mu", pyro.distributions.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", pyro.distributions.Normal(mu, scale), obs=y)

    svi = small(model, max_skips=5)
    svi.step(Y, 1.0)
    with pytest.raises(NonFiniteError, match="obs: log density nan.*restored") as caught:
        for _ in range(20):
            svi.step(Y, torch.nan)
    assert caught.value.player == "sampler"
    assert np.isfinite(svi.step(Y, 1.0))


def test_arguments_need_not_be_tensors() -> None:
    """A model may make its tensors itself, of whatever it is given."""

    def model(y: Any) -> None:
        models.normal_normal(torch.as_tensor(y))

    for y in (Y.tolist(), Y.numpy()):
        assert np.array_equal(small(model).run(y).losses, small().run(Y).losses)


@pytest.mark.filterwarnings("ignore:.*leave the posterior:UserWarning")
def test_minibatches_share_the_plan() -> None:
    fit = small(models.global_latents_in_minibatches).run(torch.randn(50))
    assert np.isfinite(fit.losses).all() and fit.log_joint.startswith("plate (vmap and the particle plate agree")


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


def test_a_copy_of_a_fit_trains_its_own_networks() -> None:
    """Copied half-way by deepcopy or pickle, both go on as if alone, bit for bit."""
    expected = [p.detach() for p in small(num_steps=8).run(Y).guide.sampler.parameters()]
    svi = small(num_steps=8, callbacks=[])
    for _ in range(4):
        svi.step(Y)
    before = [p.detach().clone() for p in svi.guide.sampler.parameters()]
    twins = [copy.deepcopy(svi), pickle.loads(pickle.dumps(svi))]  # noqa: S301
    for twin in twins:
        fit = twin.run(Y)
        assert fit.num_steps == 8 and fit.guide is twin.guide
        assert all(map(torch.equal, fit.guide.sampler.parameters(), expected))
        assert fit.guide.get_posterior().log_prob(torch.zeros(3, 1)).isfinite().all()
    assert all(map(torch.equal, svi.guide.sampler.parameters(), before))
    assert svi.trainer.step_count == 4
    assert all(map(torch.equal, svi.run(Y).guide.sampler.parameters(), expected))


def test_a_fit_is_copied_and_pickled_with_all_it_can_do(tmp_path: Path) -> None:
    fit = small(restarts=2).run(Y)
    assert len({fit, *fit.restarts}) == 2
    for twin in (pickle.loads(pickle.dumps(fit)), copy.deepcopy(fit)):  # noqa: S301
        assert np.array_equal(twin.losses, fit.losses) and str(twin.agreement) == str(fit.agreement)
        assert "mu" in twin.summary(50) and twin.guide is not fit.guide
        twin.save(tmp_path / "twin")
        again = AVBSVI.load(tmp_path / "twin", models.normal_normal, progress=False).setup(Y)
        torch.manual_seed(0)
        draws = again.guide.sample(5)["mu"]
        torch.manual_seed(0)
        assert torch.equal(draws, fit.guide.sample(5)["mu"])


def test_a_fit_of_a_local_model_is_not_pickled() -> None:
    fit = small(lambda y: models.normal_normal(y)).run(Y)
    assert copy.deepcopy(fit).guide.sample(3)["mu"].shape == (3,)
    with pytest.raises(SetupError, match=r"This Fit cannot be pickled.*top level of a module.*fit\.save\(folder\)"):
        pickle.dumps(fit)


@pytest.mark.uses_param_store
def test_a_fit_with_parameters_is_not_copied() -> None:
    """Pyro keeps the parameters, so the copy's model would not see those that the copy trains."""

    def model(y: Tensor) -> None:
        models.normal_normal(y + pyro.param("shift", torch.tensor(0.0)))

    svi = small(model)
    svi.step(Y)
    with pytest.raises(ModelError, match=r"must be without parameters, got 'shift'.*AVBSVI\.save"):
        copy.deepcopy(svi)


def counts(y: Tensor, scale: Any = 1.0) -> None:
    rate = pyro.sample("rate", pyro.distributions.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", pyro.distributions.Poisson(scale * rate), obs=y)


CALLS: dict[str, tuple[Callable[[AVBSVI], Any], str]] = {
    "a column": (lambda svi: svi.step(torch.ones(3, 1)), r"shape of its plates, \(3,\), got \(3, 1\)"),
    "a row": (lambda svi: svi.run(torch.ones(1, 3)), r"shape of its plates, \(1,\), got \(1, 3\)"),
    "NaN": (lambda svi: svi.run(torch.tensor([1.0, torch.nan, 0.0])), "outside the support.*first of them nan"),
    "below the support": (lambda svi: svi.step(torch.tensor([1.0, -1.0, 0.0])), "outside the support.*got 1 of 3"),
    "between whole numbers": (lambda svi: svi.step(torch.tensor([1.0, 1.5, 0.0])), "outside the support.*got 1 of 3"),
    "no arguments": (lambda svi: svi.run(), r"like those of the first call, \(Tensor \[3\]\), got \(\).*TypeError"),
    "an array": (lambda svi: svi.run(np.ones(3)), "data of site 'obs' must be a tensor, got ndarray"),
    "a list": (lambda svi: svi.evaluate_loss([1.0]), "data of site 'obs' must be a tensor, got list"),
    "a word": (
        lambda svi: svi.step(torch.ones(3), scale="wide"),
        r"got \(Tensor \[3\], scale=str\), at which it raised",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_arguments_of_every_call_are_checked(call: str) -> None:
    svi = small(counts)
    svi.step(torch.tensor([1.0, 2.0, 0.0]))
    wrong, message = CALLS[call]
    for _ in range(2):  # one refusal does not make them known
        with pytest.raises(ModelError, match=message):
            wrong(svi)
    assert np.isfinite(svi.step(torch.tensor([1.0, 2.0, 0.0])))


def test_sparse_data_are_taken_in_every_call() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(torch.sparse.mm(x, b[:, None])[:, 0], 1.0), obs=y)

    svi = AVBSVI(model, ImplicitGuide(model), num_steps=2, num_particles=4, warm_start=0, progress=False)
    assert all(np.isfinite(svi.step(torch.eye(3).to_sparse() * scale, Y)) for scale in (1.0, 2.0))


def test_a_call_with_other_data_of_the_model_is_taken() -> None:
    """Of other sizes and values; the model is read again where those are new, without the fit's random numbers."""
    runs: list[int] = []

    def model(y: Tensor) -> None:
        runs.append(len(y))
        counts(y)

    svi, alone = small(model), small(counts)
    data = [torch.tensor([1.0, 2.0, 0.0]), torch.tensor([2.0, 1.0, 0.0]), torch.tensor([9.0, 4.0])]
    losses = []
    for y in [*data, *data]:
        runs.clear()
        losses.append(svi.step(y))
        looks = len(runs)
    assert losses == [alone.step(y) for y in [*data, *data]]
    runs.clear()
    svi.step(data[2].clone())
    assert len(runs) == looks  # of known form and range: not another look
    data[2][0] = -1
    with pytest.raises(ModelError, match="outside the support"):
        svi.step(data[2])  # changed in place


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.uses_param_store
def test_gradients_are_switched_on(context: Callable[[], Any]) -> None:
    """The data may be made inside of ``inference_mode`` too."""
    expected = small().run(Y).losses
    with context():
        y = torch.tensor([0.5, -0.3, 1.0])
        svi = small()
        assert np.array_equal(svi.run(y).losses, expected)
        assert np.isfinite(svi.step(y)) and np.isfinite(svi.evaluate_loss(y))
        guide = ImplicitGuide(models.normal_normal).setup(y)
        assert AVBSVI(models.normal_normal, guide, **SMALL).run(y).num_steps == 6
    assert np.isfinite(AVBSVI(models.normal_normal, guide, **SMALL).run(Y).losses).all()


def test_tensors_without_values_are_refused() -> None:
    with torch.device("meta"), pytest.raises(SetupError, match="default device must be .*, got meta"):
        small().run(Y)


def test_threads_take_turns() -> None:
    """Fits in two threads are those of one after the other; the process's argument checks stay as they were."""
    expected = [small(seed=seed).run(Y).losses for seed in range(4)]
    checks = torch.distributions.Distribution._validate_args
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda seed: small(seed=seed).run(Y).losses, range(4)))
    assert all(map(np.array_equal, found, expected))
    assert torch.distributions.Distribution._validate_args == checks


FAR = torch.tensor(36.0)


def two_modes(y: Tensor) -> None:
    x = pyro.sample("x", pyro.distributions.Normal(0.0, 5.0))
    pyro.sample("obs", pyro.distributions.Normal(x.square(), 0.6), obs=y)


INTERRUPTS = {"starting_point": True, "first_gaussian": False, "search_modes": True, "PosteriorObjective": False}


@pytest.mark.parametrize(("where", "by_hand"), INTERRUPTS.items())
def test_a_set_up_that_was_interrupted_starts_again(where: str, by_hand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit as if it had not been, whether or not the guide had its networks before."""

    def fresh() -> AVBSVI:
        torch.manual_seed(0)
        svi = small(two_modes, warm_start=50)
        return svi if not by_hand else AVBSVI(two_modes, svi.guide.setup(FAR), settings=svi.settings, progress=False)

    def ctrl_c(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    expected, svi = fresh().run(FAR), fresh()
    with monkeypatch.context() as patch:
        patch.setattr(setup, where, ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            svi.run(FAR)
    assert svi.guide.is_set_up == by_hand and not svi.guide.has_log_density and svi.guide.num_modes == 1
    assert np.array_equal(svi.run(FAR).losses, expected.losses)
    assert svi.guide.num_modes == expected.guide.num_modes == 2


OWN: dict[str, tuple[dict[str, Any], str]] = {
    "contrast is none": ({"contrast": None}, "contrast must be the name of a contrast, or a function"),
    "contrast returns nothing": ({"contrast": lambda dim: None}, "that returns a Contrast, got NoneType"),
    "adversary is none": ({"adversary": None}, "adversary must be a function of the latent dimension, got None"),
    "adversary of two outputs": ({"adversary": lambda dim: nn.Linear(dim, 2)}, r"got scores \[8, 2\] for \[8, 10\]"),
    "adversary of a wrong width": (
        {"adversary": lambda dim: nn.Linear(dim + 7, 1)},
        "adversary.*got RuntimeError: mat1",
    ),
    "adversary without weights": ({"adversary": lambda dim: nn.Identity()}, "adversary.*Identity without weights"),
    "adversary is a function": ({"adversary": lambda dim: lambda z: z.sum(-1)}, "adversary.*function without weights"),
    "ratio is an object": ({"ratio": object()}, "ratio must be .* or a RatioLoss with the methods loss and log_ratio"),
    "ratio is a class": ({"ratio": FGanKL}, "ratio must be .* or a RatioLoss with the methods loss and log_ratio"),
    "informed by a word": ({"informed": "no"}, "informed must be True or False, got 'no'"),
}


@pytest.mark.parametrize("case", OWN)
def test_functions_of_ones_own_are_tried_before_the_warm_start(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, message = OWN[case]
    monkeypatch.setattr(setup, "first_gaussian", lambda *args, **kwargs: pytest.fail("the warm start has begun"))
    with pytest.raises(OptionError, match=message):
        small(**options).run(Y)


def test_no_model_is_refused() -> None:
    with pytest.raises(OptionError, match="model must be a function, the Pyro model, got None"):
        AVBSVI(None, ImplicitGuide(models.normal_normal))  # type: ignore[arg-type]


@pytest.mark.uses_param_store
def test_one_avb_elbo_is_for_one_model() -> None:
    guide, loss = ImplicitGuide(models.normal_normal), AVB_ELBO(num_steps=5, num_particles=16, warm_start=0, seed=0)
    pyro.infer.SVI(models.normal_normal, guide, pyro.optim.Adam({}), loss=loss).step(Y)
    with pytest.raises(OptionError, match="one model, got another"):
        pyro.infer.SVI(models.every_support, guide, pyro.optim.Adam({}), loss=loss).step(Y)


def test_a_rate_that_is_too_high_ends_with_the_last_good_state() -> None:
    svi = small(num_steps=40, lr=1e12, max_skips=5)
    with pytest.raises(NonFiniteError, match="has been restored"):
        svi.run(Y)
    assert all(p.isfinite().all() for p in svi.guide.sampler.parameters())


def test_a_summary_of_an_amortized_guide_is_that_of_its_data() -> None:
    """Of the elements of the run's plate, and of the first of the run's datasets."""

    def local(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
            pyro.sample("obs", pyro.distributions.Normal(z, 1.0), obs=y)

    plated = AVBSVI(local, ImplicitGuide(local, amortize="rows"), **SMALL, seed=0).run(Y)
    assert plated.summary(50).count("z[") == 3 and "z[2]" in plated._repr_html_()
    guide = ImplicitGuide(models.normal_normal, amortize=lambda y: y)
    fit = AVBSVI(models.normal_normal, guide, **SMALL, seed=0).run(torch.stack([Y, 3 + Y]))
    assert fit.summary(50).count("mu") == 1 and "mu" in fit._repr_html_()


def test_the_loss_is_not_a_criterion() -> None:
    with pytest.raises(OptionError, match="criterion must be a function of a fit.*not a bound, got 'elbo'"):
        small().run(Y).best("elbo")  # type: ignore[arg-type]
