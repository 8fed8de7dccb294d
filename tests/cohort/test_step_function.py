"""Which gradients a recipe's settings choose."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch

from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import FoldLane
from fedpeft.cohort.per_example import PerExample, step_function
from fedpeft.cohort.turns import Turn
from fedpeft.config import Local
from fedpeft.privacy.randomness import Randomness
from fedpeft.privacy.record_level import NoisySteps
from tests.cohort import small

CLIPS = Local(clip_norm=1.0, clip_per="example")


def test_the_settings_choose_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = small.network("classification"), small.examples("classification")
    taken: list[str] = []
    for kind, name in ((Gradients, "step"), (PerExample, "step"), (PerExample, "noisy_step")):
        note = functools.partial(taken.append, f"{kind.__name__}.{name}")
        monkeypatch.setattr(kind, name, lambda *_, note=note: note())
    nobody = np.full(1, -1)
    turn = Turn(nobody, nobody, nobody, nobody[:, None], nobody == 0)
    noisy = NoisySteps(1.0, torch.ones(1), torch.ones(1), Randomness.seeded(0))
    for local, noise in (
        (CLIPS, None),
        (dataclasses.replace(CLIPS, clip_per="client"), None),
        (Local(), None),
        (CLIPS, noisy),
    ):
        at = Gradients(FoldLane(net.model), net.task, data, local, net.device)
        step_function(at, noise)(torch.zeros(1, 1), net.layout, turn, torch.ones(1))
    assert taken == ["PerExample.step", "Gradients.step", "Gradients.step", "PerExample.noisy_step"]
