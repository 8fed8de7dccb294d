"""How to load what a run trained, with peft or transformers: the lines it prints at its end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedpeft.config import Recipe


def lines(recipe: Recipe, labels: int, adapter: str) -> list[str]:
    """Python that gives ``model``, the base with the adapter; none for a random base with one.

    labels: the classifier's classes (ignored for language modelling).
    """
    whole = recipe.adapter.get("kind") == "full"
    if recipe.model.random and not whole:
        return []
    task, pooled = recipe.data.task, recipe.model.pooling == "mean"
    if task == "causal_lm":
        kind, more = "AutoModelForCausalLM", ""
    elif pooled:
        kind, more = "AutoModel", ""
    else:
        kind, more = "AutoModelForSequenceClassification", f", num_labels={labels}"
    if whole and not (pooled and task == "classification"):
        return [f"model = transformers.{kind}.from_pretrained({adapter!r}, dtype='float32')"]
    if whole:
        return [
            f"base = transformers.{kind}.from_pretrained({adapter!r}, dtype='float32')",
            f"model = fedpeft.model.MeanPoolClassifier(base, {labels})",
            f"head = safetensors.torch.load_file({adapter + '/classifier.safetensors'!r})",
            "model.classifier.load_state_dict(head)",
        ]
    revision = f", revision={recipe.model.revision!r}" if recipe.model.revision else ""
    name = _base(recipe)
    found = [
        f"base = transformers.{kind}.from_pretrained(",
        f"    {name!r}{revision}{more}, dtype='float32')",
    ]
    if task == "classification" and pooled:
        found.append(f"base = fedpeft.model.MeanPoolClassifier(base, {labels})")
    return [*found, f"model = peft.PeftModel.from_pretrained(base, {adapter!r})"]


def _base(recipe: Recipe) -> str:
    from fedpeft.model import model_path

    name = model_path(recipe.model, recipe.data.task)
    if not os.path.isabs(name):
        return name
    path, here = Path(name), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else name
