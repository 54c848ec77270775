"""Data sets: posteriors with exact draws, and images.

`eight_schools` and the `toy_densities` have a plain Pyro ``model`` to fit, exact independent draws for comparison, and
their log normalising constant (for the Eight Schools: the log evidence, in nats). Data and draws are CPU tensors of
torch's default dtype; constants are computed in float64. Draws use the generator passed, or torch's own. The other
functions return training data for models of images: points, digits and folders of pictures, with values in [0, 1].
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

__all__ = ["Banana", "EightSchools", "Rosenbrock", "Torus", "ToyDensity", "TwoModes", "XShaped"]
__all__ += ["eight_schools", "toy_densities", "ImageFolder", "Labelled", "Split"]
__all__ += ["binarise", "digits", "four_points", "image_folder", "mnist", "read_idx"]
