"""One line for each thing that a recipe can name, where the code itself has no such line.

Strategies and recipes describe themselves, in the first line of their files.
"""

PARTITIONS = {
    "iid": "rows dealt out at random, clients of equal size",
    "dirichlet": "label shares of every client drawn from Dirichlet(alpha); small alpha, more skew",
    "pathological": "every client has rows of `classes` labels only",
    "shard": "rows sorted by label and cut up; every client gets `shards` pieces",
    "natural": "one client per value of the column `data.client`: a user, an author, a file",
}
"""``partition.kind``."""

SOURCES = {
    "pydocs": "functions of your own Python's standard library; no download, clients are files",
    "FILE": "a .csv, .json, .jsonl or .parquet file",
    "FOLDER": "a folder with such files (data.train, data.test), or written by save_to_disk",
    "STORE": "a folder that `fedpeft store` wrote: clients are read when they train",
    "HUB_ID": "a Hugging Face data set, such as banking77 (data.subset, data.train, data.test)",
}
"""``data.source``; a name in capitals stands for what you put there."""

FULL = "no adapter: every tensor of the model is trained, one client after another"
"""What ``adapter.kind=full`` is."""

ADAPTERS = {
    "lora": "low-rank update B A; use_dora, use_rslora and init_lora_weights choose variants",
    "adalora": "LoRA as P diag(E) Q; ranks are pruned by importance during training",
    "adamss": "low-rank updates in clustered subspaces of the weight's SVD",
    "adaption_prompt": "LLaMA-Adapter: gated prompts in the upper attention layers; decoders only",
    "beft": "biases of the value projections",
    "boft": "orthogonal rotation of the weight in butterfly factors",
    "c3a": "block-circulant update (circular convolution)",
    "cartridge": "key-value prefixes trained directly, as a cache",
    "cpt": "context-aware prompt tuning",
    "deft": "replaces a low-rank subspace of the weight's output by a learned one",
    "delora": "low-rank update of normalised directions under a learned strength",
    "fourierft": "a few spectral coefficients of the update",
    "frod": "sparse full-rank update in one shared basis",
    "glora": "generalised LoRA: scales and shifts weight and bias by low-rank terms",
    "gralora": "LoRA for each block of a k x k grid on the weight",
    "hira": "high-rank update: the weight times B A, entry by entry",
    "hra": "chain of Householder reflections",
    "ia3": "learned scales on keys, values and feed-forward activations",
    "lily": "LoRA whose B matrices are shared across layers by a router",
    "ln_tuning": "scale and shift of the layer norms",
    "loha": "Hadamard product of two low-rank updates",
    "lokr": "Kronecker product, one factor low-rank",
    "miss": "one small matrix, expanded over the shards of the weight",
    "oft": "block-orthogonal rotation of the weight",
    "osf": "trains the weak singular directions of the weight, keeps the strong ones",
    "peanut": "low-rank network with non-linearities whose input is the weight",
    "poly": "routed mixture of LoRA skills (Polytropon, multi-head routing)",
    "prefix_tuning": "key-value prefixes in every layer",
    "prompt_tuning": "virtual tokens before the text",
    "multitask_prompt_tuning": "virtual tokens as a shared prompt times a task's low-rank part",
    "p_tuning": "virtual tokens made by a small network",
    "psoft": "rotation inside the weight's principal subspace",
    "pvera": "VeRA with random latent scales",
    "randlora": "full-rank sum of scaled random low-rank bases",
    "road": "2-d rotations of the outputs",
    "shadow": "a small network beside the decoder, read at every block",
    "shira": "one or two per cent of the weight's own entries",
    "supertuning": "the weight's entries of a sparse support chosen by magnitude",
    "tinylora": "a tiny vector through fixed random tensors on the weight's SVD",
    "trainable_tokens": "embeddings of chosen tokens",
    "unilora": "one small vector, projected to all LoRA factors",
    "vblora": "LoRA factors put together from one shared bank of vectors",
    "vera": "learned scales around random matrices that all layers share",
    "waveft": "a few wavelet coefficients of the update",
    "xlora": "mixture of trained LoRA experts with a learned gate",
}
"""``adapter.kind``: peft's own descriptions name the class and little else."""
