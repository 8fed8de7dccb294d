"""Stand-ins for parts of peft: the same law, the same values, and gone afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.boft.layer import MultiplicativeDropoutLayer
from peft.tuners.c3a.utils import BlockCircularConvolution
from peft.tuners.lora.variants import MontecloraLinearVariant
from torch import nn

from fedpeft.cohort import patches
from tests.tuners import ROWS, network

QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


def own(patch: patches.Patch) -> object:
    return vars(patch.owner)[patch.name]


def test_peft_is_as_before_when_the_block_is_left() -> None:
    before = [own(patch) for patch in patches.PATCHES]
    with pytest.raises(ZeroDivisionError), patches.applied(patches.PATCHES):
        assert all(own(patch) is patch.stand_in for patch in patches.PATCHES)
        raise ZeroDivisionError
    assert all(own(p) is value for p, value in zip(patches.PATCHES, before, strict=True))


def test_only_the_layers_of_the_model_are_patched() -> None:
    needed = patches.needed(network(ROWS["fourierft"]).model)
    assert [patch.name for patch in needed] == ["get_delta_weight"]
    assert not patches.corrections(network(ROWS["fourierft"]).model)
    assert patches.needed(nn.Linear(2, 2)) == ()


def test_the_circular_convolution_has_the_gradient_that_pefts_lacks() -> None:
    stream = torch.Generator().manual_seed(0)
    shapes = ((5, 16), (3, 2, 8))
    x, w = (torch.randn(s, generator=stream, dtype=torch.float64).requires_grad_() for s in shapes)
    mended = patches._CircularConvolution.apply
    assert torch.allclose(mended(x, w), BlockCircularConvolution.apply(x, w))
    assert torch.autograd.gradcheck(mended, (x, w))
    # when this fails, peft is mended: take `corrects` from the patch
    assert not torch.autograd.gradcheck(
        BlockCircularConvolution.apply, (x, w), raise_exception=False
    )


def test_monteclora_draws_from_pefts_law() -> None:
    net = network(ROWS["lora monteclora"])
    module: Any = net.model.get_submodule(QUERY)
    module.train()
    module.lora_monteclora_sampler["default"].sample_scaler = 1.0
    nn.init.eye_(module.lora_B["default"].weight)
    x = torch.eye(32)

    def moments(forward: Any) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            drawn = [forward(module, "default", x, torch.zeros(32, 32))[:, :4] for _ in range(600)]
        stack = torch.stack(drawn)
        return stack.mean(0), stack.std(0).mean(0)  # [in, r] and per rank [r]

    mean, spread = moments(patches._monteclora)
    wanted_mean, wanted_spread = moments(MontecloraLinearVariant.forward)
    assert torch.allclose(spread, wanted_spread, rtol=0.15)  # a law with heavy tails
    assert float((mean - wanted_mean).abs().mean() / wanted_spread.mean()) < 0.1


def test_monteclora_draws_variances_and_mixtures_from_pefts_law() -> None:
    net = network(ROWS["lora monteclora"])
    sampler: Any = net.model.get_submodule(f"{QUERY}.lora_monteclora_sampler.default")
    ours, theirs = [], []
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(2000):
            ours.append(torch.cat(patches.monteclora_draw(sampler, sampler.std_prior)))
            sampler()
            theirs.append(torch.cat([sampler.gaussian_var_prior.diag(), sampler.expert_weights]))
    found, wanted = torch.stack(ours), torch.stack(theirs)
    assert torch.allclose(found.mean(0), wanted.mean(0), rtol=0.08)
    assert torch.allclose(found.std(0), wanted.std(0), rtol=0.1)


def test_boft_dropout_makes_a_share_of_one_factors_blocks_the_identity() -> None:
    layer = MultiplicativeDropoutLayer(0.5)
    x = torch.full((3, 6, 2, 2), 7.0)
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        found = patches._boft_dropout(layer, x)
        identity = (found == torch.eye(2)).all(-1).all(-1)  # [N, D]
        assert torch.equal(found[~identity], x[~identity])
        assert sorted(identity.sum(1).tolist()) == [0, 0, 3]
        seen |= {tuple(place) for place in identity.nonzero().tolist()}
    assert len(seen) == 18  # every block of every factor at some time
    assert patches._boft_dropout(layer.eval(), x) is x


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_module_dropout_drops_the_whole_adapter_or_nothing(kind: str) -> None:
    net = network(ROWS[kind], module_dropout=0.5, init_weights=False)
    layer: Any = net.model.get_submodule(QUERY)
    layer.train()
    x = torch.ones(2, 32)
    torch.manual_seed(0)
    with torch.no_grad():
        bare = layer.base_layer(x)
        full = bare + layer._get_delta_activations("default", x)
        drawn = [patches._gated(layer, x) for _ in range(40)]
    dropped = sum(torch.equal(y, bare) for y in drawn)
    kept = sum(torch.allclose(y, full) for y in drawn)
    assert dropped + kept == 40 and 10 < dropped < 30


def test_the_lstm_step_by_step_is_torchs() -> None:
    torch.manual_seed(0)
    module = nn.LSTM(6, 4, num_layers=2, batch_first=True, bidirectional=True)
    x = torch.randn(3, 5, 6)
    assert torch.allclose(patches._lstm(module, x), module(x)[0], atol=1e-6)
