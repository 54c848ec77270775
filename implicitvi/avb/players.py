"""Adversary and fitted contrast as players."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from implicitvi.avb.objective import AVBObjective
from implicitvi.training.player import Metrics, Player
from implicitvi.training.schedule import Stage

Turn = Iterator[tuple[Tensor | None, Metrics]]
Losses = Callable[[Stage], Turn]


def adversary_players(name: str, avb: AVBObjective, contrast_losses: Losses, adversary_losses: Losses) -> list[Player]:
    """Return the adversary of an objective as a player, after the contrast if that has parameters of its own."""

    def rate(stage: Stage) -> float:
        return stage.adversary_lr

    averaged = (avb.contrast, *([] if avb.average is None else [avb.average]))
    adversary = Player(name, avb.adversary, adversary_losses, rate, avb.update_average, averaged)
    if not list(avb.contrast.parameters()):
        return [adversary]
    contrast = "contrast" if name == "adversary" else f"{name} contrast"
    return [Player(contrast, avb.contrast, contrast_losses, rate), adversary]
