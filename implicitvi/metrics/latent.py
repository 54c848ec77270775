"""Metrics for the codes of any latent variable model: match with the prior, use of dimensions, reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitvi.errors import ShapeError, check_positive, check_whole
from implicitvi.metrics.two_sample import knn_kl


def aggregated_kl(codes: Tensor, prior: Tensor, *, k: int = 5) -> float:
    """Estimate ``KL(q(z)‖p(z))`` in nats between the aggregated posterior ``q(z) = mean_x q(z | x)`` and the prior.

    By nearest neighbours (`knn_kl`): not a bound, and about 0 for equal distributions. It shows a prior of the wrong
    shape, holes in it and codes outside of it, which reconstructions do not.

    Args:
        codes: Draws of ``q(z | x)`` for data drawn at random, ``[N, D]``, or several of each, ``[S, B, D]``.
        prior: Draws of the prior ``[M, D]``, best as many as there are codes.
        k: Number of the neighbour.

    Raises:
        ShapeError: The sets are not of the shapes above, with more than ``k`` draws each.
        OptionError: A value is not finite, or codes are repeated, as by an encoder without noise for repeated data: the
            divergence is infinite.

    >>> import torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> means, prior = torch.randn(2, 2000, 2, generator=generator)
    >>> noise = torch.randn(2000, 2, generator=generator)
    >>> abs(aggregated_kl(0.8 * means + 0.6 * noise, prior)) < 0.1
    True
    """
    _check_tensors("The codes", codes)
    return knn_kl(codes.flatten(0, -2) if codes.dim() > 1 else codes, prior, k=k)


def active_units(means: Tensor, *, threshold: float = 0.01) -> Tensor:
    """Return a mask ``[D]`` of latent dimensions whose posterior mean varies with the data.

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
    _check_tensors("The posterior means", means)
    if means.dim() != 2 or len(means) < 2:
        raise ShapeError.must_be("The posterior means", "[N, D] with N >= 2", f"shape {tuple(means.shape)}")
    return means.var(0) > threshold


def squared_error(x: Tensor, reconstruction: Tensor) -> float:
    """Compute the squared error of reconstructions, averaged over data and entries.

    Args:
        x: Data ``[B, *x_shape]``.
        reconstruction: One reconstruction of each, ``[B, *x_shape]``, or several, ``[S, B, *x_shape]``.

    Raises:
        ShapeError: The last axes of the reconstruction are not those of ``x``.

    >>> import torch
    >>> squared_error(torch.zeros(5, 2), torch.tensor([1.0, 3.0]).expand(4, 5, 2))
    5.0
    """
    _check_tensors("Data and reconstructions", x, reconstruction)
    if reconstruction.shape[reconstruction.dim() - x.dim() :] != x.shape:
        shapes = f"shapes {tuple(x.shape)} and {tuple(reconstruction.shape)}"
        raise ShapeError.must_be("Data and reconstructions", "[B, *x_shape] and [(S,) B, *x_shape]", shapes)
    return float((reconstruction - x).square().mean())


def negative_log_likelihood(log_likelihood: Tensor, *, entries: int = 1) -> float:
    """Compute ``-E_q[log p(x | z)]`` in nats per entry of a datum, averaged over codes and data.

    For binary data with ``entries`` pixels it is the reconstruction error of Table 1 of the AVB paper, a cross-entropy.

    Args:
        log_likelihood: ``log p(x | z)`` of codes drawn from ``q(z | x)``, ``[B]`` or ``[S, B]``.
        entries: Number of entries of a datum to divide by.

    Raises:
        OptionError: ``entries`` is below 1.

    >>> import torch
    >>> negative_log_likelihood(torch.tensor([-8.0, -4.0]), entries=4)
    1.5
    """
    check_whole("entries", entries)
    _check_tensors("The log likelihood", log_likelihood)
    return float(-log_likelihood.mean() / entries)


def _check_tensors(what: str, *tensors: Tensor) -> None:
    """Raise `ShapeError` unless all are tensors of floats with a value."""
    for tensor in tensors:
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not (dense and tensor.is_floating_point() and tensor.numel()):
            got = (
                f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                if isinstance(tensor, Tensor)
                else type(tensor).__name__
            )
            raise ShapeError.must_be(what, "tensors of floats, not empty", got)
