"""Adversarial variational Bayes: samplers, contrasts, adversaries and their objective."""
