"""The opponents of a sampler in adversarial variational Bayes, as players."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from implicitvi.avb.objective import AVBObjective
from implicitvi.training.player import Metrics, Player
from implicitvi.training.schedule import Stage

Turn = Iterator[tuple[Tensor | None, Metrics]]
Losses = Callable[[Stage], Turn]


def follow_contrast(name: str, avb: AVBObjective, contrast_losses: Losses, adversary_losses: Losses) -> list[Player]:
    """The adversary of an objective as a player, after its contrast where that has parameters of its own."""

    def rate(stage: Stage) -> float:
        return stage.adversary_lr

    averaged_modules = (avb.contrast, *([] if avb.average is None else [avb.average]))
    adversary = Player(
        name, avb.adversary, adversary_losses, rate, after_step=avb.keep_average, averaged_modules=averaged_modules
    )
    if not list(avb.contrast.parameters()):
        return [adversary]
    contrast = "contrast" if name == "adversary" else f"{name} contrast"
    return [Player(contrast, avb.contrast, contrast_losses, rate), adversary]
