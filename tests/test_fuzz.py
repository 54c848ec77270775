"""Odd arguments of every public name get a result or one of the library's errors, soon, and leave the process alone.

``python tests/test_fuzz.py [DOOR ...]`` tries every single odd value and prints what breaks the law.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import inf, nan
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro.optim import Adam  # type: ignore[attr-defined]
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.distributions import Distribution

from implicitvi import (
    AVB_ELBO,
    AVBSVI,
    Checkpoint,
    EarlyStop,
    Fit,
    ImplicitGuide,
    Settings,
    TensorBoard,
    Tracker,
    diagnose,
    metrics,
    plots,
    to_arviz,
)
from implicitvi.diagnostics.refine import polish
from implicitvi.diagnostics.sbc import sbc
from implicitvi.errors import ImplicitVIError
from implicitvi.metrics import two_sample
from implicitvi.metrics.ais import ais
from implicitvi.metrics.evidence import importance_sampling, quadrature
from implicitvi.metrics.latent import active_units, aggregated_kl, negative_log_likelihood, squared_error
from implicitvi.vae import VAE
from implicitvi.vae.decoders import likelihood_of

DEADLINE = 20  # seconds of one call
Y = torch.tensor([0.5, -0.3, 1.0])
X = torch.rand(24, 4, generator=torch.Generator().manual_seed(0)).round()
DRAWS = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {
    "num_steps": 2,
    "num_particles": 8,
    "warm_start": 2,
    "max_modes": 1,
    "progress": False,
    "seed": 0,
}
Odd = dict[str, Callable[[], Any]]
Door = tuple[Callable[..., Any], dict[str, Any], bool]


def model(y: Any) -> None:
    """The user's model: whatever is raised in here is the user's."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)


class Layer(nn.Module):
    """The user's own, of a wrong width."""

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return x @ torch.ones(2, 1)


VALUES: Odd = {
    "None": lambda: None,
    "True": lambda: True,
    "0": lambda: 0,
    "-1": lambda: -1,
    "1.5": lambda: 1.5,
    "3": lambda: 3,
    "np.int64(3)": lambda: np.int64(3),
    "np.float32(0.5)": lambda: np.float32(0.5),
    "nan": lambda: nan,
    "inf": lambda: inf,
    "-inf": lambda: -inf,
    "''": lambda: "",
    "'a'": lambda: "a",
    "b'a'": lambda: b"a",
    "[]": list,
    "[1, 2]": lambda: [1, 2],
    "['a']": lambda: ["a"],
    "()": tuple,
    "(3, 'a')": lambda: (3, "a"),
    "(1, 2, 3)": lambda: (1, 2, 3),
    "{}": dict,
    "{'a': 1}": lambda: {"a": 1},
    "{3: None}": lambda: {3: None},
    "set()": set,
    "object()": object,
    "an iterator": lambda: iter([1]),
    "a path": lambda: Path("a"),
    "an empty tensor": lambda: torch.tensor([]),
    "a tensor of NaN": lambda: torch.tensor([nan, 1.0, 2.0]),
    "an infinite tensor": lambda: torch.tensor([inf, 1.0, 2.0]),
    "a scalar": lambda: torch.tensor(1.0),
    "a column": lambda: torch.ones(3, 1),
    "a tensor of ints": lambda: torch.arange(3),
    "a tensor of bools": lambda: torch.tensor([True, False, True]),
    "a tensor in float64": lambda: torch.ones(3, dtype=torch.float64),
    "a tensor in bfloat16": lambda: torch.ones(3, dtype=torch.bfloat16),
    "a complex tensor": lambda: torch.ones(3, dtype=torch.complex64),
    "a sparse tensor": lambda: torch.eye(3).to_sparse(),
    "a tensor of another size": lambda: torch.ones(5),
    "an array": lambda: np.ones(3),
    "an array of objects": lambda: np.array([None, "a"], dtype=object),
    "a function of nothing": lambda: lambda: None,
    "a function that returns its argument": lambda: lambda x, *more, **named: x,
    "a function that returns None": lambda: lambda *args, **named: None,
    "a function of three": lambda: lambda a, b, c: a,
    "a layer": lambda: Layer(),
}
HUGE: Odd = {
    "10**30": lambda: 10**30,
    "-(10**30)": lambda: -(10**30),
    "1e300": lambda: 1e300,
    "'a' * 300": lambda: "a" * 300,
}
PATHS: Odd = {
    "a file": lambda: _file(),
    "below a file": lambda: _file() / "below",
    "a null byte": lambda: "a\0b",
    "a name too long": lambda: "a" * 300,
    "the root of devices": lambda: "/dev/null",
}
SIZES = ("num_steps", "num_particles", "adversary_steps", "warm_start", "restarts", "num_importance", "max_modes")


def _file() -> Path:
    Path("file").write_text("x")
    return Path("file")


@cache
def trained() -> Fit:
    return AVBSVI(model, ImplicitGuide(model), **SMALL).run(Y)


@cache
def vae() -> VAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VAE.dense(4, 2, hidden=(4,))


def run(y: Any = Y, then: Any = None, folder: Any = None, **options: Any) -> Any:
    """Fit, then take another step on other data."""
    guide = {k: options.pop(k) for k in ("amortize", "sampler", "init_loc_fn", "name") if k in options}
    own = options.pop("model", model)
    svi = AVBSVI(own, ImplicitGuide(own, **guide), **SMALL | options)
    fit = svi.run(y, checkpoint=folder)
    return fit if then is None else svi.step(then)


def in_pyro(y: Any = Y, then: Any = Y, **options: Any) -> None:
    small = {k: v for k, v in SMALL.items() if k != "progress"}
    svi = pyro.infer.SVI(model, ImplicitGuide(model), Adam({"lr": 1e-3}), loss=AVB_ELBO(**small | options))
    try:
        svi.step(y)
        svi.step(then)
    finally:
        pyro.clear_param_store()


def log_joint(z: Tensor) -> Tensor:
    return -z.square().sum(-1)


def train_vae(data: Any = X, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = VAE.dense(4, 2, hidden=(4,))
    return fresh.fit(data, **{"epochs": 1, "batch_size": 8, "seed": 0, "progress": False} | options)


def method(name: str, *first: Any) -> Callable[..., Any]:
    """Return a method of a small fit as a function of its keywords."""
    return lambda **options: getattr(trained(), name)(*first, **options)


def options_of(cls: type) -> dict[str, Any]:
    return {each: default for each, default in vars(cls()).items() if not each.startswith("_")}


PAIR = {"x": DRAWS, "y": DRAWS.flip(1) + 0.1}
ONE: dict[str, Any] = {"log_joint": log_joint, "loc": torch.zeros(2, 2), "scale": torch.ones(2, 2)}
CALIBRATE: dict[str, Any] = {"num_datasets": 10, "num_draws": 9, "quantities": None, "log_likelihood": True, "seed": 0}
EXPORT: dict[str, Any] = {"num_samples": 3, "prior": True, "coords": None, "dims": None, "attrs": None}
SETTINGS = options_of(Settings)
# each door: a call, its keywords with values that work, and whether it may draw from the process's random numbers
DOORS: dict[str, Door] = {
    "Settings": (Settings, SETTINGS, False),
    "AVB_ELBO": (
        AVB_ELBO,
        {k: v for k, v in SETTINGS.items() if k not in ("lr", "restarts")} | {"settings": None},
        True,
    ),
    "AVBSVI": (
        lambda model=model, guide=None, **options: AVBSVI(
            model, ImplicitGuide(model) if guide is None else guide, **options
        ),
        {"model": model, "guide": None, "settings": None, "progress": True, "callbacks": ()} | SETTINGS,
        True,
    ),
    "ImplicitGuide": (
        lambda model=model, **options: ImplicitGuide(model, **options).setup(Y).sample(2),
        {"model": model, "amortize": None, "sampler": "gated", "name": None}
        | {"init_loc_fn": pyro.infer.autoguide.init_to_median},
        True,
    ),
    "run": (run, {"y": Y, "then": Y, "folder": None, "callbacks": ()} | SETTINGS | SMALL, True),
    "pyro.infer.SVI": (in_pyro, {"y": Y, "then": Y}, True),
    "guide.sample": (lambda num_samples=2: trained().guide.sample(num_samples), {"num_samples": 2}, True),
    "guide.sample_unconstrained": (
        lambda num_samples=2: trained().guide.sample_unconstrained(num_samples),
        {"num_samples": 2},
        True,
    ),
    "guide.quantiles": (
        lambda quantiles=(0.5,), num_samples=2: trained().guide.quantiles(quantiles, num_samples=num_samples),
        {"quantiles": (0.5,), "num_samples": 2},
        True,
    ),
    "guide.median": (lambda num_samples=2: trained().guide.median(num_samples=num_samples), {"num_samples": 2}, True),
    "guide.log_prob": (
        lambda u=None: trained().guide.get_posterior().log_prob(torch.zeros(2, 1) if u is None else u),
        {"u": None},
        True,
    ),
    "fit.summary": (lambda num_samples=9: trained().summary(num_samples), {"num_samples": 9}, True),
    "fit.best": (method("best"), {"criterion": None}, False),
    "fit.save": (lambda folder="a": trained().save(folder), {"folder": "a"}, False),
    "fit.diagnose": (method("diagnose"), {"num_samples": 200, "seed": 0}, False),
    "fit.polish": (method("polish"), {"num_steps": 1, "num_samples": 40, "seed": 0}, False),
    "fit.resample": (method("resample"), {"num_samples": 10, "seed": 0}, False),
    "polish": (
        lambda source=None, own=model, y=Y: polish(trained() if source is None else source, own, y, num_samples=10),
        {"source": None, "own": model, "y": Y},
        False,
    ),
    "to_arviz": (
        lambda source=None, own=model, y=Y, **o: to_arviz(
            trained() if source is None else source, own, y, **EXPORT | o
        ),
        {"source": None, "own": model, "y": Y} | EXPORT,
        True,
    ),
    "diagnose": (
        lambda source=None, own=model, y=Y, num_samples=200, seed=0: diagnose(
            {"mu": DRAWS[:, 0]} if source is None else source, own, y, num_samples=num_samples, seed=seed
        ),
        {"source": None, "own": model, "y": Y, "num_samples": 200, "seed": 0},
        False,
    ),
    "draws of diagnose": (
        lambda mu=DRAWS[:, 0]: diagnose({"mu": mu}, model, Y, num_samples=200),
        {"mu": DRAWS[:, 0]},
        False,
    ),
    "sbc": (
        lambda own=model, make=None, **o: sbc(
            own, (lambda m, d: {"mu": DRAWS[:9, 0]}) if make is None else make, Y, **CALIBRATE | o
        ),
        {"own": model, "make": None} | CALIBRATE,
        False,
    ),
    "results of sbc": (
        lambda made=None, found=None: sbc(
            model,
            lambda m, d: {"mu": DRAWS[:9, 0]} if made is None else made,
            Y,
            num_datasets=10,
            num_draws=9,
            quantities=lambda latents, data: {"q": latents["mu"]} if found is None else found,
        ),
        {"made": None, "found": None},
        False,
    ),
    "c2st": (two_sample.c2st, PAIR | {"seed": 0, "folds": 2}, False),
    "knn_kl": (lambda x=None, y=None, k=5: two_sample.knn_kl(x, y, k=k), PAIR | {"k": 5}, False),
    "mmd": (two_sample.mmd, PAIR | {"bandwidth": None}, False),
    "mean_error": (lambda x=None, y=None: metrics.mean_error(x, y), PAIR, False),
    "sd_ratio": (lambda x=None, y=None: metrics.sd_ratio(x, y), PAIR, False),
    "sliced_wasserstein": (two_sample.sliced_wasserstein, PAIR | {"num_projections": 5, "seed": 0}, False),
    "whiten": (lambda x=None, y=None: metrics.whiten(x, y), PAIR, False),
    "aggregated_kl": (aggregated_kl, {"codes": DRAWS, "prior": DRAWS + 0.1, "k": 5}, False),
    "active_units": (active_units, {"means": DRAWS, "threshold": 0.01}, False),
    "squared_error": (squared_error, {"x": DRAWS, "reconstruction": DRAWS}, False),
    "negative_log_likelihood": (negative_log_likelihood, {"log_likelihood": DRAWS, "entries": 1}, False),
    "ais": (
        ais,
        ONE
        | {
            "num_steps": 3,
            "num_chains": 2,
            "num_leapfrog": 2,
            "step_size": 0.5,
            "schedule": "linear",
            "adapt": True,
            "acceptance": 0.8,
        },
        True,
    ),
    "importance_sampling": (importance_sampling, ONE | {"num_samples": 5, "widen": 1.2, "chunk": 500}, True),
    "quadrature": (quadrature, ONE | {"low": -6.0, "high": 6.0, "points": 50, "chunk": 2000}, False),
    "LatentModel.fit": (
        train_vae,
        {
            "data": X,
            "validation": None,
            "epochs": 1,
            "batch_size": 8,
            "num_particles": 1,
            "adversary_steps": 1,
            "lr": 1e-3,
        }
        | {
            "adversary_lr": 1e-3,
            "transform": None,
            "device": "cpu",
            "precision": "float32",
            "compile": False,
            "ema": None,
        }
        | {"clip_norm": None, "max_skips": 20, "checkpoint": None, "seed": 0, "progress": False, "callbacks": ()},
        False,
    ),
    "VAE.dense": (
        lambda x_dim=4, z_dim=2, **o: VAE.dense(x_dim, z_dim, **{"hidden": (4,)} | o),
        {"x_dim": 4, "z_dim": 2, "hidden": (4,), "likelihood": "bernoulli", "prior": None},
        True,
    ),
    "VAE.encode": (lambda x=X, num_samples=None: vae().encode(x, num_samples), {"x": X, "num_samples": None}, True),
    "VAE.decode": (lambda z=DRAWS: vae().decode(z), {"z": DRAWS}, True),
    "VAE.reconstruct": (lambda x=X: vae().reconstruct(x), {"x": X}, True),
    "VAE.sample": (lambda num_samples=2: vae().sample(num_samples), {"num_samples": 2}, True),
    "VAE.log_evidence": (
        lambda x=X[:2], **o: vae().log_evidence(x, **{"num_steps": 3} | o),
        {"x": X[:2], "num_steps": 3, "method": "ais"},
        True,
    ),
    "likelihoods": (likelihood_of, {"name": "bernoulli", "x_shape": (4,)}, False),
    "Tracker": (Tracker, {"function": len, "every": 1}, False),
    "EarlyStop": (EarlyStop, {"diagnostic": len, "every": 50, "window": 10, "num_se": 0.0, "start": 0}, False),
    "Checkpoint": (Checkpoint, {"folder": "a", "every": 1, "best": None}, False),
    "TensorBoard": (TensorBoard, {"folder": "a", "every": 1}, False),
    "AVBSVI.load": (
        lambda folder=None, own=model, **o: AVBSVI.load(_saved() if folder is None else folder, own, **o),
        {
            "folder": None,
            "own": model,
            "guide": None,
            "contrast": None,
            "adversary": None,
            "ratio": None,
            "callbacks": (),
        },
        True,
    ),
    "plots.loss": (
        lambda fit=None, **o: plots.loss(trained() if fit is None else fit, **o),
        {"fit": None, "name": "sampler", "unit": "nats", "ax": None},
        False,
    ),
    "plots.training": (
        lambda fit=None, **o: plots.training(trained() if fit is None else fit, **o),
        {"fit": None, "names": None, "axes": None},
        False,
    ),
    "plots.draws_on_density": (
        lambda draws=DRAWS, log_density=log_joint, **o: plots.draws_on_density(draws, log_density, **{"grid": 10} | o),
        {
            "draws": DRAWS,
            "log_density": log_joint,
            "extent": None,
            "masses": (0.5,),
            "grid": 10,
            "num_draws": 10,
            "legend": True,
            "color": "red",
            "ax": None,
        },
        False,
    ),
    "plots.codes": (plots.codes, {"z": DRAWS, "labels": None, "ax": None}, False),
    "plots.images": (plots.images, {"x": torch.ones(4, 2, 2), "columns": None, "rows": (), "ax": None}, False),
    "plots.diagnosis": (
        lambda checks=None, ax=None: plots.diagnosis([] if checks is None else checks, ax=ax),
        {"checks": None, "ax": None},
        False,
    ),
}
SLOW = {
    "run",
    "LatentModel.fit",
    "sbc",
    "results of sbc",
    "diagnose",
    "draws of diagnose",
    "fit.diagnose",
    "fit.resample",
    "resample",
    "c2st",
    "pyro.infer.SVI",
    "polish",
    "fit.polish",
}
FOLDERS = {"folder", "checkpoint"}


def _saved() -> Path:
    trained().save("saved")
    return Path("saved")


def values_for(door: str, option: str) -> Odd:
    """Return the odd values of an option: no huge numbers where these are sizes that would be taken."""
    is_size = (
        door in SLOW
        or option.startswith("num_")
        or option in (*SIZES, "k", "every", "points", "grid", "columns", "window")
    )
    constructed = door in ("Settings", "AVBSVI", "AVB_ELBO", "Tracker", "EarlyStop", "Checkpoint", "TensorBoard")
    huge = (
        HUGE
        if constructed or option == "seed" or not is_size and isinstance(DOORS[door][1][option], str | None)
        else {}
    )
    return VALUES | huge | (PATHS if option in FOLDERS else {})


class TooLong(Exception):
    """A call has not ended."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise `TooLong` in a call that takes longer."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def state(draws: bool) -> dict[str, Any]:
    """Return everything that no call may change."""
    kept = {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "torch's argument checks": Distribution._validate_args,
        "Pyro's settings": pyro.settings.get(),
        "parameters in Pyro's store": sorted(pyro.get_param_store().keys()),
        "Pyro's handlers": list(_PYRO_STACK),
        "filters of warnings": list(warnings.filters),
        "working directory": os.getcwd(),
        "threads": torch.get_num_threads(),
        "numpy's generator": str(np.random.get_state()),
    }
    return kept if draws else kept | {"torch's generator": torch.get_rng_state().tolist()}


def is_allowed(error: BaseException) -> bool:
    """Return whether an error is one of the library's, of Python for keywords, or the user's own."""
    if isinstance(error, ImplicitVIError):
        return True
    words = (
        "unexpected keyword argument",
        "required positional argument",
        "positional argument",
        "required keyword-only",
    )
    if isinstance(error, TypeError) and any(each in str(error) for each in words):
        return True
    # the user's own: nothing of the library is called between the user's function and the error
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    users = [
        i
        for i, file in enumerate(files)
        if file == __file__ and names[i] in ("model", "log_joint", "forward", "<lambda>")
    ]
    library = [
        i for i, file in enumerate(files) if f"{os.sep}implicitvi{os.sep}" in file and os.sep + "tests" not in file
    ]
    return bool(users) and bool(library) and users[-1] > library[-1]


def broken(door: str, changes: dict[str, Any], seconds: float = DEADLINE) -> str:
    """Call a door with some odd arguments; return how the law is broken, or an empty string."""
    call, keywords, draws = DOORS[door]
    trained(), vae()
    before = state(draws)
    said = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with deadline(seconds):
                call(
                    **{name: value for name, value in keywords.items() if name in changes or _has_no_default(door)}
                    | changes
                )
        except Exception as error:
            if not is_allowed(error):
                last = [frame for frame in traceback.extract_tb(error.__traceback__) if "implicitvi" in frame.filename][
                    -1
                ]
                where = f"{Path(last.filename).parent.name}/{Path(last.filename).name}:{last.lineno}"
                said = f"{where} {type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"
    after = state(draws)
    changed = [name for name in before if str(before[name]) != str(after[name])]
    pyro.clear_param_store()
    torch.set_grad_enabled(True)
    _close_figures()
    return "; ".join([said] * bool(said) + [f"changed {name}: {str(after[name])[:60]}" for name in changed])


def _has_no_default(door: str) -> bool:
    """Return whether all keywords must be passed: those of the library's own functions with required arguments."""
    return DOORS[door][0] not in (Settings, AVB_ELBO)


def _close_figures() -> None:
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@st.composite
def odd_arguments(draw: Any, door: str) -> dict[str, str]:
    """Draw one or two options of a door with the names of odd values."""
    names = draw(st.lists(st.sampled_from(sorted(DOORS[door][1])), min_size=1, max_size=2, unique=True))
    return {name: draw(st.sampled_from(sorted(values_for(door, name)))) for name in names}


@pytest.mark.parametrize("door", DOORS)
def test_odd_arguments_are_refused_by_name_or_work(door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    @settings(
        max_examples=6 if door in SLOW else 40,
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(odd_arguments(door))
    def law(chosen: dict[str, str]) -> None:
        changes = {name: values_for(door, name)[value]() for name, value in chosen.items()}
        assert not broken(door, changes), f"{door}({chosen})"

    law()


def planted(*, raises: bool = False, hangs: bool = False, changes: bool = False) -> Callable[..., None]:
    """Return a fault of the library: a function called from inside of it."""

    def fault(*args: Any) -> None:
        if raises:
            raise KeyError("x")
        while hangs:
            pass
        if changes:
            torch.set_num_threads(torch.get_num_threads() + 1)

    return fault


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (planted(raises=True), "KeyError"),
        (planted(hangs=True), "TooLong: still running"),
        (planted(changes=True), "changed threads"),
        (planted(), "ValueError|TypeError"),  # a check that does not look
    ],
)
def test_the_law_sees_a_planted_fault(fault: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    assert not broken("knn_kl", {"k": "a"})
    monkeypatch.setattr(two_sample, "check_whole", fault)
    assert re.search(said, broken("knn_kl", {"k": "a"}, seconds=1.0))
    torch.set_num_threads(threads)


def try_all(doors: list[str]) -> None:
    """Print every single odd value that breaks the law, those that break it in one way together."""
    for door in doors or DOORS:
        for option in DOORS[door][1]:
            found: dict[str, list[str]] = {}
            for name, make in values_for(door, option).items():
                if said := broken(door, {option: make()}):
                    found.setdefault(said, []).append(name)
            for said, names in found.items():
                print(f"{door}({option}={'; '.join(names)}): {said}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try_all(sys.argv[1:])
