"""Leave blocks of text out of a whole run, one at a time, and see which values foretell what that does.

Ground truth: a small GPT-2 trains on blocks of tokens, each seen once. The run is repeated without the gradient of one
block: the same weights at the start, the same order, and the loss of the block's tokens taken out of its update's sum,
while the number that the sum is divided by stays that of the full batch. So exactly g_i is missing; what the run makes
of the rest, the clipping factor too, it works out again by itself. The true effect of a block on a held-out query is

    change = loss(query) at the end of the run without the block - loss(query) at the end of the full run

in nats, positive where the block helped. Each query is a validation target of its own, so that one run gives values
for all of them, and the question is how well they rank the blocks for a query: Spearman's correlation with the true
change over the blocks, averaged over the queries.

An in-run value knows what a block does at its own update, not how the later updates would have differed without it.
What that costs is measured by the true change right after the block's own update, scored like the values.

Shapes: N blocks trained on, L of them left out, Q queries, T tokens, B rows of a batch, V vocabulary, D width.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_datashapley import ShapleyConfig, ShapleyTrainer
from hf_datashapley.demo.corpus import Document, drop_near_duplicates, read_corpus
from hf_datashapley.demo.harvest import harvest
from hf_datashapley.demo.rows import tokenise, train_tokenizer
from hf_datashapley.evaluation import fidelity


Floats = NDArray[np.float64]
HARVESTED = 1_000_000  # characters
HELD_OUT = 8  # one document of so many
REPEATED = 5  # blocks that are left out twice, to see how much of a change is rounding
SPLITS = 50
BETA1 = 0.9  # AdamW's
ORDERS: dict[str, dict[str, Any]] = {
    "first": {"value_order": "first"},
    "second": {"value_order": "second"},
    "path, 1 node": {"value_order": "path", "path_nodes": 1},
    "path, 3 nodes": {"value_order": "path", "path_nodes": 3},
    "path, 3 nodes, owen": {"value_order": "path", "path_nodes": 3, "path_slope": "owen"},
}
PROXY = "first, as if plain SGD (the paper)"


@dataclass
class LeaveOneOut:
    corpus: str | None = field(
        default=None,
        metadata={
            "help": "Parquet or JSONL file with a document per row: column `text` and, where there are, `domain`. "
            "Default: the text of this Python installation."
        },
    )
    blocks: int = field(default=512, metadata={"help": "Blocks trained on, each once."})
    block_tokens: int = field(default=128, metadata={"help": "Tokens of a block."})
    batch_size: int = field(default=32, metadata={"help": "Blocks of an update."})
    left_out: int = field(default=50, metadata={"help": "Blocks that are left out, one at a time."})
    queries: int = field(default=64, metadata={"help": "Held-out blocks whose loss is explained."})
    vocabulary: int = field(default=2048, metadata={"help": "Of the byte-level BPE."})
    layers: int = field(default=2, metadata={"help": "Of the GPT-2."})
    width: int = field(default=128, metadata={"help": "Of the GPT-2."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of AdamW, at its height."})
    warmup: int = field(default=4, metadata={"help": "Updates until then; after them it falls linearly."})
    seed: int = field(default=0, metadata={"help": "Of the text, its order, the weights and the blocks left out."})
    output_dir: str = field(default="runs/leave_one_out", metadata={"help": "For table.md and picture.png."})

    def __post_init__(self) -> None:
        if not 4 <= self.left_out <= self.blocks:
            raise ValueError(
                f"--left_out {self.left_out}: give at least 4, and no more than the {self.blocks} --blocks"
            )

    @property
    def updates(self) -> int:
        return -(-self.blocks // self.batch_size)

    def update_of(self, block: int) -> int:
        """From 1; the blocks are trained on in the order of their numbers."""
        return block // self.batch_size + 1


# The text and the model


@dataclass(frozen=True)
class Text:
    train_NT: Tensor
    sources_N: list[str]
    queries_QT: Tensor
    query_sources_Q: list[str]


def make_text(config: LeaveOneOut) -> Text:
    """Blocks to train on and to ask about, of different documents, each drawn at random.

    Raises:
        ValueError: there is too little text.
    """
    documents = harvest(HARVESTED, config.seed) if config.corpus is None else read_corpus(config.corpus)
    random.Random(config.seed).shuffle(documents)
    documents = drop_near_duplicates(documents)
    trained_on = [document for i, document in enumerate(documents) if i % HELD_OUT]
    tokenizer = train_tokenizer([document.text for document in trained_on], config.vocabulary, config.block_tokens)

    def draw(documents: list[Document], count: int, option: str) -> tuple[Tensor, list[str]]:
        found = {  # by their tokens, so that each stands once
            tuple(row): tokenised.document.domain
            for tokenised in tokenise(documents, tokenizer, config.block_tokens)
            for row in tokenised.rows
            if len(row) == config.block_tokens
        }
        if len(found) < count:
            raise ValueError(f"--{option} {count}: the text gives only {len(found)}; give fewer, or more text")
        drawn = random.Random(config.seed).sample(list(found), count)
        return torch.tensor(drawn), [found[row] for row in drawn]

    return Text(*draw(trained_on, config.blocks, "blocks"), *draw(documents[::HELD_OUT], config.queries, "queries"))


def make_model(config: LeaveOneOut) -> Any:
    """The same weights each time. Without dropout, as each block is seen once."""
    set_seed(config.seed)
    shape = GPT2Config(
        vocab_size=config.vocabulary,
        n_positions=config.block_tokens,
        n_embd=config.width,
        n_layer=config.layers,
        n_head=max(1, config.width // 64),
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(shape)


# Runs


def arguments(config: LeaveOneOut, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "num_train_epochs": 1,
        "per_device_train_batch_size": config.batch_size,
        "train_sampling_strategy": "sequential",  # the blocks are in random order already
        "optim": "adamw_torch",
        "adam_beta1": BETA1,
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": config.seed,
    }


def rows_of(blocks_NT: Tensor) -> Dataset:
    rows = blocks_NT.tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """[B, T-1]"""
    return F.cross_entropy(logits_BTV[:, :-1].transpose(1, 2), labels_BT[:, 1:], reduction="none")


class SummedLoss:
    """Trainer's loss: the sum over tokens by the number of tokens in the batch. A block that is left out is missing in
    the sum and counted in the number, which Trainer takes from the labels."""

    def __init__(self, left_out_T: Tensor | None):
        self.left_out_T = left_out_T

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int) -> Tensor:
        losses_B = token_losses(outputs["logits"], labels).sum(1)
        if self.left_out_T is not None:
            losses_B = losses_B * (labels != self.left_out_T).any(1)
        return losses_B.sum() / num_items_in_batch


class QueryLosses(TrainerCallback):
    """The mean token loss of each query after some updates, [Q] by update."""

    def __init__(self, queries_QT: Tensor, updates: set[int]):
        self.queries_QT = queries_QT
        self.updates = updates
        self.after: dict[int, Floats] = {}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.updates:
            losses_QT = token_losses(model(input_ids=self.queries_QT).logits, self.queries_QT)
            self.after[state.global_step] = losses_QT.double().mean(1).numpy()


def backwards(rows: list[Any]) -> Any:
    """Collates the rows in the other order, which changes nothing but rounding."""
    return default_data_collator(rows[::-1])


class PlainRun:
    """A full run of `Trainer` with a checkpoint after every update. A run without a block takes up before the block's
    own update: until there the two are the same."""

    def __init__(self, config: LeaveOneOut, text: Text, folder: str, collate: Any = default_data_collator):
        self.config, self.text, self.folder, self.collate = config, text, folder, collate
        self.model, self.losses = self.train(set(range(1, config.updates + 1)), saving=True)

    def train(
        self, updates: set[int], saving: bool = False, start: int = 0, left_out: int | None = None
    ) -> tuple[Any, dict[int, Floats]]:
        """The model, and the query losses after `updates`, of a run that begins after update `start`."""
        query_losses = QueryLosses(self.text.queries_QT, updates)
        trainer = Trainer(
            make_model(self.config),
            TrainingArguments(
                **arguments(self.config, self.folder), save_strategy="steps" if saving else "no", save_steps=1
            ),
            train_dataset=rows_of(self.text.train_NT),
            data_collator=self.collate,
            compute_loss_func=SummedLoss(None if left_out is None else self.text.train_NT[left_out]),
            callbacks=[query_losses],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=f"{self.folder}/checkpoint-{start}" if start else None)
        return trainer.model, query_losses.after

    def changes_without(self, block: int) -> tuple[Floats, Floats]:
        """How much more the queries lose without a block, [Q]: at the end, and after the block's own update."""
        own, last = self.config.update_of(block), self.config.updates
        _, losses = self.train({own, last}, start=own - 1, left_out=block)
        return losses[last] - self.losses[last], losses[own] - self.losses[own]

    def repeated(self) -> Floats:
        """The query losses at the end, [Q], of the full run taken up in its middle."""
        last = self.config.updates
        return self.train({last}, start=last // 2)[1][last]


def in_run_values(config: LeaveOneOut, text: Text, settings: dict[str, Any], folder: str) -> tuple[Floats, Floats]:
    """Values of all blocks for all queries, [N, Q], nats; and the query losses at the end of the run, [Q]."""
    query_losses = QueryLosses(text.queries_QT, {config.updates})
    names = [f"query_{q:04d}" for q in range(config.queries)]
    trainer = ShapleyTrainer(
        make_model(config),
        ShapleyConfig(
            **arguments(config, folder),
            **settings,
            save_strategy="no",
            value_kernel="project",  # so that the run stays bit for bit the plain one
            validation_batch_size=1,
        ),
        train_dataset=rows_of(text.train_NT),
        validation_dataset={name: rows_of(text.queries_QT[q : q + 1]) for q, name in enumerate(names)},
        compute_loss_func=SummedLoss(None),
        callbacks=[query_losses],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    values = trainer.values()
    return np.stack([values[f"value_{name}"] for name in names], axis=1), query_losses.after[config.updates]


def unrolled(immediate_LQ: Floats, update_L: NDArray[np.int64]) -> Floats:
    """`value_momentum="unrolled"` out of "immediate": under Adam they differ by a factor that is the update's own."""
    return immediate_LQ * ((1 - BETA1**update_L) / (1 - BETA1))[:, None]


# What is compared


@dataclass(frozen=True)
class Measured:
    """The blocks left out, what leaving them out really did, and their values; changes and values [L, Q], in nats."""

    blocks: list[int]
    update_L: NDArray[np.int64]
    at_end: Floats
    at_own_update: Floats
    values: dict[str, Floats]  # of "immediate" momentum, but for the proxy, which knows none
    cpu_seconds: dict[str, float]
    model: Any  # at the end of the full run
    losses: tuple[float, float]  # of the queries, after the first update and after the last
    rounding: float  # root mean square
    unlike: float  # the largest difference of a query's loss at the end between runs that should be the same


def measure(config: LeaveOneOut, text: Text) -> Measured:
    blocks = sorted(random.Random(config.seed).sample(range(config.blocks), config.left_out))
    values, cpu_seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        run = PlainRun(config, text, f"{folder}/plain")
        changes = [run.changes_without(block) for block in tqdm(blocks, "runs without a block", unit="run")]
        at_end, at_own_update = (np.stack(found) for found in zip(*changes, strict=True))

        again = PlainRun(config, text, f"{folder}/backwards", backwards)
        apart = max(1, len(blocks) // REPEATED)
        bar = tqdm(blocks[::apart], "the same, to see rounding", unit="run")
        rounding = np.stack([again.changes_without(block)[0] for block in bar]) - at_end[::apart]

        last = run.losses[config.updates]
        unlike = [np.abs(run.repeated() - last).max()]
        settings = {name: {**order, "value_momentum": "immediate"} for name, order in ORDERS.items()}
        settings[PROXY] = {"value_optimizer": "sgd"}
        for number, name in enumerate(tqdm(settings, "runs with values", unit="run")):
            clock = time.process_time()
            of_all, losses = in_run_values(config, text, settings[name], f"{folder}/{number}")
            cpu_seconds[name] = time.process_time() - clock
            values[name] = of_all[blocks]
            unlike.append(np.abs(losses - last).max())
    return Measured(
        blocks=blocks,
        update_L=np.array([config.update_of(block) for block in blocks]),
        at_end=at_end,
        at_own_update=at_own_update,
        values=values,
        cpu_seconds=cpu_seconds,
        model=run.model.eval(),
        losses=(run.losses[1].mean(), last.mean()),
        rounding=math.sqrt(np.square(rounding).mean()),
        unlike=max(unlike),
    )


# What needs no run with values: scores of the blocks for the queries, [L, Q]


def same_source(text: Text, blocks: list[int]) -> Floats:
    return np.array([[float(text.sources_N[block] == source) for source in text.query_sources_Q] for block in blocks])


def bm25(text: Text, blocks: list[int], vocabulary: int) -> Floats:
    """Over tokens, with k1 = 1.5; b has nothing to do, as all blocks are equally long (Robertson, Zaragoza, 2009)."""
    count_NV, count_QV = (
        torch.stack([torch.bincount(row_T, minlength=vocabulary) for row_T in rows]).double()
        for rows in (text.train_NT, text.queries_QT)
    )
    holding_V = (count_NV > 0).sum(0)
    rarity_V = torch.log1p((len(count_NV) - holding_V + 0.5) / (holding_V + 0.5))
    weight_NV = rarity_V * count_NV * 2.5 / (count_NV + 1.5)
    scores: Floats = (weight_NV[blocks] @ count_QV.T).numpy()
    return scores


@torch.no_grad()
def cosine(model: Any, text: Text, blocks: list[int]) -> Floats:
    """Of the means of the last hidden states over a block."""
    mean_LD, mean_QD = (
        F.normalize(model(input_ids=rows, output_hidden_states=True).hidden_states[-1].mean(1))
        for rows in (text.train_NT[blocks], text.queries_QT)
    )
    scores: Floats = (mean_LD @ mean_QD.T).double().numpy()
    return scores


def gradient_dot(model: Any, text: Text, blocks: list[int]) -> Floats:
    """Of the gradients of mean token losses."""

    def gradient(row_T: Tensor) -> Tensor:
        loss = token_losses(model(input_ids=row_T[None]).logits, row_T[None]).mean()
        return torch.cat([found.flatten() for found in torch.autograd.grad(loss, list(model.parameters()))])

    of_blocks, of_queries = (
        torch.stack([gradient(row_T) for row_T in rows]) for rows in (text.train_NT[blocks], text.queries_QT)
    )
    scores: Floats = (of_blocks @ of_queries.T).double().numpy()
    return scores


# The comparison


def spearman(scores_LQ: Floats, change_LQ: Floats) -> tuple[float, float]:
    """The rank correlation over blocks, its mean over the queries that have one and its standard error."""
    of_query = np.array([fidelity(s, c).spearman for s, c in zip(scores_LQ.T, change_LQ.T, strict=True)])
    of_query = of_query[~np.isnan(of_query)]
    if len(of_query) < 2:
        return math.nan, math.nan
    return float(of_query.mean()), float(of_query.std(ddof=1) / math.sqrt(len(of_query)))


def error_over_blocks(scores_LQ: Floats, change_LQ: Floats, seed: int) -> float:
    """Standard error of the mean rank correlation over draws of the blocks, from halves of them: it has a quarter of
    the variance that the difference of two halves has."""
    generator = np.random.default_rng(seed)
    differences = []
    for _ in range(SPLITS):
        order = generator.permutation(len(scores_LQ))
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        one, other = (spearman(scores_LQ[half], change_LQ[half])[0] for half in halves)
        differences.append(one - other)
    return float(np.std(differences)) / 2


@dataclass(frozen=True)
class Score:
    """A way to give a block a number for a query, against the true change.

    `correlations`: (mean, standard error over queries) over all blocks, those of the early updates, those of the late
    ones. `size`: root of the mean square, by the true change's; None if it is no number of nats.
    """

    name: str
    correlations: list[tuple[float, float]]
    error_over_blocks: float
    size: float | None
    cpu_seconds: float | None

    @classmethod
    def of(
        cls,
        name: str,
        scores_LQ: Floats,
        change_LQ: Floats,
        early_L: NDArray[np.bool_],
        nats: bool,
        cpu_seconds: float | None,
    ) -> Score:
        chosen = (np.ones_like(early_L), early_L, ~early_L)
        size = math.sqrt(np.square(scores_LQ).mean() / np.square(change_LQ).mean())
        correlations = [spearman(scores_LQ[some_L], change_LQ[some_L]) for some_L in chosen]
        error = error_over_blocks(scores_LQ, change_LQ, 0)
        return cls(name, correlations, error, size if nats else None, cpu_seconds)

    def row(self) -> list[str]:
        cells = ["-" if math.isnan(mean) else f"{mean:+.3f} ± {error:.3f}" for mean, error in self.correlations]
        size = "" if self.size is None else f"{self.size:.2g}"
        return [self.name, *cells, size, "" if self.cpu_seconds is None else f"{self.cpu_seconds:.0f}"]


def table(scores: list[Score], updates: int) -> str:
    """Markdown."""
    half = updates // 2
    head = [
        "score",
        "Spearman, all blocks",
        f"updates 1-{half}",
        f"updates {half + 1}-{updates}",
        "size",
        "CPU seconds",
    ]
    lines = [head, ["---"] * len(head), *(score.row() for score in scores)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw_picture(scores: list[Score], updates: int, path: Path) -> None:
    """Mean rank correlations with one standard error, a row for each score."""
    half = updates // 2
    styles = [
        ("all blocks", "o", "#1d2127", 6.0),
        (f"of updates 1-{half}", "<", "#c04d0a", 4.0),
        (f"of updates {half + 1}-{updates}", ">", "#0b6aa8", 4.0),
    ]
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 1.2 + 0.27 * len(scores)), dpi=110, layout="constrained")
        axes = figure.subplots()
        rows = np.arange(len(scores))[::-1]
        for which, (label, marker, color, size) in enumerate(styles):
            means, errors = np.array([score.correlations[which] for score in scores]).T
            axes.errorbar(
                means, rows, xerr=errors, fmt=marker, color=color, markersize=size, elinewidth=1, label=label
            )
        axes.axvline(0, color="#626a75", linewidth=0.8)
        axes.set_yticks(rows, [score.name for score in scores])
        axes.set_xlabel("Spearman's correlation with the true change, over blocks; mean over queries")
        axes.grid(axis="x", color="#dfe1e2")
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, 1.1), ncols=3, frameon=False)
        figure.savefig(path)


def compare(config: LeaveOneOut, text: Text, measured: Measured) -> list[Score]:
    early_L = measured.update_L <= config.updates // 2

    def score(name: str, scores_LQ: Floats, nats: bool = True, run: str = "") -> Score:
        return Score.of(name, scores_LQ, measured.at_end, early_L, nats, measured.cpu_seconds.get(run))

    blocks, model, update_L = measured.blocks, measured.model, measured.update_L
    return [
        *(score(f"{name}, unrolled", unrolled(measured.values[name], update_L), run=name) for name in ORDERS),
        *(score(f"{name}, immediate", measured.values[name], run=name) for name in ORDERS),
        score(PROXY, measured.values[PROXY], run=PROXY),
        score("(true change at its own update), unrolled", unrolled(measured.at_own_update, update_L)),
        score("(true change at its own update)", measured.at_own_update),
        score("same source", same_source(text, blocks), nats=False),
        score("BM25", bm25(text, blocks, config.vocabulary), nats=False),
        score("cosine of hidden states, at the end", cosine(model, text, blocks), nats=False),
        score("gradient dot product, at the end", gradient_dot(model, text, blocks), nats=False),
    ]


def remarks(config: LeaveOneOut, measured: Measured, scores: list[Score]) -> list[str]:
    """What stands below the table, a line each."""
    first, last = measured.losses
    errors = [score.error_over_blocks for score in scores if not math.isnan(score.error_over_blocks)]
    at_own_update = [
        f"{name} {spearman(values_LQ, measured.at_own_update)[0]:+.3f}" for name, values_LQ in measured.values.items()
    ]
    return [
        f"{len(measured.blocks)} blocks left out, {config.queries} queries, whose mean loss is {first:.2f} after the "
        f"first update and {last:.2f} after the last.",
        f"± is over queries; over other draws of as many blocks the standard error is {min(errors):.2f} to "
        f"{max(errors):.2f} (all blocks).",
        f"Immediate values against the true changes at the blocks' own updates: {'; '.join(at_own_update)}.",
        f"True changes: root mean square {math.sqrt(np.square(measured.at_end).mean()):.1e} nats, "
        f"{(measured.at_end > 0).mean():.0%} positive.",
        f"Rounding: with the rows of every batch in the other order, changes differ by {measured.rounding:.1e} nats "
        "(root mean square).",
        "The full run repeated from its middle, and every run with values: query losses at the end differ by "
        f"{measured.unlike:.1e} nats at most.",
        f"{os.cpu_count()} CPU cores, torch {torch.__version__}, transformers {transformers.__version__}, seed "
        f"{config.seed}.",
    ]


def main() -> None:
    (config,) = HfArgumentParser(LeaveOneOut).parse_args_into_dataclasses()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    text = make_text(config)
    measured = measure(config, text)
    scores = compare(config, text, measured)
    took = f"{(time.perf_counter() - started) / 60:.0f} minutes, {time.process_time() / 60:.0f} of CPU time."
    written = "\n".join([table(scores, config.updates), "", *remarks(config, measured, scores), took])
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(written + "\n", encoding="utf-8")
    draw_picture(scores, config.updates, output / "picture.png")
    print(f"\n{written}\n\nWritten: {output / 'table.md'}, {output / 'picture.png'}")


if __name__ == "__main__":
    main()
