from __future__ import annotations

import sys

from benchmarks.ways import FAMILIES, Way, available, variants
from benchmarks.workload import ON_GPU, WORKLOADS


def test_variants_share_the_same_number_of_threads() -> None:
    for name in ("A", "B", "C"):
        for family in FAMILIES:
            found = variants(family, WORKLOADS[name], threads=2, chunk=0)
            assert max(way.cores for way in found) == (1 if family == "worker" else 2)
            assert len({way.label for way in found}) == len(found) > 0
    assert {w.batch for w in variants("centralised", WORKLOADS["A"], 2, 0)} == {32, 64, 128}
    assert {(w.processes, w.threads) for w in variants("flower", WORKLOADS["B"], 2, 0)} == {
        (1, 2),
        (2, 1),
    }
    assert {w.threads for w in variants("loop", WORKLOADS["B"], 2, 0)} == {1, 2}
    assert (1, 1) in {(w.processes, w.threads) for w in variants("pfl", WORKLOADS["B"], 2, 0)}


def test_on_a_gpu_flower_is_given_several_numbers_of_actors() -> None:
    for workload in ON_GPU:
        found = variants("flower", workload, threads=16, chunk=0)
        assert tuple(way.processes for way in found) == workload.actors
        assert variants("workers", workload, 16, 0) == []


def test_a_way_is_the_recipes_settings() -> None:
    workload = WORKLOADS["A"]
    plain = Way("cohort", 1, 2, chunk=4)
    assert plain.local(workload) == workload.local
    assert (plain.engine(workload).chunk, plain.engine(workload).compile) == (4, "none")
    clipped = Way("clipped", 1, 2).local(workload)
    assert (clipped.clip_per, clipped.clip_norm) == ("example", 1.0)
    assert Way("bf16", 1, 2).local(workload).precision == "bf16"
    assert Way("compiled", 1, 2).engine(workload).compile == "default"
    spread = Way("workers", 2, 1).engine(workload)
    assert (spread.kind, spread.workers, spread.threads) == ("cohort", 2, 2)
    assert Way("sequential", 1, 2).engine(workload).kind == "sequential"


def test_pfl_can_have_a_python_of_its_own() -> None:
    assert available("flower", sys.executable) and available("loop", sys.executable)
    assert not available("pfl", "/bin/false")
    assert available("pfl", "/bin/true")
