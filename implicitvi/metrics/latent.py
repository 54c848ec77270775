"""What the codes of a latent variable model do: whether they fill the prior, are used, and give the data back.

Every function takes tensors, draws and means of whatever model, and knows nothing of models.
"""

from __future__ import annotations

from torch import Tensor

from implicitvi.errors import ShapeError, check_at_least, check_positive
from implicitvi.metrics.two_sample import knn_kl


def aggregated_kl(codes: Tensor, prior: Tensor, *, k: int = 5) -> float:
    """``KL(q(z)‖p(z))`` in nats between the aggregated posterior ``q(z) = mean_x q(z | x)`` and the prior.

    By nearest neighbours (`knn_kl`), hence no bound, and about 0 for equal distributions. A prior of the wrong shape,
    holes in it and codes outside of it all show here, and in no reconstruction.

    Args:
        codes: Draws of ``q(z | x)`` for data drawn at random, ``[N, D]``, or several of each, ``[S, B, D]``.
        prior: Draws of the prior ``[M, D]``, best as many as there are codes.
        k: Which neighbour.

    Raises:
        ShapeError: The sets are not of the shapes above, with more than ``k`` draws each.
        OptionError: A value is not finite, or codes are repeated, as those of an encoder without noise are for data
            that are: such a ``q(z)`` has no density and its divergence is infinite.

    >>> import torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> means, prior = torch.randn(2, 2000, 2, generator=generator)
    >>> noise = torch.randn(2000, 2, generator=generator)
    >>> abs(aggregated_kl(0.8 * means + 0.6 * noise, prior)) < 0.1
    True
    """
    return knn_kl(codes.flatten(0, -2), prior, k=k)


def active_units(means: Tensor, *, threshold: float = 0.01) -> Tensor:
    """Which latent dimensions say something about the data, ``[D]``: those whose posterior mean varies with them.

    ``Var_x(E_q[z_d | x]) > threshold``, in the units of the prior squared; the sum is the number of active units.

    Args:
        means: Posterior means ``[N, D]`` of data drawn at random.
        threshold: Variance above which a dimension counts.

    Raises:
        ShapeError: The means are not ``[N, D]`` with two rows or more.
        OptionError: The threshold is not above 0.

    >>> import torch
    >>> active_units(torch.tensor([[1.0, 0.01], [-1.0, -0.01]]))
    tensor([ True, False])

    References:
        Importance Weighted Autoencoders, Yuri Burda, Roger Grosse, Ruslan Salakhutdinov, 2016, section 5.2.
    """
    check_positive("threshold", threshold)
    if means.dim() != 2 or len(means) < 2:
        raise ShapeError(
            "there are no posterior means of several data",
            got=f"shape {tuple(means.shape)}",
            expected="[N, D] with N >= 2",
        )
    return means.var(0) > threshold


def squared_error(x: Tensor, reconstruction: Tensor) -> float:
    """Squared error of reconstructions, mean over data and the entries of each.

    Args:
        x: Data ``[B, *x_shape]``.
        reconstruction: What came back of them, ``[B, *x_shape]``, or several times, ``[S, B, *x_shape]``.

    Raises:
        ShapeError: The last axes of the reconstruction are not those of ``x``.

    >>> import torch
    >>> squared_error(torch.zeros(5, 2), torch.tensor([1.0, 3.0]).expand(4, 5, 2))
    5.0
    """
    if reconstruction.shape[-x.dim() :] != x.shape:
        raise ShapeError(
            "data and reconstructions do not match",
            got=f"shapes {tuple(x.shape)} and {tuple(reconstruction.shape)}",
            expected="[B, *x_shape] and [(S,) B, *x_shape]",
        )
    return float((reconstruction - x).square().mean())


def negative_log_likelihood(log_likelihood: Tensor, *, entries: int = 1) -> float:
    """``-E_q[log p(x | z)]`` in nats, mean over codes and data, for each entry of a datum.

    For binary data this is the cross-entropy that the AVB paper calls reconstruction error, when ``entries`` is the
    number of pixels (its Table 1 has the mean over pixels).

    Args:
        log_likelihood: ``log p(x | z)`` of codes drawn from ``q(z | x)``, ``[B]`` or ``[S, B]``.
        entries: Number of entries of a datum to divide by.

    Raises:
        OptionError: ``entries`` is below 1.

    >>> import torch
    >>> negative_log_likelihood(torch.tensor([-8.0, -4.0]), entries=4)
    1.5
    """
    check_at_least("entries", entries, 1)
    return float(-log_likelihood.mean() / entries)
