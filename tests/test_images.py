"""Images are read as they were written, and errors name the file that cannot be read."""

from __future__ import annotations

import gzip
import os
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from example_code import definitions
from implicitvi.datasets import Labelled, binarise, digits, four_points, image_folder, images, mnist, read_idx
from implicitvi.errors import DataError, OptionError

ROWS = {"train": 7, "t10k": 3}
MEANS = torch.tensor([[0.0, 0], [2, 2], [2, -2], [-2, 2], [-2, -2]])


def idx(array: np.ndarray) -> bytes:
    """Return an array of bytes in the IDX format, written from its specification."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def pixels(part: str) -> np.ndarray:
    return np.random.default_rng(ROWS[part]).integers(0, 256, (ROWS[part], 5, 4), dtype=np.uint8)


@pytest.fixture(params=["gz", "raw"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a folder with four tiny files in the format of MNIST."""
    for part, rows in ROWS.items():
        labels = np.arange(rows, dtype=np.uint8)
        for name, array in (("images-idx3", pixels(part)), ("labels-idx1", labels)):
            path = tmp_path / f"{part}-{name}-ubyte"
            if request.param == "gz":
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx(array)))
            else:
                path.write_bytes(idx(array))
    return tmp_path


# Points


def test_four_points_are_one_hot_and_equally_often() -> None:
    x = four_points(3)
    assert x.shape == (12, 4) and x.dtype == torch.float32
    assert torch.equal(x.sum(0), torch.full((4,), 3.0)) and torch.equal(x.sum(1), torch.ones(12))
    with pytest.raises(OptionError, match="repeats"):
        four_points(0)


def gaussian_errors(x: Tensor, labels: Tensor) -> Tensor:
    """Return the standard errors of weight, means and variances of each Gaussian."""
    errors = []
    for k, mean in enumerate(MEANS):
        count = (labels == k).sum()
        off = x[labels == k] - mean
        errors += [(count - 0.2 * len(x)).abs()[None] / (0.16 * len(x)) ** 0.5]
        errors += [off.mean(0).abs() / (0.2 / count**0.5)]
        errors += [(off.var(0) - 0.04).abs() / (0.04 * (2 / count) ** 0.5)]
    return torch.cat(errors)


def test_the_five_gaussians_of_the_example_have_their_weights_means_and_variances(seed: int) -> None:
    """Failure rate of the gate (5 standard errors of 25 numbers): below 2e-5 for exact draws."""
    mixture, *_ = definitions("13_asvae_mixture.py", "mixture", "MEANS", "SD")
    x = mixture(20_000, torch.Generator().manual_seed(seed))
    labels = torch.cdist(x, MEANS).argmin(1)  # the means are at least 14 sd apart
    assert x.dtype == torch.get_default_dtype()
    assert gaussian_errors(x, labels).max() < 5
    assert gaussian_errors(x * 1.01, labels).max() > 5
    assert gaussian_errors(x, labels.roll(1)).max() > 5


# Digits


def test_digits_are_in_the_unit_interval_with_the_labels_of_scikit_learn() -> None:
    x, labels = digits()
    assert x.shape == (1797, 1, 8, 8) and x.dtype == torch.float32
    assert x.min() == 0 and x.max() == 1 and len(x.unique()) == 17
    assert labels.dtype == torch.int64 and labels[:10].tolist() == list(range(10))


def test_a_split_has_every_image_once_with_its_label() -> None:
    whole = Labelled(torch.arange(10.0)[:, None, None, None], torch.arange(10))
    parts = whole.split(6, 3)
    assert [len(part.images) for part in parts] == [6, 3, 1]
    assert sorted(torch.cat([part.labels for part in parts]).tolist()) == list(range(10))
    assert all(torch.equal(part.images.flatten().long(), part.labels) for part in parts)
    assert torch.equal(parts[0].labels, whole.split(6)[0].labels)
    assert not torch.equal(parts[0].labels, whole.split(6, seed=1)[0].labels)
    assert whole.split(4, seed=None)[1].labels.tolist() == [4, 5, 6, 7, 8, 9]
    with pytest.raises(OptionError, match="sum up to 10, got"):
        whole.split(6, 5)


def test_black_and_white_images_are_a_threshold_or_one_draw() -> None:
    grey = torch.tensor([0.0, 0.3, 0.5, 1.0]).expand(2000, 4)
    assert torch.equal(binarise(grey)[0], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    drawn = binarise(grey, "fixed", seed=3)
    assert torch.equal(drawn, binarise(grey, "fixed", seed=3))
    assert not torch.equal(drawn, binarise(grey, "fixed", seed=4))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    off = (drawn.mean(0) - grey[0])[1:3].abs() / (torch.tensor([0.21, 0.25]) / 2000).sqrt()
    assert off.max() < 5 and drawn[:, 0].max() == 0 and drawn[:, 3].min() == 1
    with pytest.raises(OptionError, match="0 to 1"):
        binarise(2 * grey)
    with pytest.raises(OptionError, match="Did you mean 'fixed'"):
        binarise(grey, "fixd")


# MNIST


def test_mnist_comes_as_it_was_written(folder: Path) -> None:
    data = mnist(folder, validation=2)
    whole = torch.tensor(pixels("train"))[:, None]
    assert torch.equal(data.train.images, whole[:5] / 255)
    assert torch.equal(data.validation.images, whole[5:] / 255)
    assert data.validation.labels.tolist() == [5, 6]
    assert torch.equal(data.test.images, torch.tensor(pixels("t10k"))[:, None] / 255)
    raw = mnist(folder, validation=0, as_bytes=True)
    assert raw.train.images.dtype == torch.uint8 and torch.equal(raw.train.images, whole)
    with pytest.raises(OptionError, match="validation"):
        mnist(folder)


def test_mnist_is_found_through_the_environment(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPLICITVI_DATA", str(folder))
    assert len(mnist(validation=2).train.images) == 5
    above = tmp_path / "data"
    (above / "mnist").mkdir(parents=True)
    for path in folder.glob("*ubyte*"):
        path.rename(above / "mnist" / path.name)
    monkeypatch.setenv("IMPLICITVI_DATA", str(above))
    assert len(mnist(validation=2).train.images) == 5


def test_a_missing_file_is_named_with_the_places_looked_at(folder: Path) -> None:
    for path in folder.glob("t10k-labels*"):
        path.unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte is missing: found none of .*t10k-labels") as told:
        mnist(folder)
    assert str(folder) in str(told.value) and "IMPLICITVI_DATA" in str(told.value)


def test_without_files_or_pooch_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMPLICITVI_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(DataError, match="pip install pooch"):
        mnist()


def test_downloads_are_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake pooch returns the local files and records its arguments."""
    asked = {}

    def retrieve(url: str, known_hash: str, fname: str, path: Path) -> str:
        asked[fname] = (url, known_hash, path)
        return str(next(folder.glob(fname.removesuffix(".gz") + "*")))

    monkeypatch.delenv("IMPLICITVI_DATA", raising=False)
    stand_in = SimpleNamespace(retrieve=retrieve, os_cache=lambda name: folder / name)
    monkeypatch.setitem(sys.modules, "pooch", stand_in)
    assert len(mnist(validation=2).train.images) == 5
    assert asked.keys() == {name + ".gz" for name in images.MNIST_FILES}
    for name, (url, known_hash, _) in asked.items():
        assert url.endswith("/" + name)
        assert len(known_hash) == len("sha256:") + 64 and known_hash.startswith("sha256:")

    def offline(*_: object, **__: object) -> str:
        raise OSError("no route to host")

    stand_in.retrieve = offline
    with pytest.raises(DataError, match="no route to host"):
        mnist()


WRONG = {
    "magic number": (b"\x00\x00\x0d\x01" + b"\0" * 8, r"magic number of the IDX file.*got 00000d01"),
    "text": (b"<html>not found</html>", r"magic number of the IDX file.*got 3c68746d"),
    "empty": (b"", r"magic number of the IDX file.*got nothing"),
    "truncated": (idx(np.zeros((3, 2), np.uint8))[:-1], r"truncated: it must have 18 bytes.*, got 17"),
    "cut in its head": (idx(np.zeros((3, 2), np.uint8))[:7], r"truncated|must not be empty"),
    "too long": (idx(np.zeros(3, np.uint8)) + b"\0", r"too long: it must have 11 bytes.*, got 12"),
    "no rows": (idx(np.zeros((0, 2), np.uint8)), r"must not be empty, got shape \[0, 2\]"),
    "damaged gzip": (gzip.compress(idx(np.zeros((30, 20), np.uint8)))[:-9], "cannot be read"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_damaged_file_is_named(what: str, tmp_path: Path) -> None:
    data, complaint = WRONG[what]
    path = tmp_path / "damaged"
    path.write_bytes(data)
    with pytest.raises(DataError, match=complaint) as told:
        read_idx(path)
    assert str(path) in str(told.value)


def test_images_and_labels_must_belong_together(folder: Path) -> None:
    for path in folder.glob("train-labels*"):
        path.write_bytes(idx(np.zeros(6, np.uint8)))
    with pytest.raises(DataError, match=r"\[7, 5, 4\] and \[6\]"):
        mnist(folder)


@pytest.mark.skipif("IMPLICITVI_DATA" not in os.environ, reason="IMPLICITVI_DATA names no folder")
def test_the_real_mnist() -> None:
    data = mnist(as_bytes=True)
    assert [len(part.images) for part in data] == [55_000, 5_000, 10_000]
    whole = torch.cat([data.train.images, data.validation.images])
    assert whole.shape == (60_000, 1, 28, 28)
    assert whole.double().mean() / 255 == pytest.approx(0.1306605, abs=1e-7)
    assert data.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


# Folders


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Write three pictures 12 wide and 8 high: red left of column 6 and blue right of it; grey; one level of red."""
    (tmp_path / "below").mkdir()
    halves = np.zeros((8, 12, 3), np.uint8)
    halves[:, :6, 0] = halves[:, 6:, 2] = 255
    Image.fromarray(halves).save(tmp_path / "a.png")
    Image.fromarray(np.full((8, 12), 51, np.uint8)).save(tmp_path / "b.PNG")
    Image.fromarray(np.full((8, 12, 3), (102, 0, 0), np.uint8)).save(tmp_path / "below" / "c.bmp")
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path


def test_pictures_are_cut_from_the_middle_and_scaled(pictures: Path) -> None:
    folder = image_folder(pictures, 4, crop=4)
    assert [file.name for file in folder.files] == ["a.png", "b.PNG", "c.bmp"]
    x = folder.tensor()
    assert x.shape == (3, 3, 4, 4) and x.dtype == torch.float32
    halves = torch.zeros(3, 4, 4)
    halves[0, :, :2] = halves[2, :, 2:] = 1
    assert torch.equal(x[0], halves)
    assert torch.equal(x[1], torch.full((3, 4, 4), 0.2))
    assert x[2, 0].unique() == pytest.approx(0.4) and not x[2, 1:].any()
    whole = image_folder(pictures, 2)[0]  # the largest square, 8 x 8, halved twice
    assert whole[0, :, 0].min() > 0.7 and whole[2, :, 1].min() > 0.7
    assert whole.sum(0).sub(1).abs().max() < 0.01


def test_pictures_go_through_a_loader(pictures: Path) -> None:
    folder = image_folder(pictures, 4)
    batch = next(iter(DataLoader(folder, batch_size=3)))
    assert torch.equal(batch, folder.tensor())


def test_folders_and_pictures_that_cannot_be_read_are_named(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder of pictures, got .*nowhere"):
        image_folder(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"bare must have pictures, named \*\.bmp"):
        image_folder(tmp_path / "bare")
    (pictures / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.jpg cannot be read"):
        image_folder(pictures).tensor()
    with pytest.raises(DataError, match=r"a\.png must be at least 9 x 9, got 12 x 8"):
        image_folder(pictures, 4, crop=9)[0]
    with pytest.raises(OptionError, match="size"):
        image_folder(pictures, 0)
