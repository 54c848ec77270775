"""Train with the one loop: players that take turns on a schedule, guarded and watched."""

from implicitvi.training.callbacks import Checkpoint, EarlyStop, Progress, TensorBoard, Tracker
from implicitvi.training.history import History
from implicitvi.training.player import Player
from implicitvi.training.schedule import Schedule, Stage
from implicitvi.training.trainer import Callback, StopTraining, Trainer

__all__ = ["Callback", "Checkpoint", "EarlyStop", "Progress", "StopTraining", "TensorBoard", "Tracker"]
__all__ += ["History", "Player", "Schedule", "Stage", "Trainer"]
