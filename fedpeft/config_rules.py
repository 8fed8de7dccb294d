"""The ranges that a recipe's numbers must lie in, key by key."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a value must be, in words and as a test."""

    text: str
    holds: Callable[[Any], bool]


_FROM_0 = Rule("at least 0", lambda v: v >= 0)
_FROM_1 = Rule("at least 1", lambda v: v >= 1)
_FINITE = Rule("at least 0 and finite", lambda v: 0 <= v < math.inf)
_ABOVE_0 = Rule("above 0 and finite", lambda v: 0 < v < math.inf)
_BELOW_1 = Rule("at least 0 and below 1", lambda v: 0 <= v < 1)
_SHARE = Rule("above 0 and at most 1", lambda v: 0 < v <= 1)
_UNIT = Rule("at least 0 and at most 1", lambda v: 0 <= v <= 1)
_INSIDE = Rule("above 0 and below 1", lambda v: 0 < v < 1)
_FILLED = Rule("not empty", lambda v: bool(v.strip()))

RULES = {
    "name": _FILLED,
    "seed": _FROM_0,
    "model.name": _FILLED,
    "data.source": _FILLED,
    "data.train": _FILLED,
    "data.text": _FILLED,
    "data.label": _FILLED,
    "data.max_length": _FROM_1,
    "data.holdout": _BELOW_1,
    "data.limit": _FROM_0,
    "partition.clients": _FROM_0,
    "partition.alpha": _ABOVE_0,
    "partition.classes": _FROM_1,
    "partition.shards": _FROM_1,
    "partition.min_examples": _FROM_1,
    "rounds.count": _FROM_1,
    "rounds.sampling.fraction": _SHARE,
    "rounds.sampling.size": _FROM_1,
    "rounds.sampling.rate": _SHARE,
    "rounds.sampling.groups": _FROM_1,
    "rounds.quorum": _UNIT,
    "rounds.failure_rate": _BELOW_1,
    "rounds.aborts": _FROM_0,
    "rounds.reject_norm": _FINITE,
    "local.lr": _ABOVE_0,
    "local.momentum": _BELOW_1,
    "local.weight_decay": _FINITE,
    "local.epochs": _FROM_0,
    "local.steps": _FROM_0,
    "local.batch_size": _FROM_1,
    "local.accumulate": _FROM_1,
    "local.warmup": _BELOW_1,
    "local.clip_norm": _FINITE,
    "privacy.epsilon": _FINITE,
    "privacy.noise_multiplier": _FINITE,
    "privacy.delta": _INSIDE,
    "privacy.clip_norm": _ABOVE_0,
    "privacy.max_rounds": _FROM_0,
    "privacy.quantile": _INSIDE,
    "privacy.clip_rate": _ABOVE_0,
    "privacy.bands": Rule("at least -1", lambda v: v >= -1),
    "secure_aggregation.clip_norm": _ABOVE_0,
    "secure_aggregation.bits": Rule("32 or 64", lambda v: v in (32, 64)),
    "secure_aggregation.threshold": Rule("above 0.5 and at most 1", lambda v: 0.5 < v <= 1),
    "fleet.utilization": _SHARE,
    "fleet.sigma": _FINITE,
    "fleet.redraw": _FROM_0,
    "fleet.load": _FINITE,
    "fleet.beta": _BELOW_1,
    "fleet.dropout": _BELOW_1,
    "fleet.deadline": _FINITE,
    "fleet.overcommit": Rule("at least 1 and finite", lambda v: 1 <= v < math.inf),
    "fleet.buffer": _FROM_1,
    "fleet.concurrency": _FROM_0,
    "fleet.exponent": _FINITE,
    "fleet.max_staleness": _FROM_0,
    "fleet.target": _UNIT,
    "evaluation.every": _FROM_1,
    "evaluation.sample": _FROM_0,
    "evaluation.most": _FROM_0,
    "evaluation.local_test": _FROM_0,
    "engine.chunk": _FROM_0,
    "engine.threads": _FROM_0,
    "engine.workers": _FROM_0,
    "output.folder": _FILLED,
    "output.checkpoint_every": _FROM_1,
    "output.keep": _FROM_1,
}
