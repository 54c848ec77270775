"""Variational inference with implicit posteriors: any network that can be sampled is a variational family."""

from implicitvi.diagnostics.diagnose import diagnose
from implicitvi.export import to_arviz
from implicitvi.inference.elbo import AVB_ELBO
from implicitvi.inference.fit import Fit
from implicitvi.inference.guide import ImplicitGuide
from implicitvi.inference.settings import Settings
from implicitvi.inference.svi import AVBSVI
from implicitvi.training import Checkpoint, EarlyStop, StopTraining, TensorBoard, Tracker

__all__ = [
    "AVB_ELBO",
    "AVBSVI",
    "Checkpoint",
    "EarlyStop",
    "Fit",
    "ImplicitGuide",
    "Settings",
    "StopTraining",
    "TensorBoard",
    "Tracker",
    "diagnose",
    "to_arviz",
]
__version__ = "0.2.0"
