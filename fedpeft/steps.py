"""How many optimizer steps a client takes in a round."""

from __future__ import annotations

import math

from fedpeft.config import Local


def steps_of(examples: int, local: Local) -> int:
    """Optimizer steps per round of a client with ``examples`` training examples."""
    return local.steps or local.epochs * math.ceil(examples / (local.batch_size * local.accumulate))
