"""Let the networks of a model compute in low precision, or compiled, for the duration of a fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from implicitvi.avb.samplers import Sampler

GRAPHS = 8  # of each network: torch's own limit holds for all of them together


@contextmanager
def in_precision(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let the networks of a model compute in ``dtype`` and return the precision of their weights.

    Distributions, densities and contrasts are left out: a sum over a thousand pixels needs more than eight bits.
    """
    with ExitStack() as stack:
        for network in _networks(model):
            for handle in _autocast(network, dtype):
                stack.enter_context(handle)
        yield


def _autocast(network: nn.Module, dtype: torch.dtype) -> list[Any]:
    """Register hooks that run every call of a network in ``torch.autocast``, and return their handles."""
    weight = next(network.parameters())
    context = torch.autocast(weight.device.type, dtype=dtype)

    def enter(*_: Any) -> None:
        context.__enter__()

    def leave(network: nn.Module, inputs: Any, out: Any) -> Any:
        context.__exit__(None, None, None)
        return out.to(weight.dtype) if isinstance(out, Tensor) else out

    return [network.register_forward_pre_hook(enter), network.register_forward_hook(leave, always_call=True)]


@contextmanager
def compiled(model: nn.Module, mode: str | None) -> Iterator[None]:
    """Let torch compile those networks of a model that are not compiled yet; noise is drawn outside of them.

    torch's compiler turns argument checks off for every distribution of the process; they are on again afterwards.
    """
    networks = [network for network in _networks(model) if network._compiled_call_impl is None]
    checks = Distribution._validate_args
    settings: dict[str, Any] = {
        "cache_size_limit": GRAPHS * len(networks),
        "accumulated_cache_size_limit": 10**6,  # networks of earlier fits count, too
    }
    if hasattr(torch._dynamo.config, "wrap_top_frame"):  # older torch leaves `nn.Sequential` uncompiled
        settings["wrap_top_frame"] = True
    with torch._dynamo.config.patch(settings):
        try:
            for network in networks:
                network.compile(mode=mode)
            yield
        finally:
            Distribution.set_default_validate_args(checks)
            for network in networks:
                network._compiled_call_impl = None  # torch has no public way back


def _networks(model: nn.Module) -> list[nn.Module]:
    """Return the networks with weights that encoder, decoder, prior and adversaries call, each once."""

    def inside(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if isinstance(child, nn.ModuleList | nn.ModuleDict | Sampler):
                yield from inside(child)
            elif any(True for _ in child.parameters()):
                yield child

    return list(dict.fromkeys(network for part in model.children() for network in inside(part)))
