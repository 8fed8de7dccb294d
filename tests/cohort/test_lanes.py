"""Every lane gives the loop's logits and gradients: padded batches, encoders and decoders."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedpeft.cohort.choose import choose_lane
from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import FoldLane, Lane, LoopLane, VmapLane, lower, speed_up
from fedpeft.config import Engine, Local
from fedpeft.data.clients import Task
from fedpeft.data.examples import Batch, Examples, flatten
from fedpeft.errors import FedpeftError
from fedpeft.metrics import client_sums
from fedpeft.model import Network, attach, build_network, set_mode
from fedpeft.tree import Layout, Tree

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "r": 4, "lora_alpha": 16},
    "dora": {"kind": "lora", "r": 4, "use_dora": True},
    "rslora": {"kind": "lora", "r": 4, "use_rslora": True},
    "lora bias": {"kind": "lora", "r": 4, "lora_bias": True},
    "ia3": {"kind": "ia3"},
    "vera": {"kind": "vera", "r": 8},
    "prompt": {"kind": "prompt_tuning", "num_virtual_tokens": 3},
    "prefix": {"kind": "prefix_tuning", "num_virtual_tokens": 3},
    "p-tuning": {"kind": "p_tuning", "num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "multitask": {"kind": "multitask_prompt_tuning", "num_virtual_tokens": 3},
}
PROMPTS = ("prompt", "prefix", "p-tuning", "multitask")
DROPOUT = {"lora dropout": {"kind": "lora", "r": 4, "lora_dropout": 0.3}}


def base(task: Task, attention: str) -> nn.Module:
    common = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 101,
        "pad_token_id": 0,
        "attn_implementation": attention,
    }
    torch.manual_seed(0)
    if task == "classification":
        model: nn.Module = BertForSequenceClassification(BertConfig(num_labels=5, **common))
    else:
        model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **common))
    return model.eval().requires_grad_(False)


def network(task: Task, adapter: str, attention: str = "sdpa") -> Network:
    model = attach(base(task, attention), (ADAPTERS | DROPOUT)[adapter], task, 0)
    return build_network(model, task, 5, torch.device("cpu"))


def examples(task: Task) -> Examples:
    rows = [[1 + (7 * j + i) % 100 for j in range(2 + i % 7)] for i in range(12)]
    return flatten(rows, [i % 5 for i in range(12)] if task == "classification" else None, 0)


def padded(task: Task) -> Batch:
    """Three clients with 4, 2 and 3 rows of unequal lengths."""
    return examples(task).batch(torch.tensor([[0, 1, 2, 3], [4, 5, -1, -1], [6, 7, 8, -1]]))


def stacked(net: Network, clients: int = 3) -> Tree:
    stream = torch.Generator().manual_seed(1)
    return {
        name: value + 0.05 * torch.randn((clients, *value.shape), generator=stream)
        for name, value in net.initial.items()
    }


def run(net: Network, lane: Lane, batch: Batch, values: Tree) -> tuple[Tensor, Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    logits = lane.logits(leaves, batch)
    sums, counts = client_sums(net.task, logits, batch)
    grads = torch.autograd.grad((sums / counts).sum(), list(leaves.values()))
    return logits.detach(), torch.cat([g.flatten(1) for g in grads], dim=1)


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.filterwarnings("ignore:.lora_bias=True.:peft.utils.warning.PeftWarning")  # Llama
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_batched_lanes_equal_the_loop(task: Task, adapter: str, attention: str) -> None:
    net, batch = network(task, adapter, attention), padded(task)
    values = stacked(net)
    logits, grads = run(net, LoopLane(net.model), batch, values)
    kinds = [VmapLane] if adapter in PROMPTS else [FoldLane, VmapLane]
    for kind in kinds:
        found_logits, found_grads = run(net, kind(net.model), batch, values)
        assert gap(found_logits, logits) < 1e-5, kind.name
        assert gap(found_grads, grads) < 1e-5, kind.name


def test_the_loop_itself_equals_the_plain_model() -> None:
    net, batch = network("classification", "lora"), padded("classification")
    values = stacked(net)
    logits, _ = run(net, LoopLane(net.model), batch, values)
    assert batch.mask is not None
    for k in range(3):
        net.write({name: value[k] for name, value in values.items()})
        rows = slice(4 * k, 4 * k + 4)
        with torch.no_grad():
            own = net.model(input_ids=batch.tokens[rows], attention_mask=batch.mask[rows]).logits
        assert torch.equal(logits[rows], own)


def test_padding_does_not_change_a_row() -> None:
    net = network("classification", "lora")
    lane, values = FoldLane(net.model), stacked(net)
    full = lane.logits(values, padded("classification"))
    alone = examples("classification").batch(torch.tensor([[0], [4], [6]]))
    assert torch.allclose(lane.logits(values, alone), full[[0, 4, 8]], atol=1e-6)


@pytest.mark.parametrize("adapter", ["lora", "dora", "ia3", "prompt"])
def test_no_client_sees_anothers_adapter(adapter: str) -> None:
    net, batch = network("classification", adapter), padded("classification")
    lane = choose_lane(net, examples("classification"))
    values = stacked(net)
    logits, grads = run(net, lane, batch, values)
    for value in values.values():
        value[1] = torch.nan
    spoilt, spoilt_grads = run(net, lane, batch, values)
    for k in (0, 2):
        rows = slice(4 * k, 4 * k + 4)
        assert torch.allclose(spoilt[rows], logits[rows], atol=1e-6)
        assert torch.allclose(spoilt_grads[k], grads[k], atol=1e-6)


def test_only_the_stacked_factor_differs_between_clients() -> None:
    net, batch = network("classification", "lora"), padded("classification")
    values = stacked(net)
    shared = {n: v[0] for n, v in values.items() if ".lora_A." in n}
    own = {n: v for n, v in values.items() if ".lora_A." not in n}
    net.write(shared)
    same_a = {n: shared[n].expand(3, *shared[n].shape) for n in shared}
    for kind in (FoldLane, VmapLane, LoopLane):
        found = kind(net.model).logits(own, batch)
        wanted = LoopLane(net.model).logits(own | same_a, batch)
        assert torch.allclose(found, wanted, atol=1e-6)


def test_the_model_is_whole_again_after_a_call_that_fails() -> None:
    net, batch = network("classification", "lora"), padded("classification")
    lane = FoldLane(net.model)
    broken = {n: v[:2] for n, v in stacked(net).items()}  # two adapters for three clients
    with pytest.raises(RuntimeError):
        lane.logits(broken, batch)
    assert not any("forward" in vars(module) for module in net.model.modules())


@pytest.mark.parametrize(
    ("adapter", "lane"), [("lora", "fold"), ("dora", "fold"), ("ia3", "fold"), ("prompt", "vmap")]
)
def test_the_fastest_lane_that_agrees_is_chosen(adapter: str, lane: str) -> None:
    net = network("classification", adapter)
    assert choose_lane(net, examples("classification")).name == lane


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch, once a process
def test_what_no_transform_carries_runs_in_the_loop_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {"kind": "shira", "r": 4, "target_modules": ["query"], "random_seed": 0}
    model = attach(base("classification", "sdpa"), settings, "classification", 0)
    net = build_network(model, "classification", 5, torch.device("cpu"))
    with caplog.at_level(logging.INFO, logger="fedpeft"):
        lane = choose_lane(net, examples("classification"))
    assert lane.name == "loop"
    assert "lane loop for shira" in caplog.text
    assert "fold: NotImplementedError" in caplog.text and "vmap: Not" in caplog.text


def test_a_lane_that_is_silently_wrong_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = FoldLane.logits
    monkeypatch.setattr(FoldLane, "logits", lambda self, s, b: 1.1 * real(self, s, b))
    net = network("classification", "lora")
    with caplog.at_level(logging.INFO, logger="fedpeft"):
        assert choose_lane(net, examples("classification")).name == "vmap"
    assert "fold passed over: gradients differ" in caplog.text


def training_step(net: Network, lane: Lane, batch: Batch) -> Tensor:
    """Gradients in training mode, with a fixed stream for the adapter's dropout."""
    set_mode(net.model, True, base_dropout=False)
    torch.manual_seed(5)
    found = run(net, lane, batch, stacked(net))[1]
    set_mode(net.model, False, base_dropout=False)
    return found


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
@pytest.mark.parametrize("adapter", ["lora dropout", "ia3"])
def test_checkpointing_changes_no_gradient_and_keeps_less(task: Task, adapter: str) -> None:
    net, batch = network(task, adapter), padded(task)
    kept: list[int] = []

    def measured(lane: Lane) -> Tensor:
        count = 0

        def pack(value: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            found = training_step(net, lane, batch)
        kept.append(count)
        return found

    plain = measured(FoldLane(net.model))
    lane = FoldLane(net.model, checkpointing=True)
    assert lane.blocks == 2
    assert gap(measured(lane), plain) < 1e-6
    assert kept[1] < kept[0] / 2
    assert not any("forward" in vars(module) for module in net.model.modules())


def test_a_checkpointed_step_equals_a_plain_one() -> None:
    """As training runs it: the lane stays installed from the forward to the backward pass."""
    net, some = network("causal_lm", "lora"), examples("causal_lm")
    index = np.array([[0, 1, 2, 3], [4, 5, -1, -1], [6, 7, 8, -1]])
    layout, local = Layout.of(net.initial), Local(batch_size=2, accumulate=2)
    matrix = layout.pack(stacked(net)).requires_grad_()
    found = []
    for checkpointing in (False, True):
        lane = FoldLane(net.model, checkpointing)
        set_mode(net.model, True, base_dropout=False)
        at = Gradients(lane, net.task, some, local, net.device)
        found.append(at.step(matrix, layout, index, torch.ones(3)))
    for plain, again in zip(*found, strict=True):
        assert gap(again, plain) < 1e-6
    assert not any("forward" in vars(module) for module in net.model.modules())


def test_what_only_the_fold_can_do_is_refused_elsewhere() -> None:
    net = network("classification", "prompt")
    lane = VmapLane(net.model)
    assert speed_up(lane, Engine()) is lane
    for engine in (Engine(compile="default"), Engine(checkpointing=True)):
        with pytest.raises(FedpeftError, match=r"lane 'fold'.*'vmap'"):
            speed_up(lane, engine)
    with pytest.raises(FedpeftError, match="Set one of the two"):
        speed_up(lane, Engine(compile="default", checkpointing=True))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",  # torch's own use
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # dynamo looks at it
)
@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_the_compiled_fold_equals_the_loop(adapter: str) -> None:
    """Two clients in flight of three, so that a row idles at the end; unequal lengths."""
    net, some = network("classification", adapter), examples("classification")
    index = np.array([[0, 1, 2, 3], [4, 5, -1, -1], [-1, -1, -1, -1]])
    values = stacked(net)
    layout, local = Layout.of(net.initial), Local(batch_size=4)
    found = []
    fast = speed_up(FoldLane(net.model), Engine(compile="default"))
    for lane in (LoopLane(net.model), fast):
        at = Gradients(lane, net.task, some, local, net.device)
        for factor in (1.0, 2.0):  # the adapter is no constant of the compiled step
            matrix = (factor * layout.pack(values)).requires_grad_()
            found.append(at.step(matrix, layout, index, torch.ones(3)))
    for k in (0, 1):
        (wanted, loss), (gradient, found_loss) = found[k], found[k + 2]
        assert gap(gradient, wanted) < 1e-5 and gap(found_loss, loss) < 1e-5
        assert not gradient[2].any()


@pytest.mark.parametrize("adapter", ["lora", "dora", "vera", "ia3", "prompt"])
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_holding_weights_in_16_bits_gives_autocasts_numbers(task: Task, adapter: str) -> None:
    """Autocast casts them in every pass to the same values; the batched lanes agree with it."""
    plain, held, batch = network(task, adapter), network(task, adapter), padded(task)
    values = stacked(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        wanted = LoopLane(plain.model).run(values, batch)
    loop = LoopLane(held.model)
    loop.set_precision("bf16")
    dtypes = {m.weight.dtype for m in held.model.modules() if type(m) is nn.Linear}
    assert torch.bfloat16 in dtypes
    assert {v.dtype for v in held.initial.values()} == {torch.float32}
    assert torch.equal(loop.logits(values, batch), wanted)
    batched = VmapLane(held.model) if adapter in PROMPTS else FoldLane(held.model)
    batched.set_precision("bf16")
    assert gap(batched.logits(values, batch).float(), wanted.float()) < 2e-2


def test_weights_that_an_embedding_shares_or_an_adapter_reads_stay_in_float32() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=101,
            tie_word_embeddings=True,
        )
    ).requires_grad_(False)
    settings = {"kind": "lora", "r": 2, "use_dora": True, "target_modules": ["q_proj"]}
    wrapped = attach(model, settings, "causal_lm", 0)
    lower(wrapped, torch.bfloat16)
    layer = model.model.layers[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == layer.self_attn.q_proj.base_layer.weight.dtype
    assert model.lm_head.weight.dtype == torch.float32
    assert layer.mlp.up_proj.weight.dtype == torch.bfloat16
