"""Compute the Fréchet distance between images in the features of a small classifier.

This is **not** the Fréchet Inception Distance: the features are those of a `FeatureNet` trained on labelled images of
the same kind, not of an Inception network trained on ImageNet. Compare only distances in the same network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from implicitvi.errors import OptionError, ShapeError, check_at_least, check_positive


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Compute the squared Fréchet distance between Gaussians with the moments of two sets of features.

        |m_x - m_y|² + tr(C_x + C_y - 2 (C_x C_y)^½)

    The trace of the root is the sum of the singular values of ``A Bᵀ``, where ``AᵀA = C_x`` and ``BᵀB = C_y``; no
    root of a matrix is taken, and sets of fewer rows than dimensions are as accurate. But few rows make the distance of
    equal Gaussians larger, about ``tr(C) (D + 5) / (2 N)`` for ``N`` rows each: compare only sets of the same length.

    Args:
        x: Features ``[N, D]``.
        y: Features ``[M, D]``.

    Returns:
        The distance in units of the features squared: 0 for equal moments, else positive.

    Raises:
        ShapeError: The sets are not ``[N, D]`` and ``[M, D]`` with two rows or more each.
        OptionError: A value is not finite.

    >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> round(frechet_distance(x, x), 6), round(frechet_distance(x, x + 3), 6)
    (0.0, 18.0)

    References:
        The distance between two random vectors with given dispersion matrices, Ingram Olkin, Friedrich Pukelsheim,
        1982.
        GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, Martin Heusel, Hubert
        Ramsauer, Thomas Unterthiner, Bernhard Nessler, Sepp Hochreiter, 2017, eq. 6.
    """
    (m_x, a), (m_y, b) = _moments("x", x), _moments("y", y)
    if len(m_x) != len(m_y):
        raise ShapeError(f"Both sets must have the same features, got {len(m_x)} and {len(m_y)} dimensions.")
    root = torch.linalg.svdvals(a @ b.mT).sum()
    distance = (m_x - m_y).square().sum() + a.square().sum() + b.square().sum() - 2 * root
    return max(0.0, float(distance))  # rounding may put equal sets below


def feature_distance(net: FeatureNet, x: Tensor, y: Tensor) -> float:
    """Compute `frechet_distance` of two sets of images in the features of a network; not the Inception distance.

    Args:
        net: The network, the same one for all distances to be compared.
        x: Images ``[N, *x_shape]``.
        y: Images ``[M, *x_shape]``.
    """
    return frechet_distance(net.features(x), net.features(y))


class FeatureNet(nn.Module):
    """A small classifier of images, whose last hidden layer provides the features.

    Two convolutions for images with a channel axis, two dense layers for data in rows; then a layer of ``width``
    features, and the classes. The constructor trains it by Adam on the cross-entropy; it is a function of the data and
    the seed.

    Args:
        x: Images ``[N, C, H, W]`` or rows ``[N, P]``.
        labels: Class of each, ``[N]``, integers from 0.
        width: Number of features.
        steps: Training steps.
        batch_size: Rows of a step.
        lr: Initial rate of Adam; it falls to zero along a half cosine.
        seed: Seed of the weights and the batches.

    Raises:
        ShapeError: Images or labels have the wrong shape.
        OptionError: Labels are not classes, or an option has a value that cannot work.
    """

    def __init__(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        width: int = 64,
        steps: int = 1000,
        batch_size: int = 64,
        lr: float = 2e-3,
        seed: int = 0,
    ):
        super().__init__()
        check_at_least("width", width, 1)
        check_at_least("steps", steps, 1)
        check_at_least("batch_size", batch_size, 1)
        check_positive("lr", lr)
        _check_labelled(x, labels)
        self.x_shape = x.shape[1:]
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.manual_seed(seed)
            self.body = _body(self.x_shape, width)
            self.head = nn.Linear(width, int(labels.max()) + 1)
            self.to(x.device)
            self._train_on(x, labels.long(), steps, batch_size, lr)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, K]`` of images ``[N, *x_shape]``."""
        logits: Tensor = self.head(self.body(x))
        return logits

    @torch.no_grad()
    def features(self, x: Tensor, *, batch_size: int = 1000) -> Tensor:
        """Return features ``[N, width]`` of images ``[N, *x_shape]``."""
        if x.shape[1:] != self.x_shape:
            expected = f"[N, {', '.join(map(str, self.x_shape))}], as in training"
            raise ShapeError.must_be("The images", expected, tuple(x.shape))
        return torch.cat([self.body(rows) for rows in x.split(batch_size)])

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """Return the share of images ``[N, *x_shape]`` whose class ``[N]`` is predicted correctly."""
        found = self.head(self.features(x)).argmax(-1)
        return float((found == labels).float().mean())

    def _train_on(self, x: Tensor, labels: Tensor, steps: int, batch_size: int, lr: float) -> None:
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with torch.enable_grad():
            for _ in range(steps):
                rows = torch.randint(len(x), (batch_size,)).to(x.device)
                optimizer.zero_grad()
                functional.cross_entropy(self(x[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()


def _body(x_shape: torch.Size, width: int) -> nn.Sequential:
    if len(x_shape) == 1:
        layers: list[nn.Module] = [nn.Linear(x_shape[0], 256), nn.ReLU()]
        size = 256
    else:
        layers = [
            nn.Conv2d(x_shape[0], 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        ]
        size = 32 * 4 * 4
    return nn.Sequential(*layers, nn.Linear(size, width), nn.ReLU())


def _check_labelled(x: Tensor, labels: Tensor) -> None:
    if x.dim() not in (2, 4) or not len(x):
        do = "Images without a channel axis need one: x[:, None]."
        raise ShapeError.must_be("The images", "[N, C, H, W], or rows [N, P]", f"shape {tuple(x.shape)}", do)
    if labels.shape != x.shape[:1]:
        raise ShapeError.must_be("labels", f"one label for each of {len(x)} images", f"shape {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.min() < 0:
        raise OptionError.must_be("labels", "integers from 0", f"{labels.dtype} from {labels.min().item()}")


def _moments(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean ``[D]`` and a matrix ``A [R, D]`` whose ``AᵀA`` is the covariance, in float64."""
    if x.dim() != 2 or len(x) < 2:
        raise ShapeError.must_be(name, "a matrix of features [N, D] with N >= 2", f"shape {tuple(x.shape)}")
    x = x.detach().double()
    if not x.isfinite().all():
        bad = int((~x.isfinite()).any(1).sum())
        raise OptionError.must_be(name, "finite", f"{bad} bad rows of {len(x)}")
    mean = x.mean(0)
    factor: Tensor = torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5).R
    return mean, factor
