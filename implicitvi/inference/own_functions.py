"""Try functions of the user's own before anything long starts: sampler, contrast, adversary and ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from implicitvi.avb.adversaries import GatedAdversary
from implicitvi.avb.contrasts import Contrast, MixtureContrast
from implicitvi.avb.ratios import RATIOS, RatioLoss
from implicitvi.avb.samplers import SAMPLERS, Sampler
from implicitvi.errors import OptionError
from implicitvi.inference.settings import ElboSettings
from implicitvi.pyro_model.tracing import first_line
from implicitvi.rng import RandomStream

DRAWS = 8  # of a trial
OWN_SAMPLER = "the name of a sampler, or a function of the latent dimension that returns a Sampler"


def check_own_functions(settings: ElboSettings, like: Tensor, context_dim: int = 0) -> None:
    """Call functions of the user's own once, with a few draws of the dimension of ``like [D]``.

    Raises:
        OptionError: One of them raises, or returns a value of another kind or shape.
    """
    with torch.no_grad(), RandomStream(0):
        z = torch.randn(DRAWS, len(like)).to(like)
        if not isinstance(settings.contrast, str):
            z = _standardised(own_contrast(settings.contrast, len(like)).to(like), z)
        elif settings.contrast == "mixture":
            z = torch.randn(DRAWS, len(like) + MixtureContrast(len(like)).extra_dim).to(like)
        if settings.adversary is not GatedAdversary:
            _check_adversary(settings.adversary, z, context_dim)
        if not isinstance(settings.ratio, str) and type(settings.ratio) not in RATIOS.values():
            _check_ratio(settings.ratio, z[:, 0])


def own_sampler(make: Callable[..., Sampler], dim: int, **context: int) -> Sampler:
    """Return the sampler that a function makes; raise `OptionError` unless it draws."""
    if make in SAMPLERS.values():
        return make(dim, **context)
    rows = (3, *context.values()) if context else ()
    with _named("sampler", expected := f"{OWN_SAMPLER} of draws [S, {dim}]"):
        sampler = make(dim, **context)
        got = type(sampler).__name__
        if isinstance(sampler, Sampler):
            with torch.no_grad(), RandomStream(0):
                shape = sampler(2, torch.zeros(rows) if rows else None).shape
            if shape == (2, *rows[:1], dim):
                return sampler
            got = f"draws {tuple(shape)}"
    raise OptionError.must_be("sampler", expected, got)


def own_contrast(function: Callable[[int], Contrast], dim: int) -> Contrast:
    """Return the contrast that a function makes; raise `OptionError` unless it is one."""
    with _named("contrast", expected := "a function of the latent dimension that returns a Contrast"):
        contrast = function(dim)
    if not isinstance(contrast, Contrast):
        raise OptionError.must_be("contrast", expected, type(contrast).__name__)
    return contrast


def _standardised(contrast: Contrast, z: Tensor) -> Tensor:
    expected = f"one whose standardise gives [S, {z.shape[1] + contrast.extra_dim}], and its log_prob [S]"
    with _named("contrast", expected):
        r = contrast(z)
        h, scores = contrast.standardise(z, r), r.log_prob(z)
    if h.shape != (len(z), z.shape[1] + contrast.extra_dim) or scores.shape != (len(z),):
        raise OptionError.must_be("contrast", expected, f"{tuple(h.shape)} and {tuple(scores.shape)} for S = {DRAWS}")
    return h


def _check_adversary(make: Callable[..., nn.Module], h: Tensor, context_dim: int) -> None:
    shapes = f"draws [S, {h.shape[1]}] to scores [S]"
    if context_dim:
        shapes = f"draws [S, B, {h.shape[1]}] and contexts [B, {context_dim}] to scores [S, B]"
    expected = f"a function of a dimension{' and context_dim' * bool(context_dim)} that returns a network from {shapes}"
    with _named("adversary", expected):
        network = make(h.shape[1], context_dim=context_dim) if context_dim else make(h.shape[1])
    if not isinstance(network, nn.Module) or not any(weight.requires_grad for weight in network.parameters()):
        got = f"{type(network).__name__} without weights to train"
        raise OptionError.must_be("adversary", expected, got)
    inputs = (h[:, None], h.new_zeros(1, context_dim)) if context_dim else (h,)
    with _named("adversary", expected):
        scores = network.to(h)(*inputs)
    if scores.shape != inputs[0].shape[:-1]:
        raise OptionError.must_be("adversary", expected, f"scores {list(scores.shape)} for {list(inputs[0].shape)}")


def _check_ratio(ratio: RatioLoss, scores: Tensor) -> None:
    with _named("ratio", "a RatioLoss whose loss is a scalar, and its log_ratio of the scores' shape"):
        loss, log_ratio = ratio.loss(scores, scores), ratio.log_ratio(scores)
        if loss.shape or log_ratio.shape != scores.shape:
            raise ValueError(f"shapes {list(loss.shape)} and {list(log_ratio.shape)} for {list(scores.shape)}")


@contextmanager
def _named(option: str, expected: str) -> Iterator[None]:
    """Raise `OptionError` for whatever a user's function raises."""
    try:
        yield
    except OptionError:
        raise
    except Exception as error:
        raise OptionError.must_be(option, expected, first_line(error)) from error
