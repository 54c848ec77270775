"""Latent variable models with an encoder, trained by variational, adversarial and equilibrium learning."""

from implicitvi.vae.aae import AAE
from implicitvi.vae.ali import ALI
from implicitvi.vae.asvae import ASVAE
from implicitvi.vae.asvae_marginal import MarginalASVAE
from implicitvi.vae.auxiliary import AuxiliaryVAE
from implicitvi.vae.avb import AVB
from implicitvi.vae.biadversarial import BiadversarialVAE
from implicitvi.vae.elbo import VAE
from implicitvi.vae.symmetric import SymmetricVAE

__all__ = [
    "AAE",
    "ALI",
    "ASVAE",
    "AVB",
    "VAE",
    "AuxiliaryVAE",
    "BiadversarialVAE",
    "MarginalASVAE",
    "SymmetricVAE",
]
