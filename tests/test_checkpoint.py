"""Checkpoints: written whole or not at all, read without running anything, and a resume that is exact."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from implicitvi import StopTraining
from implicitvi.errors import CheckpointError, OptionError
from implicitvi.training import Trainer
from implicitvi.training.checkpoint import CONFIG, STATE, as_folder, holds_checkpoint, load_state, save_state
from implicitvi.vae.fitting import VAEFit
from implicitvi.vae.model import LatentModel
from test_vae_fit import OBJECTIVES, Rows, avb, data, fit, same, same_weights, shuffled, vae, weights

GOLDEN = Path(__file__).parent / "golden" / "v1_vae"
STATE_OF_A_FIT = {"weights": torch.arange(3.0), "step": 3, "names": ["a", "b"], "pair": (1, None)}


def stop_at(step: int, trainer: Trainer) -> None:
    if trainer.step_count == step:
        raise StopTraining("enough")


# files


def test_a_state_comes_back(tmp_path: Path) -> None:
    save_state(tmp_path / "new" / "folder", STATE_OF_A_FIT, config={"system": "VAE"})
    found = load_state(tmp_path / "new" / "folder", like={"system": "VAE"})
    assert torch.equal(found.pop("weights"), torch.arange(3.0))
    assert found == {"step": 3, "names": ["a", "b"], "pair": (1, None)}
    assert (tmp_path / "new" / "folder" / CONFIG).read_text().startswith('{\n "format": 3')


@pytest.mark.parametrize("crash", ["replace", "fsync"])
def test_a_crash_while_it_writes_leaves_the_old_state(
    crash: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, {"step": 1}, config={})

    def fail(*args: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(os, crash, fail)
        with pytest.raises(
            CheckpointError, match=rf"The folder {tmp_path} must be writable, got the disk is full. No.*lost"
        ):
            save_state(tmp_path, {"step": 2}, config={})
    assert load_state(tmp_path, like={}) == {"step": 1}
    assert {path.name for path in tmp_path.iterdir()} == {STATE, CONFIG}  # no unfinished file
    save_state(tmp_path, {"step": 3}, config={})
    assert load_state(tmp_path, like={}) == {"step": 3}


def test_no_bit_of_a_checkpoint_can_flip_unseen(tmp_path: Path) -> None:
    """Every bit of the header with its document, and some of the tensors."""
    save_state(tmp_path, {"step": 10, "a": torch.ones(2), "lr": 0.5}, config={"kind": "x"})
    content = (tmp_path / STATE).read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / STATE).write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_state(tmp_path, like={})


WRITERS = """
import sys
from pathlib import Path
import torch
from implicitvi.training.checkpoint import load_state, save_state
for i in range(100):
    save_state(Path(sys.argv[1]), {"a": torch.full((50_000,), float(i))}, config={})
    assert load_state(Path(sys.argv[1]), like={})["a"].unique().numel() == 1
"""


def test_two_writers_of_one_folder_write_whole_states(tmp_path: Path) -> None:
    jobs = [subprocess.Popen([sys.executable, "-c", WRITERS, str(tmp_path)], stderr=subprocess.PIPE) for _ in range(2)]
    assert [job.communicate(timeout=120)[1] for job in jobs] == [b"", b""]
    assert {path.name for path in tmp_path.iterdir()} == {STATE, CONFIG}


def nowhere(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "there" / "is" / "no")
    return folder / "link"


NO_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to nothing": (nowhere, "must be a folder, got the link .*link to a place that does not exist"),
    "a byte that no name has": (lambda folder: "a\0b", r"folder 'a\\x00b' must be a folder that can be written"),
    "a name of 300 letters": (lambda folder: folder / ("x" * 300), "can be written, got .*File name too long"),
    "not allowed": (lambda folder: "/proc/nowhere", "folder '/proc/nowhere' must be a folder that can be written"),
    "a file": (lambda folder: (folder / "f").write_text("") or folder / "f", "must be a folder, got the file .*/f"),
    "a number": (lambda folder: 3, "folder must be a str or Path, got 3"),
}


@pytest.mark.parametrize("case", NO_FOLDERS)
def test_a_folder_that_cannot_be_written_is_refused(case: str, tmp_path: Path) -> None:
    make, words = NO_FOLDERS[case]
    with pytest.raises(OptionError, match=words):
        as_folder(make(tmp_path), writable=True)


def test_a_folder_is_absolute_and_tried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial leaves nothing but removes what a killed writer has left; a folder to read is not made."""
    monkeypatch.chdir(tmp_path)
    assert as_folder("read") == tmp_path / "read" and not (tmp_path / "read").exists()
    new, old = tmp_path / f".{STATE}.1.new", tmp_path / f".{STATE}.2.new"
    for path in (new, old):
        path.touch()
    os.utime(old, (0, 0))
    assert as_folder(".", writable=True) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == [new.name]


class Malicious:
    """Creates a file when it is read by Python's own serialisation."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def malicious(path: Path) -> None:
    torch.save({"format": 1, "config": {}, "state": Malicious(path.with_name("ran"))}, path)


def flip(path: Path) -> None:
    """One bit of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no checkpoint"),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "another file of torch's": partial(torch.save, torch.zeros(3)),
    "without a state": partial(save_file, {}),
    "of another program": partial(save_file, {"a": torch.ones(2)}, metadata={"format": "pt"}),
    "one bit": flip,
    "malicious": malicious,
    "maliciously pickled": lambda path: path.write_bytes(pickle.dumps(Malicious(path.with_name("ran")))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_no_checkpoint_is_refused_and_not_run(damage: str, tmp_path: Path) -> None:
    save_state(tmp_path, STATE_OF_A_FIT, config={})
    DAMAGE[damage](tmp_path / STATE)
    with pytest.raises(CheckpointError, match=r"The checkpoint .*state\.safetensors cannot be read: .*an older copy"):
        load_state(tmp_path, like={})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["malicious", "maliciously pickled"])
def test_the_malicious_file_would_have_run(damage: str, tmp_path: Path) -> None:
    """The test above is not passed by a file that does no harm."""
    DAMAGE[damage](tmp_path / STATE)
    content = (tmp_path / STATE).read_bytes()
    if damage == "malicious":
        torch.load(io.BytesIO(content), weights_only=False)
    else:
        pickle.loads(content)  # noqa: S301
    assert (tmp_path / "ran").exists()


def test_a_state_without_its_name_is_missed(tmp_path: Path) -> None:
    """A fit does not begin anew where one has been, and says what it found instead."""
    save_state(tmp_path, STATE_OF_A_FIT, config={})
    (tmp_path / STATE).rename(tmp_path / "old.safetensors")
    with pytest.raises(CheckpointError, match=f"must hold the checkpoint {STATE}, got .*old.safetensors"):
        holds_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_state(tmp_path / "elsewhere", like={})
    assert not holds_checkpoint(tmp_path / "elsewhere")


def test_what_a_checkpoint_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot hold the .*Path at /state/a/0"):
        save_state(tmp_path, {"a": [Path()]}, config={})
    assert not list(tmp_path.iterdir())


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("implicitvi.training.checkpoint.FORMAT", 4)
    save_state(tmp_path, {}, config={})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format must be at most 3, got 4, of a newer version"):
        load_state(tmp_path, like={})


def test_a_fit_of_the_first_format_goes_on(tmp_path: Path) -> None:
    """Written by version 0.1.0 after two of four epochs, with the losses of a fit of four that was never stopped."""
    shutil.copytree(GOLDEN, tmp_path / "fit")
    resumed = resumable(avb(seed=3, averaging=0.5), tmp_path / "fit", data, ema=None)
    assert (resumed.resumed, resumed.epochs) == (2, 4)
    losses = [float(line) for line in (GOLDEN / "losses.txt").read_text().split()]
    assert resumed.history["model"][:4].tolist() == pytest.approx(losses[:4], rel=1e-12)
    assert resumed.history["model"].tolist() == pytest.approx(losses, rel=1e-3)


# resume

LOADERS: dict[str, Callable[[], Any]] = {
    "tensor": data,
    "loader": shuffled,
    "loader with a generator": lambda: shuffled(generator=torch.Generator().manual_seed(3)),
    "augmented dataset": lambda: Rows(data()),
    "weighted loader": lambda: DataLoader(
        data(),
        8,
        sampler=torch.utils.data.WeightedRandomSampler(
            torch.arange(1, 21), 16, generator=torch.Generator().manual_seed(4)
        ),
    ),
}


def resumable(model: LatentModel, folder: Path | None, make: Callable[[], Any], **options: Any) -> VAEFit:
    options = {"validation": data(), "ema": 0.9, "epochs": 4, "transform": torch.bernoulli} | options
    return fit(model, make(), checkpoint=folder, **options)


def check_equal(one: VAEFit, other: VAEFit) -> None:
    assert same(one.model, other.model)
    assert one.averaged is not None and other.averaged is not None
    assert same(one.averaged, other.averaged)
    assert one.validation == other.validation
    assert one.history.names() == other.history.names()
    for name, values in one.history.state_dict().items():
        assert torch.equal(values, other.history.state_dict()[name]), name


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", LOADERS)
def test_stop_and_resume_is_never_stopped(objective: str, kind: str, tmp_path: Path) -> None:
    """Stopped in the middle of the third epoch: the rest of it is forgotten, and taken again."""
    whole = resumable(OBJECTIVES[objective](), None, LOADERS[kind])
    steps = len(whole.history["model"]) // 4
    stop = partial(stop_at, 2 * steps + 1)
    stopped = resumable(OBJECTIVES[objective](), tmp_path, LOADERS[kind], callbacks=[stop])
    assert (stopped.stop_reason, stopped.epochs) == ("enough", 2)
    resumed = resumable(OBJECTIVES[objective](seed=9), tmp_path, LOADERS[kind])  # type: ignore[call-arg]
    assert (resumed.resumed, resumed.epochs) == (2, 4) and "(from epoch 2)" in str(resumed)
    check_equal(whole, resumed)
    again = resumable(OBJECTIVES[objective](seed=8), tmp_path, LOADERS[kind])  # type: ignore[call-arg]
    assert again.resumed == 4 and again.rows_per_second == 0
    check_equal(whole, again)


STOPPED = """
import sys
from test_checkpoint import *
stop = partial(stop_at, 7)
resumable(avb(contrast="gaussian"), Path(sys.argv[1]), shuffled, callbacks=[stop])
"""


def test_another_process_goes_on_where_one_stopped(tmp_path: Path) -> None:
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", STOPPED, str(tmp_path)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True, timeout=120)
    resumed = resumable(avb(seed=3, contrast="gaussian"), tmp_path, shuffled)
    assert resumed.resumed == 2
    check_equal(resumable(avb(contrast="gaussian"), None, shuffled), resumed)


def test_a_fit_without_a_seed_goes_on_with_the_one_it_drew(tmp_path: Path) -> None:
    fits = []
    for folder, outside, steps in ((None, 1, 99), (tmp_path, 1, 5), (tmp_path, 2, 99)):
        model = vae()
        torch.manual_seed(outside)
        stop = [partial(stop_at, steps)]
        fits.append(resumable(model, folder, data, seed=None, callbacks=stop))
    check_equal(fits[0], fits[2])


def test_weights_of_a_checkpoint_can_be_used_by_themselves(tmp_path: Path) -> None:
    done = resumable(vae(), tmp_path, data)
    other = vae(seed=5)
    other.load_state_dict(load_state(tmp_path, like={})["model"])
    assert same(done.model, other)


OTHERS: dict[str, tuple[Callable[[], LatentModel], dict[str, Any], str]] = {
    "system": (avb, {}, "system must be AVB, got VAE"),
    "nets": (
        lambda: vae(hidden=12),
        {},
        r"weights must be encoder.network.0.weight: \[12, 6\], got encoder.network.0.weight: \[8, 6\]",
    ),
    "epochs": (vae, {"epochs": 5}, "options must be epochs: 5, got epochs: 4"),
    "rate": (vae, {"lr": 0.01}, r"options must be lr: 0.01, got lr: \(0.003, 0.0002\)"),
    "average": (vae, {"ema": None}, "options must be ema: None, got ema: 0.9"),
    "seed": (vae, {"seed": 1}, "options must be seed: 1, got seed: 0"),
    "data": (vae, {"train": data(50)}, "steps of an epoch must be 6, got 2"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_belongs_to_another_fit_is_refused(case: str, tmp_path: Path) -> None:
    """With words that name the difference, and before anything has moved."""
    resumable(vae(), tmp_path, data)
    make, options, words = OTHERS[case]
    before = weights(model := make())
    train: Tensor = options.pop("train", data())
    with pytest.raises(CheckpointError, match=f"its {words}.*same model, data and options"):
        resumable(model, tmp_path, lambda: train, **options)
    assert same_weights(before, weights(model))


def test_an_averaged_adversary_is_no_plain_one(tmp_path: Path) -> None:
    """What a player has besides the model's weights is part of the state."""
    resumable(avb(averaging=0.5), tmp_path, data)
    with pytest.raises(CheckpointError, match="its weights must be .*got adversary: averaged_modules.1.x_net.0.weight"):
        resumable(avb(), tmp_path, data)


def test_other_data_are_not_taken_for_the_same(tmp_path: Path) -> None:
    fit(vae(), checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="its data must be"):
        fit(vae(), 1 - data(), checkpoint=tmp_path)
