"""Per-example gradients equal those of Opacus's hooks where Opacus supports the adapter."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from opacus import GradSampleModule
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import FoldLane, VmapLane
from fedpeft.cohort.per_example import Budget, PerExample
from fedpeft.config import Local
from fedpeft.data.clients import Task
from fedpeft.data.examples import IGNORED, Batch, Examples
from fedpeft.model import Network
from fedpeft.tree import row
from tests.cohort import small

CASES: dict[str, tuple[Task, dict[str, Any]]] = {
    "lora": ("classification", small.LORA),
    "lora on text": ("causal_lm", small.LORA),
    "layer norms": ("classification", {"kind": "ln_tuning", "target_modules": ["LayerNorm"]}),
    "prefix": ("classification", {"kind": "prefix_tuning", "num_virtual_tokens": 3}),
}
NUMBERS = torch.tensor([[5, 1, 2, 3]])


def losses(logits: Tensor, batch: Batch, task: Task) -> Tensor:
    """Every example's own mean loss."""
    if task == "classification":
        return cross_entropy(logits, batch.labels, reduction="none")
    target = batch.labels[:, 1:]
    text = logits[:, :-1].transpose(1, 2)
    each = cross_entropy(text, target, reduction="none", ignore_index=IGNORED)
    return each.sum(1) / (target != IGNORED).sum(1)


def by_opacus(net: Network, data: Examples, task: Task) -> Tensor:
    """Per-example gradients ``[b, P]`` at what the model holds."""
    batch = data.batch(NUMBERS)
    net.model.train()  # the hooks do nothing in eval mode; there is no dropout here
    wrapped = GradSampleModule(net.model, loss_reduction="sum", strict=False)
    logits = wrapped(input_ids=batch.tokens, attention_mask=batch.mask).logits
    losses(logits, batch, task).sum().backward()
    own = dict(net.model.named_parameters())
    return torch.cat([own[n].grad_sample.flatten(1) for n in net.layout.names], dim=1)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # Opacus's own
@pytest.mark.filterwarnings("ignore:Unsupported layer type.*LayerNorm:UserWarning")  # but right
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_sums_and_norms_equal_opacus(case: str, passes: Literal[1, 2]) -> None:
    task, adapter = CASES[case]
    net, data = small.network(task, adapter), small.examples(task)
    values = small.stacked(net, 1)
    lane = VmapLane(net.model) if case == "prefix" else FoldLane(net.model)
    net.write(row(values, 0))
    bound = 1.0
    local = Local(batch_size=4, clip_norm=bound, clip_per="example")
    ours = PerExample(Gradients(lane, task, data, local, net.device), Budget(2**20, passes))
    found = ours.clipped(net.layout.pack(values), net.layout, NUMBERS.numpy(), torch.ones(1))
    each = by_opacus(net, data, task)
    norms = each.norm(dim=1)
    assert torch.allclose(found.norms[0], norms, rtol=1e-5)
    wanted = (each * (bound / norms).clamp(max=1)[:, None]).sum(0)
    assert small.gap(found.total[0], wanted) < 1e-5
    assert (norms > bound).any()
