"""The recipe: one frozen dataclass tree; YAML and ``key=value`` merge into it, unknown keys die.

What changes the result (everything in ``Recipe`` but ``engine`` and ``output``) and what changes
only the speed (``Engine``) are different dataclasses. A strategy's own settings are checked against
the strategy's file, an adapter's against peft's configuration class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fedpeft.attacks.settings import Attack
from fedpeft.codecs.settings import Codec
from fedpeft.fleet.settings import Fleet
from fedpeft.robust.settings import Robust


@dataclass(frozen=True)
class Model:
    """The frozen base model.

    name: ``fedpeft-tiny`` (built in), a Hugging Face id, or a local folder. revision: a branch, tag
    or commit of the hub. pooling: how a classifier reads the encoder; ``auto`` takes the model
    class that transformers has for sequence classification, ``mean`` averages the token vectors
    under a linear head. random: ignore the pretrained weights (a control, not a model to use).
    quantize: hold the base in 8 or 4 bits (needs bitsandbytes); adapters stay float32.
    """

    name: str = "fedpeft-tiny"
    revision: str | None = None
    pooling: Literal["auto", "mean"] = "auto"
    random: bool = False
    quantize: Literal["none", "8bit", "4bit"] = "none"


@dataclass(frozen=True)
class Data:
    """Where the text comes from.

    source: ``pydocs`` (built in), a Hugging Face data set id, a csv, jsonl or parquet file, a
    folder of them named train/test, or a store (``fedpeft store``), which brings its own clients.
    subset: configuration name on the hub. train, test: split names on the hub, or file names in the
    folder; without a test split the clients' hold-outs are the test set. public: a split that the
    server owns and nobody needs to protect; for strategies that start from one. text, pair, label:
    columns. client: the natural-client column. max_length: tokens per example. holdout: share of
    each client's examples kept as its own test set. limit: use at most so many training rows, drawn
    by the seed (0: all).
    """

    source: str = "pydocs"
    subset: str | None = None
    train: str = "train"
    test: str | None = None
    public: str | None = None
    task: Literal["classification", "causal_lm"] = "classification"
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    client: str | None = None
    max_length: int = 64
    holdout: float = 0.2
    limit: int = 0


@dataclass(frozen=True)
class Partition:
    """How rows become clients (flwr-datasets' partitioners).

    kind: ``iid``, ``dirichlet`` (label shares drawn from Dirichlet(alpha)), ``pathological``
    (``classes`` labels per client), ``shard`` (rows sorted by label, ``shards`` shards per client)
    or ``natural`` (one client per value of ``data.client``; ``clients`` > 0 keeps the largest).
    min_examples: the fewest rows that a client may have.
    """

    kind: Literal["iid", "dirichlet", "pathological", "shard", "natural"] = "iid"
    clients: int = 10
    alpha: float = 0.5
    classes: int = 2
    shards: int = 2
    min_examples: int = 2


@dataclass(frozen=True)
class Sampling:
    """Which clients take part in a round.

    kind: ``uniform`` (a ``fraction`` of the clients, without replacement), ``fixed`` (``size``
    clients, without replacement), ``poisson`` (each independently with probability ``rate``) or
    ``cyclic`` (the clients in ``groups``, drawn once, which take turns: nobody takes part twice
    within ``groups`` rounds).
    """

    kind: Literal["uniform", "fixed", "poisson", "cyclic"] = "uniform"
    fraction: float = 1.0
    size: int = 10
    rate: float = 0.1
    groups: int = 10


@dataclass(frozen=True)
class Rounds:
    """The communication rounds.

    count: how many. weighting: ``examples`` (p_k proportional to training examples) or ``equal``.
    quorum: the share of a round's clients whose valid replies the round needs. failure_rate: the
    probability that a client drops out of a round (simulated; it may come back in the next).
    aborts: how many rounds in a row may fall short of the quorum; each leaves the model as it was
    and counts, one more stops the run with a checkpoint. reject_norm: a reply whose update has a
    larger Euclidean norm is refused (0: none is). max_reply: a reply of more bytes is refused, as
    ``100 MB`` or ``1 GiB``.
    """

    count: int = 5
    sampling: Sampling = field(default_factory=Sampling)
    weighting: Literal["examples", "equal"] = "examples"
    quorum: float = 0.5
    failure_rate: float = 0.0
    aborts: int = 0
    reject_norm: float = 0.0
    max_reply: str = "1 GiB"


@dataclass(frozen=True)
class Local:
    """Training on a client in one round.

    epochs: passes over the client's data; steps > 0 sets the number of optimizer steps instead.
    batch_size: examples per forward pass; accumulate: forward passes per optimizer step.
    schedule: the learning rate over the whole run (``constant``, ``linear`` or ``cosine`` to zero)
    after ``warmup``, a share of the run. clip_norm: gradient norm bound (0: none), per ``client``
    (of the step's mean gradient) or per ``example`` (of each example's own, before the mean).
    precision: ``fp32``, or autocast to ``bf16`` or ``fp16`` with float32 adapters. base_dropout:
    keep the base model's dropout on; an adapter's own dropout is its own setting.
    """

    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    epochs: int = 1
    steps: int = 0
    batch_size: int = 16
    accumulate: int = 1
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    clip_norm: float = 0.0
    clip_per: Literal["client", "example"] = "client"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    base_dropout: bool = False


@dataclass(frozen=True)
class Privacy:
    """Differential privacy: who is protected, and how.

    unit: ``record`` (one example: every client trains with DP-SGD) or ``client`` (all data of one
    client: its update is clipped, the mean of the updates noised). epsilon: the budget of the whole
    run, for which the noise multiplier is found; or noise_multiplier itself (0: not given), the
    standard deviation of the noise in units of the sensitivity. delta: must be below one over the
    number of what is protected. clip_norm: the Euclidean bound on an example's gradient, or on a
    client's update. max_rounds: rounds that a client may take part in (0: all of the run); the
    budget is spread over so many, and the ledger lets nobody take part in more. accountant: which
    one finds and checks (``pld`` needs dp-accounting). randomness: ``secure``, or ``seeded``, which
    can be repeated and voids the guarantee.

    Of unit ``client``: noise is added by the ``server``, by each ``client`` in full (local
    differential privacy), or as ``shares`` that add up (needs secure_aggregation). adaptive: the
    bound follows the ``quantile`` of the clients' norms at ``clip_rate``. bands: of correlated
    noise by banded matrix factorisation (0: independent noise; -1: as many as the sampling's
    groups).
    """

    unit: Literal["none", "record", "client"] = "none"
    epsilon: float = 0.0
    noise_multiplier: float = 0.0
    delta: float = 1e-5
    clip_norm: float = 1.0
    max_rounds: int = 0
    accountant: Literal["prv", "rdp", "pld"] = "prv"
    randomness: Literal["secure", "seeded"] = "secure"
    noise: Literal["server", "client", "shares"] = "server"
    adaptive: bool = False
    quantile: float = 0.5
    clip_rate: float = 0.2
    bands: int = 0


@dataclass(frozen=True)
class SecureAggregation:
    """Secure aggregation: the server learns the sum of the clients' updates and no single one.

    enabled: use it. clip_norm: bound on an update where privacy does not set one. bits: of the
    sums' arithmetic, 32 or 64. threshold: share of a round's clients that must stay to the end.
    """

    enabled: bool = False
    clip_norm: float = 10.0
    bits: int = 64
    threshold: float = 0.67


@dataclass(frozen=True)
class Comms:
    """What messages cost.

    up: how clients' replies are made smaller. down: how what clients are sent is, as a change of
    what they were sent before. budget: bytes of all messages of the run, both ways, as ``50 MB`` or
    ``1.5 GiB``; the run ends before a round that would go beyond (empty: no bound).
    """

    up: Codec = field(default_factory=Codec)
    down: Codec = field(default_factory=Codec)
    budget: str = ""


@dataclass(frozen=True)
class Evaluation:
    """When and how the adapter is measured.

    every: rounds between evaluations on the global test set (the last round always counts). sample:
    before the last round on at most so many of its examples, drawn by the seed (0: all).
    clients: also on the clients' own hold-outs, at the end. most: at most so many clients, drawn by
    the seed, for what is measured client by client; the baseline ``local`` trains no others (0:
    all). local_test: how many test examples each local-only adapter is measured on (0: all).
    """

    every: int = 1
    sample: int = 0
    clients: bool = True
    most: int = 1000
    local_test: int = 500


@dataclass(frozen=True)
class Engine:
    """How the run is computed; changes the speed, not the result.

    kind: ``cohort`` (clients batched through one base), ``sequential`` (one after another) or
    ``flower`` (Flower's simulation on Ray). chunk: clients in flight (0: planned by memory).
    device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``. threads: torch threads (0: torch's choice).
    workers: of ``cohort``, processes with one base model each, through Ray (0: one per GPU; 1: this
    process, without Ray), which share ``threads`` on the CPU; of ``flower``, concurrent clients (0:
    one per CPU core). compile: torch.compile of the training step; ``graphs`` also replays it as
    CUDA graphs. checkpointing: recompute the base's activations in the backward pass instead of
    keeping them.
    """

    kind: Literal["cohort", "sequential", "flower"] = "cohort"
    chunk: int = 0
    device: str = "auto"
    threads: int = 0
    workers: int = 0
    compile: Literal["none", "default", "graphs"] = "none"
    checkpointing: bool = False


@dataclass(frozen=True)
class Output:
    """Where the run leaves its folder.

    folder: the run folder. overwrite: delete what is there. checkpoint_every: rounds between
    checkpoints. keep: checkpoints kept.
    """

    folder: str = "runs/latest"
    overwrite: bool = False
    checkpoint_every: int = 1
    keep: int = 2


@dataclass(frozen=True)
class Recipe:
    """One run. ``strategy`` and ``adapter`` name their kind and hold that kind's own settings.

    baselines: what the last table compares with: ``untrained``, ``local``, ``centralised``.
    """

    name: str = "run"
    seed: int = 0
    model: Model = field(default_factory=Model)
    adapter: dict[str, Any] = field(default_factory=lambda: {"kind": "lora", "r": 8})
    data: Data = field(default_factory=Data)
    partition: Partition = field(default_factory=Partition)
    strategy: dict[str, Any] = field(default_factory=lambda: {"name": "fedavg"})
    rounds: Rounds = field(default_factory=Rounds)
    local: Local = field(default_factory=Local)
    privacy: Privacy = field(default_factory=Privacy)
    secure_aggregation: SecureAggregation = field(default_factory=SecureAggregation)
    comms: Comms = field(default_factory=Comms)
    robust: Robust = field(default_factory=Robust)
    attack: Attack = field(default_factory=Attack)
    fleet: Fleet = field(default_factory=Fleet)
    evaluation: Evaluation = field(default_factory=Evaluation)
    baselines: tuple[Literal["untrained", "local", "centralised"], ...] = (
        "untrained",
        "local",
        "centralised",
    )
    engine: Engine = field(default_factory=Engine)
    output: Output = field(default_factory=Output)
