"""Flower's simulation on a workload, as a Flower user would write it: no fedpeft engine in it.

The stock FedAvg strategy; one SuperNode per client of a round, so that all nodes take part in every
round; the client keeps model and data in its actor between messages (naive clients, which build the
model for every message, are slower) and trains with the same plain loop as ``benchmarks.loops``.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

from benchmarks.loops import load, train_steps
from benchmarks.model import build_model, trainable
from benchmarks.recorder import Recorder, mark_first_step
from benchmarks.texts import Texts
from benchmarks.workload import WORKLOADS, Workload, clients_of

client_app = ClientApp()


@functools.cache
def resident(name: str, threads: int, folder: str) -> tuple[nn.Module, Texts]:
    """An actor's model and data, built once; ``folder`` is where the first step is noted."""
    torch.set_num_threads(threads)
    workload = WORKLOADS[name]
    model = build_model(workload)
    mark_first_step(model, Path(folder))
    return model, Texts.draw(workload)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One client's round."""
    config = message.content.config_records["config"]
    threads, round = config["threads"], config["server-round"]
    assert isinstance(threads, int) and isinstance(round, int)
    model, texts = resident(str(config["workload"]), threads, str(config["folder"]))
    workload, named = texts.workload, trainable(model)
    client = clients_of(workload, round)[int(context.node_config["partition-id"])]
    received = message.content.array_records["arrays"].to_torch_state_dict()
    load(list(named.values()), [received[name] for name in named])
    optimizer = torch.optim.SGD(named.values(), lr=workload.local.lr, foreach=True)
    train_steps(model, optimizer, texts, texts.order(client, round))
    reply = RecordDict(
        {
            "arrays": ArrayRecord({name: p.detach().cpu() for name, p in named.items()}),
            "metrics": MetricRecord({"num-examples": workload.examples}),
        }
    )
    return Message(content=reply, reply_to=message)


def server_app(workload: Workload, recorder: Recorder, threads: int) -> ServerApp:
    """FedAvg over all nodes; the rounds are timed in ``evaluate_fn``, which runs between them."""
    app = ServerApp()

    def between(round: int, arrays: ArrayRecord) -> MetricRecord:
        if round > 0 and recorder.end():
            recorder.keep(arrays.to_torch_state_dict())
        recorder.begin()
        return MetricRecord()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_evaluate=0.0,
            min_train_nodes=workload.cohort,
            min_available_nodes=workload.cohort,
        )
        model = build_model(dataclasses.replace(workload, device="cpu"))
        initial = {name: p.detach() for name, p in trainable(model).items()}
        settings = ConfigRecord(
            {"workload": workload.name, "threads": threads, "folder": str(recorder.folder)}
        )
        strategy.start(
            grid,
            ArrayRecord(initial),
            num_rounds=recorder.rounds,
            train_config=settings,
            evaluate_fn=between,
        )

    return app


def simulate(workload: Workload, recorder: Recorder, actors: int, threads: int) -> None:
    """Runs the simulation with ``actors`` concurrent clients of ``threads`` threads each.

    On a GPU they share it.
    """
    gpus = 1 if workload.device == "cuda" else 0
    run_simulation(
        server_app=server_app(workload, recorder, threads),
        client_app=client_app,
        num_supernodes=workload.cohort,
        backend_config={
            "client_resources": {"num_cpus": threads, "num_gpus": gpus / actors},
            "init_args": {
                "address": "local",  # not another Ray of this machine
                "num_cpus": actors * threads,
                "num_gpus": gpus,
                "include_dashboard": False,
            },
        },
    )
