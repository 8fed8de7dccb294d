"""The MNIST experiment of "Every Parameter Matters": accuracy by coverage, at equal size.

    python experiments/studies/epm_mnist/measure.py MNIST.npz [--division shards] [--regions random]
    python experiments/studies/epm_mnist/measure.py --table

A code lists the types of a round's ten participants (``fedpeft.masks.DROPPED``): which quarters of
the first layer's weights, sorted by magnitude, they go without. With ``--regions random`` they are
sorted by a draw of each round, so that every quarter has the same share of the weights. A
participant starts from the masked weights and masks its gradients; the server takes the mean over
the clients that have a weight (``fedpeft.coverage``), and what nobody has stays. Every run is a
line of ``results.jsonl``; runs that are there are not made again. Participants train one after
another: a client's weights, momentum and mask then stay in a processor's cache, which is faster on
one thread than all at once.
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


def scores(first: Tensor, regions: str, seed: int, t: int) -> Tensor:
    """What the first layer's weights are sorted by, ``[n]``."""
    if regions == "magnitude":
        return first.abs().flatten()
    return torch.rand(first.numel(), generator=torch_stream(seed, "regions", t))


def play(code: str, division: str, regions: str, seed: int, data: Data) -> dict[str, Any]:
    """One run. The same seed is the same start, division, participants, batches and dropout."""
    began = time.perf_counter()
    own = divide(data.train_labels, division, seed)
    network, types = start(seed), tuple(float(kind) for kind in code)
    hits, noise, least, sizes = [], [], [], []
    for t in range(ROUNDS):
        drawn = numpy_stream(seed, "sample", t).permutation(CLIENTS)[: len(code)]
        names = [f"client-{i}" for i in drawn]
        ask = Ask(names, types, t, seed)
        first = choose("quartile", scores(network[FIRST], regions, seed, t), ask, FIRST)
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
            hits.append(accuracy(network, data))
    return {
        "code": code,
        "division": division,
        "regions": regions,
        "seed": seed,
        "accuracy": round(statistics.mean(hits), 3),
        "last": round(hits[-1], 2),
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


def by_setting(lines: list[dict[str, Any]]) -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    """Division and regions -> code -> seed -> line, in the order of the tables."""
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for division, regions in (("iid", "magnitude"), ("iid", "random"), ("shards", "magnitude")):
        own = [r for r in lines if (r["division"], r["regions"]) == (division, regions)]
        runs = {code: {r["seed"]: r for r in own if r["code"] == code} for code in CODES}
        found[f"{division}, {regions}"] = {code: one for code, one in runs.items() if one}
    return found


def codes_table(lines: list[dict[str, Any]]) -> list[list[str]]:
    """Accuracy by setting and code."""
    rows = [["setting", "code", "Γ_min", "size", "δ²", "seeds", "accuracy %", "authors' %"]]
    for setting, codes in by_setting(lines).items():
        for code, seeds in codes.items():
            runs = list(seeds.values())
            noise = statistics.mean(r["noise"] for r in runs)
            what = [str(runs[0]["gamma"]), f"{runs[0]['size']:.3f}", f"{noise:.3f}"]
            ours = interval([r["accuracy"] for r in runs])
            rows.append([setting, code, *what, str(len(runs)), ours, f"{CODES[code]:.2f}"])
    return rows


def pairs_table(lines: list[dict[str, Any]]) -> list[list[str]]:
    """What wider coverage gains at equal size, seed by seed."""
    rows = [["setting", "wider", "less", "seeds", "difference", "wider is ahead", "authors'"]]
    for setting, codes in by_setting(lines).items():
        for wide, narrow in PAIRS:
            one, two = codes.get(wide, {}), codes.get(narrow, {})
            gains = [one[s]["accuracy"] - two[s]["accuracy"] for s in sorted(one.keys() & two)]
            if gains:
                ahead = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
                theirs = f"{CODES[wide] - CODES[narrow]:+.2f}"
                few = str(len(gains))
                rows.append([setting, wide, narrow, few, interval(gains), ahead, theirs])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", nargs="?", type=Path, help="mnist.npz")
    parser.add_argument("--division", choices=["iid", "shards"], default="iid")
    parser.add_argument("--regions", choices=["magnitude", "random"], default="magnitude")
    parser.add_argument("--only", nargs="*", default=list(CODES), help="these codes only")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    lines = [json.loads(x) for x in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if asked.table:
        for table in (codes_table(lines), pairs_table(lines)):
            for row in (table[0], ["---"] * len(table[0]), *table[1:]):
                print("| " + " | ".join(row) + " |")
            print()
        return
    torch.set_num_threads(1)
    data, setting = Data.read(asked.data), (asked.division, asked.regions)
    done = {(r["code"], r["division"], r["regions"], r["seed"]) for r in lines}
    for seed in asked.seeds:
        for code in asked.only:
            if (code, *setting, seed) not in done:
                line = play(code, *setting, seed, data)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(line, flush=True)


if __name__ == "__main__":
    main()
