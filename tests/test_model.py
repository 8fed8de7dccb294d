"""Base models and adapters: faults that say what to do, seeds, digests, pooling, modes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fedpeft.config import Model
from fedpeft.errors import FedpeftError
from fedpeft.model import (
    MeanPoolClassifier,
    adapter_config,
    adapter_kinds,
    attach,
    base_digest,
    kind_of,
    load_base,
    load_tokenizer,
    set_mode,
)
from tests.tiny import LORA, tiny_model, tiny_network, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    write_tiny(made)
    return made / "model"


def test_a_model_that_is_not_there() -> None:
    missing = Model(name="nobody/no-such-model")
    for load in (
        lambda: load_tokenizer(missing, "classification"),
        lambda: load_base(missing, "classification", 3, 0, 0),
    ):
        with pytest.raises(FedpeftError, match=r"model\.name='nobody/no-such-model' could not"):
            load()


def test_an_adapter_kind_or_setting_that_does_not_exist() -> None:
    with pytest.raises(FedpeftError, match=r"adapter\.kind='lroa'.*Did you mean 'lora'\?"):
        adapter_config({"kind": "lroa"}, "classification")
    with pytest.raises(FedpeftError, match=r"adapter\.lora_alhpa .*Did you mean 'lora_alpha'\?"):
        adapter_config({"kind": "lora", "lora_alhpa": 3}, "classification")
    assert {"lora", "ia3", "vera", "prompt_tuning"} <= set(adapter_kinds())


def test_the_head_and_the_adapter_come_from_the_seed(folder: Path) -> None:
    def initial(seed: int) -> dict[str, torch.Tensor]:
        base = load_base(Model(name=str(folder)), "classification", 3, 0, seed)
        model = attach(base, LORA, "classification", seed)
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    before = torch.random.get_rng_state()
    first, again, other = initial(0), initial(0), initial(1)
    assert torch.equal(before, torch.random.get_rng_state())  # nobody else's randomness moved
    assert all(torch.equal(first[n], again[n]) for n in first)
    drawn = [n for n in first if "lora_A" in n]
    assert drawn and not any(torch.equal(first[n], other[n]) for n in drawn)
    assert {p.dtype for p in first.values()} == {torch.float32}


def test_random_ignores_the_weights(folder: Path) -> None:
    trained = load_base(Model(name=str(folder)), "classification", 3, 0, 0)
    control = load_base(Model(name=str(folder), random=True), "classification", 3, 0, 0)
    name = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(trained.state_dict()[name], control.state_dict()[name])


def test_the_digest_tells_bases_apart_and_ignores_the_adapter() -> None:
    one = base_digest(tiny_network(LORA, 0).model)
    other = attach(tiny_model(0).requires_grad_(False), LORA, "classification", 7)
    assert one == base_digest(other)
    assert one != base_digest(tiny_network(LORA, 1).model)


def test_the_digest_reads_tensors_of_any_size() -> None:
    """From 2**24 numbers on float32 cannot tell the last index from the length."""
    large = nn.Module()
    large.vocabulary = nn.Parameter(torch.zeros(30522 * 768, dtype=torch.float16))
    assert len(base_digest(large)) == 16


def test_mean_pooling_leaves_padding_out() -> None:
    torch.manual_seed(0)
    model = MeanPoolClassifier(tiny_model().bert, 3).eval()
    tokens = torch.tensor([[3, 4, 5, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        padded = model(input_ids=tokens, attention_mask=mask).logits
        alone = model(input_ids=tokens[:, :3]).logits
    assert torch.allclose(padded, alone, atol=1e-6)


def test_dropout_of_the_base_is_off_unless_asked() -> None:
    model = tiny_network({**LORA, "lora_dropout": 0.5}).model

    def training(kind: str) -> set[bool]:
        return {
            m.training
            for n, m in model.named_modules()
            if isinstance(m, nn.Dropout) and ("lora_dropout" in n) == (kind == "adapter")
        }

    set_mode(model, training=True, base_dropout=False)
    assert training("adapter") == {True} and training("base") == {False}
    set_mode(model, training=True, base_dropout=True)
    assert training("adapter") == training("base") == {True}
    set_mode(model, training=False, base_dropout=True)
    assert training("adapter") == training("base") == {False}


def test_kinds_of_the_byte_ledger() -> None:
    names = tiny_network(LORA).initial
    assert {kind_of(n) for n in names} == {"adapter", "head"}
    assert all(("classifier" in n) == (kind_of(n) == "head") for n in names)
