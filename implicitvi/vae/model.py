"""A latent variable model: encoder, decoder and prior, how they are trained, and what can be asked of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from math import inf
from operator import attrgetter
from typing import Any, ClassVar, Self, Unpack

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from implicitvi.errors import ModelError, ShapeError, check_choice, check_seed, check_whole, did_you_mean, reason_of
from implicitvi.metrics.ais import Annealing, ais
from implicitvi.metrics.evidence import importance_sampling, quadrature
from implicitvi.rng import forked
from implicitvi.training import Player, Stage
from implicitvi.training.options import from_options, with_options
from implicitvi.training.player import Metrics
from implicitvi.vae.data import tensor_of
from implicitvi.vae.decoders import rows_with
from implicitvi.vae.distributions import has_density
from implicitvi.vae.encoders import moments_of
from implicitvi.vae.fitting import Trainable, VAEFit, run_fit
from implicitvi.vae.priors import prior_of
from implicitvi.vae.settings import FitOptions, FitSettings

Batch = Callable[[], Tensor]
Scored = tuple[Tensor | None, Metrics]  # a loss, ``None`` to skip the step, and metrics for the history
Loss = Callable[[Tensor, Stage], Scored]

EVIDENCE: dict[str, Callable[..., Tensor]] = {"ais": ais, "iwae": importance_sampling, "quadrature": quadrature}


class LatentModel(Trainable):
    """An encoder ``q(z | x)``, a decoder ``p(x | z)`` and a prior ``p(z)``, trained by an objective.

    Each is a module that returns a distribution. Implementing an objective: subclass this, say in ``needs`` what each
    must be able to do, and return its `Player` s from ``players``; then join the list in ``tests/vae_contracts.py``.

    Args:
        encoder: Data ``[B, *x_shape]`` to a distribution over codes: batch shape ``[B]``, event shape ``[D]``.
        decoder: Codes ``[..., D]`` to a distribution over data: batch shape ``[...]``, event shape ``x_shape``.
        prior: A module that returns ``p(z)``, a distribution over ``[D]``, a function from the number of draws to them,
            or the number ``D`` for ``N(0, I)``.

    Attributes:
        needs: Abilities of encoder, decoder and prior: ``"draws"``, ``"gradients"`` (draws with them), ``"density"``.
        x_shape: Shape of one datum.
        latent_dim: Dimension ``D`` of a code.
    """

    needs: ClassVar[dict[str, set[str]]] = {}

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: Any):
        super().__init__()
        self.encoder, self.decoder = as_network("encoder", encoder), as_network("decoder", decoder)
        self.prior = prior_of(prior)
        self.x_shape, self.latent_dim = self._probe()

    @torch.no_grad()
    def validate(self, x: Tensor) -> dict[str, Tensor]:
        p = self.decoder(self.encode(x))
        if has_density(p):
            return {"log_likelihood": p.log_prob(x).mean()}
        return {"squared_error": (p.sample() - x).square().mean()}

    @with_options(FitSettings)
    def fit(
        self, train: Any, *, validation: Any = None, settings: FitSettings | None = None, **options: Unpack[FitOptions]
    ) -> VAEFit[Self]:
        """Train on data and return this model with the record of its training; an interrupt keeps the weights so far.

        Under ``torchrun``, or in a group of `torch.distributed` that has been started, every process takes its share of
        each batch, and all of them have the same weights at every step (docs/decisions/0004-several-processes.md).

        Args:
            train: ``[N, *x_shape]`` as a tensor or an array, a ``Dataset``, or a ``DataLoader``; of tuples the first
                part. An epoch leaves out rows that do not fill a last batch, but uses all batches of a loader.
            validation: As ``train``; the figures of ``validate`` over all of it are kept after every epoch.
            settings: Options as a value; the following ones, where they are given, replace its fields.

        Raises:
            TypeError: An option is unknown.
            OptionError: An option or the data cannot work; raised before the first step.
            ShapeError: The data do not have the model's shape.
            ModelError: The data are not finite.
            CheckpointError: The checkpoint is damaged, or of another model, data or options.
            NonFiniteError: Too many turns in a row were skipped; the last good state has been restored.
        """
        return run_fit(self, train, validation, from_options(FitSettings, options, settings, of=self.fit))

    @torch.no_grad()
    def encode(self, x: Tensor, num_samples: int | None = None) -> Tensor:
        """Draw codes of ``q(z | x)`` for ``x [B, *x_shape]``: ``[num_samples, B, D]``, or one each, ``[B, D]``."""
        if num_samples is not None:
            check_whole("num_samples", num_samples)
        z: Tensor = self.encoder(self._input(x)).sample(_shape(num_samples))
        return z

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Return the mean of ``p(x | z)`` for codes ``z [..., D]``: ``[..., *x_shape]``; a draw if it has no mean."""
        z = tensor_of(z, "Codes").to(self.like)
        if z.shape[-1:] != (self.latent_dim,):
            do = "model.encode(x) and model.prior().sample([n]) give codes."
            raise ShapeError.must_be("Codes", f"of shape [..., {self.latent_dim}]", [*z.shape], do)
        if not z.isfinite().all():
            raise ModelError.must_be("Codes", "finite", f"others in {rows_with(~z.isfinite())}")
        p = self.decoder(z)
        try:
            mean: Tensor = p.mean
        except NotImplementedError:
            return p.sample()  # type: ignore[no-any-return]
        return mean

    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode ``x [B, *x_shape]`` to a random code each, and `decode` the codes."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def sample(self, num_samples: int) -> Tensor:
        """Draw new data ``[num_samples, *x_shape]`` from ``p(x | z)`` at draws of the prior."""
        check_whole("num_samples", num_samples)
        x: Tensor = self.decoder(self.prior().sample(_shape(num_samples))).sample()
        return x

    def log_joint(self, z: Tensor, x: Tensor) -> Tensor:
        """Return ``log p(x | z) + log p(z)`` in nats: ``z [..., B, D]`` and ``x [B, *x_shape]`` to ``[..., B]``."""
        self.check_shape(x)
        log_p: Tensor = self.decoder(z).log_prob(x) + self.prior().log_prob(z)
        return log_p

    @torch.inference_mode(False)
    def log_evidence(
        self,
        x: Tensor,
        method: str = "ais",
        *,
        start: str = "encoder",
        batch_size: int = 100,
        seed: int | None = 0,
        **options: Any,
    ) -> Tensor:
        """Estimate ``log p(x)`` of each datum ``x [B, *x_shape]``: ``[B]`` in nats.

        Args:
            x: Data.
            method: ``"ais"``, annealed importance sampling by Hamiltonian Monte Carlo (`ais`); ``"iwae"``, importance
                sampling from a widened Gaussian at the moments of the start (`importance_sampling`);
                ``"quadrature"``, a grid over one or two latent dimensions (`quadrature`).
            start: The moments at which the method starts: of ``q(z | x)`` by the ``"encoder"``, or of the ``"prior"``,
                which does not depend on the encoder and needs more steps.
            batch_size: Rows of data at a time; memory grows with it.
            seed: Random seed of the method.
            options: Options of the method; those of ``"ais"`` are in `Annealing`.

        Raises:
            ModelError: The decoder or the prior has no density, or codes are discrete.
            OptionError: An option has a value that cannot work, or the encoder has no noise to start from.
            TypeError: The method does not have such an option.
        """
        check_choice("method", method, EVIDENCE)
        check_choice("start", start, ("encoder", "prior"))
        check_whole("batch_size", batch_size)
        if seed is not None:
            check_seed("seed", seed)
        estimate = EVIDENCE[method]
        known = [*inspect.signature(Annealing if method == "ais" else estimate).parameters]
        for name in options:
            if name not in known or name in ("log_joint", "loc", "scale"):
                of = f"log_evidence() got an unexpected keyword argument {name!r} for method {method!r}"
                raise TypeError(f"{of}. {did_you_mean(name, known)}".rstrip())
        x = self._input(x)
        self._check_log_joint()
        with self._as_is(), forked():
            if seed is not None:
                torch.manual_seed(seed)
            parts = [
                estimate(partial(self.log_joint, x=rows), *self._moments(rows, start), **options)
                for rows in x.split(batch_size)
            ]
        return torch.cat(parts)

    def player(
        self, name: str, modules: Iterable[nn.Module], loss: Loss, batch: Batch, *, adversary: bool = False
    ) -> Player:
        """Return a player with one loss of the batch per step, or with one per adversary step as an adversary."""

        def losses(stage: Stage) -> Iterator[Scored]:
            for _ in range(stage.adversary_steps if adversary else 1):
                yield loss(batch(), stage)

        lr = attrgetter("adversary_lr" if adversary else "lr")
        return Player(name, nn.ModuleList(modules), losses, lr)

    def check_data(self, x: Tensor) -> None:
        if self.suits(x):
            return
        if not (finite := x.isfinite()).all():
            bad = f"{rows_with(~finite)} that are not finite"
            raise ModelError.must_be("Data", "finite", bad, "Drop or impute them.")
        self.decoder.check(x)  # type: ignore[operator]

    def suits(self, x: Tensor) -> Tensor:
        self.check_shape(x)
        limits, check = (getattr(self.decoder, name, None) for name in ("limits", "check"))
        if limits is None and check is not None:
            check(x)
        (low, high), (least, most) = x.aminmax(), limits or (-inf, inf)
        suits: Tensor = low.isfinite() & high.isfinite() & (low >= least) & (high <= most)
        return suits

    def check_shape(self, x: Tensor) -> None:
        """Raise `ShapeError` unless ``x`` has the shape ``[N, *x_shape]``."""
        if x.shape[1:] != self.x_shape:
            do = "Images need their channel axis: x[:, None]; rows are x.flatten(1)."
            raise ShapeError.must_be("Data", f"of shape [N, {', '.join(map(str, self.x_shape))}]", [*x.shape], do)

    def _input(self, x: Tensor) -> Tensor:
        x = tensor_of(x).to(self.like)
        self.check_data(x)
        return x

    @torch.no_grad()
    def _moments(self, x: Tensor, start: str) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation ``[B, D]`` of ``q(z | x)``, or of the prior for every datum."""
        if start == "encoder":
            return moments_of(self.encoder(x), 256)
        loc, scale = moments_of(self.prior(), 10_000)
        return loc.expand(len(x), -1), scale.expand(len(x), -1)

    def _check_log_joint(self) -> None:
        """Raise `ModelError` unless ``log p(x, z)`` can be integrated over ``z``."""
        self.check_weights()
        with torch.no_grad(), forked():
            prior = self.prior()
            for name, p in (("decoder", self.decoder(prior.sample([2]))), ("prior", prior)):
                if not has_density(p):
                    needs = f"The evidence needs a density of the {name}, and the {name} has none."
                    raise ModelError(f"{needs} Use one of the divergences between draws instead.")
        if prior.support.is_discrete:
            codes = "the codes of this model are discrete. Sum over the codes if they can be listed."
            raise ModelError(f"The evidence is an integral over codes, and {codes}")

    def adversary_of(self, inputs: str, adversary: Any, name: str = "adversary") -> nn.Module:
        """Return a network; raise an error unless it scores ``"codes"``, ``"data"`` or ``"pairs"`` of 2 x 3 codes."""
        network = as_network(name, adversary)
        with LatentModel._as_is(network), torch.no_grad(), forked():  # type: ignore[arg-type]
            z = self.prior().sample(torch.Size([2, 3]))
            x = z.new_zeros(3, *self.x_shape)
            given = {"codes": (z,), "data": (x,), "pairs": (z, x)}[inputs]
            shapes = " and ".join(str(tuple(each.shape)) for each in given)
            try:
                scores = network(*given)
            except (RuntimeError, TypeError) as error:
                raise ShapeError(f"The {name} does not accept {inputs} {shapes}: {reason_of(error)}.") from error
        expected = given[0].shape[: given[0].dim() - (len(self.x_shape) if inputs == "data" else 1)]
        if scores.shape != expected:
            what, do = f"Scores of the {name} for {shapes}", "Leave out the last axis: scores.squeeze(-1)."
            raise ShapeError.must_be(what, f"of shape {tuple(expected)}", tuple(scores.shape), do)
        return network

    @contextmanager
    def _as_is(self) -> Iterator[None]:
        """Turn dropout, batch statistics and gradients of the weights off, and restore them afterwards."""
        modes = [(module, module.training) for module in self.modules()]
        wanted = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        self.eval().requires_grad_(False)
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, flag in wanted:
                parameter.requires_grad_(flag)

    def _probe(self) -> tuple[torch.Size, int]:
        """Return the shapes of a datum and of a code; check that encoder, decoder and prior do what is needed."""
        with self._as_is(), torch.no_grad(), forked():
            prior = _distribution("prior", self.prior)
            _check_shapes("prior, p(z) over codes [D]", prior, (), 1)
            z = prior.sample(_shape(2))
            decoded = _distribution("decoder", self.decoder, z)
            _check_shapes("decoder, p(x | z) for codes [2, D]", decoded, (2,), None)
            blank = z.new_zeros(2, *decoded.event_shape)
            encoded = _distribution("encoder", self.encoder, blank)
            _check_shapes(f"encoder, q(z | x) for data {tuple(blank.shape)}", encoded, (2,), 1)
            if encoded.event_shape != prior.event_shape:
                dims = f"{encoded.event_shape[0]} and {prior.event_shape[0]}"
                raise ShapeError.must_be("Dimensions of the codes of encoder and prior", "equal", dims)
            for name, p in (("prior", prior), ("decoder", decoded), ("encoder", encoded)):
                self._check_needs(name, p)
        return torch.Size(decoded.event_shape), prior.event_shape[0]

    def _check_needs(self, name: str, p: Distribution) -> None:
        """Raise `ModelError` unless ``p``, of the encoder, decoder or prior, has the abilities in ``needs``."""
        needed = self.needs.get(name, set())
        lacks = ["gradients through its draws (rsample)"] if "gradients" in needed and not p.has_rsample else []
        lacks += ["a density (log_prob)"] if "density" in needed and not has_density(p) else []
        if lacks:
            of = f"The {name} of {type(self).__name__} must have {' and '.join(lacks)}, got {type(p).__name__}."
            more = " Binary data have likelihood='straight_through'." if name == "decoder" and not p.has_rsample else ""
            raise ModelError(f"{of} docs/vae.md has the table of the needs of each objective.{more}")


def as_network(name: str, module: Any) -> nn.Module:
    """Return a module; raise `ModelError` for anything else."""
    if isinstance(module, nn.Module):
        return module
    got = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
    raise ModelError.must_be(f"The {name}", "a torch.nn.Module", got)


def _shape(num_samples: int | None) -> torch.Size:
    return torch.Size([] if num_samples is None else [num_samples])


def _distribution(name: str, part: nn.Module, *args: Tensor) -> Distribution:
    """Return the distribution that the encoder, decoder or prior gives; raise an error if it gives none."""
    versions = [0 if arg.is_inference() else arg._version for arg in args]
    try:
        value = part(*args)
    except RuntimeError as error:
        got = (f" of shape {tuple(args[0].shape)}" if args else "") + f": {reason_of(error)}"
        do = "A decoder takes codes of the prior's dimension, an encoder data of the decoder's shape."
        raise ShapeError(f"The {name} does not accept its input{got}. {do}") from error
    if versions != [0 if arg.is_inference() else arg._version for arg in args]:
        do = "Leave out inplace=True in its first layer."
        raise ModelError(f"The {name} must not change its input in place: others use it after it. {do}")
    if isinstance(value, Distribution):
        return value
    expected, got = "a torch.distributions.Distribution", type(value).__name__
    do = "Decoder, GaussianEncoder and ImplicitEncoder make one of a network's output."
    raise ModelError.must_be(f"The value of the {name}", expected, got, do)


def _check_shapes(name: str, p: Distribution, batch: tuple[int, ...], event_dims: int | None) -> None:
    if p.batch_shape != batch or event_dims not in (None, len(p.event_shape)):
        expected = f"batch shape {batch}" + (" and one event axis" if event_dims == 1 else "")
        got = f"batch shape {tuple(p.batch_shape)} and event shape {tuple(p.event_shape)}"
        do = "torch.distributions.Independent moves axes from the batch to the event."
        raise ShapeError.must_be(f"The shape of the {name},", expected, got, do)
