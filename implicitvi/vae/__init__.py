"""Latent variable models with an encoder, trained by variational, adversarial and equilibrium learning."""

from implicitvi.vae.objectives.aae import AAE
from implicitvi.vae.objectives.ali import ALI
from implicitvi.vae.objectives.asvae import ASVAE
from implicitvi.vae.objectives.auxiliary import AuxiliaryVAE
from implicitvi.vae.objectives.avb import AVB
from implicitvi.vae.objectives.biadversarial import BiadversarialVAE
from implicitvi.vae.objectives.marginal_asvae import MarginalASVAE
from implicitvi.vae.objectives.symmetric import SymmetricVAE
from implicitvi.vae.objectives.vae import VAE

__all__ = ["AAE", "ALI", "ASVAE", "AVB", "VAE", "AuxiliaryVAE", "BiadversarialVAE", "MarginalASVAE", "SymmetricVAE"]
