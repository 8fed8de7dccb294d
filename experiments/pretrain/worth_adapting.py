"""Check that the shipped models are worth adapting: pretrained against random weights.

Usage::

    python experiments/pretrain/worth_adapting.py encoder
    python experiments/pretrain/worth_adapting.py decoder

Both bases have the same configuration, stay frozen, and get the same LoRA adapter
(rank 8), the same data, order, number of steps and grid of learning rates.  The learning
rate is chosen for each base on a part of the training data of the first seed; the test
part (20 %) is only used for the figures printed.  Only the base's weights differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from fedpeft.data.pydocs import read_pydocs

MODELS = Path(__file__).resolve().parents[2] / "fedpeft" / "models"
LEARNING_RATES = (2e-3, 5e-3)
LENGTH = 64
BATCH = 32
PAD = 0

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Data:
    """The tokenised rows and their class labels."""

    ids: list[list[int]]
    labels: list[int]
    classes: int


@dataclass(frozen=True)
class Plan:
    """What is adapted, and on how much."""

    kind: str
    folder: Path
    examples: int
    epochs: float


def load_data(folder: Path) -> Data:
    """Tokenise the standard library rows, the first ``LENGTH`` tokens of each."""
    rows = read_pydocs()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [row["text"] for row in rows]
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
    names = sorted({row["package"] for row in rows})
    return Data(ids, [names.index(row["package"]) for row in rows], len(names))


def build(plan: Plan, pretrained: bool, classes: int, seed: int) -> nn.Module:
    """A frozen base with a fresh adapter; the random base depends on ``seed``."""
    torch.manual_seed(seed)
    encoder = plan.kind == "encoder"
    auto = AutoModelForSequenceClassification if encoder else AutoModelForCausalLM
    config = AutoConfig.from_pretrained(plan.folder)
    if encoder:
        config.num_labels = classes
    if pretrained:
        base = auto.from_pretrained(plan.folder, config=config, dtype=torch.float32)
    else:
        base = auto.from_config(config)  # type: ignore[no-untyped-call]
    targets = ["query", "value"] if encoder else ["q_proj", "v_proj"]
    task = "SEQ_CLS" if encoder else "CAUSAL_LM"
    torch.manual_seed(seed)
    adapter = LoraConfig(task_type=task, r=8, lora_alpha=16, target_modules=targets)
    return get_peft_model(base, adapter)


def batches(data: Data, chosen: Indices) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Padded ids, attention masks and class labels of consecutive rows of ``chosen``."""
    for start in range(0, len(chosen), BATCH):
        part = chosen[start : start + BATCH]
        width = max(len(data.ids[i]) for i in part)
        ids = torch.full((len(part), width), PAD)
        for row, i in enumerate(part):
            ids[row, : len(data.ids[i])] = torch.tensor(data.ids[i])
        yield ids, (ids != PAD).long(), torch.tensor([data.labels[i] for i in part])


def loss_and_count(model: nn.Module, kind: str, batch: tuple[Tensor, ...]) -> tuple[Tensor, int]:
    """Mean loss of a batch, and over how many tokens (or rows) it was taken."""
    ids, mask, labels = batch
    logits = model(input_ids=ids, attention_mask=mask).logits
    if kind == "encoder":
        return F.cross_entropy(logits, labels), len(labels)
    target = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten(), ignore_index=-100)
    return loss, int((target >= 0).sum())


def fit(model: nn.Module, plan: Plan, data: Data, chosen: Indices, lr: float, seed: int) -> float:
    """Train what is trainable with AdamW and a linear decay; returns the seconds used."""
    rng = np.random.default_rng([seed, 1])
    passes = [rng.permutation(chosen) for _ in range(int(np.ceil(plan.epochs)))]
    order = np.concatenate(passes)[: int(plan.epochs * len(chosen))]
    steps = -(-len(order) // BATCH)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    model.train()
    start = time.monotonic()
    for step, batch in enumerate(batches(data, order)):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss_and_count(model, plan.kind, batch)[0].backward()
        optimizer.step()
    return time.monotonic() - start


@torch.no_grad()
def score(model: nn.Module, plan: Plan, data: Data, chosen: Indices) -> float:
    """Accuracy in percent (encoder), or loss per token (decoder)."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches(data, chosen):
        if plan.kind == "encoder":
            logits = model(input_ids=batch[0], attention_mask=batch[1]).logits
            total += 100.0 * float((logits.argmax(-1) == batch[2]).sum())
            count += len(batch[2])
        else:
            loss, tokens = loss_and_count(model, plan.kind, batch)
            total += float(loss) * tokens
            count += tokens
    return total / count


def split(plan: Plan, data: Data, seed: int) -> tuple[Indices, Indices]:
    """Training and test rows, 80/20 by seed; the training part cut to ``plan.examples``."""
    order = np.random.default_rng(seed).permutation(len(data.ids))
    cut = len(order) * 4 // 5
    limit = plan.examples or cut
    return order[:cut][:limit], order[cut:]


def choose_rate(plan: Plan, data: Data, pretrained: bool, seed: int) -> float:
    """The learning rate that does best on a tenth of the training rows."""
    chosen, _ = split(plan, data, seed)
    cut = len(chosen) * 9 // 10
    results: dict[float, float] = {}
    for lr in LEARNING_RATES:
        model = build(plan, pretrained, data.classes, seed)
        fit(model, plan, data, chosen[:cut], lr, seed)
        results[lr] = score(model, plan, data, chosen[cut:])
    print(f"  validation by learning rate: {results}", flush=True)
    best = max if plan.kind == "encoder" else min
    return best(results, key=lambda lr: results[lr])


def compare(plan: Plan, data: Data, pretrained: bool, seeds: int) -> dict[str, object]:
    """Before and after figures of one base over all seeds."""
    print("pretrained base" if pretrained else "random base", flush=True)
    rate = choose_rate(plan, data, pretrained, 0)
    before: list[float] = []
    after: list[float] = []
    seconds: list[float] = []
    for seed in range(seeds):
        chosen, test = split(plan, data, seed)
        model = build(plan, pretrained, data.classes, seed)
        before.append(score(model, plan, data, test))
        seconds.append(fit(model, plan, data, chosen, rate, seed))
        after.append(score(model, plan, data, test))
        print(f"  seed {seed}: {before[-1]:.3f} -> {after[-1]:.3f}", flush=True)
    return {
        "learning_rate": rate,
        "before": before,
        "after": after,
        "before_mean": statistics.mean(before),
        "after_mean": statistics.mean(after),
        "after_sd": statistics.stdev(after) if seeds > 1 else 0.0,
        "seconds_mean": statistics.mean(seconds),
    }


def main() -> None:
    """Parse the command line, compare both bases and print the figures as JSON."""
    parser = argparse.ArgumentParser(description="Is the shipped model worth adapting?")
    parser.add_argument("model", choices=["encoder", "decoder"])
    parser.add_argument("--folder", type=Path, help="model folder; by default the shipped one")
    parser.add_argument("--examples", type=int, default=3000, help="training rows; 0 is all")
    parser.add_argument("--epochs", type=float, default=1.5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", choices=["pretrained", "random", "both"], default="both")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    set_verbosity_error()  # type: ignore[no-untyped-call]
    folder = args.folder or MODELS / f"tiny-{args.model}"
    plan = Plan(args.model, folder, args.examples, args.epochs)
    data = load_data(folder)
    _, test = split(plan, data, 0)
    labels = np.array(data.labels)[test]
    result: dict[str, object] = {
        "rows": len(data.ids),
        "classes": data.classes,
        "majority_class_percent": 100.0 * float(np.bincount(labels).max()) / len(labels),
        "epochs": plan.epochs,
        "training_rows": len(split(plan, data, 0)[0]),
    }
    for name in ("pretrained", "random"):
        if args.base in (name, "both"):
            result[name] = compare(plan, data, name == "pretrained", args.seeds)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
