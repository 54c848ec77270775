"""Every target by name."""

from __future__ import annotations

from collections.abc import Callable

from suite.posteriordb import POSTERIORDB
from suite.synthetic import SYNTHETIC
from suite.target import Target

TARGETS: dict[str, Callable[[], Target]] = {**SYNTHETIC, **POSTERIORDB}
