"""Changes of the frozen base: exact, bit-equal afterwards, by module type; exports hold them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from fedpeft.base import (
    check_foldable,
    export_with_base,
    folded,
    gradients_by_weight,
    pretrained,
)
from fedpeft.cohort.lanes import FoldLane, LoopLane
from fedpeft.engine import play_round
from fedpeft.errors import FedpeftError
from fedpeft.evaluate import score
from fedpeft.model import Network, attach, build_network, save_adapter
from fedpeft.strategies.flora import FLoRA
from fedpeft.tree import Tree
from tests.cohort import small
from tests.tiny import LORA, Tiny, tiny_model, tiny_network, tiny_population


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=small.WORDS, n_embd=16, n_layer=1, n_head=2, n_positions=16, pad_token_id=0,
        num_labels=3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2ForSequenceClassification(config).eval().requires_grad_(False)


def network(kind: str) -> Network:
    """Square and not: query and intermediate, attn.c_proj and c_attn."""
    if kind == "linear":
        base: nn.Module = tiny_model().eval().requires_grad_(False)
        targets = ["query", "intermediate.dense"]
    else:
        base, targets = gpt2(), ["c_attn", "attn.c_proj"]
    adapter = {"kind": "lora", "r": 2, "lora_alpha": 6, "target_modules": targets}
    if kind == "conv1d":
        adapter["fan_in_fan_out"] = True
    model = attach(base, adapter, "classification", 0)
    return build_network(model, "classification", 3, torch.device("cpu"))


def low_rank(net: Network, seed: int = 0, rank: int = 3) -> Tree:
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for layer in net.scaling:
        d_out = len(net.initial[f"{layer}.lora_B.default.weight"])
        d_in = net.initial[f"{layer}.lora_A.default.weight"].shape[1]
        up, down = (torch.randn(*s, generator=draw) for s in ((d_out, rank), (rank, d_in)))
        found[layer] = 0.05 * up @ down
    return found


def adapter(net: Network, seed: int = 1) -> Tree:
    draw = torch.Generator().manual_seed(seed)
    return {n: v + 0.1 * torch.randn(v.shape, generator=draw) for n, v in net.initial.items()}


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def logits(model: nn.Module) -> Tensor:
    tokens = torch.randint(1, 40, (4, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return found


KINDS = pytest.mark.parametrize("kind", ["linear", "conv1d"])


@KINDS
def test_a_change_of_the_base_is_that_of_an_adapter_with_the_same_product(kind: str) -> None:
    """So a transposed change would be seen, on square layers too."""
    net = network(kind)
    values, empty = adapter(net), {n: v for n, v in net.initial.items() if "lora" in n}
    plain = {n: v for n, v in values.items() if "lora" not in n}
    net.write(values)
    wanted = logits(net.model)
    base = {
        layer: s
        * values[f"{layer}.lora_B.default.weight"]
        @ values[f"{layer}.lora_A.default.weight"]
        for layer, s in net.scaling.items()
    }
    net.write(empty | plain)
    assert float((logits(net.model) - wanted).abs().max()) > 1e-3
    with folded(net, base):
        assert torch.allclose(logits(net.model), wanted, atol=1e-5)


@KINDS
def test_afterwards_every_bit_of_the_model_is_as_before(kind: str) -> None:
    net = network(kind)
    net.write(adapter(net))
    before, addresses = digest(net.model), [p.data_ptr() for p in net.model.parameters()]
    with folded(net, low_rank(net)):
        assert digest(net.model) != before
        assert [p.data_ptr() for p in net.model.parameters()] == addresses
    assert digest(net.model) == before
    with pytest.raises(KeyError), folded(net, low_rank(net)):
        raise KeyError
    assert digest(net.model) == before


@pytest.mark.parametrize("lane", [FoldLane, LoopLane])
def test_scores_see_the_change(lane: type[Any]) -> None:
    net = tiny_network(LORA)
    data = tiny_population((6,)).test
    base = {layer: 20 * change for layer, change in low_rank(net).items()}
    way = lane(net.model)
    plain, changed, again = (score(net, way, net.initial, data, b) for b in (None, base, {}))
    assert plain == again and abs(plain.loss - changed.loss) > 1e-6
    with folded(net, base):
        direct = score(net, way, net.initial, data)
    assert direct == changed


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21
@KINDS
@pytest.mark.parametrize("rank", [3, 16])
def test_plain_peft_loads_an_export_with_the_base(kind: str, rank: int, tmp_path: Path) -> None:
    """Of low rank, and of any: nothing but the pretrained base and the folder is needed."""
    net = network(kind)
    values, base = adapter(net), low_rank(net, rank=rank)
    save_adapter(net, values, tmp_path, "elsewhere")
    export_with_base(net, values, base, tmp_path)
    net.write(values)
    with folded(net, base):
        wanted = logits(net.model)
    fresh = tiny_model().eval() if kind == "linear" else gpt2()
    loaded = peft.PeftModel.from_pretrained(fresh, str(tmp_path))
    assert isinstance(loaded, peft.PeftModel)
    assert loaded.active_peft_config.r == min(rank + 2, 16)
    assert torch.allclose(logits(loaded.eval()), wanted, atol=1e-5)


def test_what_cannot_be_changed_exactly_is_refused() -> None:
    net = network("linear")
    check_foldable(net, "fedex_lora")
    layer = next(iter(net.scaling))
    with pytest.raises(FedpeftError, match=r"has shape \(3, 4\), not \(16, 16\)"):
        folded(net, {layer: torch.zeros(3, 4)}).__enter__()
    with pytest.raises(FedpeftError, match=r"'head', which is no LoRA layer"):
        folded(net, {"head": torch.zeros(3, 4)}).__enter__()
    net.model.get_submodule(layer).get_base_layer().to(torch.bfloat16)  # type: ignore[operator]
    with pytest.raises(FedpeftError, match=r"bfloat16.*local\.precision=fp32.*quantize"):
        check_foldable(net, "fedex_lora")
    assert pretrained(net, layer).dtype == torch.float32, "to be read, 16 bits will do"
    with pytest.raises(FedpeftError, match=r"'fedex_lora'.*lora_A.*adapter\.kind=lora"):
        check_foldable(tiny_network({"kind": "ia3"}), "fedex_lora")


def test_a_weight_that_two_modules_share_is_refused() -> None:
    net = network("linear")
    one = net.model.get_submodule(next(iter(net.scaling))).get_base_layer()  # type: ignore[operator]
    other = nn.Linear(16, 16, bias=False)
    other.weight = one.weight
    net.model.add_module("other", other)
    with pytest.raises(FedpeftError, match=r"also 'other\.weight'"):
        check_foldable(net, "fedex_lora")


def test_nothing_is_left_of_a_run() -> None:
    tiny, strategy = Tiny(), FLoRA()
    before = digest(tiny.network.model)
    state, federation = strategy.init(tiny.problem), tiny.federation(strategy, chunk=2)
    for number in (1, 2, 3):
        state, _ = play_round(strategy, state, federation, tiny.rounds, 0, number)
    assert any(bool(change.any()) for change in strategy.base(state).values())
    tiny.network.write(tiny.network.initial)
    assert digest(tiny.network.model) == before


@KINDS
def test_the_pretrained_weight_and_its_gradient_are_those_of_the_update(kind: str) -> None:
    """A step dW on W is a step s B A = dW: both by the layout of the update, Conv1D or not."""
    net = network(kind)
    net.write({n: torch.zeros_like(v) for n, v in net.initial.items() if "lora" in n})
    tokens = torch.randint(1, 40, (4, 7), generator=torch.Generator().manual_seed(2))

    def loss() -> Tensor:
        found: Tensor = net.model(input_ids=tokens).logits.square().sum()
        return found

    gradient = gradients_by_weight(net, [lambda: (loss(), torch.tensor(2.0))])
    for layer, own in gradient.items():
        d_out = len(net.initial[f"{layer}.lora_B.default.weight"])
        assert pretrained(net, layer).shape == own.shape and len(own) == d_out
        step = 1e-2 * torch.randn(own.shape, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            with folded(net, {layer: step}):
                up = float(loss())
                assert torch.allclose(
                    pretrained(net, layer), _before(kind, layer) + step, atol=1e-6
                )
            with folded(net, {layer: -step}):
                down = float(loss())
        assert (up - down) / 4 == pytest.approx(float((own * step).sum()), rel=2e-2)
    assert not any(p.requires_grad for n, p in net.model.named_parameters() if "lora" not in n
                   and "modules_to_save" not in n)  # fmt: skip


def _before(kind: str, layer: str) -> Tensor:
    return pretrained(network(kind), layer)
