"""Pretrain the two tiny models that ship with fedpeft, on a CPU, without a network.

Usage, in this order (see README.md next to this file)::

    python experiments/pretrain/pretrain.py tokenizer --out DIR
    python experiments/pretrain/pretrain.py encoder --out DIR --minutes 30
    python experiments/pretrain/pretrain.py decoder --out DIR --minutes 20

The text is function sources and docstrings of third-party packages that are installed
next to this interpreter.  The standard library is never trained on: it is what the
built-in data set (``fedpeft.data.pydocs``) is made of.  Every third-party snippet that
shares ``WINDOW_LINES`` consecutive lines with any standard library snippet is dropped.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import platform
import sysconfig
import time
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from fedpeft.data.pydocs import snippets

SOURCES: dict[str, str] = {
    "PIL": "MIT-CMU",
    "accelerate": "Apache-2.0",
    "aiohttp": "Apache-2.0 AND MIT",
    "alembic": "MIT",
    "anyio": "MIT",
    "click": "BSD-3-Clause",
    "cryptography": "Apache-2.0 OR BSD-3-Clause",
    "datasets": "Apache-2.0",
    "dill": "BSD-3-Clause",
    "fastapi": "MIT",
    "flwr": "Apache-2.0",
    "fontTools": "MIT",
    "fsspec": "BSD-3-Clause",
    "grpc": "Apache-2.0",
    "httpcore": "BSD-3-Clause",
    "httpx": "BSD-3-Clause",
    "huggingface_hub": "Apache-2.0",
    "jinja2": "BSD-3-Clause",
    "jsonschema": "MIT",
    "markdown_it": "MIT",
    "matplotlib": "matplotlib licence (PSF-based)",
    "mpmath": "BSD-3-Clause",
    "mypy": "MIT",
    "narwhals": "MIT",
    "networkx": "BSD-3-Clause",
    "numpy": "BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0",
    "opacus": "Apache-2.0",
    "pandas": "BSD-3-Clause",
    "peft": "Apache-2.0",
    "pip": "MIT",
    "plotly": "MIT",
    "prompt_toolkit": "BSD-3-Clause",
    "psutil": "BSD-3-Clause",
    "pyarrow": "Apache-2.0",
    "pydantic": "MIT",
    "pygments": "BSD-2-Clause",
    "pyparsing": "MIT",
    "ray": "Apache-2.0",
    "requests": "Apache-2.0",
    "rich": "MIT",
    "scipy": "BSD-3-Clause",
    "seaborn": "BSD-3-Clause",
    "sqlalchemy": "MIT",
    "starlette": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "tomlkit": "MIT",
    "torch": "Apache-2.0 AND BSD-2-Clause AND BSD-3-Clause AND BSL-1.0 AND MIT",
    "transformers": "Apache-2.0",
    "urllib3": "MIT",
    "uvicorn": "BSD-3-Clause",
    "websockets": "BSD-3-Clause",
}
"""Import name of every package that may be read, with its licence."""

SKIPPED_PARTS = frozenset(
    {"test", "tests", "testing", "_vendor", "vendor", "thirdparty_files", "__pycache__", "stdlib"}
)
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>"]
PAD, UNK, CLS, SEP, MASK, BOS, EOS = range(7)
VOCAB_SIZE = 4096
MAX_TOKENS = 254
MAX_SNIPPETS_PER_PACKAGE = 9000
WINDOW_LINES = 4
HELD_OUT_SHARE = 0.02
TOKENS_PER_STEP = 4096
LENGTHS, LENGTH_WEIGHTS = (64, 128, 256), (0.75, 0.17, 0.08)
MASKED_SHARE = 0.15
TEMPERATURE = 0.07
DECODER_LENGTH, DECODER_ROWS = 128, 16

Ints = NDArray[np.int64]


# --- text -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Snippet:
    """One function or documented class of a third-party package."""

    text: str
    package: str
    file: str


def line_windows(text: str) -> set[int]:
    """Hashes of every run of ``WINDOW_LINES`` consecutive non-blank lines."""
    lines = [" ".join(line.split()) for line in text.split("\n")]
    lines = [line for line in lines if line]
    return {
        hash("\n".join(lines[start : start + WINDOW_LINES]))
        for start in range(max(1, len(lines) - WINDOW_LINES + 1))
    }


def standard_library_windows() -> set[int]:
    """The line windows of every snippet of the whole standard library."""
    base = Path(sysconfig.get_path("stdlib"))
    windows: set[int] = set()
    for path in sorted(base.rglob("*.py")):
        if "site-packages" not in path.relative_to(base).parts:
            for text in read_snippets(path):
                windows |= line_windows(text)
    return windows


def gather() -> list[Snippet]:
    """Read all snippets, without duplicates and without the standard library's."""
    site = Path(sysconfig.get_path("purelib"))
    unseen = standard_library_windows()
    seen: set[str] = set()
    kept: list[Snippet] = []
    overlaps = 0
    for package in sorted(SOURCES):
        found: list[Snippet] = []
        for path in sorted((site / package).rglob("*.py")):
            if not SKIPPED_PARTS.isdisjoint(path.relative_to(site).parts):
                continue
            name = path.relative_to(site).as_posix()
            for text in read_snippets(path):
                key = " ".join(text.split())
                if key in seen:
                    continue
                seen.add(key)
                if not unseen.isdisjoint(line_windows(text)):
                    overlaps += 1
                    continue
                found.append(Snippet(text, package, name))
        step = max(1.0, len(found) / MAX_SNIPPETS_PER_PACKAGE)
        kept += [found[int(i * step)] for i in range(int(len(found) / step))]
        print(f"{package}: {len(found)} snippets", flush=True)
    print(f"kept {len(kept)}; dropped {overlaps} that overlap the standard library", flush=True)
    return kept


def read_snippets(path: Path) -> list[str]:
    """The snippets of one file; none if it cannot be decoded."""
    try:
        with tokenize.open(path) as stream:
            return list(snippets(stream.read()))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return []


# --- tokenizer and corpus -------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer with ``VOCAB_SIZE`` entries."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(raw: Tokenizer, folder: Path, kind: str) -> None:
    """Save the tokenizer for the encoder ([CLS] ... [SEP]) or the decoder (<s> ...)."""
    raw = Tokenizer.from_str(raw.to_str())
    common = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    common |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    if kind == "encoder":
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
        )
    else:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=raw,
        model_max_length=256,
        padding_side="right",
        truncation_side="right",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **common,
    )
    fast.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name every version knows
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def prepare(out: Path) -> None:
    """Gather the text, train the tokenizer and save the tokenised corpus under ``out``."""
    found = gather()
    raw = train_tokenizer([snippet.text for snippet in found[::4]])
    out.mkdir(parents=True, exist_ok=True)
    raw.save(str(out / "tokenizer.json"))
    ids: list[list[int]] = []
    for start in range(0, len(found), 4096):
        batch = raw.encode_batch([snippet.text for snippet in found[start : start + 4096]])
        ids += [encoding.ids[:MAX_TOKENS] for encoding in batch]
    packages = sorted({snippet.package for snippet in found})
    files = sorted({snippet.file for snippet in found})
    folders = sorted({file.rpartition("/")[0] for file in files})
    file_index = {name: index for index, name in enumerate(files)}
    folder_index = {name: index for index, name in enumerate(folders)}
    package_index = {name: index for index, name in enumerate(packages)}
    np.savez(
        out / "corpus.npz",
        tokens=np.concatenate([np.asarray(item, dtype=np.int16) for item in ids]),
        offsets=np.cumsum([0, *(len(item) for item in ids)]),
        source=np.array([file_index[snippet.file] for snippet in found]),
        folder=np.array([folder_index[snippet.file.rpartition("/")[0]] for snippet in found]),
        package=np.array([package_index[snippet.package] for snippet in found]),
        held_out=np.array([is_held_out(snippet.file) for snippet in found]),
    )
    used = {name: [SOURCES[name], package_version(name)] for name in packages}
    total = sum(len(item) for item in ids)
    summary = {"snippets": len(found), "files": len(files), "tokens": total, "packages": used}
    (out / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"{len(found)} snippets, {len(files)} files, {total} tokens", flush=True)


def is_held_out(file: str) -> bool:
    """Whether a file is kept for the held-out loss: a fixed share, chosen by its name."""
    digest = hashlib.sha256(file.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def package_version(name: str) -> str:
    """The installed version of the distribution that provides ``name``."""
    distributions = metadata.packages_distributions().get(name, [])
    return metadata.version(distributions[0]) if distributions else "unknown"


class Corpus:
    """The tokenised snippets, with the file, folder and package of each."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as data:
            self.tokens: Ints = data["tokens"].astype(np.int64)
            self.offsets: Ints = data["offsets"]
            self.file: Ints = data["source"]
            self.folder: Ints = data["folder"]
            self.package: Ints = data["package"]
            self.held_out: NDArray[np.bool_] = data["held_out"]
        self.train = np.flatnonzero(~self.held_out)
        self.valid = np.flatnonzero(self.held_out)

    def ids(self, index: int) -> Ints:
        """Token ids of one snippet, without special tokens."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class Groups:
    """Snippets grouped by file or by folder, and the groups of every package."""

    def __init__(self, keys: Ints, packages: Ints, members: Ints) -> None:
        order = members[np.argsort(keys[members], kind="stable")]
        starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
        groups = [group for group in np.split(order, starts[1:]) if len(group) >= 2]
        self.by_package: dict[int, list[Ints]] = {}
        for group in groups:
            self.by_package.setdefault(int(packages[group[0]]), []).append(group)
        self.names = sorted(self.by_package)
        sizes = np.array([len(self.by_package[name]) for name in self.names], dtype=float)
        self.weights = np.sqrt(sizes) / np.sqrt(sizes).sum()

    def pairs(self, count: int, hard: bool, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """``count`` pairs of snippets; the two of a pair share a group, no two pairs do.

        With ``hard`` the groups come from as few packages as have enough of them, so the
        negatives share a package, its style and its vocabulary with the anchor.
        """
        order = rng.choice(len(self.names), size=len(self.names), replace=False, p=self.weights)
        pool: list[Ints] = []
        if hard:
            for position in order:
                pool += self.by_package[self.names[position]]
                if len(pool) >= count:
                    break
        else:
            share = np.ceil(self.weights * count * 2).astype(int)
            for position in order:
                groups = self.by_package[self.names[position]]
                size = min(len(groups), int(share[position]))
                pool += [groups[i] for i in rng.choice(len(groups), size=size, replace=False)]
        count = min(count, len(pool))
        chosen = [pool[i] for i in rng.choice(len(pool), size=count, replace=False)]
        drawn = np.array([rng.choice(group, size=2, replace=False) for group in chosen])
        return drawn[:, 0], drawn[:, 1]


# --- count-based start ----------------------------------------------------------------


def count_embeddings(corpus: Corpus, width: int) -> Tensor:
    """Unit-length token vectors from counts: which tokens occur in the same snippets.

    A truncated singular value decomposition of positive pointwise mutual information, as
    in latent semantic analysis, with the mean vector taken out.  It costs seconds and
    saves most of the steps that a network needs to find the same.
    """
    together = torch.zeros(VOCAB_SIZE * VOCAB_SIZE)
    for start in range(0, len(corpus.train), 1000):
        pairs = []
        for member in corpus.train[start : start + 1000]:
            ids = np.unique(corpus.ids(int(member))[: LENGTHS[0]])
            pairs.append((ids[:, None] * VOCAB_SIZE + ids[None, :]).ravel())
        flat = torch.from_numpy(np.concatenate(pairs))
        together.index_add_(0, flat, torch.ones(len(flat)))
    counts = together.view(VOCAB_SIZE, VOCAB_SIZE)
    single = counts.diagonal().clone().clamp(min=1.0)
    expected = single[:, None] * single[None, :] / len(corpus.train)
    information = (counts / (counts + 5.0) * counts / expected + 1e-9).log().clamp(min=0.0)
    information.fill_diagonal_(0.0)
    left, values, _ = torch.svd_lowrank(information, q=width + 8, niter=3)
    vectors = F.normalize((left * values.sqrt())[:, :width], dim=-1)
    share = (single.sqrt() / single.sqrt().sum())[:, None]
    return F.normalize(vectors - (vectors * share).sum(0), dim=-1)


@torch.no_grad()
def warm_start(bert: BertModel, vectors: Tensor) -> None:
    """Start the encoder as a bag of words: count-based tokens, averaged into [CLS]."""
    weights = dict(bert.named_parameters())
    weights["embeddings.word_embeddings.weight"][len(SPECIALS) :] = 0.7 * vectors[len(SPECIALS) :]
    weights["embeddings.position_embeddings.weight"].mul_(0.25)
    weights["embeddings.token_type_embeddings.weight"].mul_(0.25)
    identity = torch.eye(vectors.shape[1])
    for layer in range(bert.config.num_hidden_layers):
        attention = f"encoder.layer.{layer}.attention"
        weights[f"{attention}.self.value.weight"].mul_(0.5).add_(identity)
        weights[f"{attention}.output.dense.weight"].mul_(0.5).add_(identity)
    weights["pooler.dense.weight"].mul_(0.5).add_(0.7 * identity)


# --- encoder --------------------------------------------------------------------------


class EncoderTrainer(nn.Module):
    """A stock BERT with a masked-language-model head that is thrown away afterwards."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config)
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, ids: Tensor, labels: Tensor, use_pairs: bool) -> tuple[Tensor, Tensor]:
        """The masked-token loss and the contrastive loss of a batch of stacked pairs."""
        output = self.bert(input_ids=ids, attention_mask=(ids != PAD).long())
        picked = labels >= 0
        hidden = self.norm(F.gelu(self.transform(output.last_hidden_state[picked])))
        logits = F.linear(hidden, self.bert.embeddings.word_embeddings.weight, self.bias)
        masked = F.cross_entropy(logits, labels[picked])
        if not use_pairs:
            return masked, masked.new_zeros(())
        return masked, contrastive_loss(output.pooler_output)


def contrastive_loss(pooled: Tensor) -> Tensor:
    """InfoNCE of rows ``i`` and ``i + n/2`` against all other rows of the batch."""
    unit = F.normalize(pooled, dim=-1)
    similarity = unit @ unit.T / TEMPERATURE
    similarity = similarity.masked_fill(torch.eye(len(unit), dtype=torch.bool), -1e4)
    half = len(unit) // 2
    return F.cross_entropy(similarity, torch.arange(len(unit)).roll(half))


def encoder_config() -> BertConfig:
    """The shipped encoder's shape: 2.6 million parameters."""
    return BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=768,
        max_position_embeddings=256,
        type_vocab_size=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.04,
        pad_token_id=PAD,
    )


def encoder_batch(
    corpus: Corpus, members: Ints, length: int, rng: np.random.Generator, crop: bool = True
) -> tuple[Tensor, Tensor]:
    """Masked ids and labels (-100 where not masked) of ``[CLS] tokens [SEP]`` rows."""
    ids = np.full((len(members), length), PAD, dtype=np.int64)
    for row, member in enumerate(members):
        tokens = corpus.ids(int(member))
        spare = len(tokens) - (length - 2)
        start = int(rng.integers(spare + 1)) if crop and spare > 0 and rng.random() < 0.3 else 0
        tokens = tokens[start : start + length - 2]
        ids[row, : len(tokens) + 2] = [CLS, *tokens, SEP]
    ids = ids[:, : max(8, int((ids != PAD).sum(axis=1).max()))]
    picked = (rng.random(ids.shape) < MASKED_SHARE) & (ids >= len(SPECIALS))
    picked[0, 1] |= ids[0, 1] >= len(SPECIALS)
    labels = np.where(picked, ids, -100)
    dice = rng.random(ids.shape)
    noise = rng.integers(len(SPECIALS), VOCAB_SIZE, size=ids.shape)
    ids = np.where(picked & (dice < 0.8), MASK, ids)
    ids = np.where(picked & (dice >= 0.9), noise, ids)
    return torch.from_numpy(ids), torch.from_numpy(labels)


def encoder_task(corpus: Corpus, seed: int, weight: float) -> Task:
    """The encoder with its loss of one step and its held-out loss."""
    model = EncoderTrainer(encoder_config())
    warm_start(model.bert, count_embeddings(corpus, encoder_config().hidden_size))
    by_file = Groups(corpus.file, corpus.package, corpus.train)
    by_folder = Groups(corpus.folder, corpus.package, corpus.train)

    def loss(step: int) -> tuple[Tensor, int, dict[str, float]]:
        rng = np.random.default_rng([seed, step])
        length = int(rng.choice(LENGTHS, p=LENGTH_WEIGHTS))
        groups = by_file if rng.random() < 0.4 else by_folder
        pairs = groups.pairs(TOKENS_PER_STEP // length // 2, bool(rng.random() < 0.5), rng)
        ids, labels = encoder_batch(corpus, np.concatenate(pairs), length, rng)
        masked, contrast = model(ids, labels, True)
        parts = {"mlm": masked.item(), f"contrast@{length}": contrast.item()}
        return masked + weight * contrast, int((ids != PAD).sum()), parts

    def held_out() -> float:
        rng = np.random.default_rng(7)
        total, count = 0.0, 0
        for start in range(0, len(corpus.valid), 64):
            members = corpus.valid[start : start + 64]
            ids, labels = encoder_batch(corpus, members, 128, rng, crop=False)
            picked = int((labels >= 0).sum())
            total += float(model(ids, labels, False)[0]) * picked
            count += picked
        return total / count

    return Task("encoder", model, model.bert, loss, held_out)


# --- decoder --------------------------------------------------------------------------


def decoder_config() -> LlamaConfig:
    """The shipped decoder's shape: 2.6 million parameters, tied embeddings."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        intermediate_size=512,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.04,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def packed(corpus: Corpus, members: Ints) -> Tensor:
    """``<s> tokens </s>`` of the members, end to end, cut in rows of equal length."""
    stream = np.concatenate([[BOS, *corpus.ids(int(member)), EOS] for member in members])
    rows = len(stream) // DECODER_LENGTH
    return torch.from_numpy(stream[: rows * DECODER_LENGTH].reshape(rows, DECODER_LENGTH))


def causal_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token loss of full rows."""
    logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def decoder_task(corpus: Corpus, seed: int) -> Task:
    """The decoder with its loss of one step and its held-out loss."""
    model = LlamaForCausalLM(decoder_config())
    vectors = count_embeddings(corpus, decoder_config().hidden_size)
    with torch.no_grad():
        model.model.embed_tokens.weight[len(SPECIALS) :] = 0.5 * vectors[len(SPECIALS) :]
    rows = packed(corpus, np.random.default_rng(seed).permutation(corpus.train))
    per_epoch = len(rows) // DECODER_ROWS

    def loss(step: int) -> tuple[Tensor, int, dict[str, float]]:
        epoch, position = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        first = position * DECODER_ROWS
        ids = rows[torch.from_numpy(order[first : first + DECODER_ROWS])]
        value = causal_loss(model, ids)
        return value, ids.numel(), {"lm": value.item()}

    def held_out() -> float:
        valid = packed(corpus, corpus.valid)
        parts = torch.split(valid, DECODER_ROWS)
        losses = [float(causal_loss(model, part)) * len(part) for part in parts]
        return sum(losses) / len(valid)

    return Task("decoder", model, model, loss, held_out)


# --- training -------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What the training loop needs to know about either model."""

    kind: str
    model: nn.Module
    shipped: PreTrainedModel
    loss: Callable[[int], tuple[Tensor, int, dict[str, float]]]
    held_out: Callable[[], float]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warmup over the first 4 % of the steps, then a cosine to zero."""
    warmup = max(1, steps * 4 // 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def optimizer_for(model: nn.Module) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8, fused=True)


def one_step(task: Task, optimizer: torch.optim.AdamW, step: int) -> tuple[int, dict[str, float]]:
    """One update; returns the number of tokens and the parts of the loss."""
    value, tokens, parts = task.loss(step)
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
    optimizer.step()
    return tokens, parts


def planned_steps(task: Task, minutes: float) -> int:
    """How many steps fit in ``minutes``, measured on steps that are then undone."""
    state = copy.deepcopy(task.model.state_dict())
    optimizer = optimizer_for(task.model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    one_step(task, optimizer, 0)
    count = 12
    start = time.monotonic()
    for step in range(count):
        one_step(task, optimizer, step)
    seconds = (time.monotonic() - start) / count
    task.model.load_state_dict(state)
    return max(1, int(minutes * 60 / seconds))


def export(task: Task, folder: Path, raw: Tokenizer) -> None:
    """Write half-precision safetensors, the configuration and the tokenizer.

    The configuration names single precision, so that the model is trained in it after
    ``from_pretrained``; half precision is only how the file is stored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = copy.deepcopy(task.shipped)
    nn.Module.to(stored, torch.float16)
    stored.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "model.safetensors").chmod(0o644)
    save_tokenizer(raw, folder, task.kind)


def fit(task: Task, steps: int, peak: float, folder: Path, raw: Tokenizer) -> dict[str, object]:
    """Train for ``steps``, exporting every few minutes; returns the run's figures."""
    optimizer = optimizer_for(task.model)
    start = saved = time.monotonic()
    tokens = 0
    sums: dict[str, list[float]] = {}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        used, parts = one_step(task, optimizer, step)
        tokens += used
        for name, value in parts.items():
            sums.setdefault(name, []).append(value)
        now = time.monotonic()
        if step % 50 == 49:
            means = "  ".join(f"{name} {np.mean(part):.3f}" for name, part in sorted(sums.items()))
            print(f"{step + 1}/{steps}  {now - start:.0f} s  {tokens} tokens  {means}", flush=True)
            sums.clear()
        if now - saved > 180:
            export(task, folder, raw)
            saved = now
    export(task, folder, raw)
    with torch.no_grad():
        held_out = task.held_out()
    seconds = time.monotonic() - start
    return {"steps": steps, "tokens": tokens, "seconds": seconds, "held_out_loss": held_out}


def train(args: argparse.Namespace) -> None:
    """Pretrain one of the two models and write it with a record of the run."""
    torch.manual_seed(args.seed)
    raw = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    corpus = Corpus(args.out / "corpus.npz")
    if args.model == "encoder":
        task = encoder_task(corpus, args.seed, args.contrast)
    else:
        task = decoder_task(corpus, args.seed)
    parameters = sum(p.numel() for p in task.shipped.parameters())
    steps = args.steps or planned_steps(task, args.minutes)
    print(f"{args.model}: {parameters} parameters, {steps} steps, seed {args.seed}", flush=True)
    folder = args.out / args.model
    record = fit(task, steps, args.lr, folder, raw)
    record |= {"parameters": parameters, "seed": args.seed, "peak_lr": args.lr}
    record |= {"threads": args.threads, "python": platform.python_version()}
    record |= {"torch": torch.__version__, "transformers": metadata.version("transformers")}
    if args.model == "encoder":
        record |= {"contrast_weight": args.contrast, "temperature": TEMPERATURE}
    text = json.dumps(record, indent=2) + "\n"
    (args.out / f"{args.model}.json").write_text(text, encoding="utf-8")
    print(text, flush=True)


def main() -> None:
    """Parse the command line and run one stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", choices=["tokenizer", "encoder", "decoder"])
    parser.add_argument("--out", type=Path, required=True, help="folder for all results")
    parser.add_argument("--minutes", type=float, default=20.0, help="time to plan for")
    parser.add_argument("--steps", type=int, default=0, help="repeat a run with this many steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate")
    parser.add_argument("--contrast", type=float, default=2.0, help="weight of the pooler's loss")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    if args.model == "tokenizer":
        prepare(args.out)
    else:
        train(args)


if __name__ == "__main__":
    main()
