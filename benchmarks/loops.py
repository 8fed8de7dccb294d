"""The plain loops, as one writes them by hand: no engine, torch's optimizer on the peft model.

``sequential_loop``: one client after another on one resident model. ``centralised``: one model on
the pooled data of the round's clients, the limit for any federated engine on the same tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.model import build_model, mean_loss, trainable
from benchmarks.recorder import Recorder, mark_first_step
from benchmarks.texts import Texts
from benchmarks.workload import Workload, clients_of


def train_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, texts: Texts, order: Tensor
) -> None:
    """One optimizer step per row of ``order`` ``[steps, batch]``, which holds row numbers."""
    for rows in order:
        optimizer.zero_grad()
        loss = mean_loss(texts.workload, model, texts.tokens[rows], texts.labels[rows])
        torch.autograd.backward(loss)
        optimizer.step()


@torch.no_grad()
def load(parameters: list[Tensor], values: list[Tensor]) -> None:
    """Copies values into parameters."""
    torch._foreach_copy_(parameters, values)


def sequential_loop(workload: Workload, recorder: Recorder) -> dict[str, float]:
    """Federated averaging, client by client; returns how far the adapter went in all rounds."""
    texts, model = Texts.draw(workload), build_model(workload)
    named = trainable(model)
    parameters: list[Tensor] = list(named.values())
    optimizer = torch.optim.SGD(parameters, lr=workload.local.lr, foreach=True)
    initial = state = [p.detach().clone() for p in parameters]
    mark_first_step(model, recorder.folder)
    for round in range(1, recorder.rounds + 1):
        recorder.begin()
        total = [torch.zeros_like(v) for v in state]
        for client in clients_of(workload, round):
            load(parameters, state)
            train_steps(model, optimizer, texts, texts.order(client, round))
            torch._foreach_add_(total, [p.detach() for p in parameters])
        state = [value / workload.cohort for value in total]
        if recorder.end():
            recorder.keep(dict(zip(named, state, strict=True)))
    moved = max(float((new - old).abs().max()) for new, old in zip(state, initial, strict=True))
    return {"largest_update": moved}


def centralised(workload: Workload, recorder: Recorder, batch: int) -> None:
    """The round's texts in one pool, in batches of ``batch``; as many tokens as a round trains."""
    texts, model = Texts.draw(workload), build_model(workload)
    parameters = list(trainable(model).values())
    optimizer = torch.optim.SGD(parameters, lr=workload.local.lr, foreach=True)
    mark_first_step(model, recorder.folder)
    for round in range(1, recorder.rounds + 1):
        recorder.begin()
        pool = torch.cat([texts.order(c, round).flatten() for c in clients_of(workload, round)])
        shuffled = pool[torch.randperm(len(pool), device=pool.device)]
        size = min(batch, len(pool))
        train_steps(model, optimizer, texts, shuffled[: len(pool) // size * size].view(-1, size))
        recorder.end()
