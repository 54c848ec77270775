"""The Eight Schools of the AVB paper, with exact posterior draws and the evidence."""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from implicitvi.datasets.grids import LOG_2PI, inverse_cdf_draws, log_integral, noise
from implicitvi.errors import check_at_least


@dataclass(frozen=True, eq=False)
class EightSchools:
    """The Eight Schools model of the AVB paper: a ten-dimensional posterior with two mirrored modes.

    ``mu, tau, eta_i ~ N(0, 1)`` and ``y_i ~ N(mu + tau · eta_i, sigma_i²)``. The scale ``tau`` may be negative, so the
    posterior is symmetric under ``(tau, eta) → (-tau, -eta)``. The data are effects ``y [8]`` and their standard errors
    ``sigma [8]``.

    References:
        Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017), section 5.1; data of its published code.
    """

    y: Tensor
    sigma: Tensor

    @staticmethod
    def model(sigma: Tensor, y: Tensor | None = None) -> None:
        """Run the Pyro model, with ``y=None`` to draw the effects.

        Its sites are ``mu``, ``tau`` and, in plate ``schools``, ``eta [8]`` and ``obs [8]``.
        """
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.Normal(0.0, 1.0))
        with pyro.plate("schools", len(sigma)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)

    def log_evidence(self) -> float:
        """Return ``log p(y)`` in nats: ``eta`` and ``mu`` are integrated in closed form, ``tau`` on a grid.

        >>> round(eight_schools().log_evidence(), 4)
        -12.7108
        """
        return log_integral(self._log_tau, -10.0, 10.0)

    def exact_draws(self, num_samples: int, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw independently from the exact posterior; with ``generator=None`` from torch's own generator.

        >>> draws = eight_schools().exact_draws(5)
        >>> {name: tuple(draw.shape) for name, draw in draws.items()}
        {'mu': (5,), 'tau': (5,), 'eta': (5, 8)}
        """
        check_at_least("num_samples", num_samples, 1)
        tau = inverse_cdf_draws(self._log_tau, -10.0, 10.0, num_samples, generator)
        mean, precision = self._mu_given_tau(tau)
        mu = mean + noise(num_samples, generator) / precision.sqrt()
        y, variance = self.y.double(), self.sigma.double().square()
        total = variance + tau[:, None].square()
        eta = tau[:, None] * (y - mu[:, None]) / total
        eta = eta + (variance / total).sqrt() * noise((num_samples, len(y)), generator)
        dtype = torch.get_default_dtype()
        return {"mu": mu.to(dtype), "tau": tau.to(dtype), "eta": eta.to(dtype)}

    def _mu_given_tau(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and precision ``[S]`` of the normal ``p(mu | tau, y)``, for ``tau [S]``."""
        weights = 1 / (self.sigma.double().square() + tau[:, None].square())
        precision = 1 + weights.sum(-1)
        return (weights * self.y.double()).sum(-1) / precision, precision

    def _log_tau(self, tau: Tensor) -> Tensor:
        """Return ``log p(tau, y) [S]`` as ``log p(mu, tau, y) - log p(mu | tau, y)``, at the mean ``mu``."""
        mu, precision = self._mu_given_tau(tau)
        variance = self.sigma.double().square() + tau[:, None].square()
        residual = (self.y.double() - mu[:, None]).square() / variance
        log_likelihood = -0.5 * (residual + variance.log() + LOG_2PI).sum(-1)
        log_priors = -0.5 * (mu.square() + tau.square()) - LOG_2PI
        return log_likelihood + log_priors - 0.5 * (precision.log() - LOG_2PI)


def eight_schools() -> EightSchools:
    """Return the Eight Schools data of the AVB paper's code, in torch's default dtype.

    The usual effects are divided by ten and their errors by about twenty, which makes the posterior bimodal.

    >>> eight_schools().y[:3]
    tensor([ 2.8000,  0.8000, -0.3000])
    """
    y = torch.tensor([2.8, 0.8, -0.3, 0.7, -0.1, 0.1, 1.8, 1.2])
    sigma = torch.tensor([0.8, 0.5, 0.8, 0.6, 0.5, 0.6, 0.5, 0.4])
    return EightSchools(y, sigma)
