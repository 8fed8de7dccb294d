"""The MNIST experiment of "Every Parameter Matters": accuracy by coverage, at equal size.

    python experiments/studies/epm_mnist/measure.py MNIST.npz [--division shards] [--only CODE ...]
    python experiments/studies/epm_mnist/measure.py --table

A code lists the types of a round's ten participants (``fedpeft.masks.DROPPED``): which quarters of
the first layer's weights, sorted by magnitude, they go without. A participant starts from the
masked weights and masks its gradients; the server takes the mean over the clients that have a
weight (``fedpeft.coverage``), and what nobody has stays. Every run is a line of ``results.jsonl``;
runs that are there are not made again. Participants train one after another: a client's weights,
momentum and mask then stay in a processor's cache, which is faster on one thread than all at once.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft.coverage import Coverage, reduction
from fedpeft.masks import Ask, choose
from fedpeft.streams import derive, numpy_stream, torch_stream
from fedpeft.tree import Tree, stack

RESULTS = Path(__file__).parent / "results.jsonl"
HIDDEN, CLIENTS, ROUNDS, EPOCHS, BATCH, LR, MOMENTUM = 200, 100, 100, 5, 10, 0.01, 0.5
FIRST = "first.weight"
CODES = {  # -> the authors' mean accuracy in the last ten rounds, per cent
    "1111111111": 97.62,
    "1111223344": 97.93,
    "1111444444": 97.45,
    "2233445677": 95.86,
    "1444777777": 95.39,
}
PAIRS = (("1111223344", "1111444444"), ("2233445677", "1444777777"))
"""Of equal mean size, or nearly: the wider coverage first."""
STUDENT = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}
"""Number of seeds -> 97.5 % quantile of Student's t with one degree of freedom less."""


@dataclass(frozen=True)
class Data:
    """Pixels ``[n, 784]``, normalised by MNIST's mean and deviation, and one-hot labels."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @staticmethod
    def read(path: Path) -> Data:
        with np.load(path, allow_pickle=False) as file:
            parts = {name: torch.from_numpy(file[name]) for name in file.files}
        x = {n: (parts[f"{n}_x"].flatten(1) / 255 - 0.1307) / 0.3081 for n in ("train", "test")}
        y = {n: torch.eye(10)[parts[f"{n}_y"].long()] for n in ("train", "test")}
        return Data(x["train"], y["train"], x["test"], y["test"])


def divide(labels: Tensor, division: str, seed: int) -> np.ndarray:
    """Every client's examples, ``[100, 600]``: drawn evenly, or two shards of 300 of one label."""
    stream = numpy_stream(seed, "division")
    if division == "iid":
        return stream.permutation(len(labels)).reshape(CLIENTS, -1)
    order = np.argsort(labels.argmax(1).numpy(), kind="stable")
    shards = order.reshape(2 * CLIENTS, -1)[stream.permutation(2 * CLIENTS)]
    return shards.reshape(CLIENTS, -1)


def start(seed: int) -> Tree:
    """The network as torch's linear layers begin: uniform within 1 / sqrt(inputs)."""
    found = {}
    for layer, inputs, outputs in (("first", 784, HIDDEN), ("last", HIDDEN, 10)):
        for part, shape in (("weight", (inputs, outputs)), ("bias", (outputs,))):
            drawn = torch.rand(shape, generator=torch_stream(seed, layer, part))
            found[f"{layer}.{part}"] = (2 * drawn - 1) / math.sqrt(inputs)
    return found


@torch.inference_mode()
def train(begin: Tree, mask: Tensor, x: Tensor, y: Tensor, seed: int) -> Tree:
    """A participant's network after its epochs, from ``begin``; its first layer under the mask.

    SGD with momentum on the mean cross-entropy, by hand: the mask acts on every step of the first
    layer, whose weights begin at zero where it is 0 and so stay there. Biases are the last rows of
    the weights. What dropout scales kept units by, 2, is in the step of the first layer. Pixels in
    which a client's examples do not differ (``blank``: a quarter) are one input, whose weight is
    the sum of theirs and moves by as much as they together; that is exact.
    """
    w, ones = begin[FIRST] * mask, torch.ones(len(x), 1)
    blank = (x == x[:1]).all(0) & (x[0] == x.min())
    alive, merged, many = ~blank, w[blank].sum(0, keepdim=True), mask[blank].sum(0, keepdim=True)
    first = torch.cat([w[alive], merged, begin["first.bias"][None]])
    last = torch.cat([begin["last.weight"], begin["last.bias"][None]])
    on = torch.cat([mask[alive].float(), many.float(), torch.ones(1, HIDDEN)])
    move, move_last = torch.zeros_like(first), torch.zeros_like(last)
    draw, hidden = torch.Generator().manual_seed(seed), torch.ones(BATCH, HIDDEN + 1)
    units, weights = hidden[:, :HIDDEN], last[:HIDDEN]
    x = torch.cat([x[:, alive], x.min() * ones, ones], dim=1)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=draw)
        kept = (torch.rand(len(x), HIDDEN, generator=draw) < 0.5).float().mul_(2)
        parts = (own.split(BATCH) for own in (x[order], y[order], kept))
        for inputs, labels, keep in zip(*parts, strict=True):
            torch.mul((inputs @ first).clamp_(min=0), keep, out=units)
            error = torch.softmax(hidden @ last, 1).sub_(labels)
            back = torch.ops.aten.threshold_backward(error @ weights.T, units, 0)
            move.addmm_(inputs.T, back, beta=MOMENTUM)
            move_last.addmm_(hidden.T, error, beta=MOMENTUM)
            first.addcmul_(move, on, value=-2 * LR / BATCH)
            last.add_(move_last, alpha=-LR / BATCH)
    w[alive] = first[:-2]
    w[blank] += mask[blank] * (first[-2:-1] - merged) / many.clamp(min=1)
    return {
        FIRST: w,
        "first.bias": first[-1],
        "last.weight": last[:-1],
        "last.bias": last[-1],
    }


def accuracy(network: Tree, data: Data) -> float:
    """On the test set, per cent."""
    h = (data.test @ network[FIRST] + network["first.bias"]).clamp(min=0)
    logits = h @ network["last.weight"] + network["last.bias"]
    hits = logits.argmax(1) == data.test_labels.argmax(1)
    return float(100 * hits.double().mean())


def play(code: str, division: str, seed: int, data: Data) -> dict[str, Any]:
    """One run. The same seed is the same start, division, participants, batches and dropout."""
    began = time.perf_counter()
    own = divide(data.train_labels, division, seed)
    network, types = start(seed), tuple(float(kind) for kind in code)
    scores, noise, least, sizes = [], [], [], []
    for t in range(ROUNDS):
        drawn = numpy_stream(seed, "sample", t).permutation(CLIENTS)[: len(code)]
        names = [f"client-{i}" for i in drawn]
        ask = Ask(names, types, t, seed)
        first = choose("quartile", network[FIRST].abs().flatten(), ask, FIRST)
        masks = {FIRST: first.view(-1, *network[FIRST].shape)}
        noise.append(float(reduction(network, masks).max()))
        sizes.append(float(first.double().mean()))
        replies = [
            train(
                network,
                masks[FIRST][j],
                data.train[own[i]],
                data.train_labels[own[i]],
                derive(seed, "client", t, names[j]),
            )
            for j, i in enumerate(drawn)
        ]
        cover = Coverage({FIRST: network[FIRST]})
        equal = torch.ones(len(code))
        cover.add({FIRST: torch.stack([r[FIRST] for r in replies])}, masks, equal)
        least.append(cover.least())
        rest = stack([{n: x for n, x in r.items() if n != FIRST} for r in replies])
        network = {n: x.mean(0) for n, x in rest.items()} | cover.mean()
        if t >= ROUNDS - 10:
            scores.append(accuracy(network, data))
    return {
        "code": code,
        "division": division,
        "seed": seed,
        "accuracy": round(statistics.mean(scores), 3),
        "last": round(scores[-1], 2),
        "gamma": min(least),
        "size": round(statistics.mean(sizes), 4),
        "noise": round(statistics.mean(noise), 4),
        "seconds": round(time.perf_counter() - began, 1),
    }


def interval(values: list[float]) -> str:
    """Mean and its 95 % interval by Student's t; of one value the value."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.2f} ± {half:.2f}"


def rows_of(lines: list[dict[str, Any]]) -> list[list[str]]:
    """The tables: by division and code, then the pairs of equal size, seed by seed."""
    rows = [["division", "code", "Γ_min", "size", "δ²", "seeds", "accuracy %", "authors' %"]]
    pairs = [["division", "wider", "less", "seeds", "difference", "wider is ahead", "authors'"]]
    for division in ("iid", "shards"):
        found: dict[str, dict[int, float]] = {}
        for code, theirs in CODES.items():
            own = [r for r in lines if (r["division"], r["code"]) == (division, code)]
            if not own:
                continue
            found[code] = {r["seed"]: r["accuracy"] for r in own}
            noise = statistics.mean(r["noise"] for r in own)
            gamma, size, few = own[0]["gamma"], own[0]["size"], str(len(own))
            cells = [
                str(gamma),
                f"{size:.3f}",
                f"{noise:.3f}",
                few,
                interval([*found[code].values()]),
            ]
            rows.append([division, code, *cells, f"{theirs:.2f}"])
        for wide, narrow in PAIRS:
            both = sorted(found.get(wide, {}).keys() & found.get(narrow, {}).keys())
            if both:
                gains = [found[wide][s] - found[narrow][s] for s in both]
                ahead = f"{sum(g > 0 for g in gains)} of {len(gains)}"
                theirs = f"{CODES[wide] - CODES[narrow]:+.2f}"
                pairs.append(
                    [division, wide, narrow, str(len(both)), interval(gains), ahead, theirs]
                )
    return rows, pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", nargs="?", type=Path, help="mnist.npz")
    parser.add_argument("--division", choices=["iid", "shards"], default="iid")
    parser.add_argument("--only", nargs="*", default=list(CODES), help="these codes only")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    lines = [json.loads(x) for x in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if asked.table:
        for table in rows_of(lines):
            for row in (table[0], ["---"] * len(table[0]), *table[1:]):
                print("| " + " | ".join(row) + " |")
            print()
        return
    torch.set_num_threads(1)
    data = Data.read(asked.data)
    done = {(r["code"], r["division"], r["seed"]) for r in lines}
    for seed in asked.seeds:
        for code in asked.only:
            if (code, asked.division, seed) not in done:
                line = play(code, asked.division, seed, data)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(line, flush=True)


if __name__ == "__main__":
    main()
