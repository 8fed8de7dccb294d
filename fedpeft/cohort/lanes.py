"""Lanes: ways to run one model for K clients, each with its own trainable tensors.

``FoldLane``: one big batch through the frozen base; only modules that own trainable tensors fold
their input to ``[K, b, ...]`` and apply K copies (``bmm`` for LoRA and linear heads, ``vmap`` for
everything else). ``VmapLane``: the whole model under ``vmap``, for prompt learning, whose virtual
tokens are not inside any layer. ``LoopLane``: one client after another; works for every model and
is what the other two are tested against.

``stacked`` names the trainable tensors that differ between clients, ``[K, *shape]``; every other
trainable tensor has the value that the model holds (``Network.write``), the same for all clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from fedpeft.cohort import patches
from fedpeft.cohort.fold import fold, is_plain_lora, owners, travelling
from fedpeft.config import Engine
from fedpeft.data.examples import Batch
from fedpeft.errors import FedpeftError
from fedpeft.pruning.gates import Gates
from fedpeft.pruning.structure import Part
from fedpeft.tree import Tree

Compiled = Literal["none", "default", "graphs"]
"""``engine.compile``."""

Precision = Literal["fp32", "bf16", "fp16"]
"""``local.precision``."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The type of a 16-bit precision."""

SHORT = 128
"""Rows up to this length run attention as matrix products on a CPU in 16 bits, where the backward
pass of the fused kernel is slower (2.6 x at 32 tokens, equal at 200; in float32 it never is)."""

NOTHING: tuple[Tree, int] = ({}, 1)
"""No batch is under way."""


class Lane(ABC):
    """Runs ``model`` for the clients of a batch."""

    name: str
    compiled: Compiled = "none"
    """How training steps in it are compiled."""
    blocks: int = 0
    """How many blocks of the base recompute their activations in the backward pass."""
    precision: Precision = "fp32"
    """What the model runs in, training and evaluation alike; adapters stay float32."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._gates: Gates | None = None

    @contextmanager
    def pruned(self, parts: Sequence[Part], alive: Tree) -> Iterator[None]:
        """Inside the block clients' models lack what ``alive`` (part -> bool ``[K, G]``) lacks.

        ``select`` says which of the clients a batch is of; before it is called, all of them.
        """
        gates = Gates(self.model, parts, alive)
        self._gates = gates
        try:
            with gates.installed():
                yield
        finally:
            self._gates = None

    def select(self, clients: Sequence[int] | slice) -> None:
        """The next batches hold rows of these clients of ``pruned``, in this order."""
        if self._gates is not None:
            self._gates.select(clients)

    def logits(self, stacked: Tree, batch: Batch) -> Tensor:
        """Logits of all rows, client-major: ``[K*b, C]`` or ``[K*b, P + T, V]``."""
        if self.precision == "fp32":
            return self.run(stacked, batch)
        device = batch.tokens.device.type
        products = device == "cpu" and batch.tokens.shape[1] <= SHORT
        kernel = sdpa_kernel(SDPBackend.MATH) if products else nullcontext()
        with torch.autocast(device, dtype=DTYPES[self.precision]), kernel:
            return self.run(stacked, batch)

    def set_precision(self, precision: Precision) -> None:
        """Sets what the model runs in; in 16 bits the base holds its linear weights so (``lower``).

        There is no way back to float32.
        """
        self.precision = precision
        if precision != "fp32":
            lower(self.model, DTYPES[precision])

    @abstractmethod
    def run(self, stacked: Tree, batch: Batch) -> Tensor:
        """``logits``, in whatever precision the caller has set."""

    def installed(self) -> AbstractContextManager[None]:
        """Makes the model ready for several calls of ``logits``; compiled ones need it."""
        return nullcontext()


class LoopLane(Lane):
    """One client after another, each through the whole model."""

    name = "loop"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._patches = patches.corrections(model)

    def run(self, stacked: Tree, batch: Batch) -> Tensor:
        found = []
        for k, rows in enumerate(_per_client(batch)):
            own = {name: value[k] for name, value in stacked.items()}
            if self._gates is not None:
                self._gates.one(k)
            with patches.applied(self._patches):
                output = functional_call(self.model, own, (), _inputs(*rows))
            found.append(output.logits)
        return torch.cat(found)


class VmapLane(Lane):
    """The whole model under ``vmap`` over clients.

    2-D padding masks break under vmap in transformers 5 where a shortcut looks at their values;
    inside this lane the shortcut is off. Attention runs as plain matrix products, the only kernel
    with a batching rule both ways.
    """

    name = "vmap"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._patches = patches.needed(model)

    def run(self, stacked: Tree, batch: Batch) -> Tensor:
        shape = (batch.clients, -1, batch.tokens.shape[1])
        tokens = batch.tokens.view(shape)
        mask = torch.ones_like(tokens) if batch.mask is None else batch.mask.view(shape)

        def one(own: Tree, tokens: Tensor, mask: Tensor) -> Tensor:
            output = functional_call(self.model, own, (), _inputs(tokens, mask))
            logits = output.logits
            assert isinstance(logits, Tensor)
            return logits

        kernel = sdpa_kernel(SDPBackend.MATH)
        with _no_mask_shortcut(), kernel, patches.applied(self._patches):
            logits = torch.vmap(one, randomness="different")(stacked, tokens, mask)
        return logits.flatten(0, 1)


class _Owner:
    """A module that owns trainable tensors, and its forward while a batch is under way.

    names: of its tensors inside it, to those under which they travel.
    """

    def __init__(self, lane: FoldLane, module: nn.Module, names: dict[str, str]) -> None:
        self.module = module
        self._lane = lane
        self._names = names

    def forward(self, x: Tensor) -> Tensor:
        """The module's output for all clients of the batch, ``[K*b, ...]``."""
        stacked, clients = self._lane.under_way
        own = {local: stacked[name] for local, name in self._names.items() if name in stacked}
        if own:
            return fold(self.module, own, clients)(x)
        found = type(self.module).forward(self.module, x)
        assert isinstance(found, Tensor)
        return found


class FoldLane(Lane):
    """One batch through the base; folding inside the modules that own trainable tensors.

    Their folding forwards lie on the module instances while a batch is under way. checkpointing:
    keep no activations inside the base's blocks, recompute them in the backward pass. compiled:
    how training steps are to be compiled.

    Raises ValueError when a trainable tensor lies outside every tuner layer and saved module, and
    when the base has no blocks to checkpoint.
    """

    name = "fold"

    def __init__(
        self, model: nn.Module, checkpointing: bool = False, compiled: Compiled = "none"
    ) -> None:
        super().__init__(model)
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise ValueError("prompt learning: virtual tokens are made outside the layers")
        self.compiled = compiled
        self.under_way = NOTHING
        self._owners = [
            _Owner(self, module, travelling(model, module)) for module in owners(model).values()
        ]
        self.blocks = self._checkpoint() if checkpointing else 0
        self._installed = False

    def run(self, stacked: Tree, batch: Batch) -> Tensor:
        if not self._installed:
            with self.installed():
                return self.run(stacked, batch)
        self.under_way = (stacked, batch.clients)
        logits = self.model(input_ids=batch.tokens, attention_mask=batch.mask).logits
        assert isinstance(logits, Tensor)
        return logits

    @contextmanager
    def installed(self) -> Iterator[None]:
        if self._installed:
            yield
            return
        self._installed = True
        for owner in self._owners:
            owner.module.forward = owner.forward
        try:
            yield
        finally:
            self._installed, self.under_way = False, NOTHING
            for owner in self._owners:
                del owner.module.forward

    @contextmanager
    def _again(self, under_way: tuple[Tree, int]) -> Iterator[None]:
        before = self.under_way
        with self.installed():
            self.under_way = under_way
            yield
            self.under_way = before

    def _checkpoint(self) -> int:
        """Turns on transformers' activation checkpointing for every block of the base: how many.

        A block that is recomputed in the backward pass finds the tensors of its forward pass.
        """

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self._again(self.under_way)

        blocks: list[Any] = [
            m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)
        ]
        if not blocks:
            raise ValueError("activation checkpointing: the base has no blocks that support it")
        for block in blocks:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(
                checkpoint, use_reentrant=False, context_fn=contexts
            )
        return len(blocks)


def speed_up(lane: Lane, engine: Engine) -> Lane:
    """The lane with ``engine.compile`` and ``engine.checkpointing``.

    Raises FedpeftError for the two settings in another lane than ``fold``, which alone has them,
    and for a base that cannot.
    """
    if engine.compile != "none" and engine.checkpointing:
        raise FedpeftError(
            f"engine.compile={engine.compile} with engine.checkpointing: a compiled step decides "
            f"itself what to recompute. Set one of the two."
        )
    if engine.compile != "none" or engine.checkpointing:
        if not isinstance(lane, FoldLane):
            raise FedpeftError(
                f"engine.compile and engine.checkpointing work in the lane 'fold', and this run "
                f"has the lane {lane.name!r} (the log says why): use engine.kind=cohort, another "
                f"adapter, or leave the two settings out."
            )
        try:
            lane = FoldLane(lane.model, engine.checkpointing, engine.compile)
        except ValueError as error:
            raise FedpeftError(f"engine.checkpointing=true: {error}; leave it out.") from error
    return lane


def lower(model: nn.Module, dtype: torch.dtype) -> None:
    """Holds the frozen linear layers' weights in ``dtype``, in place.

    Autocast would cast them in every pass, to the same values: it keeps no copy of tensors without
    gradient. Layers whose adapter computes with the weight itself (DoRA, BOFT, ...) stay, and
    weights that an embedding shares.
    """
    kept = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not is_plain_lora(m)]
    inside = {id(child) for layer in kept for child in layer.modules()}
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if type(module) is not nn.Linear or id(module) in inside:
            continue
        frozen = not any(p.requires_grad for p in module.parameters())
        if frozen and id(module.weight) not in embedded:
            module.to(dtype)


def _inputs(tokens: Tensor, mask: Tensor | None) -> dict[str, Any]:
    return {"input_ids": tokens, "attention_mask": mask}


def _per_client(batch: Batch) -> Iterator[tuple[Tensor, Tensor | None]]:
    size = len(batch.tokens) // batch.clients
    for k in range(batch.clients):
        rows = slice(k * size, (k + 1) * size)
        yield batch.tokens[rows], None if batch.mask is None else batch.mask[rows]


@contextmanager
def _no_mask_shortcut() -> Iterator[None]:
    """Turns off transformers' look into the mask (``mask.all()``), which no transform can trace."""
    names = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")
    before = {name: getattr(masking_utils, name) for name in names}
    for name in names:
        setattr(masking_utils, name, lambda *a, **k: False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(masking_utils, name, value)
