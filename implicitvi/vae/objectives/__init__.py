"""Objectives of latent variable models, one file each."""
