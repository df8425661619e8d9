"""The text, the model, its retrainings, and the groups: what the measurements of this example are made on.

A small GPT-2 is trained on the domains that are *not* asked about, and then trained on: on rows of all domains, those
that are asked about among them. That second training is what rows are credited for, and what is done again without
some of them. (Trained from scratch a model this small stands for a while on a plateau that it leaves at a moment that
chance decides, and what a retraining differs by is that moment.)

Shapes: N rows of training, Q queries, T tokens, V vocabulary, K groups.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from hf_datashapley.attribution.fingerprint import sha256_of
from hf_datashapley.attribution.partitions import Partition
from hf_datashapley.demo.corpus import Document, drop_near_duplicates, read_corpus
from hf_datashapley.demo.harvest import harvest
from hf_datashapley.demo.junk import plant_junk
from hf_datashapley.demo.rows import tokenise, train_tokenizer
from hf_datashapley.random_state import random_state_kept


Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
HARVESTED = 3_000_000  # characters
TARGETS = ("code", "legal", "drama")
HELD_OUT = 16  # documents of each target: one half is what the setting was chosen on, the other is asked about
ROWS_OF_A_DOCUMENT = 16
CLEAN_ROWS = 8  # of each domain, which junk is judged by
BASE_ROWS_OF_A_DOCUMENT = 64
WARM_UP = 10  # updates
BASE_BATCH, BASE_RATE = 32, 3e-3
FIRST_SEED = 100  # of the model that attributions are of: none of the retrainings'
GROUPINGS = ("random", "tokens", "representations", "gradients")


@dataclass
class GroupAttribution:
    corpus: str | None = field(
        default=None,
        metadata={
            "help": "Parquet or JSONL file with a document per row: column `text` and, where there are, `domain`. "
            "Default: the text of this Python installation."
        },
    )
    junk: str | None = field(
        default=None,
        metadata={
            "help": "JSONL file of what nobody would want to train on, column `text`. Default: made of the text."
        },
    )
    targets: list[str] | None = field(
        default=None, metadata={"help": "Domains that are asked about. Default: code, legal, drama where there are."}
    )
    rows: int = field(default=4096, metadata={"help": "Of training, the units."})
    queries: int = field(default=32, metadata={"help": "Rows asked about of each target domain."})
    row_tokens: int = field(default=32, metadata={"help": "Tokens of a row."})
    vocabulary: int = field(default=512, metadata={"help": "Of the byte-level BPE."})
    layers: int = field(default=2, metadata={"help": "Of the GPT-2."})
    width: int = field(default=64, metadata={"help": "Of the GPT-2."})
    base_updates: int = field(default=2000, metadata={"help": "Of the training that all others go on from."})
    updates: int = field(default=256, metadata={"help": "Of every training, however many rows it has."})
    batch_size: int = field(default=16, metadata={"help": "Rows of an update."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of AdamW, at its height."})
    checkpoints: int = field(default=3, metadata={"help": "Of the training, for TracIn."})
    projection_dim: int = field(default=2048, metadata={"help": "Features of TracIn, TRAK, and the Fisher matrix."})
    sizes: list[int] = field(
        default_factory=lambda: [4, 16, 64, 256, 1024], metadata={"help": "Of groups, on average, beside 1."}
    )
    fractions: list[float] = field(
        default_factory=lambda: [0.01, 0.05, 0.1, 0.2], metadata={"help": "Of the tokens, that are removed."}
    )
    fraction: float = field(
        default=0.1,
        metadata={"help": "The one of these that is retrained with all seeds, and that kernels are compared at."},
    )
    pruned: list[float] = field(
        default_factory=lambda: [0.25, 0.5, 0.75], metadata={"help": "Of the tokens, the least valuable, dropped."}
    )
    draws: int = field(default=3, metadata={"help": "Of what is removed at random."})
    seeds: int = field(
        default=3, metadata={"help": "Retrainings without that fraction, and of what it is compared with."}
    )
    seeds_elsewhere: int = field(default=1, metadata={"help": "Retrainings without other fractions."})
    junk_share: float = field(default=0.1, metadata={"help": "Of the rows, where junk is looked for."})
    repeats: int = field(default=3, metadata={"help": "Of what is timed; 0: nothing is."})
    workers: int = field(default=2, metadata={"help": "Processes that retrain, of one thread each."})
    seed: int = field(default=0, metadata={"help": "Of the text, the groups and the draws."})
    output_dir: str = field(
        default="runs/group_attribution",
        metadata={"help": "For everything; a run that was stopped goes on from there."},
    )

    def __post_init__(self) -> None:
        if not all(1 < size < self.rows for size in self.sizes):
            raise ValueError(f"--sizes {self.sizes}: groups have at least 2 of the {self.rows} --rows, and not all")
        if not all(0 < part < 1 for part in [*self.fractions, *self.pruned]):
            raise ValueError("--fractions and --pruned are parts of the tokens, between 0 and 1")


# The text


@dataclass(frozen=True)
class Text:
    """Rows of token ids, int64 [rows, T]: of the first training, of the second, and what is asked about; `tabled` are
    the queries that tables are of, `chosen_on` those of other documents that the setting was chosen on. `clean`: rows
    of all domains that nothing is trained on."""

    base: Tensor
    train: Tensor
    domains_N: NDArray[Any]
    tabled: Tensor
    chosen_on: Tensor
    targets: list[str]
    junk: Tensor
    clean: Tensor

    @property
    def queries(self) -> Tensor:
        return torch.cat([self.tabled, self.chosen_on])

    @property
    def of_targets_N(self) -> NDArray[np.bool_]:
        """Rows of the domains that are asked about."""
        found: NDArray[np.bool_] = np.isin(self.domains_N, self.targets)
        return found

    def with_junk(self, share: float, seed: int) -> tuple[Tensor, NDArray[np.bool_]]:
        """The rows of training, some of which are replaced by junk; and which."""
        count = min(round(share * len(self.train)), len(self.junk))
        where = np.random.default_rng(seed).choice(len(self.train), count, replace=False)
        rows, is_junk_N = self.train.clone(), np.zeros(len(self.train), bool)
        rows[where], is_junk_N[where] = self.junk[:count], True
        return rows, is_junk_N


def make_text(config: GroupAttribution) -> Text:
    """
    Raises:
        ValueError: a target is none of the domains, or there is too little text.
    """
    documents = harvest(HARVESTED, config.seed) if config.corpus is None else read_corpus(config.corpus)
    random.Random(config.seed).shuffle(documents)
    documents = drop_near_duplicates(documents)
    domains = sorted({document.domain for document in documents})
    targets = [domain for domain in TARGETS if domain in domains] if config.targets is None else config.targets
    if not targets or not set(targets) < set(domains):
        raise ValueError(f"--targets {targets}: choose some, and not all, of {', '.join(domains)}")
    # A sample of the text is enough for a small vocabulary.
    tokenizer = train_tokenizer([document.text for document in documents[::4]], config.vocabulary, config.row_tokens)

    def full_rows(chosen: Sequence[Document]) -> list[list[list[int]]]:
        """Of each document; what is shorter than a row is left out."""
        return [
            [row for row in tokenised.rows if len(row) == config.row_tokens]
            for tokenised in tokenise(chosen, tokenizer, config.row_tokens)
        ]

    pools: dict[str, list[list[int]]] = {}
    base: list[list[int]] = []
    asked: tuple[list[list[int]], list[list[int]]] = ([], [])
    for domain in domains:
        own = full_rows([document for document in documents if document.domain == domain])
        if domain in targets:
            for half, rows in zip(asked, (own[: HELD_OUT // 2], own[HELD_OUT // 2 : HELD_OUT]), strict=True):
                half.extend(spread_over(rows, config.queries))
            own = own[HELD_OUT:]
        else:
            base += [row for rows in own[1::2] for row in rows[:BASE_ROWS_OF_A_DOCUMENT]]
            own = own[::2]
        pools[domain] = [row for rows in own for row in rows[:ROWS_OF_A_DOCUMENT]]
    counts = shares({domain: len(pool) for domain, pool in pools.items()}, config.rows)
    clean = [row for domain in domains for row in pools[domain][counts[domain] :][-CLEAN_ROWS:]]
    junk_rows = [row for rows in full_rows(junk_documents(config, documents)) for row in rows]
    random.Random(config.seed).shuffle(junk_rows)
    if sum(counts.values()) < config.rows or not min(map(len, (base, clean, junk_rows, *asked))):
        raise ValueError(f"--rows {config.rows}: the text has {sum(counts.values())}; give fewer, or more text")
    return Text(
        torch.tensor(base),
        torch.tensor([row for domain in domains for row in pools[domain][: counts[domain]]]),
        np.repeat(domains, [counts[domain] for domain in domains]),
        torch.tensor(asked[1]),
        torch.tensor(asked[0]),
        targets,
        torch.tensor(junk_rows),
        torch.tensor(clean),
    )


def junk_documents(config: GroupAttribution, documents: Sequence[Document]) -> list[Document]:
    if config.junk is not None:
        return read_corpus(config.junk)
    return plant_junk(documents, round(2 * config.junk_share * config.rows * config.row_tokens), config.seed)


def spread_over(documents: Sequence[list[list[int]]], count: int) -> list[list[int]]:
    """So many rows, as many of each document as of the others."""
    each = -(-count // len(documents)) if documents else 0
    return [row for rows in documents for row in rows[:each]][:count]


def shares(available: dict[str, int], total: int) -> dict[str, int]:
    """Equal shares of the total; what some have too little of, others give."""
    found: dict[str, int] = {}
    for place, domain in enumerate(sorted(available, key=lambda name: (available[name], name))):
        found[domain] = min(available[domain], -(-(total - sum(found.values())) // (len(available) - place)))
    return found


def rows_of(rows: Tensor) -> Dataset:
    return Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})


# The model, and its training


def new_model(config: GroupAttribution) -> GPT2LMHeadModel:
    shape = GPT2Config(
        vocab_size=config.vocabulary,
        n_positions=config.row_tokens,
        n_embd=config.width,
        n_layer=config.layers,
        n_head=max(1, config.width // 32),
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(shape)


def token_losses(model: nn.Module, rows: Tensor) -> Tensor:
    """[rows, T - 1], nats"""
    return cross_entropy(model(rows).logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")


def train(
    model: nn.Module, rows: Tensor, updates: int, batch_size: int, learning_rate: float, seed: int
) -> Iterator[float]:
    """AdamW, with a rate that rises for a few updates and then falls to 0; yields that of each update, once it is
    done. Draws nothing but the rows' order, and that from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-updates * batch_size // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    model.train()
    for update in range(updates):
        rate = learning_rate * min((update + 1) / WARM_UP, (updates - update) / updates)
        for group in optimizer.param_groups:
            group["lr"] = rate
        token_losses(model, rows[order[update * batch_size : (update + 1) * batch_size]]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield rate
    model.eval()


@dataclass(frozen=True)
class TrainedOn:
    """A retraining, as `RetrainingBank` takes it: goes on from the base with some of the rows.

    The number of updates is the same however few the rows are, so that losses say which rows were left out, and not
    how much less was trained.
    """

    config: GroupAttribution
    base: dict[str, Tensor]
    rows: Tensor
    queries: Tensor

    def __call__(self, rows: Indices, seed: int) -> Floats:
        (model,), _ = self.checkpoints(rows, seed, 1)
        with torch.no_grad():
            losses_Q: Floats = token_losses(model, self.queries).mean(1).double().numpy()
        return losses_Q

    @property
    def settings(self) -> dict[str, Any]:
        """What losses depend on, for the bank."""
        own = ("layers", "width", "updates", "batch_size", "learning_rate")
        tensors = {**self.base, "rows": self.rows, "queries": self.queries}
        return {name: vars(self.config)[name] for name in own} | {"tensors": sha256_of(tensors)}

    def checkpoints(self, rows: Indices, seed: int, count: int) -> tuple[list[nn.Module], list[float]]:
        """Models at equal distances, the last at the end; and the mean learning rate of the updates before each."""
        config = self.config
        with random_state_kept():  # the weights are drawn, and then replaced
            model = new_model(config)
        model.load_state_dict(self.base)
        ends = [config.updates * (number + 1) // count for number in range(count)]
        models: list[nn.Module] = []
        means: list[float] = []
        rates: list[float] = []
        updates = train(
            model, self.rows[torch.from_numpy(rows)], config.updates, config.batch_size, config.learning_rate, seed
        )
        for done, rate in enumerate(updates, 1):
            rates.append(rate)
            if done in ends:
                models.append(copy.deepcopy(model).eval())
                means.append(float(np.mean(rates)))
                rates = []
        return models, means


def make_base(config: GroupAttribution, text: Text) -> dict[str, Tensor]:
    """The weights that all trainings start from, made once."""
    path = Path(config.output_dir) / "base.pt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with random_state_kept():
            torch.manual_seed(config.seed)
            model = new_model(config)
        for _ in train(model, text.base, config.base_updates, BASE_BATCH, BASE_RATE, config.seed):
            pass
        torch.save(model.state_dict(), path)
    state: dict[str, Tensor] = torch.load(path, weights_only=True)
    return state


# The groups


def make_partition(
    config: GroupAttribution, grouping: str, size: int, model: nn.Module, rows: Tensor
) -> Partition | None:
    """Groups of so many rows on average; None: each row by itself. Clusters are as large as they come, as in the
    paper."""
    if size == 1:
        return None
    count = -(-len(rows) // size)
    if grouping == "random":
        return Partition.random(len(rows), count, seed=config.seed)
    if grouping == "tokens":
        return Partition.kmeans(tf_idf(rows, config.vocabulary), count, seed=config.seed)
    make = Partition.of_representations if grouping == "representations" else Partition.of_gradients
    return make(model, rows_of(rows), count, seed=config.seed, batch_size=64, progress=False)


def tf_idf(rows: Tensor, vocabulary: int) -> NDArray[np.float32]:
    """Of token ids, [N, V], each row of length 1."""
    counts_NV = torch.nn.functional.one_hot(rows, vocabulary).sum(1).double()
    weighted_NV = counts_NV * torch.log(len(rows) / counts_NV.gt(0).sum(0).clamp(min=1))
    found: NDArray[np.float32] = torch.nn.functional.normalize(weighted_NV).float().numpy()
    return found
