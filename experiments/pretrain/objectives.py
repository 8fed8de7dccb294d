"""The two built-in models before training: their shapes, starts, batches and losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from corpus import BOS, CLS, EOS, MASK, PAD, SEP, SPECIALS, VOCAB_SIZE, Corpus, Groups, Ints
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

TOKENS_PER_STEP = 4096
LENGTHS, LENGTH_WEIGHTS = (64, 128, 256), (0.75, 0.17, 0.08)
MASKED_SHARE = 0.15
TEMPERATURE = 0.07
DECODER_LENGTH, DECODER_ROWS = 128, 16


@dataclass(frozen=True)
class Task:
    """What the training loop needs to know about either model."""

    kind: str
    model: nn.Module
    shipped: PreTrainedModel
    loss: Callable[[int], tuple[Tensor, int, dict[str, float]]]
    held_out: Callable[[], float]


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
