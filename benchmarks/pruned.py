"""Forward time of pruned models: ``python -m benchmarks.pruned [--threads 1] [--out FILE.json]``.

Random weights in the sizes of BERT-base and of a small Llama with grouped queries; P of the heads
and of the channels of every block is cut out, the model saved, loaded again as a user would, and
timed against the whole one: alternating, the best of ``--repeats`` of each. FLOPs are counted by
torch on the same calls. The bar: time at most (1 - 0.8 P) of the whole model's, P the share of the
prunable weights that is gone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedpeft.model import attach, build_network
from fedpeft.pruned import load, save, smaller
from fedpeft.pruning.anatomy import structure_of
from fedpeft.pruning.schedule import prune
from fedpeft.record import environment

ROWS, TOKENS = 8, 128
SHARES = (0.25, 0.5)


def bert() -> Any:
    """BERT-base: 12 blocks of width 768, 12 heads, 3072 channels."""
    return BertForSequenceClassification(BertConfig(num_labels=2, pad_token_id=0)), "classification"


def llama() -> Any:
    """8 blocks of width 512, 8 heads for 4 keys and values, 1376 channels, 8000 words."""
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config), "causal_lm"


MODELS = {"bert-base": bert, "llama-512": llama}


def at_share(name: str, share: float) -> tuple[Any, float]:
    """The model with ``share`` of every part cut out, saved and loaded; and what is gone of it."""
    torch.manual_seed(0)
    base, task = MODELS[name]()
    target = ["query", "value"] if task == "classification" else ["q_proj", "v_proj"]
    settings = {"kind": "lora", "r": 8, "target_modules": target}
    model = attach(base.eval().requires_grad_(False), settings, task, 0)
    network = build_network(model, task, 2, torch.device("cpu"))
    structure = structure_of(model, network.scaling)
    whole = structure.whole(1)
    scores = {n: torch.rand(v.shape) for n, v in whole.items()}
    alive = prune(structure.parts, whole, scores, torch.tensor([share]))
    gone = float(structure.gone(alive))
    with tempfile.TemporaryDirectory() as folder:
        small = smaller(network, network.initial, {n: v[0] for n, v in alive.items()})
        save(small, Path(folder))
        return load(Path(folder)), gone


def seconds(model: Any, rows: torch.Tensor) -> tuple[float, float]:
    """Of the clock, which a user waits, and of the processor, whatever else runs there."""
    began, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        model(input_ids=rows)
    return time.perf_counter() - began, time.process_time() - cpu


def flops(model: Any, rows: torch.Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(input_ids=rows)
    return int(counter.get_total_flops())


def measure(name: str, repeats: int) -> list[dict[str, Any]]:
    """One line per share, 0 first."""
    models = {share: at_share(name, share) for share in (0.0, *SHARES)}
    rows = torch.randint(5, 5000, (ROWS, TOKENS))
    spent: dict[float, list[tuple[float, float]]] = {share: [] for share in models}
    for _ in range(repeats + 1):
        for share, (model, _gone) in models.items():
            spent[share].append(seconds(model, rows))
    best = {
        share: [min(own) for own in zip(*found[1:], strict=True)] for share, found in spent.items()
    }
    work = {share: flops(model, rows) for share, (model, _) in models.items()}
    return [
        {
            "model": name,
            "gone": gone,
            "seconds": best[share][0],
            "of_dense": best[share][0] / best[0.0][0],
            "cpu_seconds": best[share][1],
            "cpu_of_dense": best[share][1] / best[0.0][1],
            "flops_of_dense": work[share] / work[0.0],
            "weights": sum(p.numel() for p in model.parameters()),
            "bar": 1 - 0.8 * gone,
        }
        for share, (model, gone) in models.items()
    ]


def main() -> None:
    """Prints the table, and writes it with the machine it was taken on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lines = [line for name in MODELS for line in measure(name, given.repeats)]
    for line in lines:
        print(
            f"{line['model']:10} gone {line['gone']:.3f}  {1000 * line['seconds']:7.1f} ms  "
            f"{line['of_dense']:.3f} of dense, {line['cpu_of_dense']:.3f} of its processor time "
            f"(bar {line['bar']:.3f})  "
            f"FLOPs {line['flops_of_dense']:.3f}"
        )
    if given.out is not None:
        found = {
            "threads": given.threads,
            "rows": ROWS,
            "tokens": TOKENS,
            "lines": lines,
            "environment": environment.describe(),
        }
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
