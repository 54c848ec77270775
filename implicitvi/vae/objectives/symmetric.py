"""Symmetric equilibrium learning: encoder and decoder, each fitted to what the other one draws."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from implicitvi import distributed
from implicitvi.errors import ModelError, OptionError, ShapeError
from implicitvi.training import Player, Stage
from implicitvi.training.player import Metrics
from implicitvi.vae.architectures import Architecture, ReadyMade
from implicitvi.vae.data import tensor_of
from implicitvi.vae.decoders import Likelihood
from implicitvi.vae.distributions import has_density
from implicitvi.vae.fitting import VAEFit
from implicitvi.vae.model import Batch, LatentModel

Utility = Callable[[Tensor, Tensor], Tensor]
Pairs = tuple[Tensor, Tensor]  # codes [M, D] and data [M, *x_shape]


class SymmetricVAE(ReadyMade, LatentModel):
    """Nash equilibrium learning of a latent variable model: two players, each with a utility of its own.

        decoder:  max E_{x ~ data} E_{z ~ q(z | x)} log p(x | z)        (and of log p(z), where the prior is learned)
        encoder:  max E_{z ~ p(z)} E_{x ~ p(x | z)} log q(z | x)

    Both are maximum likelihood on draws of the other player, so no gradient passes through a draw: codes and data may
    be discrete, and of data and prior nothing is needed but draws. The decoder minimises ``KL(q(x, z) ‖ p(x, z))``,
    the encoder ``KL(p(x, z) ‖ q(x, z))``. Unrestricted players are in equilibrium exactly where the two joints are
    one, ``p_data(x) q(z | x) = p(z) p(x | z)``.

    Every joint with the right marginals is such an equilibrium, the one where ``z`` tells nothing of ``x`` included.
    Which is found is up to what the networks can express and to labelled pairs: without any, codes are right up to a
    symmetry of the prior at best. The encoder is trained on what the decoder draws only; noise on the data helps it
    early on, and is what ``transform`` of `fit` is for.

    Args:
        encoder: ``q(z | x)``: draws, and a density.
        decoder: ``p(x | z)``: draws, and a density.
        prior: ``p(z)``; draws are enough, unless it has parameters to learn. The number ``D`` for ``N(0, I)``.

    Raises:
        ModelError: An arrow lacks what it needs.

    References:
        Symmetric Equilibrium Learning of VAEs, Boris Flach, Dmitrij Schlesinger, Alexander Shekhovtsov, 2024.
        The wake-sleep algorithm for unsupervised neural networks, Geoffrey Hinton, Peter Dayan, Brendan Frey,
        Radford Neal, 1995.
    """

    needs = {"prior": {"draws"}, "encoder": {"draws", "density"}, "decoder": {"draws", "density"}}

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: Any):
        super().__init__(encoder, decoder, prior)
        self.learns_prior = any(p.requires_grad for p in self.prior.parameters())
        if self.learns_prior and not has_density(self.prior()):
            raise ModelError(
                "a prior with parameters is learned by its density, and it has none",
                got=type(self.prior()).__name__,
                do="Freeze it, prior.requires_grad_(False), or give its distribution a log_prob.",
            )
        self._pairs: Pairs | None = None

    @classmethod
    def assemble(
        cls,
        networks: Architecture,
        z_dim: int,
        *,
        posterior: str = "gaussian",
        likelihood: str | Likelihood = "bernoulli",
        prior: Any = None,
    ) -> Self:
        """The system of ready-made networks.

        Args:
            networks: What encoder and decoder are made of.
            z_dim: Dimension ``D`` of a code.
            posterior: See `Architecture.encoder`.
            likelihood: A key of `LIKELIHOODS`, or a `Likelihood`.
            prior: As for the class; ``None`` for ``N(0, I)``.
        """
        return cls(*networks.arrows(z_dim, posterior, likelihood, prior))

    def players(self, batch: Batch) -> list[Player]:
        pairs = None
        if self._pairs is not None:
            mine = slice(distributed.rank(), None, distributed.count())
            z, x = self._pairs
            pairs = z[mine].to(self.device), x[mine].to(self.device)
        decoder = partial(self._decoder_loss, pairs=pairs)
        encoder = partial(self._encoder_loss, pairs=pairs)
        return [
            self.player("decoder", [self.decoder, self.prior], decoder, batch),
            self.player("encoder", [self.encoder], encoder, batch),
        ]

    def decoder_utility(self, z: Tensor, x: Tensor) -> Tensor:
        """What the decoder gains by pairs drawn by the encoder: ``log p(x | z)``, and ``log p(z)`` of a learned prior.

        Args:
            z: Codes ``[..., B, D]``.
            x: Data ``[B, *x_shape]``.

        Returns:
            ``[..., B]`` in nats, higher is better.
        """
        utility: Tensor = self.decoder(z).log_prob(x)
        return utility + self.prior().log_prob(z) if self.learns_prior else utility

    def encoder_utility(self, z: Tensor, x: Tensor) -> Tensor:
        """What the encoder gains by pairs drawn by prior and decoder, ``log q(z | x)``; shapes as `decoder_utility`."""
        utility: Tensor = self.encoder(x).log_prob(z)
        return utility

    def fit(self, train: Any, *, pairs: tuple[Any, Any] | None = None, **options: Any) -> VAEFit[Self]:
        """Train on data, and on labelled pairs where there are any.

        In every step the pairs stand beside the rows of the batch, for both players, each row with the same weight. Of
        more pairs than the batch has rows, as many are drawn anew for every turn.

        Args:
            train: As in `LatentModel.fit`; without labels.
            pairs: Data ``[M, *x_shape]`` and their codes ``[M, D]``.
            options: Options of `LatentModel.fit`; any other is a ``TypeError``.

        Raises:
            ShapeError: The pairs are not two tensors of these shapes.
            OptionError: Encoder or decoder cannot score them.
        """
        self._pairs = None if pairs is None else self._checked(pairs)
        try:
            return super().fit(train, **options)
        finally:
            self._pairs = None

    @torch.no_grad()
    def validate(self, x: Tensor) -> dict[str, Tensor]:
        z = self.encode(x)
        fantasies = self._fantasies(len(x))
        return {
            "decoder_utility": self.decoder_utility(z, x).mean(),
            "encoder_utility": self.encoder_utility(*fantasies).mean(),
        }

    def _decoder_loss(self, x: Tensor, stage: Stage, *, pairs: Pairs | None) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            z = self.encoder(x).sample(torch.Size([stage.num_particles]))
        return _loss(self.decoder_utility, self.decoder_utility(z, x).mean(0), pairs)

    def _encoder_loss(self, x: Tensor, stage: Stage, *, pairs: Pairs | None) -> tuple[Tensor, Metrics]:
        z, fantasies = self._fantasies(stage.num_particles * len(x))
        drawn = self.encoder_utility(z, fantasies).reshape(-1, len(x)).mean(0)
        return _loss(self.encoder_utility, drawn, pairs)

    @torch.no_grad()
    def _fantasies(self, rows: int) -> tuple[Tensor, Tensor]:
        """Codes ``[rows, D]`` of the prior, and data ``[rows, *x_shape]`` drawn for them."""
        z = self.prior().sample(torch.Size([rows]))
        return z, self.decoder(z).sample()

    def _checked(self, pairs: tuple[Any, Any]) -> Pairs:
        """Codes and data of labelled pairs that encoder and decoder can score."""
        if not isinstance(pairs, tuple | list) or len(pairs) != 2:
            raise OptionError(
                "pairs are not two things", got=type(pairs).__name__, expected="(data [M, *x_shape], codes [M, D])"
            )
        x, z = (tensor_of(part).to(self.device) for part in pairs)
        if z.shape != (len(x), self.latent_dim):
            raise ShapeError(
                "the codes of the pairs do not have the shape of a code for each datum",
                got=f"{list(z.shape)} for {len(x)} data",
                expected=[len(x), self.latent_dim],
            )
        self.check_data(x)
        with self._as_is(), torch.no_grad():
            q = self.encoder(x)
            known = _supports(q, z)
            for name, utility in (("encoder", self.encoder_utility), ("decoder", self.decoder_utility)):
                bad = ~(utility(z, x).isfinite() & known)
                if bad.any():
                    first = int(bad.nonzero()[0])
                    raise OptionError(
                        f"the {name} cannot score the codes of {int(bad.sum())} of {len(z)} pairs",
                        got=f"{z[first].tolist()} in row {first}",
                        expected=f"values that {name} and prior can give",
                    )
        return z, x


def _loss(utility: Utility, drawn: Tensor, pairs: Pairs | None) -> tuple[Tensor, Metrics]:
    """Less the mean utility of ``drawn [B]`` and of labelled pairs, of at most ``B`` of them; each row counts once."""
    if pairs is not None:
        z, x = pairs
        if len(z) > len(drawn):
            rows = torch.randperm(len(z), device=z.device)[: len(drawn)]
            z, x = z[rows], x[rows]
        drawn = torch.cat([drawn, utility(z, x)])
    return -drawn.mean(), {}


def _supports(q: Distribution, z: Tensor) -> Tensor | bool:
    """Whether each code is one that ``q`` could draw, as far as it says."""
    try:
        return q.support.check(z)  # type: ignore[no-any-return, union-attr]
    except NotImplementedError:
        return True
