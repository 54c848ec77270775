"""Images with values in [0, 1]: four points, the small digits of scikit-learn, MNIST, and folders of pictures.

Images are ``[N, channels, height, width]`` in float32. Black and white ones are made of grey ones once and for all by
`binarise`, or anew for every batch with ``fit(transform=torch.bernoulli)``, which the papers call dynamic binarisation.
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

from implicitvi.errors import DataError, OptionError, check_at_least, check_choice

# sha256 of the files as they were published, and a mirror that still has them
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_FILES = {
    "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_UNSIGNED_BYTES = 8  # the IDX code of the values' type


class Labelled(NamedTuple):
    """Images and what they show.

    Attributes:
        images: ``[N, channels, height, width]``, in [0, 1].
        labels: ``[N]``, whole numbers.
    """

    images: Tensor
    labels: Tensor

    def split(self, *sizes: int, seed: int | None = 0) -> tuple[Labelled, ...]:
        """Parts of these sizes, then one with all that is left, after a shuffle by the seed; ``None`` for no shuffle.

        >>> [len(part.images) for part in digits().split(1500)]
        [1500, 297]
        """
        count = len(self.images)
        if min(sizes, default=0) < 0 or sum(sizes) > count:
            raise OptionError(
                "the images cannot be split like this", got=f"sizes {sizes}", expected=f"a sum up to {count}"
            )
        order = torch.arange(count)
        if seed is not None:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        parts = order.split([*sizes, count - sum(sizes)])
        return tuple(Labelled(self.images[part], self.labels[part]) for part in parts)


class Split(NamedTuple):
    """Images to learn from, to watch the fit with, and to judge it by."""

    train: Labelled
    validation: Labelled
    test: Labelled


def four_points(repeats: int = 128) -> Tensor:
    """The four binary images of 2 x 2 pixels of which one is on, each ``repeats`` times: ``[4 · repeats, 4]``.

    The best log likelihood is ``-log 4``, with no more than two latent dimensions.

    >>> four_points(1)
    tensor([[1., 0., 0., 0.],
            [0., 1., 0., 0.],
            [0., 0., 1., 0.],
            [0., 0., 0., 1.]])

    References:
        Adversarial Variational Bayes, Lars Mescheder, Sebastian Nowozin, Andreas Geiger, 2017, section 5.2.
    """
    check_at_least("repeats", repeats, 1)
    return torch.eye(4).repeat(repeats, 1)


def digits() -> Labelled:
    """The handwritten digits that come with scikit-learn: grey images ``[1797, 1, 8, 8]`` and which digit each is.

    References:
        Optical Recognition of Handwritten Digits, E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    return Labelled(images, torch.as_tensor(bunch.target, dtype=torch.int64))


def binarise(images: Tensor, method: str = "threshold", *, seed: int = 0) -> Tensor:
    """Black and white images of grey ones, once and for all.

    Args:
        images: Values in [0, 1], of any shape.
        method: ``"threshold"`` for white from one half on; ``"fixed"`` for one draw with the grey values as
            probabilities. For new draws in every batch hand ``transform=torch.bernoulli`` to ``fit`` instead.
        seed: Seed of the draw.

    >>> binarise(torch.tensor([0.2, 0.5, 0.9]))
    tensor([0., 1., 1.])
    """
    check_choice("method", method, ["threshold", "fixed"])
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):
        raise OptionError(
            "the images cannot be made black and white",
            got=f"values from {low.item():g} to {high.item():g}",
            expected="0 to 1",
        )
    if method == "threshold":
        return (images >= 0.5).to(images.dtype)
    generator = torch.Generator(images.device).manual_seed(seed)
    return torch.bernoulli(images, generator=generator)


def mnist(path: str | Path | None = None, *, validation: int = 5000, as_bytes: bool = False) -> Split:
    """MNIST: 55,000 images ``[N, 1, 28, 28]`` to learn from, 5,000 for validation and 10,000 for the test.

    The files are looked for in ``path``, else in the folder that the environment variable ``IMPLICITVI_DATA`` names or
    its subfolder ``mnist``, else downloaded and checked, which needs pooch (``pip install implicitvi[data]``).

    Args:
        path: Folder with the four IDX files, packed by gzip or not. Whatever has their form will do, as Fashion-MNIST.
        validation: How many of the last training images are kept for validation.
        as_bytes: Whether images are whole numbers from 0 to 255, a quarter of the memory.

    Raises:
        DataError: A file is missing, damaged, or no IDX file of images or labels.

    References:
        Gradient-Based Learning Applied to Document Recognition, Yann LeCun, Léon Bottou, Yoshua Bengio,
        Patrick Haffner, 1998.
    """
    train_x, train_y, test_x, test_y = (_find(name, path) for name in MNIST_FILES)
    train, test = _labelled(train_x, train_y, as_bytes), _labelled(test_x, test_y, as_bytes)
    count = len(train.images)
    if not 0 <= validation < count:
        raise OptionError("validation is out of range", got=validation, expected=f"0 to {count - 1}")
    kept, held_out = train.split(count - validation, seed=None)
    return Split(kept, held_out, test)


def read_idx(path: str | Path) -> Tensor:
    """The bytes of an IDX file, packed by gzip or not, in the shape that the file says.

    Raises:
        DataError: The file cannot be read, has another magic number, or other than the bytes it announces.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            data = bytearray(file.read())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read", got=f"{error}") from error
    zeros, kind, dims = struct.unpack(">HBB", data[:4].ljust(4, b"\xff"))
    if zeros or kind != _UNSIGNED_BYTES:
        raise DataError(
            f"{path} is not an IDX file of bytes",
            got=f"magic number {data[:4].hex() or 'none'}",
            expected=f"00000{_UNSIGNED_BYTES}, then the number of axes",
        )
    begin = 4 + 4 * dims
    shape = struct.unpack(f">{dims}I", data[4:begin].ljust(4 * dims, b"\0"))
    if len(data) != begin + prod(shape):
        raise DataError(
            f"{path} is {'truncated' if len(data) < begin + prod(shape) else 'too long'}",
            got=f"{len(data)} bytes",
            expected=f"{begin + prod(shape)} for shape {list(shape)}",
        )
    if not prod(shape):
        raise DataError(f"{path} has no data", got=f"shape {list(shape)}")
    return torch.frombuffer(data, dtype=torch.uint8, offset=begin).reshape(shape)


class ImageFolder(Dataset[Tensor]):
    """Pictures of a folder and those below it, in the order of their names; see `image_folder`.

    Args:
        files: The pictures.
        size: Height and width of what is returned.
        crop: Side of the square cut out of the middle before it is resized; ``None`` for the largest there is.
    """

    def __init__(self, files: Sequence[Path], size: int, crop: int | None):
        self.files = tuple(files)
        self.size = size
        self.crop = crop

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        """Picture ``[3, size, size]``, red, green and blue in [0, 1]."""
        from PIL import Image

        path = self.files[index]
        try:
            with Image.open(path) as file:
                picture = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"the picture {path} cannot be read", got=f"{error}", do="Mend it or take it away."
            ) from error
        side = min(picture.size) if self.crop is None else self.crop
        if side > min(picture.size):
            raise DataError(
                f"the picture {path} is smaller than the square to be cut out of it",
                got=f"{picture.width} x {picture.height}",
                expected=f"at least {side} x {side}",
                do="Pass a smaller crop, or None.",
            )
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        box = (left, top, left + side, top + side)
        small = picture.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
        return pixels.reshape(self.size, self.size, 3).permute(2, 0, 1) / 255

    def tensor(self) -> Tensor:
        """All pictures ``[N, 3, size, size]`` at once, for a folder that fits into memory."""
        return torch.stack([self[i] for i in range(len(self))])


def image_folder(path: str | Path, size: int = 64, *, crop: int | None = None) -> ImageFolder:
    """Colour pictures of a folder and those below it, cut square and resized, for ``fit`` or a ``DataLoader``.

    The faces of the AVB paper's code are CelebA with ``size=64, crop=128``.

    Args:
        path: The folder.
        size: Height and width of the pictures ``[3, size, size]``.
        crop: Side, in pixels of the file, of the square cut out of the middle; ``None`` for the largest there is.

    Raises:
        DataError: The folder is missing or has no pictures; later, by name, a picture that cannot be read.
    """
    check_at_least("size", size, 1)
    if crop is not None:
        check_at_least("crop", crop, 1)
    folder = Path(path)
    if not folder.is_dir():
        raise DataError("there is no such folder of pictures", got=str(folder))
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise DataError(f"the folder {folder} has no pictures", expected=f"files named *{', *'.join(PICTURES)}")
    return ImageFolder(files, size, crop)


def _find(name: str, path: str | Path | None) -> Path:
    """Where one of the files of MNIST is."""
    root = os.environ.get("IMPLICITVI_DATA") if path is None else path
    if not root:
        return _download(name)
    tried = [Path(root) / folder / (name + ending) for folder in ("", "mnist") for ending in (".gz", "")]
    for file in tried:
        if file.is_file():
            return file
    raise DataError(
        f"there is no file {name}",
        got="none of " + ", ".join(map(str, tried)),
        do="Pass the folder of the four files, or set IMPLICITVI_DATA to it.",
    )


def _download(name: str) -> Path:
    try:
        pooch: Any = importlib.import_module("pooch")
    except ImportError as error:
        raise DataError(
            "MNIST is nowhere to be found",
            got="no path, no environment variable IMPLICITVI_DATA, and no pooch to download it with",
            do="Pass the folder of its four IDX files, set IMPLICITVI_DATA to it, or pip install pooch.",
        ) from error
    try:
        file: str = pooch.retrieve(
            MNIST_URL + name + ".gz",
            known_hash="sha256:" + MNIST_FILES[name],
            fname=name + ".gz",
            path=pooch.os_cache("implicitvi") / "mnist",
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name} could not be downloaded",
            got=f"{error}",
            do="Get the four IDX files of MNIST and pass their folder.",
        ) from error
    return Path(file)


def _labelled(images: Path, labels: Path, as_bytes: bool) -> Labelled:
    x, y = read_idx(images), read_idx(labels)
    if x.dim() != 3 or y.dim() != 1 or len(x) != len(y):
        raise DataError(
            f"{images} and {labels} are not images and their labels",
            got=f"shapes {list(x.shape)} and {list(y.shape)}",
            expected="[N, height, width] and [N]",
        )
    x = x[:, None]
    return Labelled(x if as_bytes else x / 255, y.long())
