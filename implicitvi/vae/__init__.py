"""Latent variable models with an encoder, trained by variational, adversarial and equilibrium learning."""

from implicitvi.vae.avb import AVB
from implicitvi.vae.elbo import VAE

__all__ = ["AVB", "VAE"]
