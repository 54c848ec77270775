"""Train an `ImplicitGuide` inside `pyro.infer.SVI`: a loss with its own adversary."""

from __future__ import annotations

from math import nan
from typing import Any, Unpack

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from implicitvi.errors import OptionError
from implicitvi.inference.copies import Copyable
from implicitvi.inference.guide import ImplicitGuide
from implicitvi.inference.settings import ElboOptions, ElboSettings
from implicitvi.inference.setup import Training, set_up
from implicitvi.numerics.doors import exclusive, with_gradients
from implicitvi.numerics.types import Model
from implicitvi.pyro_model.arguments import Arguments
from implicitvi.pyro_model.parameters import show_parameters
from implicitvi.rng import RandomStream
from implicitvi.training.options import from_options, with_options


@with_options(ElboSettings)
class AVB_ELBO(Copyable, ELBO):
    """A loss for `pyro.infer.SVI` that trains an `ImplicitGuide` by adversarial variational Bayes.

    The Pyro optimiser moves the sampler, at its own rate. Before each gradient the loss lets its adversary take its
    steps, with an optimiser of its own. Use one instance for one guide.

    Args:
        settings: The options as a value; keywords replace its fields.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from implicitvi import ImplicitGuide
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)
        >>> guide = ImplicitGuide(model)
        >>> optim = pyro.optim.Adam({"lr": 1e-3, "betas": (0.5, 0.999)})
        >>> svi = pyro.infer.SVI(model, guide, optim, loss=AVB_ELBO(num_steps=3, seed=0))
        >>> losses = [svi.step(torch.ones(3)) for _ in range(3)]
    """

    def __init__(self, *, settings: ElboSettings | None = None, **options: Unpack[ElboOptions]):
        self.settings = from_options(ElboSettings, options, settings, of=AVB_ELBO)
        super().__init__(num_particles=self.settings.schedule.at(0).num_particles)
        self._stream = RandomStream(self.settings.seed)
        self._guide: ImplicitGuide | None = None
        self._model: Model | None = None
        self._training: Training | None = None

    def loss(self, model: Model, guide: ImplicitGuide, *args: Any, **kwargs: Any) -> float:
        """Return the loss of fresh draws at the current stage, in nats; trains nothing."""
        with torch.no_grad():
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
        return loss.item()

    @with_gradients()
    def loss_and_grads(self, model: Model, guide: ImplicitGuide, *args: Any, **kwargs: Any) -> float:
        """Let the adversary take its steps, then back-propagate the sampler's loss; return it in nats.

        A step without a finite loss leaves no gradient.
        """
        self._bound(model, guide, Arguments(args, kwargs)).trainer.step()
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.isfinite():
            loss.backward()
        return loss.item()

    @exclusive()
    def differentiable_loss(self, model: Model, guide: ImplicitGuide, *args: Any, **kwargs: Any) -> Tensor:
        """Return the sampler's loss at the current stage, a scalar with gradients for the sampler only."""
        training = self._bound(model, guide, Arguments(args, kwargs))
        pyro.module(f"{guide._pyro_name}.sampler", guide.sampler)
        show_parameters(training.objective.parameters)
        with poutine.block(), self._stream:
            stage = training.trainer.schedule.at(max(training.trainer.step_count - 1, 0))
            loss, _ = training.objective.loss(training.target, stage)
        return torch.tensor(nan) if loss is None else loss

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        """Refuse Pyro's hook for losses made of traces."""
        raise NotImplementedError("AVB_ELBO scores particles without traces of the guide")

    def _bound(self, model: Model, guide: ImplicitGuide, arguments: Arguments) -> Training:
        """Return the training at these arguments, set up at the first call."""
        if self._guide is not guide and self._guide is not None:
            raise OptionError("An AVB_ELBO must be used with one guide, got another. Make one for each guide.")
        if self._model is not None and self._model != model:
            raise OptionError("An AVB_ELBO must be used with one model, got another. Make one for each model.")
        if self._training is None:
            with poutine.block(), with_gradients():
                self._training = set_up(model, guide, self.settings, arguments, self._stream, moves_sampler=False)
            self._guide, self._model = guide, model
        else:
            self._training.bind(arguments)
        return self._training
