"""Losses and scores against plain arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedpeft.data.examples import IGNORED, flatten
from fedpeft.evaluate import mean_and_worst
from fedpeft.metrics import Score, Tally, client_sums


def softmax_loss(logits: np.ndarray, label: int) -> float:
    return float(np.log(np.exp(logits).sum()) - logits[label])


def test_classification_sums_per_client_leave_absent_rows_out() -> None:
    examples = flatten([[1, 2], [3], [4, 5, 6]], [0, 2, 1], 0)
    batch = examples.batch(torch.tensor([[0, 1], [2, -1]]))
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    sums, counts = client_sums("classification", logits, batch)
    plain = logits.numpy()
    assert counts.tolist() == [2, 1]
    assert sums.tolist() == pytest.approx(
        [softmax_loss(plain[0], 0) + softmax_loss(plain[1], 2), softmax_loss(plain[2], 1)]
    )


def test_language_model_loss_is_per_predicted_token_and_skips_virtual_tokens() -> None:
    examples = flatten([[1, 2, 3], [4, 5]], None, 0)
    batch = examples.batch(torch.tensor([[0], [1]]))
    text = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    sums, counts = client_sums("causal_lm", text, batch)
    plain = text.numpy()
    first = softmax_loss(plain[0, 0], 2) + softmax_loss(plain[0, 1], 3)
    wanted = [first, softmax_loss(plain[1, 0], 5)]
    assert counts.tolist() == [2, 1] and sums.tolist() == pytest.approx(wanted)
    prompted = torch.cat([torch.randn(2, 4, 7), text], dim=1)
    assert client_sums("causal_lm", prompted, batch)[0].tolist() == pytest.approx(wanted)


def test_tally_over_batches_equals_plain_arithmetic() -> None:
    stream = np.random.default_rng(0)
    labels = stream.integers(0, 4, 30)
    examples = flatten([[1]] * 30, labels.tolist(), 0)
    logits = torch.from_numpy(stream.normal(size=(30, 4)))
    owner = torch.from_numpy(stream.integers(0, 2, 30))
    tally = Tally("classification", 4, groups=3)
    for part in (np.arange(0, 11), np.arange(11, 30)):
        batch = examples.batch(torch.from_numpy(part)[:, None])
        tally.add(logits[part], batch, owner[part])
    for g, score in enumerate(tally.scores()):
        own = owner.numpy() == g
        guess, true = logits.numpy()[own].argmax(1), labels[own]
        if g == 2:
            assert score.items == 0 and math.isnan(score.loss) and math.isnan(score.macro_f1)
            continue
        assert score.items == own.sum()
        assert score.accuracy == pytest.approx((guess == true).mean())
        f1 = []
        for c in sorted(set(guess) | set(true)):
            hit = ((guess == c) & (true == c)).sum()
            f1.append(2 * hit / ((guess == c).sum() + (true == c).sum()))
        assert score.macro_f1 == pytest.approx(np.mean(f1))


def test_language_model_tally() -> None:
    examples = flatten([[1, 2, 3]], None, 0)
    logits = torch.full((1, 3, 5), -50.0)
    logits[0, 0, 2] = logits[0, 1, 4] = 50.0  # right, then wrong; the last says nothing
    tally = Tally("causal_lm", 0)
    batch = examples.batch(torch.tensor([[0]]))
    assert (batch.labels != IGNORED).all()
    tally.add(logits, batch, torch.zeros(1, dtype=torch.int64))
    (score,) = tally.scores()
    assert score.items == 2 and score.accuracy == 0.5 and score.loss == pytest.approx(50)
    assert score.perplexity == pytest.approx(math.exp(50)) and math.isnan(score.macro_f1)


def test_perplexity_of_a_hopeless_model_is_infinite() -> None:
    assert Score(1, 1e4, 0.0, math.nan).perplexity == math.inf


def test_mean_and_worst_tenth() -> None:
    values = [i / 20 for i in range(20)]
    assert mean_and_worst(values) == pytest.approx((0.475, 0.025))
    assert mean_and_worst([0.5, math.nan, 0.7]) == pytest.approx((0.6, 0.5))
    assert all(math.isnan(v) for v in mean_and_worst([math.nan]))
