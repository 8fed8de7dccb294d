"""What codecs cost: ``python -m benchmarks.codecs [--workload A] [--clients 64] [--threads 2]``.

For a whole cohort's updates of the workload's tensors: the time of ``encode`` (with what receivers
get and what the payloads cost, as a simulation has it in every round) over the time of a FedAvg
round; the time to write and read the cohort's payloads for real, client by client; and bytes a
client, the payload's header included. Updates are normal numbers of 1e-3.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.server_step import whole_rounds
from benchmarks.workload import WORKLOADS
from fedpeft import codecs
from fedpeft.codecs import wire
from fedpeft.codecs.settings import Codec, check_codec
from fedpeft.record import environment
from fedpeft.tree import Layout

BAR = 0.10
"""The largest share of a round that encoding a cohort may take."""

CODECS = {
    "dense, fp32": Codec(codec="dense"),
    "dense, fp16": Codec(codec="dense", values="fp16"),
    "dense, int8": Codec(codec="dense", values="int8"),
    "dense, int4, block 64": Codec(codec="dense", values="int4", block=64),
    "dense, qsgd 127": Codec(codec="dense", values="qsgd"),
    "dense, qsgd 4": Codec(codec="dense", values="qsgd", levels=4),
    "topk 0.05, fp16": Codec(codec="topk", density=0.05, values="fp16"),
    "topk 0.1, int8": Codec(codec="topk", values="int8"),
    "topk 0.25, fp16, by tensor": Codec(codec="topk", density=0.25, values="fp16", scope="tensor"),
    "randk 0.1, fp16": Codec(codec="randk", values="fp16"),
    "dare 0.1, fp16": Codec(codec="dare", values="fp16"),
    "compeft 0.05": Codec(codec="compeft", density=0.05),
    "compeft 0.2": Codec(codec="compeft", density=0.2),
    "powersgd 2, fp16": Codec(codec="powersgd", rank=2, values="fp16"),
}


def fastest(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of several calls."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return min(found)


def measured(settings: Codec, matrix: Tensor, layout: Layout, repeats: int) -> dict[str, float]:
    """Seconds to encode, and to write and read all payloads; bytes a client."""
    check_codec(settings, "codec")
    seeds = torch.arange(len(matrix))

    def encode() -> tuple[codecs.Symbols, Tensor]:
        symbols = codecs.encode(settings, matrix, layout.shapes, seeds)
        return symbols, wire.overhead(symbols.lengths()) + sum(symbols.bytes().values())

    symbols, price = encode()
    header = wire.Header(settings.codec, layout.digest, layout.digest)

    def write() -> list[bytes]:
        return [wire.write(header, symbols.arrays(k)) for k in range(len(matrix))]

    payloads = write()

    def read() -> list[Tensor]:
        return [
            codecs.decode(settings, wire.read(data, len(data))[1], layout.shapes)
            for data in payloads
        ]

    if sum(map(len, payloads)) != int(price.sum()):
        raise AssertionError("the payloads are not as long as their price says")
    return {
        "encode": fastest(encode, repeats),
        "write": fastest(write, 1),
        "read": fastest(read, 1),
        "bytes": float(price.double().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workload", default="A", choices=sorted(WORKLOADS))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    whole, seconds = whole_rounds(WORKLOADS[asked.workload], asked.clients, asked.threads)
    whole_round, layout = sorted(seconds)[1], Layout.of(whole.problem.initial)
    matrix = torch.randn(asked.clients, layout.size, generator=torch.Generator().manual_seed(0))
    matrix *= 1e-3
    print(f"a round of FedAvg, {asked.clients} clients: {whole_round:.2f} s")
    print(f"{layout.size} numbers a client, {2 * layout.size} bytes as fp16")
    print("| codec | encode, ms | share of a round | bar | write, read, ms | bytes | x fp16 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    found = {}
    for name, settings in CODECS.items():
        own = found[name] = measured(settings, matrix, layout, asked.repeats)
        share = own["encode"] / whole_round
        print(
            f"| {name} | {1e3 * own['encode']:.1f} | {100 * share:.1f} % | "
            f"{100 * BAR:.0f} %: {'pass' if share <= BAR else 'FAIL'} | "
            f"{1e3 * own['write']:.0f}, {1e3 * own['read']:.0f} | {own['bytes']:.0f} | "
            f"{2 * layout.size / own['bytes']:.1f} |"
        )
    if asked.out:
        figures = {"round": seconds, "codecs": found, "clients": asked.clients}
        figures |= {"numbers": layout.size, "workload": asked.workload}
        asked.out.write_text(
            json.dumps({"environment": environment.describe(), **figures}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
