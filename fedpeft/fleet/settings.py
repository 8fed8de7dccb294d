"""The recipe's ``fleet:``, who simulates which devices, links and rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedpeft.fleet.jobs import Stage
from fedpeft.fleet.memory import Action

Preset = Literal[
    "none",
    "jetson80",
    "jetson_tx2",
    "jetson_xavier_nx",
    "jetson_agx_xavier",
    "jetson_nano",
    "jetson_orin_nano",
    "rpi4",
    "server_gpu",
    "flash",
    "fedscale",
]
Links = Literal["auto", "wifi", "lte", "5g", "3g", "lan", "sat", "groups"]
Kind = Literal["idl", "homo", "ln", "sln", "mdf", "ldf", "ymf", "yff", "yc", "trace"]
Policy = Literal["sync", "deadline", "over_select", "fedbuff", "semi_async"]

ASYNCHRONOUS = ("fedbuff", "semi_async")


@dataclass(frozen=True)
class Fleet:
    """Simulated devices and a virtual clock; they decide what counts, not how it is computed.

    preset: whose devices; ``none`` for no clock. ``jetson80`` is 30 TX2, 40 Xavier NX and 10 AGX
    Xavier, or as many in proportion; ``flash`` phones in three classes, timed by the batches of
    FLASH's ``workload``; ``fedscale`` the devices of ``capacities`` (a JSON file; without one a
    synthetic look-alike). utilization: share of a device's peak that training reaches. sigma: how
    unequal clients are beside that, of LogNormal(0, sigma). redraw: rounds after which Jetsons
    change their power mode (0: never). roofline: a device computes no faster than its memory
    moves. load: seconds to load the model in a round.
    network: links; ``auto`` goes with the preset. bad_spells: links have bad states (Gilbert).
    availability: who is there, see ``fedpeft.fleet.availability``; ``trace`` reads ``trace``, JSON
    of FedScale's or FLASH's form (without one a synthetic look-alike). beta: its strength.
    dropout: the probability that a client drops out of a round; stage: where.
    policy: ``sync`` waits for all; ``deadline`` for ``deadline`` seconds; ``over_select`` asks
    ``overcommit`` times as many and takes the first; ``fedbuff`` and ``semi_async`` go on when
    ``buffer`` replies are there, of ``concurrency`` clients at work (0: as many as
    rounds.sampling draws), weigh an update by (1 + staleness)^-exponent, and throw away what is
    older than ``max_staleness`` versions (0: nothing).
    memory: what a client does that has too little. target: the test accuracy, or for language
    models the token accuracy, whose time is measured (0: none).
    """

    preset: Preset = "none"
    workload: Literal["reddit", "celeba", "femnist"] = "reddit"
    capacities: str = ""
    utilization: float = 0.25
    sigma: float = 0.0
    redraw: int = 20
    roofline: bool = False
    load: float = 0.0
    network: Links = "auto"
    bad_spells: bool = False
    availability: Kind = "idl"
    beta: float = 0.1
    trace: str = ""
    dropout: float = 0.0
    stage: Stage = "any"
    policy: Policy = "sync"
    deadline: float = 0.0
    overcommit: float = 1.3
    buffer: int = 10
    concurrency: int = 0
    exponent: float = 0.5
    max_staleness: int = 0
    memory: Action = "reject"
    target: float = 0.0

    @property
    def asynchronous(self) -> bool:
        """Whether clients train from different versions at once."""
        return self.policy in ASYNCHRONOUS
