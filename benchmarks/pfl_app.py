"""pfl-research's simulation on a workload, as its user would write it: no fedpeft engine in it.

FederatedAveraging with a central SGD of rate 1, users in cyclic order, evaluation in the untimed
first round only. Started by ``torchrun`` the processes share a round's users.
"""

from __future__ import annotations

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data import FederatedDataset, get_user_sampler
from pfl.data.dataset import Dataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from benchmarks.model import build_model, mean_loss, trainable
from benchmarks.recorder import Recorder, mark_first_step
from benchmarks.texts import Texts
from benchmarks.workload import SEED, Workload


class Learner(nn.Module):
    """The peft model with the two methods that pfl calls."""

    def __init__(self, model: nn.Module, workload: Workload) -> None:
        super().__init__()
        self.model = model
        self.workload = workload

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of a batch."""
        return mean_loss(self.workload, self.model, tokens, labels)

    def metrics(self, tokens: Tensor, labels: Tensor) -> dict[str, Weighted]:
        """The loss, for the evaluation that pfl makes in its first iteration."""
        with torch.no_grad():
            return {"loss": Weighted(len(labels) * self.loss(tokens, labels).item(), len(labels))}


class Rounds(TrainingProcessCallback):
    """Times the rounds and tells the data set which round it is."""

    def __init__(self, recorder: Recorder, model: nn.Module) -> None:
        self.recorder = recorder
        self.model = model
        self.round = 1

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        self.recorder.begin()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        if self.recorder.end():
            self.recorder.keep(trainable(self.model))
        self.round += 1
        self.recorder.begin()
        return False, Metrics()


def simulate(workload: Workload, recorder: Recorder) -> None:
    """Runs the simulation; of a torchrun's processes only one may keep what its recorder writes."""
    np.random.seed(SEED)
    model, texts = build_model(workload), Texts.draw(workload)
    mark_first_step(model, recorder.folder)
    rounds = Rounds(recorder, model)

    def user(client: int) -> Dataset:
        order = texts.order(client, rounds.round).flatten()
        return Dataset(raw_data=[texts.tokens[order], texts.labels[order]], user_id=str(client))

    sampler = get_user_sampler("minimize_reuse", list(range(workload.population)))
    users = FederatedDataset(user, sampler)
    steps = {"local_batch_size": workload.batch}
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=recorder.rounds,
            evaluation_frequency=recorder.rounds + 1,
            train_cohort_size=workload.cohort,
            val_cohort_size=None,
        ),
        SimulatedBackend(training_data=users, val_data=users),
        PyTorchModel(
            Learner(model, workload),
            local_optimizer_create=lambda parameters, lr: torch.optim.SGD(
                (p for p in parameters if p.requires_grad), lr=lr, foreach=True
            ),
            central_optimizer=torch.optim.SGD(trainable(model).values(), lr=1.0),
        ),
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=workload.local.lr, **steps),
        NNEvalHyperParams(**steps),
        callbacks=[rounds],
        send_metrics_to_platform=False,
    )
