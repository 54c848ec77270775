"""Kill and interrupt fits at random moments: each resume must equal the fit that nobody stopped, bit for bit.

``python tests/interrupts.py --count 20`` prints a table; tests/test_saved.py runs a few of them. Every try is a process
of its own, forked from this one, on a folder of its own. The moments are uniform over a whole fit, set-up included.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from implicitvi import AVBSVI, ImplicitGuide
from implicitvi.training.checkpoint import STATE
from test_saved import Y, digest, tiny_adversary, tiny_sampler
from test_vae_fit import avb, data, fit, shuffled

STEPS, EPOCHS = 12, 6


def two_modes(y: Tensor) -> None:
    """A posterior with a mode on either side of zero, for the search."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(mu.abs(), 0.5), obs=y)


class PosteriorFit:
    """A fit with a warm start and a search for modes, whose state is kept after every step."""

    def __init__(self) -> None:
        options: dict[str, Any] = {"num_steps": STEPS, "num_particles": 16, "adversary_steps": 1, "warm_start": 30}
        options |= {"contrast": "gaussian", "adversary": tiny_adversary, "seed": 0, "progress": False}
        self.svi = AVBSVI(two_modes, ImplicitGuide(two_modes, sampler=tiny_sampler), **options)

    def run(self, folder: Path) -> bool:
        """Run to the end; return whether it got there."""
        return self.svi.run(Y.abs() + 2, checkpoint=folder, every=1).num_steps == STEPS

    def state_dict(self) -> dict[str, Any]:
        return self.svi.state_dict()


class LatentFit:
    """A fit of a latent variable model, whose state is kept after every epoch."""

    def run(self, folder: Path) -> bool:
        """Run to the end; return whether it got there."""
        self.done = fit(avb(averaging=0.5), shuffled(), checkpoint=folder, validation=data(), epochs=EPOCHS, ema=0.9)
        return self.done.stop_reason == "finished"

    def state_dict(self) -> dict[str, Any]:
        assert self.done.averaged is not None
        averaged, history = self.done.averaged.state_dict(), self.done.history.state_dict()
        return {**self.done.model.state_dict(), "averaged": averaged, "history": history, **self.done.validation}


class SameProcess(PosteriorFit):
    """A fit that is run again in the process that was interrupted."""

    def run(self, folder: Path) -> bool:
        """Run to the end, again where it was interrupted."""
        try:
            if super().run(folder):
                return True
        except KeyboardInterrupt:  # in set-up, or while the last state was written: a run after it would go further
            if self.svi._training is not None and self.svi.trainer.step_count == STEPS:
                return True
        return super().run(folder)


KINDS: dict[str, tuple[Callable[[], Any], signal.Signals]] = {
    "AVBSVI, kill": (PosteriorFit, signal.SIGKILL),
    "AVBSVI, Ctrl-C": (PosteriorFit, signal.SIGINT),
    "AVBSVI, Ctrl-C, same process": (SameProcess, signal.SIGINT),
    "LatentModel, kill": (LatentFit, signal.SIGKILL),
    "LatentModel, Ctrl-C": (LatentFit, signal.SIGINT),
}


def start(make: Callable[[], Any], folder: Path) -> int:
    """Start a fit in a child, which writes its digest beside the folder if it gets to the end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # an interrupt waits until the child can take it
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return child
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        made = make()
        if made.run(folder):
            written = folder.with_suffix(".part")
            written.write_text(digest(made))
            written.replace(folder.with_suffix(".digest"))  # a file that is there is whole
    except KeyboardInterrupt:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def finish(make: Callable[[], Any], folder: Path) -> str:
    """Run a fit to its end in a child; return its digest, empty where it failed."""
    os.waitpid(start(make, folder), 0)
    written = folder.with_suffix(".digest")
    return written.read_text() if written.exists() else ""


def stop(make: Callable[[], Any], folder: Path, how: signal.Signals, moment: float) -> str:
    """Stop a fit after so many seconds; return what it was doing."""
    child = start(make, folder)
    time.sleep(moment)
    doing = "in training" if (folder / STATE).exists() else "in set-up"
    if folder.with_suffix(".digest").exists():
        doing = "at its end"
    os.kill(child, how)
    os.waitpid(child, 0)
    return doing


def tries(kind: str, count: int, seed: int, root: Path) -> tuple[Counter[str], Counter[str]]:
    """Stop and resume ``count`` fits; count what they were doing, and what they were doing where a resume differs."""
    make, how = KINDS[kind]
    stopped, different, moments = Counter[str](), Counter[str](), random.Random(seed)
    began = time.perf_counter()
    never = finish(make, root / "never")
    seconds = time.perf_counter() - began
    assert never
    for i in range(count):
        folder = root / str(i)
        doing = stop(make, folder, how, moments.uniform(0.0, seconds))
        stopped[doing] += 1
        written = folder.with_suffix(".digest")
        if (written.read_text() if written.exists() else finish(make, folder)) != never:
            different[doing] += 1
    return stopped, different


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Print the table; return 1 if a resume differs from the fit that nobody stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="tries of each kind")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a child can be forked only from a process without threads of its own
    warnings.simplefilter("ignore")
    say(f"{'':32}{'in set-up':>12}{'in training':>12}{'at its end':>12}{'differ':>12}")
    wrong = 0
    for kind in given.kinds:
        with tempfile.TemporaryDirectory() as root:
            KINDS[kind][0]().run(Path(root) / "first")  # does what is slow the first time before the forks
            stopped, different = tries(kind, given.count, given.seed, Path(root))
        cells = [stopped["in set-up"], stopped["in training"], stopped["at its end"], different.total()]
        say(
            f"{kind:32}"
            + "".join(f"{cell:>12}" for cell in cells)
            + "".join(f"  {n} {what}" for what, n in different.items())
        )
        wrong += different.total()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
