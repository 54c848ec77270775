"""Images with values in [0, 1]: four points, the small digits of scikit-learn, MNIST, and folders of pictures.

Images are ``[N, channels, height, width]`` in float32. `binarise` turns grey images black and white once;
``fit(transform=torch.bernoulli)`` does so for every batch again, which the papers call dynamic binarisation.
"""

from __future__ import annotations

import gzip
import importlib
import os
import struct
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from implicitvi.errors import DataError, OptionError, check_at_least, check_choice, check_seed

# a mirror of the published files, and their sha256
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_FILES = {
    "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_UNSIGNED_BYTES = 8  # IDX code of the data type


class Labelled(NamedTuple):
    """A set of images ``[N, channels, height, width]`` with values in [0, 1], and their integer labels ``[N]``."""

    images: Tensor
    labels: Tensor

    def split(self, *sizes: int, seed: int | None = 0) -> tuple[Labelled, ...]:
        """Shuffle, then split into parts of these sizes and the rest; do not shuffle if ``seed`` is ``None``.

        >>> [len(part.images) for part in digits().split(1500)]
        [1500, 297]
        """
        count = len(self.images)
        if min(sizes, default=0) < 0 or sum(sizes) > count:
            raise OptionError.must_be("sizes", f"non-negative with a sum up to {count}", sizes)
        order = torch.arange(count)
        if seed is not None:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(check_seed("seed", seed)))
        parts = order.split([*sizes, count - sum(sizes)])
        return tuple(Labelled(self.images[part], self.labels[part]) for part in parts)


class Split(NamedTuple):
    """A split into training, validation and test images."""

    train: Labelled
    validation: Labelled
    test: Labelled


def four_points(repeats: int = 128) -> Tensor:
    """Return the four binary images of 2 x 2 pixels with one pixel on, each ``repeats`` times: ``[4 · repeats, 4]``.

    Two latent dimensions suffice for the best log likelihood, ``-log 4`` (the AVB paper, section 5.2).

    >>> four_points(1)
    tensor([[1., 0., 0., 0.],
            [0., 1., 0., 0.],
            [0., 0., 1., 0.],
            [0., 0., 0., 1.]])
    """
    check_at_least("repeats", repeats, 1)
    return torch.eye(4).repeat(repeats, 1)


def digits() -> Labelled:
    """Return the handwritten digits of scikit-learn: grey images ``[1797, 1, 8, 8]`` and their labels.

    References:
        Optical Recognition of Handwritten Digits, E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    return Labelled(images, torch.as_tensor(bunch.target, dtype=torch.int64))


def binarise(images: Tensor, method: str = "threshold", *, seed: int = 0) -> Tensor:
    """Turn grey images black and white.

    Args:
        images: Values in [0, 1], of any shape.
        method: ``"threshold"`` for 1 from one half up; ``"fixed"`` for one draw with the grey values as probabilities.
        seed: Random seed of the draw.

    >>> binarise(torch.tensor([0.2, 0.5, 0.9]))
    tensor([0., 1., 1.])
    """
    check_choice("method", method, ["threshold", "fixed"])
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):
        raise OptionError.must_be("images", "values from 0 to 1", f"{low.item():g} to {high.item():g}")
    if method == "threshold":
        return (images >= 0.5).to(images.dtype)
    generator = torch.Generator(images.device).manual_seed(check_seed("seed", seed))
    return torch.bernoulli(images, generator=generator)


def mnist(path: str | Path | None = None, *, validation: int = 5000, as_bytes: bool = False) -> Split:
    """Read MNIST: 55,000 training images ``[N, 1, 28, 28]``, 5,000 for validation and 10,000 for the test.

    The files are read from ``path``, or the folder in the environment variable ``IMPLICITVI_DATA``, or the subfolder
    ``mnist`` of either. Without both, pooch downloads and verifies them (``pip install implicitvi[data]``).

    Args:
        path: Folder with the four IDX files, gzipped or not. Other data in this format work too, such as Fashion-MNIST.
        validation: Number of training images, the last ones, to keep for validation.
        as_bytes: Whether to return bytes from 0 to 255, which take a quarter of the memory.

    Raises:
        DataError: A file is missing, damaged, or not an IDX file of images or labels.

    References:
        Gradient-Based Learning Applied to Document Recognition, LeCun, Bottou, Bengio, Haffner, 1998.
    """
    files = [_find(name, path) for name in MNIST_FILES]
    train, test = _labelled(files[0], files[1], as_bytes), _labelled(files[2], files[3], as_bytes)
    count = len(train.images)
    if not 0 <= validation < count:
        raise OptionError.must_be("validation", f"from 0 to {count - 1}", validation)
    kept, held_out = train.split(count - validation, seed=None)
    return Split(kept, held_out, test)


def read_idx(path: str | Path) -> Tensor:
    """Read the bytes of an IDX file, gzipped or not, in the shape that its header gives; a damaged one is refused."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            data = bytearray(file.read())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    zeros, kind, dims = struct.unpack(">HBB", data[:4].ljust(4, b"\xff"))
    if zeros or kind != _UNSIGNED_BYTES:
        magic = f"00000{_UNSIGNED_BYTES} and the number of axes"
        raise DataError.must_be(f"The magic number of the IDX file {path}", magic, data[:4].hex() or "nothing")
    begin = 4 + 4 * dims
    shape = struct.unpack(f">{dims}I", data[4:begin].ljust(4 * dims, b"\0"))
    length = begin + prod(shape)
    if len(data) != length:
        state = "truncated" if len(data) < length else "too long"
        raise DataError(f"{path} is {state}: it must have {length} bytes for shape {list(shape)}, got {len(data)}.")
    if not prod(shape):
        raise DataError(f"{path} must not be empty, got shape {list(shape)}.")
    return torch.frombuffer(data, dtype=torch.uint8, offset=begin).reshape(shape)


class ImageFolder(Dataset[Tensor]):
    """A data set of pictures, cropped and resized to ``[3, size, size]``; see `image_folder`."""

    def __init__(self, files: Sequence[Path], size: int, crop: int | None):
        self.files, self.size, self.crop = tuple(files), size, crop

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        """Return a picture ``[3, size, size]``, RGB in [0, 1]."""
        from PIL import Image

        path = self.files[index]
        try:
            with Image.open(path) as file:
                picture = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"The picture {path} cannot be read: {error}. Fix or remove the file.") from error
        side = min(picture.size) if self.crop is None else self.crop
        if side > min(picture.size):
            got = f"{picture.width} x {picture.height}"
            raise DataError.must_be(f"The picture {path}", f"at least {side} x {side}", got, "Pass a smaller crop.")
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        box = (left, top, left + side, top + side)
        small = picture.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
        return pixels.reshape(self.size, self.size, 3).permute(2, 0, 1) / 255

    def tensor(self) -> Tensor:
        """Return all pictures ``[N, 3, size, size]`` at once, for a folder that fits in memory."""
        return torch.stack([self[i] for i in range(len(self))])


def image_folder(path: str | Path, size: int = 64, *, crop: int | None = None) -> ImageFolder:
    """Return the colour pictures of a folder and its subfolders, cropped and resized, for ``fit`` or a ``DataLoader``.

    A damaged one raises `DataError` when it is read. For the faces of the AVB paper, use CelebA, ``size=64, crop=128``.

    Args:
        path: The folder.
        size: Height and width of the pictures ``[3, size, size]``.
        crop: Side, in pixels of the file, of the central square to crop; ``None`` for the largest.
    """
    check_at_least("size", size, 1)
    if crop is not None:
        check_at_least("crop", crop, 1)
    folder = Path(path)
    if not folder.is_dir():
        raise DataError.must_be("path", "a folder of pictures", folder)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise DataError(f"The folder {folder} must have pictures, named *{', *'.join(PICTURES)}.")
    return ImageFolder(files, size, crop)


def _find(name: str, path: str | Path | None) -> Path:
    """Return the path of a file of MNIST, downloaded if necessary."""
    root = os.environ.get("IMPLICITVI_DATA") if path is None else path
    if not root:
        return _download(name)
    tried = [Path(root) / folder / (name + ending) for folder in ("", "mnist") for ending in (".gz", "")]
    found = next((file for file in tried if file.is_file()), None)
    if found is not None:
        return found
    places = f"found none of {', '.join(map(str, tried))}"
    raise DataError(f"{name} is missing: {places}. Pass the folder of the four files, or set IMPLICITVI_DATA to it.")


def _download(name: str) -> Path:
    try:
        pooch: Any = importlib.import_module("pooch")
    except ImportError as error:
        do = "Pass the folder of its four IDX files, set IMPLICITVI_DATA to it, or pip install pooch to download it."
        raise DataError(f"MNIST cannot be found. {do}") from error
    file, cache = name + ".gz", pooch.os_cache("implicitvi") / "mnist"
    try:
        return Path(pooch.retrieve(MNIST_URL + file, f"sha256:{MNIST_FILES[name]}", fname=file, path=cache))
    except (OSError, ValueError) as error:
        do = "Get the four IDX files of MNIST and pass their folder."
        raise DataError(f"{name} could not be downloaded: {error}. {do}") from error


def _labelled(images: Path, labels: Path, as_bytes: bool) -> Labelled:
    x, y = read_idx(images), read_idx(labels)
    if x.dim() != 3 or y.dim() != 1 or len(x) != len(y):
        expected, got = "images [N, height, width] and labels [N]", f"shapes {list(x.shape)} and {list(y.shape)}"
        raise DataError.must_be(f"{images} and {labels}", expected, got)
    return Labelled(x[:, None] if as_bytes else x[:, None] / 255, y.long())
