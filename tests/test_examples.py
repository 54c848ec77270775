"""Every example runs at a tiny size, prints its whole table and saves its pictures."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

EXAMPLES = Path(__file__).parents[1] / "examples"

ROWS = {
    "00_toy_densities.py": {"torus", "rosenbrock", "banana", "two_modes", "x_shaped"},
    "01_eight_schools.py": {
        "AVB + AC (defaults)",
        "AVB, paper (8 steps, width 128)",
        "AVB + AC, paper (8 steps, width 128)",
        "AutoNormal",
        "AutoMultivariateNormal",
        "AutoIAFNormal",
        "NUTS",
        "floor",
    },
    "02_bayesian_regression.py": {"Normal", "Student t", "horseshoe", "Gibbs again"},
    "03_logistic_minibatch.py": {"plain", "control variate"},
    "04_mixture_enumeration.py": {f"{what} {i}" for what in ("mean", "sd", "weight") for i in (1, 2, 3)},
    "05_bnn_regression.py": {"implicit", "NUTS"},
    "06_amortized_local.py": {"mu", "tau", "groups fitted", "groups never seen"},
    "07_empirical_bayes.py": {"mean", "spread", "noise"},
    "08_item_response.py": {"exact", "AVB, K = 1", "AVB, K = 5"},
    "09_vae_in_pyro.py": {"exact log evidence", "posterior mean error", "posterior sd ratio"},
    "23_custom_contrast.py": {"Gaussian", "mixture (default)", "funnel (ours)", "exact draws"},
    "24_custom_sampler.py": {"gated (default)", "mirrored (ours)", "exact draws"},
    "25_implicit_prior.py": {"the prior", "the fit", "brute force"},
    "20_diagnostics_of_a_bad_fit.py": {"good", "collapsed", "one mode", "exact"},
    "21_sbc.py": {"exact", "a quarter too narrow", "the prior", "amortized AVB"},
    "22_resume_and_checkpoint.py": {
        "never interrupted",
        "killed and resumed",
        "loaded in a new object",
        "another seed",
    },
    "10_four_points.py": {"log likelihood", "reconstruction error", "ELBO", "KL of the codes", "optimum"},
    "11_mnist.py": {"VAE", "AVB + AC"},
    "12_faces.py": {"AVB", "VAE"},
    "16_objectives_compared.py": {
        "VAE",
        "VAE, IAF",
        "IWAE, 8 weights",
        "auxiliary VAE",
        "AVB",
        "AVB + AC",
        "AVB, f-GAN",
        "AAE",
        "ALI",
        "ALICE",
        "AS-VAE",
        "biadversarial",
        "SEL",
    },
    "15_symmetric_equilibrium.py": {"labels only", "ELBO", "SEL", "Bayes' rule"},
    "13_asvae_mixture.py": {"VAE", "ASVAE", "MarginalASVAE", "ALI"},
    "14_biadversarial_bimodal.py": {"Gaussian decoder", "ALI", "biadversarial", "biadversarial, f-GAN"},
}
OPTIONS = {"01_eight_schools.py": ["--paper", "both"]}
PICTURES = {
    "00_toy_densities.py": {"toy_densities.png"},
    "01_eight_schools.py": {"eight_schools.png", "eight_schools_kl.png"},
    "02_bayesian_regression.py": {"regression_forest.png", "regression_pairs.png"},
    "03_logistic_minibatch.py": {"logistic_minibatch.png"},
    "04_mixture_enumeration.py": {"mixture_enumeration.png"},
    "05_bnn_regression.py": {"bnn_regression.png"},
    "06_amortized_local.py": {"amortized_local.png"},
    "07_empirical_bayes.py": {"empirical_bayes.png"},
    "08_item_response.py": {"item_response.png"},
    "09_vae_in_pyro.py": {"vae_in_pyro.png"},
    "10_four_points.py": {"four_points.png"},
    "23_custom_contrast.py": {"custom_contrast.png"},
    "24_custom_sampler.py": {"custom_sampler.png"},
    "25_implicit_prior.py": {"implicit_prior.png"},
    "20_diagnostics_of_a_bad_fit.py": {"diagnostics_of_a_bad_fit.png", "diagnostics_restarts.png"},
    "21_sbc.py": {"sbc.png"},
    "22_resume_and_checkpoint.py": {"resume_and_checkpoint.png"},
    "11_mnist.py": {"mnist.png"},
    "12_faces.py": {"faces.png"},
    "16_objectives_compared.py": {"objectives_compared.png"},
    "15_symmetric_equilibrium.py": {"symmetric_bars.png", "symmetric_chain.png"},
    "13_asvae_mixture.py": {"asvae_mixture.png"},
    "14_biadversarial_bimodal.py": {"biadversarial_bimodal.png"},
}
# A number that even a tiny run gets right: row, column, lower and upper bound.
BOUNDS = {
    "02_bayesian_regression.py": ("Gibbs again", 1, 0.0, 1.0),  # mean error between two chains, sd
    "03_logistic_minibatch.py": ("control variate", 1, 1.0, 1000.0),  # ms a step
    "04_mixture_enumeration.py": ("mean 1", 1, -2.4, -1.4),  # Gibbs is near the truth, -2
    "05_bnn_regression.py": ("NUTS", -1, 0.0, 0.0),  # distance of the reference from itself
    "06_amortized_local.py": ("groups never seen", 2, 0.1, 20.0),  # ratio of the sds: the exact ones are finite
    "07_empirical_bayes.py": ("noise", 1, 0.6, 0.75),  # where the marginal likelihood is greatest
    "08_item_response.py": ("exact", 3, 0.95, 1.0),  # correlation of the loadings with the truth
    "09_vae_in_pyro.py": ("posterior sd ratio", 0, 0.5, 2.0),  # the Gaussian start is that near
    "12_faces.py": ("VAE", 0, 0.005, 0.12),  # a grey picture is not far off
    "15_symmetric_equilibrium.py": ("Bayes' rule", 0, 0.98, 1.0),  # 64 pixels determine the code
    "13_asvae_mixture.py": ("VAE", 3, 0.5, 20.0),  # squared error, of data whose variance is 6.5
    "14_biadversarial_bimodal.py": ("Gaussian decoder", 0, 0.3, 0.45),  # it blurs from the start
    "23_custom_contrast.py": ("exact draws", 2, 1.8, 2.2),  # sd of v, 2
    "24_custom_sampler.py": ("mirrored (ours)", 0, 0.4, 0.6),  # by its symmetry, from the start
    "25_implicit_prior.py": ("brute force", 0, 0.7, 0.9),  # share on the right, 0.79
    "20_diagnostics_of_a_bad_fit.py": ("exact", 0, 4.1, 4.2),  # minus the log evidence, nats
    "21_sbc.py": ("exact", 2, 0.1, 1.0),  # the log likelihood stays within the band
    "22_resume_and_checkpoint.py": ("killed and resumed", -1, 0.0, 0.0),  # nats, bit for bit
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == ROWS.keys() == PICTURES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ROWS))
def test_example_prints_its_table_and_draws_its_pictures(name: str, tmp_path: Path) -> None:
    printed = run(name, "--smoke", "--output", "pictures", *OPTIONS.get(name, []), cwd=tmp_path)
    rows = table(printed)
    assert rows.keys() == ROWS[name]
    assert len({len(numbers) for numbers in rows.values()}) == 1, "a number is missing"
    assert all(math.isfinite(number) for numbers in rows.values() for number in numbers)
    if name in BOUNDS:
        row, column, least, greatest = BOUNDS[name]
        assert least <= rows[row][column] <= greatest
    pictures = {path.name: imread(path) for path in (tmp_path / "pictures").iterdir()}
    assert pictures.keys() == PICTURES[name]
    for picture in pictures.values():
        height, width, _ = picture.shape
        assert min(height, width) > 500
        assert picture[..., :3].std() > 0.05, "the picture is blank"


def run(name: str, *options: str, cwd: Path) -> str:
    """Run an example with warnings as errors and return its output."""
    environment = os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    # ArviZ before 1.0 announces version 1.0 once a day.
    warnings = ["-W", "error", "-W", "ignore::FutureWarning:arviz"]
    command = [sys.executable, *warnings, str(EXAMPLES / name), *options]
    done = subprocess.run(command, cwd=cwd, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def table(printed: str) -> dict[str, list[float]]:
    """Return the rows of the first table printed: the label and the numbers of each.

    Its header is the first line with columns two spaces or more apart.
    """
    below = printed[re.search(r"^\S.*\S {2,}\S", printed, re.MULTILINE).start() :]
    rows = {}
    for line in below.partition("\n\n")[0].splitlines()[1:]:
        name, *numbers = re.split(r"\s{2,}", line.strip())
        rows[name] = [float(number.replace(",", "")) for number in numbers]
    return rows
