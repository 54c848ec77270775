"""Fits in folders: saved, loaded, resumed bit for bit, killed at any time, and refused where they do not belong."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints as c
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor
from torch.distributions import biject_to

import models
from implicitvi import AVBSVI, Checkpoint, Fit, ImplicitGuide, StopTraining
from implicitvi.avb.adversaries import ResidualAdversary
from implicitvi.avb.contrasts import GaussianContrast
from implicitvi.avb.ratios import FGanKL
from implicitvi.avb.samplers import DenseSampler
from implicitvi.errors import CheckpointError, ImplicitVIError, OptionError, SetupError
from implicitvi.inference.modes import Mode
from implicitvi.inference.persistence import SavedFit
from implicitvi.inference.supports import SUPPORTS, describe, support_of
from implicitvi.training import Trainer
from implicitvi.training.checkpoint import CONFIG, STATE, read_state, save_state

Y = torch.tensor([0.5, -0.3, 1.0])
GOLDEN = Path(__file__).parent / "golden" / "v1"
SMALL: dict[str, Any] = {"num_steps": 8, "num_particles": 16, "warm_start": 5, "seed": 0, "progress": False}


def learned(y: Tensor) -> None:
    """A latent and a parameter of the model."""
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu, scale), obs=y)


def local(y: Tensor) -> None:
    """A shared latent and one of every datum."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=y)


def alone(y: Tensor) -> None:
    """A latent of every datum, and no other."""
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(y.new_tensor(0.0), 1.0))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=y)


def tiny_sampler(dim: int) -> DenseSampler:
    return DenseSampler(dim, hidden=(2,))


def tiny_adversary(dim: int) -> ResidualAdversary:
    return ResidualAdversary(dim, width=3, blocks=1)


def tiny(num_steps: int = 4, **options: Any) -> AVBSVI:
    """A fit of a few kilobytes, with a sampler and an adversary of ones own."""
    guide = ImplicitGuide(models.normal_normal, sampler=tiny_sampler)
    fixed = {"adversary": tiny_adversary, "contrast": "gaussian", "averaging": 0.0}
    fixed |= {"adversary_steps": 1, "informed": False, "num_steps": num_steps, "warm_start": 0}
    return AVBSVI(models.normal_normal, guide, **(SMALL | fixed | options))


def small(model: Callable[..., Any] = models.normal_normal, **options: Any) -> AVBSVI:
    amortize = options.pop("amortize", None)
    sampler = options.pop("sampler", "gated")
    guide = ImplicitGuide(model, amortize=amortize, sampler=sampler)
    return AVBSVI(model, guide, **(SMALL | options))


CASES: dict[str, Callable[..., AVBSVI]] = {
    **{contrast: partial(small, contrast=contrast) for contrast in ("mixture", "gaussian", "flow", "prior")},
    "parameters": partial(small, learned),
    "amortized": partial(small, local, amortize="data"),
    "noise basis": partial(small, alone, amortize="data", sampler="noise_basis", contrast="moments"),
    "functions": tiny,
}
LOAD: dict[str, Callable[[Path], AVBSVI]] = {
    "parameters": lambda folder: AVBSVI.load(folder, learned, progress=False),
    "amortized": lambda folder: AVBSVI.load(folder, local, progress=False),
    "noise basis": lambda folder: AVBSVI.load(folder, alone, progress=False),
    "functions": lambda folder: AVBSVI.load(
        folder,
        models.normal_normal,
        guide=ImplicitGuide(models.normal_normal, sampler=tiny_sampler),
        adversary=tiny_adversary,
        progress=False,
    ),
}


def load(case: str, folder: Path) -> AVBSVI:
    default = partial(AVBSVI.load, model=models.normal_normal, progress=False)
    return LOAD.get(case, default)(folder)


def stop_at(step: int, trainer: Trainer) -> None:
    if trainer.step_count == step:
        raise StopTraining("enough")


def digest(fit: Any) -> str:
    """A fingerprint of everything that the next step depends on, and of all steps so far."""
    seen = hashlib.sha256()

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            seen.update(value.detach().numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                seen.update(str(key).encode())
                visit(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        else:
            seen.update(repr(value).encode())

    visit(fit.state_dict())
    return seen.hexdigest()


def whole(case: str) -> str:
    svi = CASES[case]()
    svi.run(Y)
    pyro.clear_param_store()
    return digest(svi)


def halfway(case: str, folder: Path) -> None:
    half = CASES[case](callbacks=[partial(stop_at, 3)])
    half.run(Y, checkpoint=folder)
    pyro.clear_param_store()


# saved, loaded, resumed


@pytest.mark.parametrize("case", CASES)
def test_a_loaded_fit_goes_on_bit_for_bit(case: str, tmp_path: Path) -> None:
    """By load and by run(checkpoint=), with the history of the first half; no warm start is made again."""
    expected = whole(case)
    halfway(case, tmp_path)
    shutil.copytree(tmp_path, tmp_path / "copy")
    loaded = load(case, tmp_path)
    loaded.run(Y)
    assert digest(loaded) == expected
    pyro.clear_param_store()
    again = CASES[case]()
    fit = again.run(Y, checkpoint=tmp_path / "copy")
    assert digest(again) == expected
    assert (fit.stop_reason, fit.num_steps) == ("finished", again.schedule.num_steps)
    pyro.clear_param_store()


IN_ANOTHER_PROCESS = """
import sys
from test_saved import *
torch.set_num_threads(1)
for case in CASES:
    svi = load(case, Path(sys.argv[1]) / case)
    svi.run(Y)
    print(digest(svi))
"""


def test_another_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = [whole(case) for case in CASES]
    for case in CASES:
        halfway(case, tmp_path / case)
    torch.set_num_threads(threads)
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected


def test_a_loaded_guide_draws_what_it_drew(tmp_path: Path) -> None:
    """At once, and without training; nothing of the process or of a fresh network is in the draws."""
    fit = small(models.eight_schools).run(models.SIGMA, models.Y)
    fit.save(tmp_path)
    torch.manual_seed(3)
    expected = fit.guide.sample(10)
    svi = AVBSVI.load(tmp_path, models.eight_schools)
    svi.guide.setup(models.SIGMA, models.Y)
    torch.manual_seed(3)
    drawn = svi.guide.sample(10)
    assert all(torch.equal(expected[name], drawn[name]) for name in expected)
    again = svi.setup(models.SIGMA, models.Y).fit
    assert np.array_equal(again.losses, fit.losses)
    assert str(again) == str(fit) and again.seconds == fit.seconds
    u = fit.guide.sample_unconstrained(5)
    assert torch.equal(fit.guide.get_posterior().log_prob(u), again.guide.get_posterior().log_prob(u))


def test_parameters_of_the_model_come_back(tmp_path: Path) -> None:
    fit = small(learned).run(Y)
    fit.save(tmp_path)
    pyro.clear_param_store()
    found = AVBSVI.load(tmp_path, learned).setup(Y).fit.parameters
    assert found["scale"] != 1 and torch.equal(found["scale"], fit.parameters["scale"])
    assert torch.equal(pyro.param("scale"), fit.parameters["scale"])
    pyro.clear_param_store()


def test_a_script_may_be_started_again(tmp_path: Path) -> None:
    """A finished run is not repeated; in one process a later run goes on, and its state is kept."""
    first = small().run(Y, checkpoint=tmp_path)
    calls: list[int] = []
    svi = small(callbacks=[lambda trainer: calls.append(trainer.step_count)])
    again = svi.run(Y, checkpoint=tmp_path)
    assert not calls and again.stop_reason == "finished"
    assert np.array_equal(first.losses, again.losses)
    assert svi.run(Y, checkpoint=tmp_path).num_steps == 16
    assert len(calls) == 8 and SavedFit.read(tmp_path).step == 16
    assert AVBSVI.load(tmp_path, models.normal_normal, progress=False).run(Y).num_steps == 24


def test_the_later_state_is_taken_up(tmp_path: Path) -> None:
    """Not an earlier one of the folder, and none of the object where the folder is ahead."""
    halfway("mixture", tmp_path)
    ahead = small(callbacks=[partial(stop_at, 5)])
    ahead.run(Y)
    assert ahead.run(Y, checkpoint=tmp_path).num_steps == 8
    assert digest(ahead) == whole("mixture")
    behind = small()
    behind.step(Y)
    assert behind.run(Y, checkpoint=tmp_path).num_steps == 8
    assert digest(behind) == whole("mixture")


def test_states_are_kept_on_the_way(tmp_path: Path) -> None:
    seen: list[int] = []

    def look(trainer: Trainer) -> None:
        seen.append(SavedFit.read(tmp_path).step if (tmp_path / STATE).exists() else 0)

    small(callbacks=[look]).run(Y, checkpoint=tmp_path, every=3)
    assert seen == [0, 0, 0, 3, 3, 3, 6, 6]
    assert SavedFit.read(tmp_path).step == 8


def test_an_interrupt_keeps_the_state(tmp_path: Path) -> None:
    def interrupt(trainer: Trainer) -> None:
        if trainer.step_count == 3:
            raise KeyboardInterrupt

    assert small(callbacks=[interrupt]).run(Y, checkpoint=tmp_path).stop_reason == "interrupted"
    resumed = small()
    resumed.run(Y, checkpoint=tmp_path)
    assert digest(resumed) == whole("mixture")


@pytest.mark.parametrize("num_steps", [8])
def test_the_best_by_a_diagnostic_is_kept_beside_the_last(num_steps: int, tmp_path: Path) -> None:
    """Also where the fit was resumed in between: the lowest of all, with its score."""
    scores = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5}

    def keep() -> Checkpoint:
        return Checkpoint(tmp_path, every=2, best=lambda trainer: scores[trainer.step_count])

    small(callbacks=[keep(), partial(stop_at, 4)]).run(Y)
    svi = AVBSVI.load(tmp_path, models.normal_normal, callbacks=[keep()], progress=False)
    svi.run(Y)
    assert SavedFit.read(tmp_path).step == 8
    best = SavedFit.read(tmp_path / "best")
    notes = best.config["notes"]
    assert (notes["score"], notes["step"], best.step) == (1.0, 4, 4)
    assert json.loads((tmp_path / "best" / CONFIG).read_text())["notes"]["score"] == 1.0
    assert AVBSVI.load(tmp_path / "best", models.normal_normal).setup(Y).trainer.step_count == 4


def test_a_relative_folder_is_the_one_where_the_run_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    small(callbacks=[lambda trainer: os.chdir(tmp_path / "elsewhere")]).run(Y, checkpoint="fit", every=1)
    assert SavedFit.read(tmp_path / "fit").step == 8 and not list((tmp_path / "elsewhere").iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step() -> None:
    svi = small()
    with pytest.raises(OptionError, match="folder '/proc/nowhere' must be a folder that can be written"):
        svi.run(Y, checkpoint="/proc/nowhere")
    assert not svi.guide.is_set_up


def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    svi, full, write = small(), [False], os.fsync

    def fsync(file: int) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")
        write(file)

    svi.callbacks = (lambda trainer: full.__setitem__(0, trainer.step_count == 4),)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=rf"The folder {tmp_path} must be writable, got .*No space.*make room"):
        svi.run(Y, checkpoint=tmp_path, every=2)
    assert SavedFit.read(tmp_path).step == 2 and {p.name for p in tmp_path.iterdir()} == {STATE, CONFIG}
    full[0] = False
    svi.run(Y, checkpoint=tmp_path)
    assert digest(svi) == whole("mixture")


# drawn from without the data


def every_support(y: Tensor) -> None:
    """A latent site of each kind of support that a file holds, some in a plate, bounds of numbers and of tensors."""
    pyro.sample("real", dist.Normal(0.0, 1.0))
    pyro.sample("vector", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    pyro.sample("positive", dist.Gamma(2.0, 1.0))
    pyro.sample("unit", dist.Beta(2.0, 2.0))
    pyro.sample("interval", dist.Uniform(torch.tensor([0.0, -1.0]), 2.0).to_event(1))
    pyro.sample("pareto", dist.Pareto(1.5, 3.0))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.sample("correlation", dist.LKJCholesky(3, 1.0))
    ordered = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), OrderedTransform())
    pyro.sample("ordered", ordered)
    with pyro.plate("groups", 2):
        pyro.sample("grouped", dist.LogNormal(0.0, 1.0))
    pyro.sample("obs", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1), obs=y)


def test_a_loaded_guide_draws_without_the_data(tmp_path: Path) -> None:
    """The same draws as before, in every support, of numbers that nobody else misses; then it sees its data."""
    svi = small(every_support, num_steps=1, warm_start=0).setup(Y)
    svi.save(tmp_path)
    torch.manual_seed(3)
    expected = svi.guide.sample(10)
    torch.manual_seed(3)
    loaded = AVBSVI.load(tmp_path, every_support, progress=False)
    drawn = loaded.guide.sample(10)
    assert list(drawn) == list(expected) and all(torch.equal(expected[name], drawn[name]) for name in expected)
    assert not loaded.guide.is_set_up and loaded.guide.layout.dim == svi.guide.layout.dim
    with pytest.raises(SetupError, match="must be learned first"):
        loaded.guide.get_posterior().log_prob(torch.zeros(loaded.guide.layout.dim))
    loaded.setup(Y)
    torch.manual_seed(3)
    assert all(torch.equal(expected[name], value) for name, value in loaded.guide.sample(10).items())


@pytest.mark.parametrize("support", [c.stack([c.real, c.positive], -1), c.cat([c.less_than(2.0), c.unit_interval], -1)])
def test_a_joined_support_is_described(support: Any) -> None:
    u = torch.tensor([0.3, -1.0])
    assert torch.equal(biject_to(support_of(describe(support)))(u), biject_to(support)(u))
    assert describe(c.stack([c.real, c.boolean])) is None


def test_modes_and_dtype_come_back_without_the_data(tmp_path: Path) -> None:
    svi = small(max_modes=1).setup(Y.double())
    svi.guide.split([Mode(0.5, loc.double(), torch.eye(1).double()) for loc in torch.tensor([[-2.0], [2.0]])])
    rewrite_from(svi, tmp_path)
    guide = AVBSVI.load(tmp_path, models.normal_normal).guide
    assert guide.num_modes == 2 and guide.sample(3)["mu"].dtype == torch.float64


def test_a_guide_of_an_unknown_support_asks_for_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(SUPPORTS, "real")
    small().run(Y).save(tmp_path)
    guide = AVBSVI.load(tmp_path, models.normal_normal).guide
    with pytest.raises(SetupError, match="must be set up with its model's arguments"):
        guide.sample(3)
    assert guide.sample(3, Y)["mu"].shape == (3,)


# killed


def test_an_interrupt_of_set_up_leaves_nothing_half_done() -> None:
    """The next run of the same object starts set-up anew, wherever the first was interrupted."""
    calls, at = [0], [0]

    def model(y: Tensor) -> None:
        calls[0] += 1
        if calls[0] == at[0]:
            raise KeyboardInterrupt
        models.normal_normal(y)

    small(model, num_steps=2).setup(Y)
    last, never = calls[0], digest_of_run(model)
    for at[0] in (1, 2, last // 2, last):
        calls[0] = 0
        svi = small(model, num_steps=2)
        with pytest.raises(KeyboardInterrupt):
            svi.run(Y)
        svi.run(Y)
        assert digest(svi) == never, at[0]


def digest_of_run(model: Callable[..., Any]) -> str:
    svi = small(model, num_steps=2)
    svi.run(Y)
    return digest(svi)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each try is a forked process")
def test_kills_and_interrupts_change_nothing() -> None:
    """Two of each kind, at random moments, set-up included; ``python tests/interrupts.py --count 20`` does more."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("interrupts.py"), "--count", "2"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


KILLS, KILLED_STEPS = 20, 300
TRAIN_WHEN_ASKED = """
import os, sys
from test_saved import *
torch.set_num_threads(1)
tiny().run(Y)  # what is slow the first time is done before the forks
for line in sys.stdin:
    child = os.fork()
    if not child:
        tiny(KILLED_STEPS).run(Y, checkpoint=line.strip(), every=1)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked, to be quick")
def test_no_kill_loses_the_fit(tmp_path: Path) -> None:
    """20 times ``kill -9`` at a random moment of a run that writes after every step: the folder loads, the fit has
    gone on, and in the end it is the one that was never killed."""
    moments = random.Random(0)
    folder, step = tmp_path / "fit", 0
    with subprocess.Popen(
        [sys.executable, "-c", TRAIN_WHEN_ASKED],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as trainer:
        assert trainer.stdin is not None and trainer.stdout is not None
        for _ in range(KILLS):
            print(folder, file=trainer.stdin, flush=True)
            child = int(trainer.stdout.readline())
            patience = time.monotonic() + 60
            while not (folder / STATE).exists() or SavedFit.read(folder).step == step:
                assert time.monotonic() < patience
                time.sleep(0.002)
            time.sleep(moments.uniform(0.0, 0.02))
            os.kill(child, signal.SIGKILL)
            assert int(trainer.stdout.readline()) == -signal.SIGKILL
            now = SavedFit.read(folder).step
            assert now > step
            step = now
        trainer.stdin.close()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    resumed, never = tiny(KILLED_STEPS), tiny(KILLED_STEPS)
    resumed.run(Y, checkpoint=folder)
    never.run(Y)
    torch.set_num_threads(threads)
    assert 0 < step < KILLED_STEPS
    assert digest(resumed) == digest(never)


# refused


def test_the_first_format_is_still_read() -> None:
    """Files that version 0.1 wrote after four steps (`tiny().run(Y).save(GOLDEN)`), to the last digit."""
    svi = load("functions", GOLDEN).setup(Y)
    assert svi.trainer.step_count == 4
    assert svi.fit.losses.tolist() == pytest.approx(
        [float(x) for x in (GOLDEN / "losses.txt").read_text().split()], rel=1e-12
    )
    assert svi.guide.sample(10)["mu"].isfinite().all()
    assert svi.run(Y).num_steps == 8
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 40_000


def with_old_names(value: Any) -> Any:
    """A state or description with the names of format 1."""
    if isinstance(value, dict):
        return {
            key.replace("averaged_modules.", "followers.").replace("initialised", "placed")
            if isinstance(key, str)
            else key: with_old_names(item)
            for key, item in value.items()
        }
    return value


@pytest.mark.parametrize("case", ["mixture", "amortized"])
def test_every_name_of_the_first_format_is_migrated(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit written under the old names goes on bit for bit."""
    halfway(case, tmp_path)
    config, state = read_state(tmp_path)
    assert any("averaged_modules" in name for name in config["weights"])
    monkeypatch.setattr("implicitvi.training.checkpoint.FORMAT", 1)
    save_state(tmp_path, with_old_names(state), config=with_old_names(config))
    assert "placed" in (tmp_path / CONFIG).read_text() and "initialised" not in (tmp_path / CONFIG).read_text()
    monkeypatch.undo()
    loaded = load(case, tmp_path)
    loaded.run(Y)
    pyro.clear_param_store()
    assert digest(loaded) == whole(case)


def test_a_state_dict_of_the_first_version_is_read() -> None:
    """``guide.state_dict()`` as version 0.1.0 named its entries."""
    old = small().setup(Y).guide
    new = small(seed=1).setup(Y).guide
    new.load_state_dict(with_old_names(dict(old.state_dict())))
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())


def saved(folder: Path) -> Path:
    halfway("mixture", folder)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Any], Any], object]) -> None:
    config, state = read_state(folder)
    change(config, state)
    save_state(folder, state, config=config)


def rewrite_from(svi: AVBSVI, folder: Path) -> None:
    """Save a guide that was changed by hand, beside the trainer that knew it before."""
    svi.save(folder)
    state = {f"module.{name}": value for name, value in svi.guide.sampler.state_dict().items()}
    rewrite(folder, lambda config, kept: kept["fit"]["players"]["sampler"].update(modules=state))


def run_anew(folder: Path, **options: Any) -> Fit:
    return small(**options).run(Y, checkpoint=folder)


REFUSED: dict[str, tuple[Callable[[Path], object], type[ImplicitVIError], str]] = {
    "no folder": (
        lambda folder: AVBSVI.load(folder / "nowhere", models.normal_normal),
        CheckpointError,
        "must hold the checkpoint state.safetensors, got no such folder",
    ),
    "renamed": (
        lambda folder: ((folder / STATE).rename(folder / "mine"), run_anew(folder)),
        CheckpointError,
        f"must hold the checkpoint {STATE}, got {CONFIG}, mine. Give",
    ),
    "torn": (
        lambda folder: ((folder / STATE).write_bytes((folder / STATE).read_bytes()[:-9]), run_anew(folder)),
        CheckpointError,
        "cannot be read",
    ),
    "of a latent variable model": (
        lambda folder: (save_state(folder, {}, config={"system": "VAE"}), AVBSVI.load(folder, models.normal_normal)),
        CheckpointError,
        "its kind must be AVBSVI, got None",
    ),
    "other options": (
        lambda folder: run_anew(folder, num_steps=9),
        CheckpointError,
        "options must be num_steps: 9, got num_steps: 8",
    ),
    "other seed": (lambda folder: run_anew(folder, seed=1), CheckpointError, "options must be seed: 1, got seed: 0"),
    "other sampler": (
        lambda folder: run_anew(folder, sampler="dense"),
        CheckpointError,
        "options must be sampler: dense, got sampler: gated",
    ),
    "other model": (
        lambda folder: AVBSVI.load(folder, models.eight_schools).setup(models.SIGMA, models.Y),
        CheckpointError,
        r"sites must be mu: None, got mu: \[\]|sites must be tau: \[\], got tau: None",
    ),
    "other model, drawn from": (
        lambda folder: AVBSVI.load(folder, models.eight_schools).guide.sample(3, models.SIGMA),
        CheckpointError,
        "its sites must be",
    ),
    "other networks": (
        lambda folder: (
            tiny().run(Y).save(folder),
            AVBSVI.load(
                folder,
                models.normal_normal,
                guide=ImplicitGuide(models.normal_normal, sampler=lambda dim: DenseSampler(dim, hidden=(3,))),
                adversary=tiny_adversary,
            ).setup(Y),
        ),
        CheckpointError,
        r"sampler must be .*: \[3, 1\], got .*: \[2, 1\]",
    ),
    "functions not passed": (
        lambda folder: (tiny().run(Y).save(folder), AVBSVI.load(folder, models.normal_normal)),
        CheckpointError,
        r"got none for adversary, sampler. Pass them again: AVBSVI.load\(folder, model, adversary=..., "
        r"guide=ImplicitGuide\(model, sampler=...\)\)",
    ),
    "a function too many": (
        lambda folder: AVBSVI.load(folder, models.normal_normal, contrast=lambda dim: GaussianContrast()),
        CheckpointError,
        "options must be contrast: a function or object of your own, got contrast: mixture",
    ),
    "a ratio of ones own": (
        lambda folder: (small(ratio=FGanKL(limit=3.0)).run(Y).save(folder), AVBSVI.load(folder, models.normal_normal)),
        CheckpointError,
        r"got none for ratio. Pass them again: .*ratio=\.\.\.\)",
    ),
    "every without a folder": (
        lambda folder: small().run(Y, every=3),
        OptionError,
        "every must be given with checkpoint, got every=3 alone. Pass checkpoint=folder",
    ),
    "an array for a function": (
        lambda folder: AVBSVI.load(folder, models.normal_normal, adversary=np.ones(3)),  # type: ignore[arg-type]
        OptionError,
        "adversary must be a function of the latent dimension, got array",
    ),
    "every zero": (lambda folder: small().run(Y, checkpoint=folder, every=0), OptionError, "every must be"),
    "before the model": (lambda folder: small().save(folder), SetupError, "must see its model first"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_is_refused_by_name(case: str, tmp_path: Path) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call(saved(tmp_path))


ENTRIES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "an option of a later version": (
        lambda config, state: (config["options"].update(new=1), config["versions"].update(implicitvi="9.9")),
        r"that implicitvi [\d.]+ can read \(it was written by 9.9\), got unknown 'new' among its options. Upgrade",
    ),
    "an option missing": (lambda config, state: config["options"].pop("tempering"), "no 'tempering' among its options"),
    "an option that cannot be": (
        lambda config, state: config["options"].update(num_steps=-1),
        "num_steps must be an int",
    ),
    "a million restarts": (
        lambda config, state: config["options"].update(restarts=10**6),
        "restarts must be an int >= 1 and <= 1000, got 1000000",
    ),
    "no options": (lambda config, state: config.pop("options"), "got no 'options'"),
    "options of a word": (lambda config, state: config.update(options="x"), "The state must be one that"),
    "versions of a word": (
        lambda config, state: (config.update(versions="x"), state.pop("probe")),
        "it was written by another program",
    ),
    "no probe": (lambda config, state: state.pop("probe"), "no 'probe' among its entries"),
    "a probe of a word": (lambda config, state: state.update(probe="x"), "The state must be one that"),
    "no record": (lambda config, state: state.pop("record"), "no 'record' among its entries"),
    "a record with more": (lambda config, state: state["record"].update(more=1), "unknown 'more' among its record"),
    "no state": (lambda config, state: state.clear(), "no 'fit', 'probe', 'record' among its entries"),
    "no optimisers": (lambda config, state: state["fit"].pop("optimisers"), "got no 'optimisers'"),
    "a word for a step": (lambda config, state: state["fit"].update(step="x"), "step 'x' with a history of 3 steps"),
    "a step below zero": (lambda config, state: state["fit"].update(step=-5), "step -5 with a history of 3 steps"),
    "a step far ahead": (lambda config, state: state["fit"].update(step=10**18), "000 with a history of 3 steps"),
    "a support of its own": (lambda config, state: state["layout"][0].update(support={"os": []}), "support 'os'"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_entries_that_cannot_be_are_refused_by_name(case: str, one_saved: Path, tmp_path: Path) -> None:
    """By load, and by a run that would continue."""
    change, words = ENTRIES[case]
    shutil.copytree(one_saved, tmp_path / "fit")
    rewrite(tmp_path / "fit", change)
    with pytest.raises(CheckpointError, match=words):
        AVBSVI.load(tmp_path / "fit", models.normal_normal, progress=False).setup(Y)
    if "option" not in case and "restarts" not in case:
        with pytest.raises(CheckpointError, match=words):
            run_anew(tmp_path / "fit")


@pytest.fixture(scope="module")
def one_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fit after three steps."""
    return saved(tmp_path_factory.mktemp("saved"))


def test_nothing_has_moved_where_a_checkpoint_was_refused(tmp_path: Path) -> None:
    """The guide is as new: the next run of it makes its own start."""
    saved(tmp_path)
    guide = ImplicitGuide(models.normal_normal)
    with pytest.raises(CheckpointError, match="options"):
        AVBSVI(models.normal_normal, guide, **SMALL | {"lr": 0.1}).run(Y, checkpoint=tmp_path)
    for file in (tmp_path / STATE, tmp_path / STATE / "inside"):
        with pytest.raises(OptionError, match=rf"folder must be a folder, got the file .*{STATE}\. Give another"):
            AVBSVI(models.normal_normal, guide, **SMALL).run(Y, checkpoint=file)
    assert not guide.is_set_up
    other = AVBSVI.load(tmp_path, models.eight_schools)
    with pytest.raises(CheckpointError, match="sites"):
        other.setup(models.SIGMA, models.Y)
    assert not other.guide.is_set_up


def test_the_same_weights_have_to_give_the_same_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that has changed its ways is found out by the probe, for guides of both kinds."""
    tiny().run(Y).save(tmp_path)
    plain = DenseSampler.transform
    monkeypatch.setattr(DenseSampler, "transform", lambda *args: 1.01 * plain(*args))
    with pytest.raises(CheckpointError, match="must be those that it gave"):
        load("functions", tmp_path).guide.sample(3, Y)


def test_a_fit_made_by_hand_cannot_be_saved(tmp_path: Path) -> None:
    fit = small().run(Y)
    by_hand = Fit(**{k: v for k, v in vars(fit).items() if k != "write"})
    with pytest.raises(SetupError, match="must be made by AVBSVI"):
        by_hand.save(tmp_path)


def wider(y: Tensor) -> None:
    """`models.normal_normal` with another prior: the same sites."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.mark.parametrize(("model", "y"), [(models.normal_normal, 2 * Y), (wider, Y)])
def test_other_data_or_another_model_are_not_taken_for_the_same(model: Any, y: Tensor, tmp_path: Path) -> None:
    small().run(Y, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="must be of the same model and data"):
        small(model).run(y, checkpoint=tmp_path)
    # on purpose it may be
    assert AVBSVI.load(tmp_path, model, progress=False).run(y).num_steps == 16


def test_the_best_of_an_earlier_fit_in_the_folder_is_not_kept(tmp_path: Path) -> None:
    keep = partial(Checkpoint, tmp_path, every=2)
    small(callbacks=[keep(best=lambda trainer: 0.0)]).run(Y)
    later = keep(best=lambda trainer: 5.0)
    small(seed=1, callbacks=[later]).run(Y)
    assert later.lowest == 5.0
    assert SavedFit.read(tmp_path / "best").options["seed"] == 1
