"""Learning-rate schedules: cosine, linear, constant and warm-up/stable/decay, with llm.c's formulas.

Called by train.py once per step, and by settings.py for their names; imports only math.
"""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant", "wsd")

# "wsd" holds the peak for this share of all steps and decays over the rest.
WSD_STABLE_FRACTION = 0.8


def learning_rate(
    schedule: str, step: int, *, peak: float, warmup: int = 0, total: int, final_fraction: float = 0.0
) -> float:
    """The learning rate of update number `step`, counted from 0, of `total` updates.

    Warm-up (all but constant):  peak (step + 1) / warmup             while step < warmup
    then, with r the fraction of the decay that is done and m the peak, f = final_fraction m:
    cosine    f + (1 + cos(pi r)) / 2 (m - f)
    linear    m - r (m - f)
    constant  m
    wsd       m until int(0.8 total), then f + (1 - sqrt(r)) (m - f)

    ValueError for an unknown schedule, or a step outside 0 .. total.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown learning-rate schedule {schedule!r}; known are {', '.join(SCHEDULES)}")
    if not 0 <= step <= total:
        raise ValueError(f"learning_rate: step must be from 0 to {total}, got {step}")
    if schedule == "constant":
        return peak
    if step < warmup:
        return peak * (step + 1) / warmup
    decay_start = int(WSD_STABLE_FRACTION * total) if schedule == "wsd" else warmup
    if step < decay_start:
        return peak
    final = final_fraction * peak
    done = (step - decay_start) / (total - decay_start) if total > decay_start else 1.0
    if schedule == "cosine":
        return final + 0.5 * (1.0 + math.cos(math.pi * done)) * (peak - final)
    if schedule == "linear":
        return peak - done * (peak - final)
    return final + (1.0 - math.sqrt(done)) * (peak - final)
