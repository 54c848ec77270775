"""The one training loop: players that take turns, on a schedule, guarded and watched."""

from implicitvi.training.callbacks import Callback, Progress, StopTraining
from implicitvi.training.player import Player
from implicitvi.training.rng import RandomStream, derived_seed
from implicitvi.training.schedule import Schedule, Stage
from implicitvi.training.trainer import History, Trainer

__all__ = [
    "Callback",
    "History",
    "Player",
    "Progress",
    "RandomStream",
    "Schedule",
    "Stage",
    "StopTraining",
    "Trainer",
    "derived_seed",
]
