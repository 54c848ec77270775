"""Pairs of a code and a datum: those that adversaries of joint densities score, and labelled ones.

An adversary scores codes ``z [..., N, D]`` and data ``x [N, *x_shape]`` together, ``adversary(z, x) [..., N]``, so that
it looks once at a datum that is paired with several codes.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from implicitvi import distributed
from implicitvi.avb.ratios import capped_exp
from implicitvi.errors import OptionError, ShapeError
from implicitvi.vae.data import tensor_of
from implicitvi.vae.model import LatentModel

Utility = Callable[[Tensor, Tensor], Tensor]  # codes and data to [...] in nats, higher is better
Pairs = tuple[Tensor, Tensor]  # codes [M, D] and data [M, *x_shape]


def codes(prior: Distribution, num_samples: int) -> Tensor:
    """Return draws ``z [num_samples, D]`` of the prior, without gradients."""
    return prior.sample(torch.Size([num_samples]))


def codes_like(z: Tensor, prior: Distribution) -> Tensor:
    """Return draws of the prior, as many as codes ``z [S, B, D]`` and of their shape."""
    return codes(prior, len(rows(z))).view_as(z)


def rows(z: Tensor) -> Tensor:
    """Return codes ``[S, B, D]`` as ``[S · B, D]``, to be paired with a datum each."""
    return z.flatten(0, -2)


def parted(z: Tensor) -> Tensor:
    """Return codes ``z [S, B, D]`` in another order of the ``B >= 2`` data, so that none stays with its datum.

    Each datum takes the codes of its neighbour on a random circle: draws of ``q(x) q(z)`` for ``z ~ q(z | x)``.
    """
    count = z.shape[-2]
    if count < 2:
        raise ShapeError.must_be("The rows of a batch", "2 or more, to pair codes with other data", count)
    circle = torch.randperm(count, device=z.device)
    giver = torch.empty_like(circle)
    giver[circle] = circle.roll(1)
    return z[..., giver, :]


def slope(adversary: nn.Module, z: Tensor, x: Tensor) -> Tensor:
    """Return the mean squared gradient of the scores in ``z [..., N, D]`` and ``x [N, *x_shape]``, a scalar.

    As a penalty on the draws of one side it damps the circling of two players.

    References:
        Which Training Methods for GANs do actually Converge?, Lars Mescheder, Andreas Geiger, Sebastian Nowozin,
        2018, eq. 9.
    """
    with torch.enable_grad():
        inputs = [z.detach().requires_grad_(), x.detach().requires_grad_()]
        scores: Tensor = adversary(*inputs)
        gradients = torch.autograd.grad(scores.sum(), inputs, create_graph=True)
    squares: Tensor = torch.stack([g.square().sum() for g in gradients]).sum()
    return squares / scores.numel()


def kl_bound(of_first: Tensor, of_second: Tensor, limit: float = inf) -> Tensor:
    """Return ``1 + E_first[ρ] - E_second[exp ρ]`` in nats, at most ``KL(first ‖ second)``; equal at the log ratio.

    ``ρ``, of any shape, is the learned ``log first - log second`` at draws of the first (``of_first``) and second.
    Above ``limit`` the exponential continues as its tangent.

    References:
        Estimating Divergence Functionals and the Likelihood Ratio by Convex Risk Minimization, XuanLong Nguyen,
        Martin Wainwright, Michael Jordan, 2010.
    """
    return 1 + of_first.mean() - capped_exp(of_second, limit).mean()


def cycle_error(encoder: nn.Module, decoder: nn.Module, z: Tensor) -> Tensor:
    """Return the mean squared distance of codes ``z [N, D]`` from those of their decoded data, summed over ``D``."""
    again: Tensor = encoder(decoder(z).rsample()).rsample()
    return (again - z).square().sum(-1).mean()


def own_share(pairs: Pairs, device: torch.device) -> Pairs:
    """Return the pairs ``[M / P, ...]`` of this one of ``P`` processes, on a device."""
    own = slice(distributed.rank(), None, distributed.count())
    return pairs[0][own].to(device), pairs[1][own].to(device)


def labelled(pairs: Any, model: LatentModel, **utilities: Utility) -> Pairs:
    """Return codes ``[M, D]`` and data ``[M, *x_shape]`` of labelled pairs ``(data, codes)`` that a model can score.

    The utilities are those of encoder and decoder, by name.

    Raises:
        ShapeError: There is not one code of the right dimension for each datum.
        OptionError: They are not two tensors, or codes are outside the support of ``q(z | x)`` or have no utility.
    """
    if not isinstance(pairs, tuple | list) or len(pairs) != 2:
        raise OptionError.must_be("pairs", "(data [M, *x_shape], codes [M, D])", type(pairs).__name__)
    x, z = (tensor_of(part, "A part of pairs").to(model.like) for part in pairs)
    if z.shape != (len(x), model.latent_dim):
        got = f"{list(z.shape)} for {len(x)} data"
        raise ShapeError.must_be("Codes of pairs", f"of shape {[len(x), model.latent_dim]}", got)
    model.check_data(x)
    with model._as_is(), torch.no_grad():
        possible = _in_support(model.encoder(x), z)
        for name, utility in utilities.items():
            bad = ~(utility(z, x).isfinite() & possible)
            if bad.any():
                got = f"{z[bad][0].tolist()} in row {int(bad.nonzero()[0])}, one of {int(bad.sum())} of {len(z)} rows"
                raise OptionError.must_be("Codes of pairs", f"possible for {name} and prior", got)
    return z, x


def _in_support(q: Distribution, z: Tensor) -> Tensor | bool:
    """Return whether ``q`` could draw each code; ``True`` if its support is unknown."""
    try:
        return q.support.check(z)  # type: ignore[no-any-return, union-attr]
    except NotImplementedError:
        return True


def loss_with_pairs(utility: Utility, drawn: Tensor, pairs: Pairs | None) -> Tensor:
    """Return minus the mean utility of the rows ``drawn [B]`` and of at most ``B`` random pairs, each row once."""
    if pairs is not None:
        z, x = pairs
        if len(z) > len(drawn):
            chosen = torch.randperm(len(z), device=z.device)[: len(drawn)]
            z, x = z[chosen], x[chosen]
        drawn = torch.cat([drawn, utility(z, x)])
    return -drawn.mean()
