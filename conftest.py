"""What every test and doctest is held to; here at the root, so that the package's doctests are too."""

from __future__ import annotations

import getpass
import logging
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch.distributions import Distribution

PYROS = "Pyro's setting "
SEED = 20170807  # any constant will do; a test that needs luck is mended, not reseeded


def pytest_configure() -> None:
    """Give each worker a cache of compiled code: one must not load what another has half written."""
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        folder = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}_{worker}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Every test starts from one seed and leaves torch's generators as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        yield SEED


@pytest.fixture(autouse=True)
def unchanged_process(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves the process changed, and put it right for the next one."""
    pyro.clear_param_store()
    before, generators = process_state(), (np.random.get_state(), random.getstate())
    yield
    after = process_state()
    np.random.set_state(generators[0])
    random.setstate(generators[1])
    shows_svi = isinstance(request.node, pytest.DoctestItem)
    if shows_svi or request.node.get_closest_marker("uses_param_store"):
        after["parameters in Pyro's store"] = before["parameters in Pyro's store"]
    restore(before)
    changed = [f"{name}: {before[name]!r} -> {after[name]!r}" for name in before if before[name] != after[name]]
    if changed:
        pytest.fail("the test left the process changed: " + "; ".join(changed), pytrace=False)


def process_state() -> dict[str, Any]:
    """What no call of the library may change, by name."""
    root = logging.getLogger()
    return {
        "numpy's generator": hash(str(np.random.get_state())),
        "Python's generator": hash(random.getstate()),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "torch's argument checks": Distribution._validate_args,
        "arguments that torch checks": Distribution.__dict__["arg_constraints"],
        **{PYROS + name: value for name, value in pyro.settings.get().items()},
        "parameters in Pyro's store": sorted(pyro.get_param_store().keys()),
        "level of the root logger": root.level,
        "handlers of the root logger": [h for h in root.handlers if not is_pytests(h)],
    }


def is_pytests(handler: logging.Handler) -> bool:
    return type(handler).__module__.startswith("_pytest.")


def restore(state: dict[str, Any]) -> None:
    """Bring back a `process_state` whose parameter store was empty."""
    torch.set_default_dtype(state["default dtype"])
    torch.set_grad_enabled(state["grad mode"])
    pyro.settings.set(**{name.removeprefix(PYROS): state[name] for name in state if name.startswith(PYROS)})
    Distribution._validate_args = state["torch's argument checks"]
    Distribution.arg_constraints = state["arguments that torch checks"]
    pyro.clear_param_store()
    root = logging.getLogger()
    root.setLevel(state["level of the root logger"])
    root.handlers = [*filter(is_pytests, root.handlers), *state["handlers of the root logger"]]
