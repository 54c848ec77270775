"""A latent variable model: encoder, decoder and prior, how they are trained, and what can be asked of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Self, Unpack

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from implicitvi.errors import ModelError, ShapeError, check_choice, check_whole
from implicitvi.metrics.ais import ais
from implicitvi.metrics.evidence import importance_sampling, quadrature
from implicitvi.rng import forked
from implicitvi.training import Player, Stage
from implicitvi.training.options import from_options, with_options
from implicitvi.training.player import Metrics
from implicitvi.vae.distributions import has_density
from implicitvi.vae.encoders import moments_of
from implicitvi.vae.fitting import Trainable, VAEFit, run_fit
from implicitvi.vae.priors import prior_of
from implicitvi.vae.settings import FitOptions, FitSettings

Batch = Callable[[], Tensor]
Loss = Callable[[Tensor, Stage], tuple[Tensor | None, Metrics]]

EVIDENCE: dict[str, Callable[..., Tensor]] = {"ais": ais, "iwae": importance_sampling, "quadrature": quadrature}
STARTS = ("encoder", "prior")


class LatentModel(Trainable):
    """An encoder ``q(z | x)``, a decoder ``p(x | z)`` and a prior ``p(z)``, trained by an objective.

    Each of the three is a module that returns a distribution. Implementing an objective: subclass this, say in
    ``needs`` what the three must be able to do, and return its `Player` s from ``players``; then join the list in
    ``tests/vae_contracts.py``.

    Args:
        encoder: Data ``[B, *x_shape]`` to a distribution over codes: batch shape ``[B]``, event shape ``[D]``.
        decoder: Codes ``[..., D]`` to a distribution over data: batch shape ``[...]``, event shape ``x_shape``.
        prior: A module that returns ``p(z)``, a distribution with event shape ``[D]``, a function of the number of
            draws, or the number ``D`` for ``N(0, I)``.

    Attributes:
        needs: Abilities that encoder, decoder and prior must have: ``"draws"``, ``"gradients"`` (draws with
            gradients), ``"density"``.
        x_shape: Shape of one datum.
        latent_dim: Dimension ``D`` of a code.
    """

    needs: ClassVar[dict[str, set[str]]] = {}

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: Any):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.prior = prior_of(prior)
        self.x_shape, self.latent_dim = self._probe()

    @abstractmethod
    def players(self, batch: Batch) -> list[Player]:
        """Return the players in the order of their turns; ``batch()`` is the present batch ``x [B, *x_shape]``."""

    @torch.no_grad()
    def validate(self, x: Tensor) -> dict[str, Tensor]:
        """Return figures of held-out data ``x [B, *x_shape]``: means over the rows, logs in nats."""
        z = self.encode(x)
        p = self.decoder(z)
        if has_density(p):
            return {"log_likelihood": p.log_prob(x).mean()}
        return {"squared_error": (p.sample() - x).square().mean()}

    @with_options(FitSettings)
    def fit(
        self,
        train: Any,
        *,
        validation: Any = None,
        settings: FitSettings | None = None,
        **options: Unpack[FitOptions],
    ) -> VAEFit[Self]:
        """Train on data; an interrupt keeps the weights learned so far.

        Under ``torchrun``, or in a group of `torch.distributed` that has been started, every process takes its share of
        each batch, and all of them have the same weights at every step (docs/decisions/0004-several-processes.md).

        Args:
            train: ``[N, *x_shape]`` as a tensor or an array, a ``Dataset``, or a ``DataLoader``; of batches that are
                tuples the first part. An epoch leaves out rows that do not fill a last batch; all batches of a
                ``DataLoader`` are used.
            validation: As ``train``; the figures of ``validate`` over all of it are kept after every epoch.
            settings: Options as a value; the following ones, where they are given, replace its fields.

        Returns:
            The trained model, which is this one, with the record of its training.

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
        """Draws of ``q(z | x)`` for ``x [B, *x_shape]``: ``[num_samples, B, D]``, or one each, ``[B, D]``."""
        z: Tensor = self.encoder(self._input(x)).sample(_shape(num_samples))
        return z

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Mean of ``p(x | z)`` for codes ``z [..., D]``: ``[..., *x_shape]``; a draw where it has no mean."""
        if z.shape[-1:] != (self.latent_dim,):
            raise ShapeError(
                "the codes do not have the dimension of the model's",
                got=f"[{', '.join(map(str, z.shape))}]",
                expected=f"[..., {self.latent_dim}]",
                do="model.encode(x) and model.prior().sample([n]) give codes.",
            )
        p = self.decoder(z)
        try:
            mean: Tensor = p.mean
        except NotImplementedError:
            return p.sample()  # type: ignore[no-any-return]
        return mean

    def reconstruct(self, x: Tensor) -> Tensor:
        """``x [B, *x_shape]`` through a code drawn for it and back, as `decode` has it."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def sample(self, num_samples: int) -> Tensor:
        """New data ``[num_samples, *x_shape]``: draws of ``p(x | z)`` at draws of the prior."""
        check_whole("num_samples", num_samples)
        x: Tensor = self.decoder(self.prior().sample(_shape(num_samples))).sample()
        return x

    def log_joint(self, z: Tensor, x: Tensor) -> Tensor:
        """``log p(x | z) + log p(z)`` in nats: ``z [..., B, D]`` and ``x [B, *x_shape]`` to ``[..., B]``.

        Raises:
            ModelError: The decoder or the prior has no density.
        """
        log_p: Tensor = self.decoder(z).log_prob(x) + self.prior().log_prob(z)
        return log_p

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
        """Estimated ``log p(x)`` of each datum ``x [B, *x_shape]``: ``[B]`` in nats.

        Args:
            x: Data.
            method: ``"ais"``, annealed importance sampling by Hamiltonian Monte Carlo (`ais`); ``"iwae"``, importance
                sampling from a widened Gaussian at the moments of the start (`importance_sampling`);
                ``"quadrature"``, a grid over one or two latent dimensions (`quadrature`).
            start: Where the method looks first: at the moments of ``q(z | x)`` by the ``"encoder"``, or at those of the
                ``"prior"``, which owes nothing to the encoder and needs more steps.
            batch_size: Rows of data at a time; memory grows with it.
            seed: Seed of the method's own random numbers.
            options: Options of the method; those of ``"ais"`` are in `Annealing`.

        Raises:
            ModelError: The decoder or the prior has no density, or codes are discrete.
            OptionError: An option has a value that cannot work, or the encoder has no noise to start from.
        """
        check_choice("method", method, EVIDENCE)
        check_choice("start", start, STARTS)
        check_whole("batch_size", batch_size)
        x = self._input(x)
        self._check_log_joint()
        estimates = []
        with self._as_is(), forked():
            if seed is not None:
                torch.manual_seed(seed)
            for rows in x.split(batch_size):
                loc, scale = self._moments(rows, start)
                log_joint = partial(self.log_joint, x=rows)
                estimates.append(EVIDENCE[method](log_joint, loc, scale, **options))
        return torch.cat(estimates)

    # what systems are built with

    def player(
        self, name: str, modules: Iterable[nn.Module], loss: Loss, batch: Batch, *, adversary: bool = False
    ) -> Player:
        """A player with one loss of the batch a step, or, as an adversary, one for each of the adversary's steps."""

        def losses(stage: Stage) -> Iterator[tuple[Tensor | None, Metrics]]:
            for _ in range(stage.adversary_steps if adversary else 1):
                yield loss(batch(), stage)

        return Player(
            name, nn.ModuleList(modules), losses, lr=lambda stage: stage.adversary_lr if adversary else stage.lr
        )

    @property
    def like(self) -> Tensor:
        """An empty tensor on the model's device and in its dtype."""
        weights = (p for p in self.parameters() if p.is_floating_point())
        return next((p.new_empty(0) for p in weights), torch.empty(0))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.like.device

    def check_data(self, x: Tensor) -> None:
        """Raise an error that names what is wrong with data ``x [N, *x_shape]``, if anything is."""
        if x.shape[1:] != self.x_shape:
            raise ShapeError(
                "the data do not have the shape of the model's",
                got=f"[{x.shape[0]}, {', '.join(map(str, x.shape[1:]))}]",
                expected=f"[N, {', '.join(map(str, self.x_shape))}]",
                do="Images need their channel axis: x[:, None]; rows are x.flatten(1).",
            )
        if not x.isfinite().all():
            rows = (~x.isfinite()).flatten(1).any(1).sum().item()
            raise ModelError(
                "the data have entries that are not finite",
                got=f"{rows} such rows of {len(x)}",
                do="Drop them or fill them in.",
            )
        check = getattr(self.decoder, "check", None)
        if check is not None:
            check(x)

    def _input(self, x: Tensor) -> Tensor:
        x = torch.as_tensor(x).to(self.like)
        self.check_data(x)
        return x

    @torch.no_grad()
    def _moments(self, x: Tensor, start: str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``[B, D]`` of ``q(z | x)``, or of the prior for every datum."""
        if start == "encoder":
            return moments_of(self.encoder(x), 256)
        loc, scale = moments_of(self.prior(), 10_000)
        shape = (len(x), self.latent_dim)
        return loc.expand(shape), scale.expand(shape)

    def _check_log_joint(self) -> None:
        """Raise `ModelError` unless ``log p(x, z)`` can be integrated over ``z``."""
        with torch.no_grad(), forked():
            prior = self.prior()
            decoded = self.decoder(prior.sample([2]))
            for name, arrow in (("decoder", decoded), ("prior", prior)):
                if not has_density(arrow):
                    raise ModelError(
                        f"the evidence needs a density of the {name}, and it has none",
                        do="Use one of the divergences between draws instead.",
                    )
        if prior.support.is_discrete:
            raise ModelError(
                "the evidence is an integral over codes, and those of this model are discrete",
                do="Sum over the codes where they can be listed.",
            )

    @contextmanager
    def _as_is(self) -> Iterator[None]:
        """Without dropout, batch statistics and gradients of the weights, which all come back."""
        modes = {module: module.training for module in self.modules()}
        wanted = {p: p.requires_grad for p in self.parameters()}
        self.eval().requires_grad_(False)
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter, flag in wanted.items():
                parameter.requires_grad_(flag)

    def _probe(self) -> tuple[torch.Size, int]:
        """Shapes of a datum and of a code, and whether every arrow does what is needed of it."""
        with self._as_is(), torch.no_grad(), forked():
            prior = _distribution("prior", self.prior)
            _check_shapes("prior", prior, (), 1, "p(z) over codes [D]")
            z = prior.sample(_shape(2))
            decoded = _distribution("decoder", self.decoder, z)
            _check_shapes("decoder", decoded, (2,), None, "p(x | z) for codes [2, D]")
            blank = z.new_zeros(2, *decoded.event_shape)
            encoded = _distribution("encoder", self.encoder, blank)
            _check_shapes("encoder", encoded, (2,), 1, f"q(z | x) for data {tuple(blank.shape)}")
            if encoded.event_shape != prior.event_shape:
                raise ShapeError(
                    "encoder and prior disagree on the dimension of a code",
                    got=f"{encoded.event_shape[0]} and {prior.event_shape[0]}",
                    expected="the same",
                )
            arrows = {"prior": prior, "decoder": decoded, "encoder": encoded}
            for name, arrow in arrows.items():
                self._check_needs(name, arrow)
        return torch.Size(decoded.event_shape), prior.event_shape[0]

    def _check_needs(self, name: str, arrow: Distribution) -> None:
        needed = self.needs.get(name, set())
        lacks = []
        if "gradients" in needed and not arrow.has_rsample:
            lacks.append("gradients through its draws (rsample)")
        if "density" in needed and not has_density(arrow):
            lacks.append("a density (log_prob)")
        if lacks:
            binary = name == "decoder" and not arrow.has_rsample
            raise ModelError(
                f"{type(self).__name__} needs of its {name} {' and '.join(lacks)}",
                got=type(arrow).__name__,
                do="docs/vae.md has the table of what each system needs."
                + (" Binary data have likelihood='straight_through'." if binary else ""),
            )


def _shape(num_samples: int | None) -> torch.Size:
    return torch.Size([] if num_samples is None else [num_samples])


def _distribution(name: str, arrow: nn.Module, *args: Tensor) -> Distribution:
    try:
        value = arrow(*args)
    except RuntimeError as error:
        raise ShapeError(
            f"the {name} does not take what it is given",
            got=f"shape {tuple(args[0].shape)}" if args else None,
            do=f"torch says: {str(error).splitlines()[0]}. A decoder takes codes of the prior's dimension, an encoder "
            "data of the decoder's shape.",
        ) from error
    if isinstance(value, Distribution):
        return value
    raise ModelError(
        f"the {name} does not return a distribution",
        got=type(value).__name__,
        expected="a torch.distributions.Distribution",
        do="Decoder, GaussianEncoder and ImplicitEncoder make one of a network's output.",
    )


def _check_shapes(name: str, given: Distribution, batch: tuple[int, ...], event_dims: int | None, what: str) -> None:
    if given.batch_shape == batch and event_dims in (None, len(given.event_shape)):
        return
    raise ShapeError(
        f"the {name} has the wrong shape as {what}",
        got=f"batch shape {tuple(given.batch_shape)}, event shape {tuple(given.event_shape)}",
        expected=f"batch shape {batch}" + (", an event of one axis" if event_dims == 1 else ""),
        do="torch.distributions.Independent moves axes from the batch to the event.",
    )
