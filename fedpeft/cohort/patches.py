"""Parts of peft's tuners as plain differentiable operations that ``vmap`` carries.

A batched lane runs an adapter layer for K clients under ``vmap``. Some layers of peft stop it by
how they are written, not by what they compute: a branch on a tensor's value, a write in place into
a tensor that has no client dimension, an ``autograd.Function`` without batching rule. Each function
here computes the same as the one it stands for, out of place and without a branch; random draws
have the same law, and with ``vmap(randomness="different")`` every client has its own. Dropout and
sampling stay on: no algorithm is changed.

``applied`` puts them in place while a batched lane runs the model, and only then (not for use from
several threads at once). ``LoopLane`` runs peft as it is; ``tests/cohort/test_tuners.py`` compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.boft import layer as boft
from peft.tuners.c3a import layer as c3a
from peft.tuners.fourierft import layer as fourierft
from peft.tuners.loha import layer as loha
from peft.tuners.lokr import layer as lokr
from peft.tuners.lora import variants
from peft.tuners.lora.monteclora import MontecloraSampler
from peft.tuners.oft import layer as oft
from peft.tuners.p_tuning import PromptEncoder
from peft.tuners.psoft import layer as psoft
from peft.tuners.randlora import layer as randlora
from peft.tuners.vblora import layer as vblora
from peft.tuners.waveft import layer as waveft
from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
from peft.tuners.waveft.waverec2d import waverec2d
from torch import Tensor, nn
from torch.func import functional_call


def _zeros(layer: Any, like: Tensor) -> Tensor:
    """A dense weight of the layer, ``[out, in]``."""
    return torch.zeros(layer.out_features, layer.in_features, dtype=like.dtype, device=like.device)


def _fourierft_delta(layer: Any, adapter: str) -> Tensor:
    """Cause: the spectrum is written in place into zeros (fourierft/layer.py:99)."""
    spectrum = layer.fourierft_spectrum[adapter]
    at = layer.indices[adapter].to(spectrum.device)
    dense = _zeros(layer, spectrum.float()).index_put((at[0], at[1]), spectrum.float())
    delta: Tensor = torch.fft.ifft2(dense).real * layer.fourierft_scaling[adapter]
    return delta.to(spectrum.dtype)


def _waveft_delta(layer: Any, adapter: str) -> Tensor:
    """Cause: the spectrum is written in place into zeros (waveft/layer.py:165 and 194)."""
    spectrum, scaling = layer.waveft_spectrum[adapter], layer.waveft_scaling[adapter]
    at, family = layer.waveft_indices[adapter].to(spectrum.device), layer.waveft_wavelet_family
    if not layer.waveft_use_idwt[adapter]:
        dense: Tensor = _zeros(layer, spectrum).index_put((at[0], at[1]), spectrum) * scaling
        return dense
    rows, columns = layer.out_features, layer.in_features
    lost_rows, lost_columns = WAVELET_REDUCTIONS[family[adapter]]
    high, wide = rows + lost_rows, columns + lost_columns
    high, wide = high + high % 2, wide + wide % 2
    padded = torch.zeros(high, wide, dtype=spectrum.dtype, device=spectrum.device)
    where = (at[0] + (high - rows) // 2, at[1] + (wide - columns) // 2)
    padded = padded.index_put(where, spectrum)
    h, w = high // 2, wide // 2
    bands = (padded[:h, :w], (padded[:h, w:], padded[h:, :w], padded[h:, w:]))
    full: Tensor = waverec2d(bands, family[adapter]) * scaling  # type: ignore[arg-type]
    top, left = (full.shape[0] - rows) // 2, (full.shape[1] - columns) // 2
    return full[top : top + rows, left : left + columns]


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """The Cayley transform ``(I + Q)(I - Q)^-1`` of ``[..., n, n]`` as peft's Neumann series."""
    found = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    if terms > 1:
        found = found + 2.0 * skew
    if terms > 2:
        power = skew @ skew
        found = found + 2.0 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            found = found + 2.0 * power
        found = found + power @ skew
    return found


def _oft_skew(layer: Any, vec: Tensor, block_size: int) -> Tensor:
    """Cause: the upper triangle is written in place into zeros (oft/layer.py:109)."""
    flat = torch.zeros(len(vec), block_size**2, dtype=vec.dtype, device=vec.device)
    upper = flat.index_copy(1, layer.rows * block_size + layer.cols, vec)
    square = upper.view(len(vec), block_size, block_size)
    return square - square.transpose(-2, -1)


def _oft_cayley(
    layer: Any,
    Q: Tensor,
    block_size: int,
    use_cayley_neumann: bool = True,
    num_neumann_terms: int = 5,
) -> Tensor:
    """Cause: the Neumann series is summed in place (oft/layer.py:137)."""
    skew = layer._pytorch_skew_symmetric(Q, block_size)
    if use_cayley_neumann:
        return _neumann(skew, num_neumann_terms).to(Q.dtype)
    eye = torch.eye(block_size, dtype=skew.dtype, device=skew.device).expand_as(skew)
    found: Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
    return found.to(Q.dtype)


def _oft_rotation(module: Any, x: Tensor) -> Tensor:
    """Cause: constrained OFT writes its projection into the weight itself (oft/layer.py:254).

    A client's weight is a view into the cohort's; here the projected weight is used in its place,
    with the same gradient. ``LoopLane`` therefore uses this one too.
    """
    if not module.coft:
        plain: Tensor = _OFT_ROTATION(module, x)
        return plain
    weight = module.weight
    projected = module._project_batch(weight.detach(), eps=module.eps)
    module.coft = False
    try:
        rotated = functional_call(module, {"weight": weight + (projected - weight.detach())}, (x,))
    finally:
        module.coft = True
    assert isinstance(rotated, Tensor)
    return rotated


def _psoft_matrix(layer: Any) -> Tensor:
    """Cause: the Neumann series is summed in place (psoft/layer.py:144)."""
    if not (layer.orth and layer.use_cayley_neumann):
        exact: Tensor = _PSOFT_MATRIX(layer)
        return exact
    skew = layer._skew_symmetric()
    if layer.cayley_neumann_eps is not None:
        skew = layer._project_Q(skew, eps=layer.cayley_neumann_eps)
    found = _neumann(skew, int(layer.num_cayley_neumann_terms))
    if layer.vector_b is not None:
        found = layer.vector_b[:, None] * found
    return found if layer.vector_a is None else found * layer.vector_a[None, :]


def _psoft_project(layer: Any, Q: Tensor, eps: float = 0.9) -> Tensor:
    """Cause: a branch on the norm (psoft/layer.py:113)."""
    norm: Tensor = torch.linalg.norm(Q, ord="fro")
    far = torch.isfinite(norm) & (norm > eps)
    return torch.where(far, Q * (eps / (norm + 1e-12)), Q)


class _RandloraBases:
    """Cause: an autograd.Function without batching rule (randlora/layer.py:30)."""

    @staticmethod
    def apply(a: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        return lam[:, :, None] * a * gamma[None]


class _CircularConvolution:
    """Cause: an autograd.Function without batching rule (c3a/utils.py:29).

    Its backward is also wrong for x: it correlates where the transposed product convolves, and
    ``torch.autograd.gradcheck`` refuses it. ``LoopLane`` therefore uses this one too.
    """

    @staticmethod
    def apply(x: Tensor, w: Tensor) -> Tensor:
        blocks = x.reshape(*x.shape[:-1], *w.shape[1:])
        mixed = torch.einsum("...nb,mnb->...mb", torch.fft.ifft(blocks), torch.fft.fft(w))
        found: Tensor = torch.fft.fft(mixed).real
        return found.flatten(-2)


def _loha_weight(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor, scale: Tensor) -> Tensor:
    """Cause: an autograd.Function without batching rule (loha/layer.py:364)."""
    return (w1a @ w1b) * (w2a @ w2b) * scale


def _gated(layer: Any, x: Tensor) -> Tensor:
    """LoHa and LoKr. Cause: a branch on a random number (loha/layer.py:241, lokr/layer.py:309).

    The branch of ``module_dropout`` becomes a factor of 0 or 1 on the adapter's output.
    """
    found: Tensor = layer.base_layer(x)
    for adapter in layer.active_adapters:
        delta = layer._get_delta_activations(adapter, x)
        share = layer.module_dropout[adapter]
        if layer.training and share > 0:
            delta = delta * (torch.rand((), device=x.device) > share)
        found = found + delta
    return found.to(x.dtype)


def _vblora_matrices(layer: Any, adapter: str, cast_to_fp32: bool = False) -> tuple[Tensor, Tensor]:
    """Cause: in training mode a look for infinities (vblora/layer.py:192), and nothing else."""
    mode = layer.training
    layer.training = False
    try:
        down, up = _VBLORA_MATRICES(layer, adapter, cast_to_fp32)
    finally:
        layer.training = mode
    return down, up


def _boft_dropout(layer: Any, x: Tensor) -> Tensor:
    """Cause: ``.item()`` of a random number and a write at it (boft/layer.py:176).

    x: ``[N, D, H, H]``. In one of the N factors, a share p of the D blocks becomes the identity.
    """
    if not layer.training:
        return x
    factors, blocks, size, _ = x.shape
    factor = torch.arange(factors) == torch.randint(0, factors, (1,))
    block = torch.randperm(blocks) < int(layer.p * blocks)
    drop = (factor[:, None] & block[None, :])[..., None, None].to(x.device)
    return torch.where(drop, torch.eye(size, dtype=x.dtype, device=x.device), x)


def monteclora_draw(sampler: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """MonteCLoRA's variances ``[r]`` and its mixture ``[samples]``, drawn afresh.

    Wishart(r degrees of freedom, I) is ``Z Z^T`` with Z standard normal ``[r, r]``, of which peft
    uses the diagonal.
    """
    rank = sampler.out_features
    wishart = torch.randn(rank, rank).to(like).square().sum(1)
    variance = (torch.exp(2 * sampler.std_prior) * wishart).clamp(min=1e-3)
    alpha = torch.exp(sampler.expert_weights_prior)
    normal = torch.randn(sampler.num_samples).to(like)
    return variance, sampler.dirichlet_reparameterization(alpha, normal).softmax(-1)


def _monteclora(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:
    """Cause: a branch on NaNs (variants.py:1241), noise from a buffer that all clients share."""
    down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
    x = x.to(down.weight.dtype)
    weight: Tensor = down.weight  # [r, in]
    if module.training:
        x = module.lora_dropout[active_adapter](x)
        sampler = module.lora_monteclora_sampler[active_adapter]
        variance, share = monteclora_draw(sampler, weight)
        normal = torch.randn(len(share), *weight.mT.shape).to(weight)
        noise = sampler.sample_scaler * normal * variance.sqrt()  # [samples, in, r]
        weight = torch.einsum("n,nij->ji", share, weight.mT + noise)
    inner = torch.nn.functional.linear(x, weight)
    found: Tensor = result + up(inner) * module.scaling[active_adapter]
    return found


def _lstm(module: nn.LSTM, x: Tensor) -> Tensor:
    """A bidirectional batch-first LSTM step by step: ``[b, T, i]`` to ``[b, T, 2h]``."""
    for layer in range(module.num_layers):
        both = []
        for suffix in ("", "_reverse"):
            name = f"l{layer}{suffix}"
            weights = [
                f"weight_ih_{name}",
                f"weight_hh_{name}",
                f"bias_ih_{name}",
                f"bias_hh_{name}",
            ]
            w, u, b, c = (getattr(module, key) for key in weights)
            steps = (x @ w.mT + b + c).unbind(1)
            hidden = cell = steps[0].new_zeros(len(x), module.hidden_size)
            outputs = []
            for step in reversed(steps) if suffix else steps:
                i, f, g, o = (step + hidden @ u.mT).chunk(4, dim=-1)
                cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                hidden = o.sigmoid() * cell.tanh()
                outputs.append(hidden)
            both.append(torch.stack(outputs[::-1] if suffix else outputs, dim=1))
        x = torch.cat(both, dim=-1)
        if layer + 1 < module.num_layers:
            x = torch.nn.functional.dropout(x, module.dropout, module.training)
    return x


def _prompt_encoder(module: Any, indices: Tensor) -> Tensor:
    """P-tuning. Cause: the LSTM kernel has no batching rule (p_tuning/model.py:117).

    cuDNN's has no backward in eval mode either, so that ``LoopLane`` uses this one too.
    """
    if module.encoder_type != "LSTM":
        plain: Tensor = _PROMPT_ENCODER(module, indices)
        return plain
    found: Tensor = module.mlp_head(_lstm(module.lstm_head, module.embedding(indices)))
    return found


_OFT_ROTATION: Callable[..., Tensor] = oft.OFTRotationModule.forward
_PSOFT_MATRIX = psoft.OrthLayer.get_matrix
_VBLORA_MATRICES = vblora.Linear._get_lora_matrices
_PROMPT_ENCODER: Callable[..., Tensor] = PromptEncoder.forward


@dataclass(frozen=True)
class Patch:
    """In models that hold a ``layer``, ``owner.name`` (class or module) becomes ``stand_in``.

    corrects: peft's own is wrong or fails alone too, so that no lane may use it.
    """

    layer: type[Any]
    owner: Any
    name: str
    stand_in: object
    corrects: bool = False


PATCHES = (
    Patch(fourierft.FourierFTLayer, fourierft.FourierFTLayer, "get_delta_weight", _fourierft_delta),
    Patch(waveft.WaveFTLayer, waveft.WaveFTLayer, "get_delta_weight", _waveft_delta),
    Patch(oft.OFTLayer, oft.OFTRotationModule, "_pytorch_skew_symmetric", _oft_skew),
    Patch(oft.OFTLayer, oft.OFTRotationModule, "_cayley_batch", _oft_cayley),
    Patch(oft.OFTLayer, oft.OFTRotationModule, "forward", _oft_rotation, corrects=True),
    Patch(psoft.PsoftLayer, psoft.OrthLayer, "get_matrix", _psoft_matrix),
    Patch(psoft.PsoftLayer, psoft.OrthLayer, "_project_Q", _psoft_project),
    Patch(randlora.RandLoraLayer, randlora, "UniqueBaseGrad", _RandloraBases),
    Patch(c3a.C3ALayer, c3a, "BlockCircularConvolution", _CircularConvolution, corrects=True),
    Patch(loha.LoHaLayer, loha, "make_weight", _loha_weight),
    Patch(loha.LoHaLayer, loha.LoHaLayer, "forward", _gated),
    Patch(lokr.LoKrLayer, lokr.LoKrLayer, "forward", _gated),
    Patch(vblora.VBLoRALayer, vblora.Linear, "_get_lora_matrices", _vblora_matrices),
    Patch(boft.BOFTLayer, boft.MultiplicativeDropoutLayer, "forward", _boft_dropout),
    Patch(
        MontecloraSampler, variants.MontecloraLinearVariant, "forward", staticmethod(_monteclora)
    ),
    Patch(PromptEncoder, PromptEncoder, "forward", _prompt_encoder, corrects=True),
)
"""Every stand-in, with the layer that needs it."""


def needed(model: nn.Module) -> tuple[Patch, ...]:
    """The patches that concern the layers of ``model``."""
    modules = list(model.modules())
    return tuple(p for p in PATCHES if any(isinstance(module, p.layer) for module in modules))


def corrections(model: nn.Module) -> tuple[Patch, ...]:
    """Those of them that every lane needs."""
    return tuple(patch for patch in needed(model) if patch.corrects)


@contextmanager
def applied(patches: Sequence[Patch]) -> Iterator[None]:
    """The stand-ins in the place of peft's own, until the block is left."""
    before = [vars(patch.owner)[patch.name] for patch in patches]
    for patch in patches:
        setattr(patch.owner, patch.name, patch.stand_in)
    try:
        yield
    finally:
        for patch, value in zip(patches, before, strict=True):
            setattr(patch.owner, patch.name, value)
