"""What a tuner adds to its clients' objective beyond the model's outputs.

A *penalty* is a term of the loss in the trainable tensors alone: AdaLoRA's orthogonality, KaSA's
singular values and orthogonality, MonteCLoRA's variational term. peft adds them only where a model
computes its own loss, or leaves them to the user. A *projection* is a hook that peft puts on a
parameter's gradient (OSF keeps out of the high singular directions, CPT off the fixed tokens);
clients' tensors are not those parameters, so it has to be repeated here. Both are the same in every
lane.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, LoraModel, PeftModel
from torch import Tensor, nn
from torch.func import functional_call

from fedpeft.cohort.patches import monteclora_draw
from fedpeft.tree import Layout, Tree

Hook = Callable[[Tensor], Any]


class Objective:
    """The penalty and the projections of a model's tuner; most have neither."""

    def __init__(self, model: nn.Module) -> None:
        term = _term(model)
        self._penalty = None if term is None else _Penalty(model, term)
        self._hooks: dict[str, list[Hook]] = {
            name: list(p._backward_hooks.values())
            for name, p in model.named_parameters()
            if p._backward_hooks
        }

    @property
    def plain(self) -> bool:
        """Whether there is neither."""
        return self._penalty is None and not self._hooks

    def penalty(self, stacked: Tree) -> Tensor | None:
        """The term to add to each client's mean loss, ``[K]``; None where there is none."""
        if self._penalty is None:
            return None
        module = self._penalty

        def one(own: Tree) -> Tensor:
            found = functional_call(module, {f"model.{n}": v for n, v in own.items()}, ())
            assert isinstance(found, Tensor)
            return found

        return torch.vmap(one, randomness="different")(stacked)

    def project(self, gradient: Tensor, layout: Layout) -> Tensor:
        """The gradient ``[K, P]`` after the hooks of its parameters, client by client."""
        if not self._hooks.keys() & set(layout.names):
            return gradient
        named = layout.unpack(gradient)
        for name in named:
            for hook in self._hooks.get(name, []):
                named[name] = torch.vmap(hook)(named[name])
        return layout.pack(named)


class _Penalty(nn.Module):
    def __init__(self, model: nn.Module, term: Callable[[PeftModel], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.term = term

    def forward(self) -> Tensor:
        assert isinstance(self.model, PeftModel)
        return self.term(self.model)


def _term(model: nn.Module) -> Callable[[PeftModel], Tensor] | None:
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if isinstance(config, AdaLoraConfig):
        return _adalora
    if isinstance(config, LoraConfig) and config.kasa_config is not None:
        return _kasa
    if isinstance(config, LoraConfig) and config.monteclora_config is not None:
        return _monteclora
    return None


def _adalora(model: PeftModel) -> Tensor:
    """The mean over all factors of ``||A A^T - I||``, ``||B^T B - I||`` (adalora/model.py:239)."""
    config = model.active_peft_config
    assert isinstance(config, AdaLoraConfig)
    norms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.mT if "lora_A" in name else p.mT @ p
            eye = torch.eye(len(gram), dtype=p.dtype, device=p.device)
            norms.append(torch.linalg.matrix_norm(gram - eye))
    return config.orth_reg_weight * torch.stack(norms).mean()


def _kasa(model: PeftModel) -> Tensor:
    tuner = model.base_model
    assert isinstance(tuner, LoraModel)
    found = tuner._get_kasa_loss()
    assert isinstance(found, Tensor)
    return found


def _monteclora(model: PeftModel) -> Tensor:
    """The mean over layers of KL and entropy (lora/monteclora.py:200), on a fresh draw."""
    terms = []
    for name, module in model.named_modules():
        if name.endswith(".lora_monteclora_sampler.default"):
            variance, share = monteclora_draw(module, module.std_prior)
            kl = (
                module.dirichlet_kl(torch.exp(module.expert_weights_prior))
                + module.wishart_kl(torch.diag(torch.exp(module.std_prior)))
                + module.multivariate_kl(torch.diag(variance))
            )
            entropy = share.square().sum() if module.use_entropy else 0.0
            terms.append(module.kl_loss_weight * kl + entropy)
    return torch.stack(terms).mean()
