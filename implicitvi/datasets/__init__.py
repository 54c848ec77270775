"""Data to learn from: posteriors whose truth is known, and images.

`eight_schools` and the `toy_densities` have a plain Pyro ``model`` to fit, exact independent draws to compare with and
their log normalising constant (of the Eight Schools: the log evidence, in nats). Their data and draws live on the CPU
in torch's default dtype; constants are computed in float64. Draws come from the generator passed, or from torch's own.
The other functions give data to learn a model of: points, digits, and folders of images, with values in [0, 1].
"""

from implicitvi.datasets.densities import Banana, Rosenbrock, Torus, ToyDensity, TwoModes, XShaped, toy_densities
from implicitvi.datasets.eight_schools import EightSchools, eight_schools
from implicitvi.datasets.images import (
    ImageFolder,
    Labelled,
    Split,
    binarise,
    digits,
    four_points,
    image_folder,
    mnist,
    read_idx,
)

__all__ = [
    "Banana",
    "EightSchools",
    "ImageFolder",
    "Labelled",
    "Rosenbrock",
    "Split",
    "Torus",
    "ToyDensity",
    "TwoModes",
    "XShaped",
    "binarise",
    "digits",
    "eight_schools",
    "four_points",
    "image_folder",
    "mnist",
    "read_idx",
    "toy_densities",
]
