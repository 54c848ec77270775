"""Wrap the prior of a Pyro model on its unconstrained vector as a distribution."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.overrides import TorchFunctionMode

from implicitvi.errors import ModelError
from implicitvi.pyro_model.log_joint import LogJoint
from implicitvi.pyro_model.tracing import first_line, unvalidated


class _FreshNoise(TorchFunctionMode):
    """A mode that replaces in-place noise by new tensors, so that under vmap every particle gets its own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None) -> Any:
        if func not in (Tensor.normal_, Tensor.exponential_, Tensor.cauchy_) or len(args) != 1 or kwargs:
            return func(*args, **(kwargs or {}))
        draw = torch.randn if func is Tensor.normal_ else torch.rand
        noise = draw(args[0].shape, dtype=args[0].dtype, device=args[0].device)
        if func is Tensor.exponential_:
            return -torch.log1p(-noise)
        return noise if func is Tensor.normal_ else torch.tan(torch.pi * (noise - 0.5))


class ModelPrior(Distribution):
    """A distribution of ``u [D]``, the prior of a model: sampled by running the model, scored by `LogJoint`.

    Args:
        log_prior: The model's log joint, restricted to its latent sites.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
        like: A tensor with the dtype and device of the draws.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def __init__(self, log_prior: LogJoint, args: tuple[Any, ...], kwargs: dict[str, Any], like: Tensor):
        super().__init__(event_shape=torch.Size([log_prior.layout.dim]), validate_args=False)
        self._log_prior, self._args, self._kwargs = log_prior, args, kwargs
        self._like, self._loops = like, False

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw ``u [*sample_shape, D]`` by running the model."""
        count = torch.Size(sample_shape).numel()
        with torch.no_grad(), unvalidated():
            return self._draw(count).reshape(*sample_shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log prior density of ``value [..., D]`` in nats, ``log|J|`` included: ``[...]``."""
        flat = value.reshape(-1, *self.event_shape)
        return self._log_prior(flat, *self._args, **self._kwargs).reshape(value.shape[:-1])

    def _draw(self, count: int) -> Tensor:
        if not self._loops:
            try:
                blank = self._like.new_zeros(count)
                with _FreshNoise():
                    draws: Tensor = torch.func.vmap(self._draw_one, randomness="different")(blank)
                return draws
            except RuntimeError as error:  # a sampler that cannot be batched, such as a rejection loop
                self._loops = True
                message = f"the prior is drawn one particle at a time, about 1 ms each ({first_line(error)})"
                warnings.warn(message, stacklevel=2)
        return torch.stack([self._draw_one(self._like.new_zeros(())) for _ in range(count)])

    def _draw_one(self, blank: Tensor) -> Tensor:
        layout = self._log_prior.layout
        try:
            with poutine.block():
                trace = poutine.trace(self._log_prior.model).get_trace(*self._args, **self._kwargs)
        except NotImplementedError as error:
            problem = f"contrast='prior' needs a prior that can be sampled, got {first_line(error).rstrip('.')}."
            raise ModelError(f"{problem} Use contrast='gaussian' or 'flow'.") from error
        values: dict[str, Any] = {name: trace.nodes[name]["value"] for name in layout.names}
        return layout.pack(values) + blank
