"""Federated parameter-efficient fine-tuning.

Clients train adapters on a frozen pretrained model; a strategy aggregates them. A strategy needs no
more than these names; runs start with ``fedpeft.run`` or the command line.
"""

from fedpeft.strategy import (
    Cohort,
    Fit,
    Message,
    Messages,
    Problem,
    Replies,
    Strategy,
    weighted_mean,
)
from fedpeft.tree import Tree

__all__ = [
    "Cohort",
    "Fit",
    "Message",
    "Messages",
    "Problem",
    "Replies",
    "Strategy",
    "Tree",
    "weighted_mean",
]
