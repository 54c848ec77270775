"""Symmetric equilibrium learning: encoder and decoder are each fitted to draws of the other."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from implicitvi.errors import ModelError
from implicitvi.training import Player, Stage
from implicitvi.vae.architectures import ReadyMade
from implicitvi.vae.distributions import has_density
from implicitvi.vae.fitting import VAEFit
from implicitvi.vae.identity import digest_of
from implicitvi.vae.model import Batch, Scored
from implicitvi.vae.objectives.pairs import Pairs, labelled, loss_with_pairs, own_share


class SymmetricVAE(ReadyMade):
    """A latent variable model trained to a Nash equilibrium of two players.

        decoder:  max E_{x ~ data} E_{z ~ q(z | x)} log p(x | z)        (and of log p(z), if the prior is learned)
        encoder:  max E_{z ~ p(z)} E_{x ~ p(x | z)} log q(z | x)

    Both are maximum likelihood on draws of the other player. No gradient passes through a draw, so codes and data may
    be discrete, and data and prior need draws only. The decoder minimises ``KL(q(x, z) ‖ p(x, z))``, the encoder
    ``KL(p(x, z) ‖ q(x, z))``. Unrestricted players are in equilibrium exactly if the joints are equal; which joint,
    perhaps one with ``z`` independent of ``x``, depends on networks and labelled pairs. Without pairs codes are right
    up to a symmetry of the prior at best. The encoder sees draws of the decoder only; noise on the data helps it early.

    Args:
        encoder: ``q(z | x)``: draws, and a density.
        decoder: ``p(x | z)``: draws, and a density.
        prior: ``p(z)``; draws are enough unless it has parameters to learn. The number ``D`` for ``N(0, I)``.

    References:
        Symmetric Equilibrium Learning of VAEs, Boris Flach, Dmitrij Schlesinger, Alexander Shekhovtsov, 2024.
        The wake-sleep algorithm for unsupervised neural networks, Geoffrey Hinton et al., 1995.
    """

    needs = {"prior": {"draws"}, "encoder": {"draws", "density"}, "decoder": {"draws", "density"}}

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: Any):
        super().__init__(encoder, decoder, prior)
        self.learns_prior = any(p.requires_grad for p in self.prior.parameters())
        if self.learns_prior and not has_density(self.prior()):
            raise ModelError("A prior with parameters must have a log_prob. Or freeze it: prior.requires_grad_(False).")
        self._pairs: Pairs | None = None
        self.pairs = ""  # identifies those of the fit in its checkpoint

    def players(self, batch: Batch) -> list[Player]:
        pairs = None if self._pairs is None else own_share(self._pairs, self.device)
        of_decoder, of_encoder = (partial(loss, pairs=pairs) for loss in (self._decoder_loss, self._encoder_loss))
        decoder = self.player("decoder", [self.decoder, self.prior], of_decoder, batch)
        return [decoder, self.player("encoder", [self.encoder], of_encoder, batch)]

    def decoder_utility(self, z: Tensor, x: Tensor) -> Tensor:
        """Return ``log p(x | z)`` in nats, plus ``log p(z)`` of a learned prior: ``[..., B]`` for ``z [..., B, D]``."""
        self.check_shape(x)
        utility: Tensor = self.decoder(z).log_prob(x)
        return utility + self.prior().log_prob(z) if self.learns_prior else utility

    def encoder_utility(self, z: Tensor, x: Tensor) -> Tensor:
        """Return ``log q(z | x)``, ``[..., B]`` for ``z [..., B, D]``, in nats; higher is better."""
        utility: Tensor = self.encoder(x).log_prob(z)
        return utility

    def fit(self, train: Any, *, pairs: tuple[Any, Any] | None = None, **options: Any) -> VAEFit[Self]:
        """Train as `LatentModel.fit`, and on labelled ``pairs``: data ``[M, *x_shape]`` and their codes ``[M, D]``.

        In every step each pair counts as one row of the batch, for both players; of more pairs than rows a new random
        choice, as many as rows, is used in each turn. See `labelled` for the errors.
        """
        if pairs is not None:
            self._pairs = labelled(pairs, self, encoder=self.encoder_utility, decoder=self.decoder_utility)
            self.pairs = digest_of(*self._pairs)
        try:
            return super().fit(train, **options)
        finally:
            self._pairs, self.pairs = None, ""

    @torch.no_grad()
    def validate(self, x: Tensor) -> dict[str, Tensor]:
        of_decoder = self.decoder_utility(self.encode(x), x).mean()
        return {"decoder_utility": of_decoder, "encoder_utility": self.encoder_utility(*self._fantasies(len(x))).mean()}

    def _decoder_loss(self, x: Tensor, stage: Stage, *, pairs: Pairs | None) -> Scored:
        with torch.no_grad():
            z = self.encoder(x).sample(torch.Size([stage.num_particles]))
        return loss_with_pairs(self.decoder_utility, self.decoder_utility(z, x).mean(0), pairs), {}

    def _encoder_loss(self, x: Tensor, stage: Stage, *, pairs: Pairs | None) -> Scored:
        drawn = self.encoder_utility(*self._fantasies(stage.num_particles * len(x))).reshape(-1, len(x)).mean(0)
        return loss_with_pairs(self.encoder_utility, drawn, pairs), {}

    @torch.no_grad()
    def _fantasies(self, rows: int) -> Pairs:
        """Return codes ``[rows, D]`` of the prior, and data ``[rows, *x_shape]`` drawn for them."""
        z = self.prior().sample(torch.Size([rows]))
        return z, self.decoder(z).sample()
