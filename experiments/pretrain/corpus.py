"""The text the built-in models are pretrained on: gathering it, its tokenizer, drawing from it.

The text is function sources and docstrings of third-party packages that are installed
next to this interpreter.  The standard library is never trained on: it is what the
built-in data set (``fedpeft.data.pydocs``) is made of.  Every third-party snippet that
shares ``WINDOW_LINES`` consecutive lines with any standard library snippet is dropped.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
import tokenize
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

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
