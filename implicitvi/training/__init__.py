"""The one training loop: players that take turns, on a schedule, guarded and watched."""

from implicitvi.rng import RandomStream, derived_seed, forked
from implicitvi.training.callbacks import Callback, Checkpoint, EarlyStop, Progress, StopTraining, TensorBoard, Tracker
from implicitvi.training.player import Player
from implicitvi.training.schedule import Schedule, Stage
from implicitvi.training.trainer import History, Trainer

__all__ = [
    "Callback",
    "Checkpoint",
    "EarlyStop",
    "History",
    "Player",
    "Progress",
    "RandomStream",
    "Schedule",
    "Stage",
    "StopTraining",
    "TensorBoard",
    "Tracker",
    "Trainer",
    "derived_seed",
    "forked",
]
