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
from torch import Tensor

import models
from implicitvi import AVBSVI, Checkpoint, Fit, ImplicitGuide, StopTraining
from implicitvi.avb.adversaries import ResidualAdversary
from implicitvi.avb.contrasts import GaussianContrast
from implicitvi.avb.ratios import FGanKL
from implicitvi.avb.samplers import DenseSampler
from implicitvi.errors import CheckpointError, ImplicitVIError, OptionError, SetupError
from implicitvi.inference.persistence import SavedFit
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


def digest(svi: AVBSVI) -> str:
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

    visit(svi.state_dict())
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


# killed


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
    "every zero": (lambda folder: small().run(Y, checkpoint=folder, every=0), OptionError, "every must be"),
    "before the model": (lambda folder: small().save(folder), SetupError, "must see its model first"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_is_refused_by_name(case: str, tmp_path: Path) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call(saved(tmp_path))


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
