"""Two processes with half a batch each are one process with all of it.

This file is also the program that ``torchrun`` starts: each of `CASES` runs in both processes, and the tests look at
what they wrote down.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, DistributedSampler

from implicitvi import StopTraining, distributed
from implicitvi.avb.contrasts import GaussianContrast, MixtureContrast
from implicitvi.errors import ModelError, OptionError
from implicitvi.rng import RandomStream
from implicitvi.training import Schedule, Trainer
from implicitvi.vae import VAE
from implicitvi.vae.data import batches_of
from implicitvi.vae.encoders import GaussianEncoder
from implicitvi.vae.fitting import VAEFit
from implicitvi.vae.model import LatentModel
from test_checkpoint import check_equal, stop_at
from test_vae_fit import X, Z, avb, data, decoder, fit, vae, weights

CPU = torch.device("cpu")


class NoiseOfAll(TorchFunctionMode):
    """Normal noise ``[..., rows, dim]`` drawn for all processes alike, of which each gets its own rows."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(11)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            return self.draw(args[0], kwargs["dtype"])
        if func is Tensor.normal_:
            return args[0].copy_(self.draw(args[0].shape, args[0].dtype))
        if func is torch.normal:
            loc, scale = args
            return loc + scale * self.draw(loc.shape, loc.dtype)
        return func(*args, **kwargs)

    def draw(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        *lead, rows, dim = shape
        everyones = [*lead, rows * distributed.count(), dim]
        noise = torch.randn(everyones, dtype=dtype, generator=self.generator)
        return noise.narrow(-2, rows * distributed.rank(), rows)


OBJECTIVES: dict[str, Callable[[], LatentModel]] = {
    "VAE": vae,
    "AVB": avb,
    "AVB, Gaussian contrast": partial(avb, contrast="gaussian"),
    "AVB, not informed": partial(avb, contrast="gaussian", informed=False),
}


def gradients(objective: str) -> list[Tensor]:
    """Loss and gradients of every turn of a step on this process's rows, averaged; in double precision."""
    model = OBJECTIVES[objective]().double()
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():  # the hint's weight, which starts at 0, too
            weight.add_(0.1 * torch.randn_like(weight))
    x = data(8).double().tensor_split(distributed.count())[distributed.rank()]
    schedule = Schedule(num_steps=1, num_particles=3, adversary_steps=2, tempering=None)
    players = model.players(lambda: x)
    trainer = Trainer(players, schedule=schedule, stream=RandomStream(0), average=distributed.average)
    found: list[Tensor] = []
    with NoiseOfAll():
        for player in players:
            for loss, _ in player.losses(schedule.at(0)):
                mean, means = trainer._gradients(player, loss)
                found += [g for g in (mean, *means) if g is not None]
    return found


def gradients_together(objective: str, folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    alone = gradients(objective)
    with distributed.join(CPU):
        return alone, gradients(objective)


def gradients_of_own_statistics(folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """The bug: moments of the noise basis and centre of the hint from a process's own rows."""
    alone = gradients("AVB, Gaussian contrast")
    with distributed.join(CPU):
        exchange = distributed.average
        turns = lambda tensors: exchange(tensors) if len(tensors) > 1 else list(tensors)  # noqa: E731
        with patch.object(distributed, "average", turns), patch.object(distributed, "gather", lambda z: z):
            return alone, gradients("AVB, Gaussian contrast")


def statistics_together(folder: Path) -> dict[str, Any]:
    """Contrasts without context, of draws that the two processes share."""
    torch.manual_seed(3)
    everyones = torch.randn(64, 2)
    alone = GaussianContrast()(everyones)
    with distributed.join(CPU):
        own = everyones.tensor_split(distributed.count())[distributed.rank()]
        gaussian = GaussianContrast()(own)
        torch.manual_seed(distributed.rank())  # the mixture begins at random
        mixture = MixtureContrast(2, components=3)
        mixture.observe(own, mixture(own))
    return {
        "alone": (alone.loc, alone.scale_tril),  # type: ignore[attr-defined]
        "together": (gaussian.loc, gaussian.scale_tril),  # type: ignore[attr-defined]
        "mixture": dict(mixture.state_dict()),
    }


def summary(done: VAEFit) -> dict[str, Any]:
    return {
        "weights": weights(done.model),
        "averaged": None if done.averaged is None else weights(done.averaged),
        "validation": done.validation,
        "history": done.history.state_dict(),
        "reason": done.stop_reason,
        "epochs": done.epochs,
        "resumed": done.resumed,
        "skipped": done.skipped,
    }


def rank() -> int:
    """Which process this is, inside a fit or not."""
    return int(os.environ["RANK"])


def trained(objective: str, folder: Path) -> dict[str, Any]:
    """The processes begin with other weights, data in the same order, noise of their own; 21 rows to validate."""
    made = OBJECTIVES[objective]().requires_grad_(True)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.01 * rank())
    return summary(fit(made, data(40), validation=data(21), ema=0.9))


def stopped_by_one(folder: Path) -> dict[str, Any]:
    def stop(trainer: Trainer) -> None:
        if rank() == 1 and trainer.step_count == 3:
            raise StopTraining("the second has enough")

    return summary(fit(vae(), data(40), callbacks=[stop]))


def interrupted(folder: Path) -> dict[str, Any]:
    """A real interrupt of one process, in the middle of a step."""
    seen: list[int] = []

    def kill(x: Tensor) -> Tensor:
        seen.append(1)
        if rank() == 0 and len(seen) == 5:  # the first was looked at: in the fourth step
            os.kill(os.getpid(), signal.SIGINT)
        return x

    handler = signal.getsignal(signal.SIGINT)
    done = fit(vae(), data(40), transform=kill)
    assert signal.getsignal(signal.SIGINT) is handler
    return summary(done)


def poisoned_in_one(folder: Path) -> dict[str, Any]:
    """One process has a turn without a finite loss, or without any: all skip it. A bad batch of one ends all."""
    seen: list[int] = []
    model = vae()
    whole = model._loss

    def poison(x: Tensor) -> Tensor:
        seen.append(1)
        return x * torch.nan if rank() == 1 and len(seen) == 4 else x

    def poisoned(x: Tensor, stage: Any) -> Any:
        loss, metrics = whole(poison(x), stage)
        return loss, metrics

    model._loss = poisoned  # type: ignore[method-assign]
    done = {"VAE": summary(fit(model, data(40))), "AVB": fit_without_draws()}
    seen.clear()
    try:
        fit(vae(), data(40), transform=poison)
    except ModelError as error:
        done["bad batch"] = str(error)
    return done


def fit_without_draws() -> dict[str, Any]:
    """The second process once drops all its draws: no loss at all."""
    model, seen = avb(informed=False), []
    whole = model._loss

    def loss(*args: Any) -> Any:
        seen.append(1)
        return (None, {}) if rank() == 1 and len(seen) == 2 else whole(*args)

    model._loss = loss  # type: ignore[method-assign]
    return summary(fit(model, data(40)))


def resumed(folder: Path) -> dict[str, Any]:
    """Stopped in the third epoch and taken up again, beside a fit that was never stopped; and stopped once more."""
    options: dict[str, Any] = {"validation": data(9), "ema": 0.9, "epochs": 4}
    whole = fit(vae(), data(40), **options)
    fit(vae(), data(40), checkpoint=folder, callbacks=[partial(stop_at, 12)], **options)
    again = fit(vae(seed=4), data(40), checkpoint=folder, **options)
    check_equal(whole, again)
    stop = {"callbacks": [partial(stop_at, 12)], "checkpoint": folder / "by two"}
    fit(vae(), data(40), **stop, **options)
    return summary(again)


def batches_of_two(folder: Path) -> dict[str, Any]:
    """Batches of a tensor, of a loader that knows of no other process and of one that does; of 22 rows, 8 at a time."""
    rows, like = torch.arange(22.0)[:, None], torch.empty(0)
    loader = DataLoader(rows, 8, shuffle=True)
    alone = {n: [*batches_of(d, 8, like).epoch(5)] for n, d in {"tensor": rows, "loader": loader}.items()}
    with distributed.join(CPU):
        sampler: DistributedSampler[Any] = DistributedSampler(rows)  # type: ignore[arg-type]
        parted = DataLoader(rows, 4, sampler=sampler)
        kinds = {"tensor": rows, "loader": loader, "parted": parted}
        own = {name: [*batches_of(kind, 8, like).epoch(5)] for name, kind in kinds.items()}
        try:
            batches_of(rows, 1, like)
        except OptionError as error:
            refused = str(error)
    return {"alone": alone, "own": own, "refused": refused, "count outside": distributed.count()}


def normalised(folder: Path) -> dict[str, Any]:
    """Running statistics of a batch normalisation meet after an epoch, and the user is told what they are."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(X, 8), nn.BatchNorm1d(8), nn.Linear(8, 2 * Z))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = fit(VAE(GaussianEncoder(net), decoder(), Z), data(40))
    return summary(done) | {"warned": [str(w.message) for w in caught]}


class Mean(VAE):
    """Its figure of validation data is their mean."""

    def validate(self, x: Tensor) -> dict[str, Tensor]:
        return {"mean": x.mean()}


def validated(folder: Path) -> list[float]:
    """17 rows in batches of 8, 8 and 1: of the last one process has none."""
    model = Mean(vae().encoder, decoder(), Z)
    return fit(model, data(40), validation=shaded(), epochs=1).validation["mean"]


def shaded() -> Tensor:
    return data(17) * torch.linspace(0, 1, 17)[:, None]


CASES: dict[str, Callable[[Path], Any]] = {
    **{f"gradients of {name}": partial(gradients_together, name) for name in OBJECTIVES},
    "planted": gradients_of_own_statistics,
    "statistics": statistics_together,
    **{f"{name} trained": partial(trained, name) for name in OBJECTIVES},
    "stopped": stopped_by_one,
    "interrupted": interrupted,
    "poisoned": poisoned_in_one,
    "resumed": resumed,
    "batches": batches_of_two,
    "validated": validated,
    "normalised": normalised,
}

Written = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def written(folder: Path) -> Written:
    """What the two processes wrote down."""
    path = os.pathsep.join(p for p in sys.path if p)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, __file__, str(folder)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(2)]


def identical(a: Any, b: Any) -> bool:
    """Bit for bit, through nested containers; NaN is NaN."""
    if isinstance(a, Tensor):
        return a.nan_to_num(123.0).equal(b.nan_to_num(123.0))
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[k], b[k]) for k in a)
    return bool(a == b)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_half_batches_give_the_gradients_of_the_whole(objective: str, written: Written) -> None:
    for process in written:
        alone, together = process[f"gradients of {objective}"]
        assert len(alone) == len(together) > 8
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-10)


def test_the_gradients_of_own_statistics_are_others(written: Written) -> None:
    """A contrast of one process's noise is caught by the test above."""
    alone, planted = written[0]["planted"]
    assert max((a - b).abs().max() for a, b in zip(alone, planted, strict=True)) > 1e-3


def test_contrasts_without_context_are_of_all_draws(written: Written) -> None:
    one, other = (process["statistics"] for process in written)
    for process in (one, other):
        for expected, found in zip(process["alone"], process["together"], strict=True):
            torch.testing.assert_close(found, expected)
    assert identical(one["mixture"], other["mixture"])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_training_run_ends_with_the_same_weights_everywhere(objective: str, written: Written) -> None:
    one, other = (process[f"{objective} trained"] for process in written)
    assert (one["reason"], one["epochs"], len(one["history"]["model"])) == ("finished", 3, 15)
    for part in ("weights", "averaged", "validation"):
        assert identical(one[part], other[part]), part
    assert identical(one["history"]["model"], other["history"]["model"])
    assert not identical(one["weights"], weights(OBJECTIVES[objective]()))


def test_both_stop_where_one_has_enough(written: Written) -> None:
    for process in written:
        found = process["stopped"]
        assert (found["reason"], len(found["history"]["model"])) == ("the second has enough", 3)
    assert identical(written[0]["stopped"]["weights"], written[1]["stopped"]["weights"])


def test_both_stop_at_the_step_in_which_one_is_interrupted(written: Written) -> None:
    for process in written:
        found = process["interrupted"]
        assert (found["reason"], len(found["history"]["model"])) == ("interrupted", 4)
    assert identical(written[0]["interrupted"]["weights"], written[1]["interrupted"]["weights"])


@pytest.mark.parametrize("objective", ["VAE", "AVB"])
def test_both_skip_what_one_cannot_take(objective: str, written: Written) -> None:
    one, other = (process["poisoned"][objective] for process in written)
    assert one["skipped"] == other["skipped"] == 1 and one["reason"] == "finished"
    for process in written:
        assert process["poisoned"]["bad batch"].startswith("Batch 3 of epoch 1 must have finite values")
    assert identical(one["weights"], other["weights"])


def test_two_processes_resume_as_one_does(written: Written, folder: Path) -> None:
    """Exactly where there are as many; with another number the data are in the same order, the noise is not."""
    one, other = (process["resumed"] for process in written)
    assert one["resumed"] == 2 and identical(one["weights"], other["weights"])
    options: dict[str, Any] = {"validation": data(9), "ema": 0.9, "epochs": 4}
    alone = fit(vae(seed=4), data(40), checkpoint=folder / "resumed" / "by two", **options)
    assert (alone.resumed, alone.epochs, len(alone.history["model"])) == (2, 4, 20)
    earlier = one["history"]["model"][:10].tolist()
    assert alone.history["model"][:10].tolist() == earlier


@pytest.mark.parametrize("kind", ["tensor", "loader", "parted"])
def test_each_process_takes_its_rows_of_the_batch(kind: str, written: Written) -> None:
    one, other = (process["batches"]["own"][kind] for process in written)
    together = [torch.cat(both) for both in zip(one, other, strict=True)]
    if kind == "parted":  # 22 rows, 11 for each process
        assert sorted(torch.cat(together).flatten().tolist()) == list(range(22))
        return
    for batch, whole in zip(together, written[0]["batches"]["alone"][kind], strict=True):
        assert torch.equal(batch, whole)


def test_validation_weighs_every_row_the_same(written: Written) -> None:
    for process in written:
        assert process["validated"] == pytest.approx([shaded().mean().item()], rel=1e-6)


def test_fewer_rows_than_processes_are_refused(written: Written) -> None:
    for process in written:
        assert "must be at least as many as processes, 2, got 1." in process["batches"]["refused"]
        assert process["batches"]["count outside"] == 1


def test_batch_normalisation_is_warned_of_and_ends_the_same(written: Written) -> None:
    one, other = (process["normalised"] for process in written)
    assert identical(one["weights"], other["weights"])
    assert any("SyncBatchNorm" in text for text in one["warned"])


def test_one_process_exchanges_nothing() -> None:
    """Without ``torchrun`` nothing is started, and tensors come back as they are."""
    rows = torch.rand(3, requires_grad=True)
    with distributed.join(CPU):
        assert not torch.distributed.is_initialized()
        assert distributed.gather(rows) is rows and distributed.average([rows]) == [rows]
        assert (distributed.count(), distributed.rank(), distributed.per_process(7)) == (1, 0, 7)
        assert distributed.agree(None) is None and distributed.agree("enough") == "enough"


if __name__ == "__main__":
    results = {name: case(Path(sys.argv[1]) / name) for name, case in CASES.items()}
    torch.save(results, Path(sys.argv[1]) / f"{rank()}.pt")
