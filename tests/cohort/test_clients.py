"""What a strategy is given: losses, gradients, private memory, and refusals that say why."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedpeft import tree
from fedpeft.cohort.clients import RoundInfo, TorchCohort
from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import FoldLane
from fedpeft.cohort.shelf import Shelf
from fedpeft.local import Progress, Trainer
from fedpeft.tree import Tree
from tests.tiny import LOCAL, LORA, tiny_network, tiny_population

SIZES = (9, 5, 2)


def cohort() -> TorchCohort:
    net, population = tiny_network(LORA), tiny_population(SIZES)
    lane = FoldLane(net.model)
    at = Trainer(Gradients(lane, net.task, population.examples, LOCAL, net.device), width=2)
    info = RoundInfo(Progress(1, 1), 0)
    weights = torch.tensor(SIZES, dtype=torch.float64)
    return TorchCohort(net, at, population.clients, info, weights, ({}, Shelf()))


def start() -> Tree:
    stream = torch.Generator().manual_seed(0)
    initial = tiny_network(LORA).initial
    return {n: v + 0.1 * torch.randn((3, *v.shape), generator=stream) for n, v in initial.items()}


def plain(k: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Client k's mean loss and its gradient, example by example through the peft model."""
    net, population = tiny_network(LORA), tiny_population(SIZES)
    examples = population.examples
    assert examples.labels is not None
    net.write(tree.row(start(), k))
    own = {n: p for n, p in net.model.named_parameters() if p.requires_grad}
    losses = []
    for i in population.clients[k].train:
        tokens = examples.tokens[examples.starts[i] : examples.starts[i + 1]].long()[None]
        losses.append(cross_entropy(net.model(input_ids=tokens).logits, examples.labels[i : i + 1]))
    loss = torch.stack(losses).mean()
    grads = torch.autograd.grad(loss, list(own.values()))
    return float(loss.detach()), dict(zip(own, grads, strict=True))


def test_losses_and_gradients_are_means_over_all_of_a_clients_data() -> None:
    losses, gradients = cohort().losses(start()), cohort().gradients(start())
    for k in range(3):
        loss, grads = plain(k)
        assert float(losses[k]) == pytest.approx(loss, rel=1e-5)
        off = tree.norm(tree.sub(tree.row(gradients, k), tree.sort(grads)))
        assert off <= 1e-5 * tree.norm(grads)


def test_memory_is_kept_by_client_and_default_rows_stand_in() -> None:
    one = cohort()
    default = {"x": torch.zeros(3, 2)}
    assert torch.equal(one.recall("m", default)["x"], default["x"])
    value = {"x": torch.arange(6.0).view(3, 2)}
    one.remember("m", value)
    value["x"][0] = 9.0  # what is remembered is a copy
    assert one.recall("m", default)["x"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert default["x"].sum() == 0


@pytest.mark.parametrize("fault", ["missing", "unknown", "twice", "shape"])
def test_start_and_fixed_must_make_up_the_adapter(fault: str) -> None:
    values = start()
    first = next(iter(values))
    fixed: Tree | None = None
    if fault == "missing":
        del values[first]
    elif fault == "unknown":
        values["canary"] = torch.zeros(3, 1)
    elif fault == "twice":
        fixed = {first: values[first][0]}
    else:
        values[first] = values[first][:2]
    said = {"missing": "missing", "unknown": "canary", "twice": "twice", "shape": "has shape"}[
        fault
    ]
    with pytest.raises(ValueError, match=said):
        cohort().fit(values, fixed=fixed)


def test_a_number_of_steps_stands_in_for_the_recipes() -> None:
    for count in (1, 7):
        fit = cohort().fit(start(), steps=count)
        assert fit.steps.tolist() == [count] * 3
    with pytest.raises(ValueError, match="steps=0: a client takes at least one"):
        cohort().fit(start(), steps=0)


def test_fixed_tensors_are_used_and_not_trained() -> None:
    values = start()
    frozen = {n: v[0] for n, v in values.items() if ".lora_A." in n}
    own = {n: v for n, v in values.items() if ".lora_A." not in n}
    fit = cohort().fit(own, fixed=frozen)
    assert set(fit.adapter) == set(own)
    other = cohort().fit(own, fixed={n: -v for n, v in frozen.items()})
    assert not torch.equal(other.loss, fit.loss)
    assert np.isfinite(fit.loss.numpy()).all()


def test_gradients_by_the_frozen_weights_are_those_of_the_plain_model() -> None:
    """Against autograd on the whole data of each client; the weights stay frozen and untouched."""
    at, net, population = cohort(), tiny_network(LORA), tiny_population(SIZES)
    values = start()
    found = at.weight_gradients(values)
    assert set(found) == set(net.scaling)
    examples = population.examples
    for k, client in enumerate(population.clients):
        net.write(tree.row(values, k))
        weights = [net.model.get_submodule(n).get_base_layer().weight for n in found]  # type: ignore[operator]
        for weight in weights:
            weight.requires_grad_(True)
        losses = []
        for i in client.train:
            tokens = examples.tokens[examples.starts[i] : examples.starts[i + 1]].long()[None]
            logits = net.model(input_ids=tokens).logits
            losses.append(cross_entropy(logits, examples.labels[i : i + 1]))  # type: ignore[index]
        wanted = torch.autograd.grad(torch.stack(losses).mean(), weights)
        for layer, gradient in zip(found, wanted, strict=True):
            assert float((found[layer][k] - gradient).norm()) <= 1e-5 * float(gradient.norm())
    own = [p for p in at._network.model.parameters() if p.requires_grad]
    assert len(own) == len(net.initial)
