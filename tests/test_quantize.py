"""Quantised bases: what is refused; the stand-in everywhere; bitsandbytes' own where installed."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedpeft import quantize
from fedpeft.cohort import fold
from fedpeft.cohort.choose import choose_lane
from fedpeft.cohort.lanes import FoldLane, Lane, LoopLane
from fedpeft.config import Model
from fedpeft.data.clients import Task
from fedpeft.data.examples import Examples, flatten
from fedpeft.errors import FedpeftError
from fedpeft.metrics import client_sums
from fedpeft.model import Network, attach, base_digest, build_network, load_base, save_adapter
from tests.tiny import tiny_model, write_tiny

CPU = torch.device("cpu")
ALL = ["q_proj", "v_proj", "down_proj"]
LORA: dict[str, Any] = {"kind": "lora", "r": 4, "lora_alpha": 16, "target_modules": ALL}

absent = importlib.util.find_spec("bitsandbytes") is None
with_bitsandbytes = pytest.mark.skipif(absent, reason="60 MB: pip install 'fedpeft[quantize]'")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def rows() -> Examples:
    return flatten([[1 + (7 * j + i) % 100 for j in range(3 + i % 5)] for i in range(12)], None, 0)


def gradients(network: Network, lane: Lane, examples: Examples) -> tuple[Tensor, Tensor]:
    """Logits and packed gradients ``[3, P]`` of three clients with adapters of their own."""
    stream = torch.Generator().manual_seed(1)
    stacked = {
        name: (value + 0.1 * torch.randn((3, *value.shape), generator=stream)).requires_grad_()
        for name, value in network.initial.items()
    }
    batch = examples.batch(torch.tensor([[0, 1], [5, 3], [4, -1]]))
    logits = lane.logits(stacked, batch)
    sums, counts = client_sums(network.task, logits, batch)
    torch.autograd.backward((sums / counts).sum())
    found = [value.grad for value in stacked.values()]
    assert all(g is not None for g in found)
    return logits.detach(), torch.cat([g.flatten(1) for g in found if g is not None], 1)


def assert_same(network: Network, lane: Lane, examples: Examples) -> None:
    wanted = gradients(network, LoopLane(network.model), examples)
    found = gradients(network, lane, examples)
    for one, other in zip(found, wanted, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Int8Params(nn.Parameter):
    """As bitsandbytes': int8 codes, and the largest absolute value of each row as ``SCB``."""

    SCB: Tensor


class QuantisedLora(LoraLinear):
    """Stands in for peft's LoRA layer over a quantised one: another class, elsewhere."""

    __module__ = fold.QUANTISED


def quantised_stand_in(model: nn.Module) -> None:
    """Turns every linear layer but the head into 8 bits, as bitsandbytes stores them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            largest = module.weight.abs().amax(1)
            codes = (module.weight.detach() / largest[:, None] * 127).round().to(torch.int8)
            weight = Int8Params(codes, requires_grad=False)
            weight.SCB = largest.detach()
            module.weight = weight
    quantize.use_dequantised(model)


def stand_in_network() -> Network:
    base = llama().eval().requires_grad_(False)
    quantised_stand_in(base)
    model = attach(base, LORA, "causal_lm", 0)
    layers = [module for module in model.modules() if type(module) is LoraLinear]
    assert len(layers) == 6
    for module in layers:
        module.__class__ = QuantisedLora
    return build_network(model, "causal_lm", 0, CPU)


def test_without_bitsandbytes_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FedpeftError, match=r"model\.quantize='4bit'.*pip install bitsandbytes"):
        load_base(Model(quantize="4bit"), "causal_lm", 0, 0, 0)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    backend = SimpleNamespace(supported_torch_devices={"cuda"})
    monkeypatch.setattr(importlib, "import_module", lambda name: backend)


@pytest.mark.usefixtures("pretended")
def test_a_device_that_bitsandbytes_does_not_support_is_refused() -> None:
    with pytest.raises(FedpeftError, match=r"model\.quantize='8bit' on engine\.device='cpu'"):
        quantize.check(Model(quantize="8bit"), CPU)
    quantize.check(Model(quantize="8bit"), torch.device("cuda:0"))


@pytest.mark.usefixtures("pretended")
def test_random_weights_cannot_be_quantised() -> None:
    with pytest.raises(FedpeftError, match=r"with model\.random=true"):
        quantize.check(Model(quantize="8bit", random=True), torch.device("cuda"))


def test_the_fold_over_a_quantised_layer_gives_the_loops_gradients() -> None:
    network = stand_in_network()
    before = {n: p.clone() for n, p in network.model.named_parameters() if p.dtype == torch.int8}
    assert len(before) == 14
    assert_same(network, FoldLane(network.model), rows())
    now = dict(network.model.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in before.items())


def test_lora_over_a_quantised_layer_takes_the_bmm_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("not by vmap")

    monkeypatch.setattr(fold, "_vmap_forward", refuse)
    network = stand_in_network()
    gradients(network, FoldLane(network.model), rows())


@pytest.mark.parametrize("kind", ["ia3", "vera"])
def test_other_adapters_over_quantised_weights_run_batched_too(kind: str) -> None:
    base = llama().eval().requires_grad_(False)
    quantised_stand_in(base)
    own = {"feedforward_modules": ["down_proj"]} if kind == "ia3" else {"r": 8}
    targets = ["q_proj", "down_proj"] if kind == "ia3" else ["q_proj", "o_proj"]
    model = attach(base, {"kind": kind, "target_modules": targets, **own}, "causal_lm", 0)
    network = build_network(model, "causal_lm", 0, CPU)
    assert_same(network, FoldLane(network.model), rows())


def test_the_product_is_that_of_the_dequantised_weight_also_under_autocast() -> None:
    stream = torch.Generator().manual_seed(0)
    weight = torch.randn((5, 4), generator=stream)
    x = torch.randn((3, 4), generator=stream, requires_grad=True)
    y = quantize.dequantised_linear(x, weight.to)
    torch.testing.assert_close(y, x @ weight.T)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(found, 2 * (x @ weight.T) @ weight)
    base = nn.Sequential(nn.Linear(4, 5))
    quantised_stand_in(base)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = base(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), base(x), rtol=0.02, atol=0.02)


def test_no_dequantised_weight_is_kept_for_the_backward_pass() -> None:
    base = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantised_stand_in(base)
    kept: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        base(torch.ones(1, 64, requires_grad=True))
    assert not [value for value in kept if value.shape == (64, 64)]


def test_the_digest_sees_the_quantisation_and_its_scales() -> None:
    plain = base_digest(llama())
    base = llama()
    quantised_stand_in(base)
    quantised = base_digest(base)
    assert quantised != plain
    weight: Any = base.model.layers[0].self_attn.q_proj.weight
    weight.SCB = weight.SCB * 1.5
    assert base_digest(base) != quantised


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Task, str]:
    made = tmp_path_factory.mktemp("models")
    llama().save_pretrained(made / "decoder")
    write_tiny(made)
    tiny_model().save_pretrained(made / "encoder")
    return {"causal_lm": str(made / "decoder"), "classification": str(made / "encoder")}


@pytest.fixture
def quiet() -> Iterator[None]:
    """bitsandbytes logs that an optional package with faster kernels is not there."""
    log = logging.getLogger("bitsandbytes")
    before, log.disabled = log.disabled, True
    yield
    log.disabled = before


@with_bitsandbytes
@pytest.mark.usefixtures("quiet")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_bitsandbytes_base_batched_equals_the_loop(
    bits: Any, folders: dict[Task, str], tmp_path: Path
) -> None:
    settings = Model(name=folders["causal_lm"], quantize=bits)
    base = load_base(settings, "causal_lm", 0, 0, 0)
    plain = load_base(Model(name=folders["causal_lm"]), "causal_lm", 0, 0, 0)
    tokens = rows().batch(torch.tensor([[0, 5]])).tokens
    with torch.no_grad():
        gap = (base(input_ids=tokens).logits - plain(input_ids=tokens).logits).abs().max()
    assert 0 < gap < 0.1
    assert base_digest(base) != base_digest(plain)
    numbers = [sum(quantize.count(p) for p in model.parameters()) for model in (base, plain)]
    assert numbers[0] == numbers[1]
    network = build_network(attach(base, LORA, "causal_lm", 0), "causal_lm", 0, CPU)
    lane = choose_lane(network, rows())
    assert lane.name == "fold"
    before = gradients(network, lane, rows())[1]
    assert_same(network, lane, rows())
    with torch.no_grad():  # an evaluation must not change what the next step does
        network.model(input_ids=tokens)
    assert torch.equal(gradients(network, lane, rows())[1], before)
    changed = {name: value + 0.01 for name, value in network.initial.items()}
    save_adapter(network, changed, tmp_path, settings.name)
    again = PeftModel.from_pretrained(load_base(settings, "causal_lm", 0, 0, 0), str(tmp_path))
    with torch.no_grad():
        wanted = network.model(input_ids=tokens).logits
        torch.testing.assert_close(again(input_ids=tokens).logits, wanted)


@with_bitsandbytes
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("pooling", ["auto", "mean"])
def test_the_head_of_a_quantised_classifier_is_trained_in_float32(
    pooling: Any, folders: dict[Task, str]
) -> None:
    settings = Model(name=folders["classification"], pooling=pooling, quantize="8bit")
    base = load_base(settings, "classification", 3, 0, 0)
    assert any(p.dtype == torch.int8 for p in base.parameters())
    lora = {"kind": "lora", "r": 2, "target_modules": ["query", "value"]}
    network = build_network(attach(base, lora, "classification", 0), "classification", 3, CPU)
    assert any(".modules_to_save." in name for name in network.initial)
    assert {value.dtype for value in network.initial.values()} == {torch.float32}
    texts = flatten([[1 + (3 * j + i) % 40 for j in range(4)] for i in range(12)], [0, 1, 2] * 4, 0)
    assert_same(network, FoldLane(network.model), texts)
