"""The MNIST study of EPM: its training by hand is autograd's, and its README says what lines do."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

STUDY = Path(__file__).parents[1] / "experiments" / "studies" / "epm_mnist"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("epm_mnist", STUDY / "measure.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_a_clients_training_is_that_of_autograd_under_the_mask(study: ModuleType) -> None:
    draw = torch.Generator().manual_seed(0)
    x, begin = torch.randn(20, 784, generator=draw), study.start(0)
    x[:, 100:300] = -9.0  # pixels in which the examples do not differ
    y = torch.eye(10)[torch.randint(10, (20,), generator=draw)]
    mask = torch.rand(784, study.HIDDEN, generator=draw) > 0.3
    found = study.train(begin, mask, x, y, 5)
    w, b, v, c = (begin[n].clone() for n in begin)
    leaves = [own.requires_grad_() for own in (w * mask, b, v, c)]
    sgd = torch.optim.SGD(leaves, lr=study.LR, momentum=study.MOMENTUM)
    draw = torch.Generator().manual_seed(5)
    for _ in range(study.EPOCHS):
        order = torch.randperm(20, generator=draw)
        kept = 2 * (torch.rand(20, study.HIDDEN, generator=draw) < 0.5).float()
        for at in range(0, 20, study.BATCH):
            part = order[at : at + study.BATCH]
            hidden = torch.relu(x[part] @ leaves[0] + leaves[1]) * kept[at : at + study.BATCH]
            loss = torch.nn.functional.cross_entropy(hidden @ leaves[2] + leaves[3], y[part])
            sgd.zero_grad()
            loss.backward()
            assert leaves[0].grad is not None
            leaves[0].grad *= mask
            sgd.step()
    for name, own in zip(begin, leaves, strict=True):
        assert torch.allclose(found[name], own, atol=1e-6)
        assert float((found[name] - begin[name]).abs().max()) > 1e-4
    assert float(found[study.FIRST][~mask].abs().max()) == 0.0


def test_clients_have_600_examples_by_shards_of_at_most_a_few_labels(study: ModuleType) -> None:
    labels = torch.eye(10)[torch.arange(60000) % 10]
    for division, most in (("iid", 10), ("shards", 4)):
        own = study.divide(labels, division, 3)
        assert own.shape == (100, 600) and len(set(own.ravel().tolist())) == 60000
        assert max(len(set((part % 10).tolist())) for part in own) <= most


def test_the_tables_in_the_readme_are_those_of_the_results(study: ModuleType) -> None:
    lines = [json.loads(text) for text in (STUDY / "results.jsonl").read_text().splitlines()]
    text = (STUDY / "README.md").read_text()
    for table in (study.codes_table(lines), study.pairs_table(lines)):
        assert len(table) > 1
        for row in table:
            assert "| " + " | ".join(row) + " |" in text
