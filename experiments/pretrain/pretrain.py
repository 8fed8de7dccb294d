"""Pretrain the two tiny models that ship with fedpeft, on a CPU, without a network.

Usage, in this order (see README.md next to this file)::

    python experiments/pretrain/pretrain.py tokenizer --out DIR
    python experiments/pretrain/pretrain.py encoder --out DIR --minutes 30
    python experiments/pretrain/pretrain.py decoder --out DIR --minutes 20

This file is the command line and the training loop; ``corpus.py`` gathers the text and
``objectives.py`` defines the models and their losses.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from corpus import Corpus, prepare, save_tokenizer
from objectives import TEMPERATURE, Task, decoder_task, encoder_task
from tokenizers import Tokenizer
from torch import nn
from transformers.utils.logging import disable_progress_bar


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warmup over the first 4 % of the steps, then a cosine to zero."""
    warmup = max(1, steps * 4 // 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def optimizer_for(model: nn.Module) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8, fused=True)


def one_step(task: Task, optimizer: torch.optim.AdamW, step: int) -> tuple[int, dict[str, float]]:
    """One update; returns the number of tokens and the parts of the loss."""
    value, tokens, parts = task.loss(step)
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
    optimizer.step()
    return tokens, parts


def planned_steps(task: Task, minutes: float) -> int:
    """How many steps fit in ``minutes``, measured on steps that are then undone."""
    state = copy.deepcopy(task.model.state_dict())
    optimizer = optimizer_for(task.model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    one_step(task, optimizer, 0)
    count = 12
    start = time.monotonic()
    for step in range(count):
        one_step(task, optimizer, step)
    seconds = (time.monotonic() - start) / count
    task.model.load_state_dict(state)
    return max(1, int(minutes * 60 / seconds))


def export(task: Task, folder: Path, raw: Tokenizer) -> None:
    """Write half-precision safetensors, the configuration and the tokenizer.

    The configuration names single precision, so that the model is trained in it after
    ``from_pretrained``; half precision is only how the file is stored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = copy.deepcopy(task.shipped)
    nn.Module.to(stored, torch.float16)
    stored.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "model.safetensors").chmod(0o644)
    save_tokenizer(raw, folder, task.kind)


def fit(task: Task, steps: int, peak: float, folder: Path, raw: Tokenizer) -> dict[str, object]:
    """Train for ``steps``, exporting every few minutes; returns the run's figures."""
    optimizer = optimizer_for(task.model)
    start = saved = time.monotonic()
    tokens = 0
    sums: dict[str, list[float]] = {}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        used, parts = one_step(task, optimizer, step)
        tokens += used
        for name, value in parts.items():
            sums.setdefault(name, []).append(value)
        now = time.monotonic()
        if step % 50 == 49:
            means = "  ".join(f"{name} {np.mean(part):.3f}" for name, part in sorted(sums.items()))
            print(f"{step + 1}/{steps}  {now - start:.0f} s  {tokens} tokens  {means}", flush=True)
            sums.clear()
        if now - saved > 180:
            export(task, folder, raw)
            saved = now
    export(task, folder, raw)
    with torch.no_grad():
        held_out = task.held_out()
    seconds = time.monotonic() - start
    return {"steps": steps, "tokens": tokens, "seconds": seconds, "held_out_loss": held_out}


def train(args: argparse.Namespace) -> None:
    """Pretrain one of the two models and write it with a record of the run."""
    torch.manual_seed(args.seed)
    raw = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    corpus = Corpus(args.out / "corpus.npz")
    if args.model == "encoder":
        task = encoder_task(corpus, args.seed, args.contrast)
    else:
        task = decoder_task(corpus, args.seed)
    parameters = sum(p.numel() for p in task.shipped.parameters())
    steps = args.steps or planned_steps(task, args.minutes)
    print(f"{args.model}: {parameters} parameters, {steps} steps, seed {args.seed}", flush=True)
    folder = args.out / args.model
    record = fit(task, steps, args.lr, folder, raw)
    record |= {"parameters": parameters, "seed": args.seed, "peak_lr": args.lr}
    record |= {"threads": args.threads, "python": platform.python_version()}
    record |= {"torch": torch.__version__, "transformers": metadata.version("transformers")}
    if args.model == "encoder":
        record |= {"contrast_weight": args.contrast, "temperature": TEMPERATURE}
    text = json.dumps(record, indent=2) + "\n"
    (args.out / f"{args.model}.json").write_text(text, encoding="utf-8")
    print(text, flush=True)


def main() -> None:
    """Parse the command line and run one stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", choices=["tokenizer", "encoder", "decoder"])
    parser.add_argument("--out", type=Path, required=True, help="folder for all results")
    parser.add_argument("--minutes", type=float, default=20.0, help="time to plan for")
    parser.add_argument("--steps", type=int, default=0, help="repeat a run with this many steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate")
    parser.add_argument("--contrast", type=float, default=2.0, help="weight of the pooler's loss")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    if args.model == "tokenizer":
        prepare(args.out)
    else:
        train(args)


if __name__ == "__main__":
    main()
