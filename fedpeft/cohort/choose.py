"""Which lane carries a model: the fastest that gives the loop's gradients on two clients."""

from __future__ import annotations

import logging

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from fedpeft import streams
from fedpeft.cohort.lanes import FoldLane, Lane, LoopLane, VmapLane
from fedpeft.data.examples import Batch, Examples
from fedpeft.errors import FedpeftError
from fedpeft.metrics import client_sums
from fedpeft.model import Network, set_mode
from fedpeft.tree import Tree

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest relative difference (see ``gap``) from the loop's gradients in the self-check."""

FLOOR = 1e-4
"""A tensor's gradient counts as at least this share of the whole gradient, in ``gap``."""


def choose_lane(network: Network, examples: Examples) -> Lane:
    """Fold, else vmap, else the loop; each but the loop must pass the self-check.

    The check runs two clients with different adapters on two padded rows each: gradients in eval
    mode must be the loop's, and in training mode too unless dropout or sampling makes even the
    loop's differ from run to run. One line of the log says which lane was chosen, and why none
    before it. Raises FedpeftError when not even the loop runs. A model without an adapter, of which
    clients share nothing, gets the loop unchecked.
    """
    if not isinstance(network.model, PeftModel):
        log.info("lane loop for full: every tensor is trained, clients train one after another")
        return LoopLane(network.model)
    kind = _kind(network.model)
    batch, stacked = _probe(network, examples)
    loop, reasons = LoopLane(network.model), []
    try:
        wanted = [_gradients(network, loop, batch, stacked, mode) for mode in (False, True)]
    except Exception as error:
        raise FedpeftError(
            f"adapter.kind={kind!r} does not run on this model and task: {_first_line(error)}. Use "
            f"another adapter or model.name."
        ) from error
    again = _gradients(network, loop, batch, stacked, True, seed=1)
    fixed = gap(again, wanted[1]) <= TOLERANCE
    for lane_kind in () if _barred(network.model) else (FoldLane, VmapLane):
        try:
            lane = lane_kind(network.model)
            found = [_gradients(network, lane, batch, stacked, mode) for mode in (False, True)]
        except Exception as error:  # any refusal of a transform means: not this lane
            reasons.append(f"{lane_kind.name}: {_first_line(error)}")
            continue
        gaps = [gap(f, w) for f, w in zip(found, wanted, strict=True)]
        worst = max(gaps if fixed else gaps[:1])
        if worst <= TOLERANCE:
            note = "" if fixed else "; compared with dropout and sampling off"
            passed = f" [{'; '.join(reasons)}]" if reasons else ""
            log.info(
                "lane %s for %s: gradients within %.1e of the loop's%s%s",
                lane.name, kind, worst, note, passed,
            )  # fmt: skip
            return lane
        reasons.append(f"{lane_kind.name} passed over: gradients differ by {worst:.1e}")
    if gap(_gradients(network, loop, batch, stacked, False), wanted[0]) > TOLERANCE:
        raise RuntimeError(f"the attempts to batch {kind} changed the model: {reasons}")
    log.warning(
        "lane loop for %s, clients train one after another: %s",
        kind,
        _barred(network.model) or "; ".join(reasons),
    )
    return loop


def gap(found: Tree, wanted: Tree) -> float:
    """The largest relative difference, in Euclidean norm, of a tensor's gradient from ``wanted``.

    Tensor by tensor, so that a large gradient (a head's) does not hide a wrong small one.
    """
    floor = FLOOR * float(torch.stack([w.norm() for w in wanted.values()]).norm()) or 1e-30
    gaps = [(found[n] - w).norm() / w.norm().clamp(min=floor) for n, w in wanted.items()]
    return float(torch.stack(gaps).nan_to_num(nan=torch.inf).max())


def _kind(model: nn.Module) -> str:
    assert isinstance(model, PeftModel)
    return str(model.active_peft_config.peft_type.value).lower()


def _barred(model: nn.Module) -> str:
    """Why no batched lane may even be tried; empty if they may."""
    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        return "target_parameters registers parametrisations inside forward (lora/layer.py:2594)"
    return ""


def _first_line(error: Exception) -> str:
    """The first sentence of an error, at most 160 characters."""
    line = f"{type(error).__name__}: {error}".split("\n")[0].split(". ")[0]
    return line if len(line) <= 160 else line[:157] + "..."


def _probe(network: Network, examples: Examples) -> tuple[Batch, Tree]:
    stream = streams.torch_stream(0, "lane probe")
    count = len(examples)
    index = torch.tensor([[0, min(1, count - 1)], [count - 1, -1]])
    stacked = {}
    for name, value in network.initial.items():
        noise = 0.02 * torch.randn((2, *value.shape), generator=stream)
        stacked[name] = (value + noise).to(network.device).requires_grad_()
    return examples.batch(index).to(network.device), stacked


def _gradients(
    network: Network, lane: Lane, batch: Batch, stacked: Tree, training: bool, seed: int = 0
) -> Tree:
    """The clients' own gradients, stacked as ``stacked``."""
    set_mode(network.model, training=training, base_dropout=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sums, counts = client_sums(network.task, lane.logits(stacked, batch), batch)
    loss = (sums / counts.clamp(min=1)).sum()
    found = torch.autograd.grad(loss, list(stacked.values()), allow_unused=True)
    set_mode(network.model, training=False, base_dropout=False)
    return {
        name: torch.zeros_like(value) if g is None else g.detach()
        for (name, value), g in zip(stacked.items(), found, strict=True)
    }
