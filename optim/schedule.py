"""Learning-rate schedules, as a factor of the step alone: nothing to store, nothing to restore."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant")


def lr_factor(step: int, total: int, warmup: int, kind: str = "cosine", floor: float = 0.0) -> float:
    """The factor of the learning rate at `step` of `total`: a linear rise over `warmup` steps, then down to `floor`.

    Step 0 already learns (factor 1 / warmup), and the last step still does. Raises ValueError for an unknown kind.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule {kind!r} is unknown; known: {', '.join(SCHEDULES)}")
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)  # 0 … just under 1
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return floor + (1 - floor) * (1 - progress)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
