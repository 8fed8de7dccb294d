from __future__ import annotations

import dataclasses

import pytest
from omegaconf import OmegaConf

from fedpeft.codecs.settings import Codec, biased, check_codec, feeds_back
from fedpeft.errors import FedpeftError
from tests.codecs.cohorts import every, label


@pytest.mark.parametrize("settings", every(), ids=label)
def test_what_the_other_tests_use_is_allowed(settings: Codec) -> None:
    check_codec(settings, "comms.up")


def test_defaults_send_nothing_compressed() -> None:
    check_codec(Codec(), "comms.up")
    assert not biased(Codec()) and not feeds_back(Codec())


def test_settings_are_a_structured_recipe() -> None:
    read = OmegaConf.merge(OmegaConf.structured(Codec), {"codec": "topk", "density": 0.05})
    assert OmegaConf.to_object(read) == Codec(codec="topk", density=0.05)
    with pytest.raises(Exception, match="nonsense"):
        OmegaConf.merge(OmegaConf.structured(Codec), {"codec": "nonsense"})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"codec": "topk", "density": 0.0}, r"comms.up.density=0.0: must be above 0"),
        ({"codec": "topk", "density": float("nan")}, "density=nan"),
        ({"codec": "topk", "density": 1.5}, "at most 1"),
        ({"codec": "dare", "rescale": 0.05}, "DAREx-q divides by a number between"),
        ({"codec": "dare", "rescale": -1.0}, "0 for the density"),
        ({"codec": "compeft", "alpha": -1.0}, "alpha=-1.0: must be 0"),
        ({"codec": "compeft", "alpha": float("inf")}, "alpha=inf"),
        ({"codec": "dense", "values": "int8", "block": 0}, "block=0: must be between 1"),
        ({"codec": "dense", "values": "qsgd", "levels": 128}, "between 1 and 127"),
        ({"codec": "powersgd", "rank": 0}, "rank=0"),
        ({"values": "int8"}, r"values=int8 means nothing with comms.up.codec=none"),
        ({"feedback": "always"}, "feedback=always means nothing"),
        ({"codec": "dense", "density": 0.5}, "density=0.5 means nothing"),
        ({"codec": "randk", "positions": "golomb"}, "positions=golomb means nothing"),
        ({"codec": "compeft", "scope": "tensor"}, "scope=tensor means nothing"),
        ({"codec": "compeft", "values": "fp16"}, "values=fp16 means nothing"),
        ({"codec": "dense", "block": 64}, "block=64 means nothing"),
        ({"codec": "dense", "values": "int8", "levels": 3}, "levels=3 means nothing"),
        ({"codec": "topk", "rank": 2}, "rank=2 means nothing"),
        ({"codec": "topk", "alpha": 2.0}, "alpha=2.0 means nothing"),
        ({"codec": "topk", "rescale": 0.5}, "rescale=0.5 means nothing"),
        ({"form": "weights"}, "form=weights means nothing"),
        ({"codec": "powersgd", "values": "int8"}, "cast only"),
        ({"codec": "dare", "feedback": "always"}, "Use randk or topk"),
        (
            {"codec": "dense", "values": "qsgd", "levels": 4, "feedback": "always"},
            "at least the root of comms.up.block=256",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, object], why: str) -> None:
    with pytest.raises(FedpeftError, match=why):
        check_codec(dataclasses.replace(Codec(), **change), "comms.up")  # type: ignore[arg-type]


def test_who_feeds_back() -> None:
    on = {s.codec for s in every() if feeds_back(s) and s.feedback == "auto"}
    assert on == {"topk", "compeft", "powersgd"} == {s.codec for s in every() if biased(s)}
    assert not feeds_back(Codec(codec="topk", feedback="never"))
    assert feeds_back(Codec(codec="dense", values="int4", feedback="always"))
