"""All objectives of latent variable models, in one list: every one is held to the same laws.

A new objective joins the list here and is tested.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from implicitvi.avb.adversaries import GatedAdversary
from implicitvi.avb.samplers import NoiseBasisSampler
from implicitvi.nn import mlp
from implicitvi.training import Player, Schedule, Stage
from implicitvi.vae.decoders import (
    BernoulliLikelihood,
    Decoder,
    GaussianLikelihood,
    ImplicitDecoder,
    Likelihood,
    StraightThroughLikelihood,
)
from implicitvi.vae.encoders import ConditionalGaussian, DeterministicEncoder, GaussianEncoder, ImplicitEncoder
from implicitvi.vae.model import LatentModel
from implicitvi.vae.objectives.aae import AAE
from implicitvi.vae.objectives.ali import ALI
from implicitvi.vae.objectives.asvae import ASVAE
from implicitvi.vae.objectives.auxiliary import AuxiliaryVAE
from implicitvi.vae.objectives.avb import AVB
from implicitvi.vae.objectives.biadversarial import BiadversarialVAE
from implicitvi.vae.objectives.marginal_asvae import MarginalASVAE
from implicitvi.vae.objectives.symmetric import SymmetricVAE
from implicitvi.vae.objectives.vae import VAE

X, Z, A = 4, 2, 3  # dimensions of data, codes and the auxiliary variable


def prior_draws(num_samples: int) -> Tensor:
    """A prior known by its draws: two lumps."""
    signs = torch.randint(2, (num_samples, 1)) * 2.0 - 1
    return signs + 0.3 * torch.randn(num_samples, Z)


def explicit_encoder() -> nn.Module:
    return GaussianEncoder(mlp([X, 8, 2 * Z]))


def implicit_encoder() -> nn.Module:
    return ImplicitEncoder(NoiseBasisSampler(Z, context_dim=X, num_basis=3, hidden=(8,)))


def deterministic_encoder() -> nn.Module:
    return DeterministicEncoder(mlp([X, 8, Z]))


def decoder(likelihood: Likelihood | None = None) -> nn.Module:
    likelihood = likelihood or GaussianLikelihood([X])
    return Decoder(mlp([Z, 8, likelihood.size]), likelihood)


def bernoulli_decoder() -> nn.Module:
    return decoder(BernoulliLikelihood([X]))


def straight_through_decoder() -> nn.Module:
    return decoder(StraightThroughLikelihood([X]))


def implicit_decoder() -> nn.Module:
    return ImplicitDecoder(mlp([Z + 2, 8, X]), [X], noise_dim=2)


def of_pairs() -> nn.Module:
    """An adversary of codes and data."""
    return GatedAdversary(Z, context_dim=X, width=8)


def of_codes() -> nn.Module:
    return GatedAdversary(Z, width=8)


def of_data() -> nn.Module:
    return GatedAdversary(X, width=8)


SYSTEMS: dict[str, Callable[[], LatentModel]] = {
    "VAE": lambda: VAE(explicit_encoder(), bernoulli_decoder(), Z),
    "IWAE": lambda: VAE(explicit_encoder(), bernoulli_decoder(), Z, num_importance=3),
    "AuxiliaryVAE": lambda: AuxiliaryVAE(
        GaussianEncoder(mlp([X, 8, 2 * A])),
        bernoulli_decoder(),
        Z,
        second=ConditionalGaussian(mlp([A + X, 8, 2 * Z])),
        auxiliary=ConditionalGaussian(mlp([Z + X, 8, 2 * A])),
    ),
    "AVB": lambda: AVB(implicit_encoder(), bernoulli_decoder(), prior_draws, of_pairs()),
    "AVB, f-GAN": lambda: AVB(implicit_encoder(), bernoulli_decoder(), Z, of_pairs(), ratio="fgan_kl", informed=False),
    "AVB, Gaussian contrast": lambda: AVB(implicit_encoder(), bernoulli_decoder(), Z, of_pairs(), contrast="gaussian"),
    "AAE": lambda: AAE(deterministic_encoder(), bernoulli_decoder(), prior_draws, of_codes()),
    "ALI": lambda: ALI(implicit_encoder(), implicit_decoder(), prior_draws, of_pairs()),
    "ALI, binary": lambda: ALI(deterministic_encoder(), straight_through_decoder(), Z, of_pairs(), penalty=0.1),
    "ALICE": lambda: ALI(explicit_encoder(), decoder(), Z, of_pairs(), cycle=1.0),
    "ASVAE": lambda: ASVAE(explicit_encoder(), decoder(), prior_draws, of_pairs(), of_pairs()),
    "ASVAE, binary": lambda: ASVAE(explicit_encoder(), straight_through_decoder(), Z, of_pairs(), of_pairs()),
    "MarginalASVAE": lambda: MarginalASVAE(explicit_encoder(), decoder(), Z, of_data()),
    "BiadversarialVAE": lambda: BiadversarialVAE(
        implicit_encoder(), implicit_decoder(), prior_draws, of_pairs(), of_pairs()
    ),
    "BiadversarialVAE, f-GAN": lambda: BiadversarialVAE(
        implicit_encoder(), implicit_decoder(), Z, of_pairs(), of_pairs(), ratio="fgan_kl"
    ),
    "BiadversarialVAE, cycle": lambda: BiadversarialVAE(
        explicit_encoder(), decoder(), Z, of_pairs(), of_pairs(), cycle=1.0
    ),
    "SymmetricVAE": lambda: SymmetricVAE(explicit_encoder(), bernoulli_decoder(), prior_draws),
    "AVB, informed": lambda: AVB(implicit_encoder(), bernoulli_decoder(), Z, of_pairs(), informed=True, averaging=0.5),
}


def data(num_rows: int = 40, seed: int = 0) -> Tensor:
    """Data that any of the likelihoods could give, ``[num_rows, X]``: 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.tensor([0.2, 0.8]).repeat_interleave(X // 2)
    lot = torch.rand(num_rows, 1, generator=generator) < 0.5
    return torch.bernoulli(torch.where(lot, p, 1 - p), generator=generator)


def shaken(name: str) -> LatentModel:
    """A model whose zero layers are filled, so that every parameter matters."""
    torch.manual_seed(0)
    model = SYSTEMS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def stage(num_particles: int = 2) -> Stage:
    return Schedule(num_steps=1, num_particles=num_particles, adversary_steps=1).at(0)


def loss_of(player: Player, num_particles: int = 2) -> Tensor:
    """The loss of a player's next step."""
    loss, _ = next(player.losses(stage(num_particles)))
    assert loss is not None
    return loss
