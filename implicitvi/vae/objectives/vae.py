"""The variational autoencoder: an explicit posterior and the evidence lower bound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from implicitvi.avb.objective import importance_weighted
from implicitvi.errors import check_whole
from implicitvi.training import Player, Stage
from implicitvi.vae.architectures import ReadyMade
from implicitvi.vae.distributions import divergence
from implicitvi.vae.model import Batch, Scored


class VAE(ReadyMade):
    """A variational autoencoder, with any posterior that has a density.

        E_q[log p(x | z)] - KL(q(z | x) ‖ p(z))

    The divergence is in closed form if torch has one (for a Gaussian encoder and prior), else ``log q - log p`` of the
    draws, as for a flow. With ``num_importance = K`` the objective is the log mean of ``K`` importance weights (IWAE).

    Args:
        encoder: ``q(z | x)``: draws with gradients, and a density.
        decoder: ``p(x | z)``, with a density.
        prior: ``p(z)``, with a density; the number ``D`` for ``N(0, I)``.
        num_importance: Weights ``K`` in each bound; 1 for the ELBO.

    References:
        Auto-Encoding Variational Bayes, Diederik Kingma, Max Welling, 2014.
        Importance Weighted Autoencoders, Yuri Burda, Roger Grosse, Ruslan Salakhutdinov, 2016.
    """

    needs = {"encoder": {"draws", "gradients", "density"}} | dict.fromkeys(("prior", "decoder"), {"draws", "density"})

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: Any, *, num_importance: int = 1):
        check_whole("num_importance", num_importance)
        super().__init__(encoder, decoder, prior)
        self.num_importance = num_importance

    def players(self, batch: Batch) -> list[Player]:
        return [self.player("model", [self.encoder, self.decoder, self.prior], self._loss, batch)]

    def elbo(self, x: Tensor, num_samples: int = 1) -> Tensor:
        """Return the bound of each datum ``x [B, *x_shape]`` at draws of its code: ``[num_samples, B]`` in nats."""
        self.check_shape(x)
        q, p = self.encoder(x), self.prior()
        shape = torch.Size([num_samples])
        # a flow is cheap in one direction: its draws come with their density
        together = getattr(q, "rsample_and_log_prob", None)
        z, log_q = together(shape) if together else (q.rsample(shape), None)
        likelihood: Tensor = self.decoder(z).log_prob(x)
        if self.num_importance == 1:
            return likelihood - divergence(q, p, z, log_q)
        elbo: Tensor = likelihood + p.log_prob(z) - (q.log_prob(z) if log_q is None else log_q)
        return elbo

    @torch.no_grad()
    def validate(self, x: Tensor) -> dict[str, Tensor]:
        return {"elbo": self._bound(x, 1).mean()}

    def _bound(self, x: Tensor, num_particles: int) -> Tensor:
        return importance_weighted(self.elbo(x, num_particles * self.num_importance), None, self.num_importance)

    def _loss(self, x: Tensor, stage: Stage) -> Scored:
        return -self._bound(x, stage.num_particles).mean(), {}
