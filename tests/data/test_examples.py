"""Tests of batches: padding, masks, absent rows, labels."""

from __future__ import annotations

import torch

from fedpeft.data.examples import IGNORED, Batch, Examples, flatten

ROWS = [[11, 12, 13], [21], [31, 32], [41, 42, 43]]


def batch(index: list[list[int]], labels: list[int] | None = None, pad: int = 0) -> Batch:
    return flatten(ROWS, labels, pad).batch(torch.tensor(index))


def test_flatten() -> None:
    examples = flatten(ROWS, [5, 6, 7, 8], pad=9)
    assert examples.tokens.tolist() == [11, 12, 13, 21, 31, 32, 41, 42, 43]
    assert examples.starts.tolist() == [0, 3, 4, 6, 9]
    assert examples.lengths.tolist() == [3, 1, 2, 3]
    assert (examples.tokens.dtype, examples.starts.dtype) == (torch.int32, torch.int64)
    assert len(examples) == 4
    assert len(flatten([], None, 0)) == 0


def test_padded_batch_of_two_clients() -> None:
    made = batch([[0, 1], [2, 1]], [5, 6, 7, 8], pad=99)
    assert made.clients == 2
    assert made.tokens.tolist() == [[11, 12, 13], [21, 99, 99], [31, 32, 99], [21, 99, 99]]
    assert made.mask is not None
    assert made.mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]]
    assert made.labels.tolist() == [5, 6, 7, 6]
    assert (made.tokens.dtype, made.mask.dtype) == (torch.int64, torch.int64)


def test_no_mask_when_nothing_is_padded() -> None:
    assert batch([[0, 3]], [5, 6, 7, 8]).mask is None
    assert batch([[0], [3]]).mask is None


def test_language_model_labels_are_the_real_tokens() -> None:
    made = batch([[2, 0]], pad=32)  # the pad token also occurs as a real token
    assert made.tokens.tolist() == [[31, 32, 32], [11, 12, 13]]
    assert made.labels.tolist() == [[31, 32, IGNORED], [11, 12, 13]]


def test_absent_rows_count_nothing() -> None:
    classes = batch([[2, -1], [-1, -1]], [5, 6, 7, 8])
    assert classes.labels.tolist() == [7, IGNORED, IGNORED, IGNORED]
    assert classes.tokens.shape == (4, 2)
    assert classes.mask is not None
    assert classes.mask.sum(1).tolist() == [2, 1, 1, 1]  # one real token: no row is all masked
    words = batch([[2, -1]])
    assert words.labels.tolist() == [[31, 32], [IGNORED, IGNORED]]


def test_only_absent_rows() -> None:
    made = batch([[-1], [-1]])
    assert made.tokens.shape == (2, 1)
    assert (made.labels == IGNORED).all()


def test_last_example_does_not_read_past_the_end() -> None:
    examples = Examples(
        torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor([0, 2, 3]), None, 0
    )
    assert examples.batch(torch.tensor([[0, 1]])).tokens.tolist() == [[1, 2], [3, 0]]


def test_to_a_device_keeps_everything() -> None:
    for made in (batch([[0, 1]], [5, 6, 7, 8]), batch([[0, 3]])):
        moved = made.to(torch.device("cpu"))
        assert moved.clients == made.clients
        assert torch.equal(moved.tokens, made.tokens)
        assert torch.equal(moved.labels, made.labels)
        assert (moved.mask is None) == (made.mask is None)
