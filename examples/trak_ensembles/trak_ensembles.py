"""Are dropout masks and LoRA adapters as good as models, in TRAK's ensembles, and what do they save?

TRAK averages over models that were trained independently, which is dear. "Efficient Ensembles Improve Training Data
Attribution" (Deng, Li, Zhang, Ma, arXiv 2405.17293) puts dropout masks or LoRA adapters in their place and claims up
to 80 % less training time, 60 % less serving time and 80 % less space at similar efficacy. This script measures the
same on a small GPT-2: the linear datamodeling score (LDS) of every ensemble, against a bank of retrainings on halves
of the text, and its three costs.

Units are rows: consecutive pieces of documents. One piece of each document is not trained on but asked about. The
queries of one half of the documents are what the table scores; on those of the other half damping is chosen, kind by
kind, and no table scores them.

All that takes time is kept in `output_dir`, and taken from there when the script runs again: the bank, the models and
adapters, every ensemble's scores with their costs.

Shapes: U units, S subsets, R retrainings of each, Q queries.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import transformers
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray
from peft import LoraConfig
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_datashapley import CheckpointEnsemble, DropoutEnsemble, GradCos, GradDot, Influence, LoraEnsemble, TracIn, Trak
from hf_datashapley.attribution.ensembles import Ensemble, as_ensemble
from hf_datashapley.demo.corpus import drop_near_duplicates, read_corpus
from hf_datashapley.demo.harvest import harvest
from hf_datashapley.demo.rows import tokenise, train_tokenizer
from hf_datashapley.evaluation import (
    LanguageModelRetraining,
    LinearDatamodelingScore,
    RetrainingBank,
    bm25,
    cosine,
    lds,
    mean_hidden_states,
    own_loss,
    query_losses,
    random_masks,
    same_source,
)
from hf_datashapley.evaluation.kept import check_begun, kept_arrays
from hf_datashapley.evaluation.markdown import markdown
from hf_datashapley.whole_files import write_whole


Floats = NDArray[np.float64]
HARVESTED = 2_000_000  # characters
FRACTION = 0.5
DROPOUT = 0.1
FIRST_SEED = 100  # of the models that attributions are of: none of the bank's seeds
BATCH = 32  # rows of a pass of attribution
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
CONFIDENCE = 0.95
CLAIMED = {"training": 0.8, "serving": 0.6, "space": 0.8}  # savings, by the paper
KINDS = {
    "models": "independent models",
    "dropout": "dropout masks",
    "forward": "masks in Q only",
    "lora": "LoRA",
    "again": "1 model, more projections",
}


@dataclass
class TrakEnsembles:
    corpus: str | None = field(
        default=None,
        metadata={
            "help": "Parquet or JSONL file with a document per row: column `text` and, where there are, `domain`. "
            "Default: the text of this Python installation."
        },
    )
    documents: int = field(default=80, metadata={"help": "Half of them are asked about, on the others is chosen."})
    pieces: int = field(default=6, metadata={"help": "Rows of each document trained on; one more is asked about."})
    row_tokens: int = field(default=64, metadata={"help": "Tokens of a row."})
    vocabulary: int = field(default=512, metadata={"help": "Of the byte-level BPE."})
    layers: int = field(default=2, metadata={"help": "Of the GPT-2."})
    width: int = field(default=96, metadata={"help": "Of the GPT-2."})
    epochs: float = field(default=8, metadata={"help": "Of every training."})
    batch_size: int = field(default=4, metadata={"help": "Rows of an update."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of AdamW, at its height."})
    subsets: int = field(default=80, metadata={"help": "Halves of the rows that models are retrained on."})
    retrainings: int = field(default=2, metadata={"help": "Of each half, with different seeds; at least 2."})
    workers: int = field(default=2, metadata={"help": "Processes that retrain, of one thread each."})
    models: int = field(default=5, metadata={"help": "Independent models."})
    bases: list[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": "Of how many models masks and adapters are, in turn."}
    )
    passes: list[int] = field(default_factory=lambda: [2, 5, 10], metadata={"help": "Masks of each model."})
    adapters: list[int] = field(default_factory=lambda: [1, 2, 5, 10], metadata={"help": "Of each model."})
    adapter_rank: int = field(default=8, metadata={"help": "Of LoRA; alpha is twice as much."})
    adapter_epochs: float = field(default=2, metadata={"help": "Of an adapter's training."})
    adapter_learning_rate: float = field(default=1e-2, metadata={"help": "Of an adapter's training, at its height."})
    projection_dims: list[int] = field(
        default_factory=lambda: [2048, 16384], metadata={"help": "Features; a table for each number."}
    )
    other_dims: list[int] = field(
        default_factory=lambda: [512, 8192, 32768], metadata={"help": "Others, for 1 model and for all models."}
    )
    dampings: list[float] = field(default_factory=lambda: list(DAMPINGS), metadata={"help": "To choose from."})
    seed: int = field(default=0, metadata={"help": "Of the text, the halves and the ensembles."})
    output_dir: str = field(
        default="runs/trak_ensembles", metadata={"help": "For everything; a run that was stopped goes on from there."}
    )

    def __post_init__(self) -> None:
        if self.retrainings < 2:
            raise ValueError(f"--retrainings {self.retrainings}: give at least 2, or the noise is not known")
        if max(self.bases) > self.models:
            raise ValueError(f"--bases {max(self.bases)}: there are only {self.models} --models")
        if self.documents < 4:
            raise ValueError(f"--documents {self.documents}: give at least 4, half of which are asked about")


# The text


@dataclass(frozen=True)
class Text:
    """Rows of token ids, and for each the number of its document; of every document one query and its domain."""

    train: list[list[int]]
    documents_U: list[int]
    queries: list[list[int]]
    domains: list[str]

    @property
    def tabled(self) -> slice:
        """The queries that the table scores."""
        return slice(0, len(self.queries) // 2)

    @property
    def chosen_on(self) -> slice:
        return slice(len(self.queries) // 2, len(self.queries))


def make_text(config: TrakEnsembles) -> Text:
    """
    Raises:
        ValueError: too few documents are long enough.
    """
    documents = harvest(HARVESTED, config.seed) if config.corpus is None else read_corpus(config.corpus)
    generator = random.Random(config.seed)
    generator.shuffle(documents)
    documents = drop_near_duplicates(documents)
    tokenizer = train_tokenizer([document.text for document in documents], config.vocabulary, config.row_tokens)
    text = Text([], [], [], [])
    for tokenised in tokenise(documents, tokenizer, config.row_tokens):
        rows = [row for row in tokenised.rows if len(row) == config.row_tokens][: config.pieces + 1]
        if len(rows) <= config.pieces:
            continue
        text.queries.append(rows.pop(generator.randrange(len(rows))))
        text.train.extend(rows)
        text.documents_U.extend([len(text.domains)] * len(rows))
        text.domains.append(tokenised.document.domain)
        if len(text.domains) == config.documents:
            return text
    raise ValueError(
        f"--documents {config.documents}: only {len(text.domains)} have {config.pieces + 1} rows of "
        f"{config.row_tokens} tokens; give fewer, or more text"
    )


def rows_of(rows: list[list[int]]) -> Dataset:
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


# Models, and the bank of retrainings


def make_retraining(config: TrakEnsembles, text: Text) -> LanguageModelRetraining:
    shape = GPT2Config(
        vocab_size=config.vocabulary,
        n_positions=config.row_tokens,
        n_embd=config.width,
        n_layer=config.layers,
        n_head=max(1, config.width // 32),
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=DROPOUT,
        embd_pdrop=DROPOUT,
        attn_pdrop=0.0,  # it has no channels to mask, and slows attention down
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return LanguageModelRetraining(shape, rows_of(text.train), rows_of(text.queries), arguments(config))


def arguments(config: TrakEnsembles, **changed: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(Path(config.output_dir) / "trainer"),
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": 32,
        "learning_rate": config.learning_rate,
        "warmup_steps": 10,
        "weight_decay": 0.01,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**settings | changed)


def make_bank(config: TrakEnsembles, text: Text, retraining: LanguageModelRetraining) -> RetrainingBank:
    masks_SU = random_masks(len(text.train), config.subsets, FRACTION, config.seed)
    bank = retraining.bank(Path(config.output_dir) / "bank", masks_SU, seeds=config.retrainings)
    return bank.run(retraining, config.workers)


def spread(outputs_SRQ: Floats) -> tuple[float, float]:
    """Of a query's loss, in nats: over seeds for the same subset, and over subsets for the mean of the seeds."""
    over_seeds = math.sqrt(outputs_SRQ.var(1, ddof=1).mean())
    return over_seeds, math.sqrt(outputs_SRQ.mean(1).var(0, ddof=1).mean())


# What is kept


def check_kept(config: TrakEnsembles) -> None:
    """
    Raises:
        ValueError: what lies in `output_dir` was made with other settings, of those that scores depend on.
    """
    free = {"subsets", "retrainings", "workers", "models", "bases", "passes", "adapters", "dampings", "output_dir"}
    free |= {"projection_dims", "other_dims"}
    check_begun(config.output_dir, {name: value for name, value in asdict(config).items() if name not in free})


@dataclass(frozen=True)
class Trained:
    """Models, and adapters of the first of them; with the CPU seconds that training each of them took."""

    models: list[nn.Module]
    model_seconds: list[float]
    adapters: list[list[Path]]
    adapter_seconds: list[list[float]]


def train_all(config: TrakEnsembles, retraining: LanguageModelRetraining, text: Text) -> Trained:
    folder = Path(config.output_dir) / "members"
    trained = Trained([], [], [], [])
    everything_U = np.arange(len(text.train))
    for number in tqdm(range(config.models), "models", unit="model"):
        path = folder / f"model-{number}"

        def train(path: Path = path, number: int = number) -> None:
            retraining.model(everything_U, FIRST_SEED + number).save_pretrained(path)  # type: ignore[operator]

        trained.model_seconds.append(seconds_of(path, train))
        trained.models.append(GPT2LMHeadModel.from_pretrained(path).eval())
    for base in tqdm(range(max(config.bases)), "adapters", unit="base"):
        paths = [folder / f"adapters-{base}-{number}" for number in range(max(config.adapters))]
        seconds = []
        for number, path in enumerate(paths):

            def adapt(path: Path = path, number: int = number, base: int = base) -> None:
                lora = LoraConfig(
                    r=config.adapter_rank,
                    lora_alpha=2 * config.adapter_rank,
                    target_modules="all-linear",
                    task_type="CAUSAL_LM",
                )
                args = arguments(
                    config,
                    num_train_epochs=config.adapter_epochs,
                    learning_rate=config.adapter_learning_rate,
                    disable_tqdm=True,
                )
                seed = 1000 * (base + 1) + number
                rows = rows_of(text.train)
                with redirect_stdout(io.StringIO()):  # where Trainer sums up every run
                    made = LoraEnsemble.train(trained.models[base], rows, 1, lora_config=lora, args=args, seed=seed)
                made.save(path)

            seconds.append(seconds_of(path, adapt))
        trained.adapters.append([path / "member-0" for path in paths])
        trained.adapter_seconds.append(seconds)
    return trained


def seconds_of(path: Path, make: Callable[[], None]) -> float:
    """The CPU seconds of what makes a folder, now or when it was made."""
    note = path.with_name(f"{path.name}.json")
    if not note.is_file():
        if path.is_dir():  # a training that did not end
            for file in sorted(path.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            path.rmdir()
        clock = time.process_time()
        make()
        write_whole(note, json.dumps({"cpu_seconds": time.process_time() - clock}).encode())
    return float(json.loads(note.read_text(encoding="utf-8"))["cpu_seconds"])


# Ensembles and their scores


@dataclass(frozen=True)
class Members:
    """`each`: masks or adapters of each of `models` models; 0 where there are none."""

    kind: str
    models: int
    each: int = 0

    @property
    def name(self) -> str:
        if self.kind == "models":
            return f"{self.models} independent" if self.models > 1 else "1 model"
        unit = {"lora": "adapter", "again": "projection"}.get(self.kind, "mask")
        each = f"{self.each} {unit}{'s' if self.each > 1 else ''}"
        models = f"{self.models} model{'s' if self.models > 1 else ''}"
        return f"{models} x {each}{' in Q only' if self.kind == 'forward' else ''}"

    def ensemble(self, trained: Trained, seed: int) -> Ensemble:
        models = trained.models[: self.models]
        if self.kind == "models":
            return as_ensemble(models)
        if self.kind == "again":
            return as_ensemble([model for model in models for _ in range(self.each)])
        if self.kind == "lora":
            paths = [path for own in trained.adapters[: self.models] for path in own[: self.each]]
            return LoraEnsemble.load(paths, models)
        return DropoutEnsemble(models, passes=self.each, seed=seed, forward_only=self.kind == "forward")

    def bytes(self, trained: Trained) -> int:
        """Of models and adapters."""
        kept = Members("models", self.models) if self.kind == "again" else self
        return kept.ensemble(trained, 0).cost.total_bytes

    def training_seconds(self, trained: Trained) -> float:
        seconds = sum(trained.model_seconds[: self.models])
        if self.kind == "lora":
            seconds += sum(sum(own[: self.each]) for own in trained.adapter_seconds[: self.models])
        return seconds


def all_members(config: TrakEnsembles) -> list[Members]:
    def of(kind: str, sizes: list[int]) -> list[Members]:
        return [Members(kind, models, each) for models, each in itertools.product(config.bases, sizes)]

    alone = [Members("models", count) for count in range(1, config.models + 1)]
    again = [Members("again", 1, each) for each in config.passes]
    masked = [*of("dropout", config.passes), *of("forward", config.passes)]
    return [*alone, *again, *masked, *of("lora", config.adapters)]


@dataclass(frozen=True)
class Scored:
    """Scores of all queries, and what they cost: CPU seconds of training members and of `fit` and `score`, bytes of
    the members and of the features that are stored."""

    scores_UQ: NDArray[np.float32]
    training: float
    serving: float
    members_bytes: float
    features_bytes: float


def score(path: Path, make: Callable[[str], Any], text: Text, training: float, members_bytes: int) -> Scored:
    """`make`: the estimator, for a folder of its features."""

    def measure() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            train, queries = rows_of(text.train), rows_of(text.queries)
            clock = time.process_time()
            scores_UQ = make(folder).fit(train).score(queries)
            serving = time.process_time() - clock
            stored = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
        return {"scores": scores_UQ, "serving": serving, "stored": stored}

    found = kept_arrays(path, measure)
    return Scored(found["scores"], training, float(found["serving"]), members_bytes, float(found["stored"]))


class Scorer:
    """Scores of all that the tables have, each made once."""

    def __init__(self, config: TrakEnsembles, text: Text, trained: Trained):
        self.config, self.text, self.trained = config, text, trained
        self.folder = Path(config.output_dir) / "scores"
        self.settings: dict[str, Any] = {"batch_size": BATCH, "seed": config.seed, "progress": False}

    def trak(self, members: Members, dim: int, damping: float) -> Scored:
        ensemble = members.ensemble(self.trained, self.config.seed)

        def make(folder: str) -> Any:
            return Trak(ensemble, projection_dim=dim, damping=damping, store_dir=folder, **self.settings)

        training = members.training_seconds(self.trained)
        path = self.folder / f"trak-{members.kind}-{members.models}-{members.each}-{dim}-damping-{damping:g}.npz"
        return score(path, make, self.text, training, members.bytes(self.trained))

    def others(self, dim: int, damping: float) -> dict[str, Scored]:
        """What is not TRAK, of the first model or of an ensemble; and TracIn, of a run like the first model's."""
        one, each = Members("models", 1), sorted(self.config.passes)[len(self.config.passes) // 2]
        made: dict[str, tuple[Members, Callable[[Ensemble, str], Any]]] = {
            "GradDot": (one, lambda members, folder: GradDot(members, **self.settings)),
            "GradCos": (one, lambda members, folder: GradCos(members, **self.settings)),
            f"Influence, fisher, {dim} features": (
                one,
                lambda members, folder: Influence(
                    members, projection_dim=dim, damping=damping, store_dir=folder, **self.settings
                ),
            ),
            "Influence, kfac": (one, lambda members, folder: Influence(members, curvature="kfac", **self.settings)),
        }
        several = (one, Members("models", self.config.models), Members("dropout", 1, each))
        for members in several:
            made[f"Influence, ekfac, {members.name}" if members != one else "Influence, ekfac"] = (
                members,
                lambda members, folder: Influence(members, curvature="ekfac", **self.settings),
            )
        found = {}
        for name, (members, make) in made.items():
            ensemble = members.ensemble(self.trained, self.config.seed)
            found[name if members != one else f"{name}, 1 model"] = score(
                self.folder / f"{name}-{damping:g}.npz",
                lambda folder, ensemble=ensemble, make=make: make(ensemble, folder),  # type: ignore[misc]
                self.text,
                members.training_seconds(self.trained),
                members.bytes(self.trained),
            )
        run, run_seconds = self.checkpoints()
        for name, factor in (("TracIn", None), ("TracIn, Adam's factor", "adam")):
            found[f"{name}, {len(run)} checkpoints"] = score(
                self.folder / f"{name}.npz",
                lambda folder, factor=factor: TracIn(run, preconditioner=factor, **self.settings),  # type: ignore[misc]
                self.text,
                run_seconds,
                run.cost.total_bytes,
            )
        return found

    def checkpoints(self) -> tuple[CheckpointEnsemble, float]:
        """One for each epoch of a run, and the CPU seconds that it took."""
        path = Path(self.config.output_dir) / "members" / "run"
        retraining = make_retraining(self.config, self.text)

        def train() -> None:
            set_seed(FIRST_SEED)
            args = arguments(
                self.config,
                output_dir=str(path),
                save_strategy="epoch",
                logging_strategy="steps",  # of which TracIn takes the learning rates
                logging_steps=1,
                disable_tqdm=True,
            )
            trainer = Trainer(
                AutoModelForCausalLM.from_config(retraining.config), args, train_dataset=retraining.train_dataset
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()

        seconds = seconds_of(path, train)
        folders = sorted(path.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
        return CheckpointEnsemble(folders, device="cpu"), seconds

    def over_dampings(self, kind: type[Trak] | type[Influence], members: Members, dim: int) -> NDArray[np.float32]:
        """Scores for the queries that settings are chosen on, [dampings, U, Q]: features are made once."""
        ensemble = members.ensemble(self.trained, self.config.seed)
        train, queries = rows_of(self.text.train), rows_of(self.text.queries[self.text.chosen_on])

        def measure() -> dict[str, Any]:
            found = []
            with tempfile.TemporaryDirectory() as folder:
                for damping in self.config.dampings:
                    estimator = kind(ensemble, projection_dim=dim, damping=damping, store_dir=folder, **self.settings)
                    found.append(estimator.fit(train).score(queries))
            return {"scores": np.stack(found)}

        grid = "-".join(f"{damping:g}" for damping in self.config.dampings)
        name = f"{kind.__name__}-{members.kind}-{members.models}-{members.each}-{dim}-{grid}.npz"
        return kept_arrays(self.folder / "dampings" / name, measure)["scores"]


def baselines(text: Text, model: nn.Module) -> dict[str, NDArray[np.float32]]:
    train, queries = rows_of(text.train), rows_of(text.queries)
    domains_U = [text.domains[document] for document in text.documents_U]
    return {
        "same document": same_source(text.documents_U, range(len(text.domains))),
        "same domain": same_source(domains_U, text.domains),
        "BM25": bm25(text.train, text.queries),
        "cosine of hidden states": cosine(mean_hidden_states(model, train), mean_hidden_states(model, queries)),
        "own loss": own_loss(model, train, len(text.queries)),
    }


# Damping


@dataclass(frozen=True)
class Damped:
    """LDS over the queries that settings are chosen on, a number for each damping."""

    estimator: type[Trak] | type[Influence]
    members: Members
    dim: int
    lds: list[float]


def try_dampings(config: TrakEnsembles, scorer: Scorer, bank: RetrainingBank) -> list[Damped]:
    """What is tried: 1 model and all of them, with every number of features; the middle of masks and of adapters of
    1 model, and the Fisher matrix, with the numbers that tables are made for."""
    one, every = Members("models", 1), Members("models", config.models)
    masked, adapted = (
        Members(kind, 1, sorted(sizes)[len(sizes) // 2])
        for kind, sizes in (("dropout", config.passes), ("lora", config.adapters))
    )
    tried: list[tuple[type[Trak] | type[Influence], Members, int]] = []
    for dim in sorted({*config.projection_dims, *config.other_dims}):
        tried += [(Trak, one, dim), (Trak, every, dim)]
        if dim in config.projection_dims:
            tried += [(Trak, masked, dim), (Trak, adapted, dim), (Influence, one, dim), (Influence, every, dim)]
    found = []
    outputs_SRQ = bank.outputs[:, :, scorer.text.chosen_on]
    for estimator, members, dim in tqdm(tried, "dampings", unit="ensemble"):
        scores = scorer.over_dampings(estimator, members, dim)
        means = [lds(own_UQ, bank.masks, outputs_SRQ, resamples=1).mean for own_UQ in scores]
        found.append(Damped(estimator, members, dim, means))
    return found


class Dampings:
    """The damping of each kind of members with each number of features: the best on the mean of what was tried of it.
    Masks in Q only, and projections, have that of models."""

    def __init__(self, config: TrakEnsembles, tried: list[Damped]):
        self.config, self.tried = config, tried

    def of(self, estimator: type[Trak] | type[Influence], kind: str, dim: int) -> float:
        kind = "models" if kind in ("forward", "again") else kind
        own = [
            damped.lds
            for damped in self.tried
            if (damped.estimator, damped.members.kind, damped.dim) == (estimator, kind, dim)
        ]
        return self.config.dampings[int(np.mean(own, axis=0).argmax())]


def damping_table(config: TrakEnsembles, tried: list[Damped]) -> str:
    rows = []
    for damped in tried:
        best = max(damped.lds)
        name = f"{damped.estimator.__name__}, {damped.members.name}, {damped.dim}"
        rows.append([name, *(f"**{found:.3f}**" if found == best else f"{found:.3f}" for found in damped.lds)])
    return markdown(["LDS by damping", *(f"{damping:g}" for damping in config.dampings)], rows)


# The tables


@dataclass(frozen=True)
class Row:
    name: str
    found: LinearDatamodelingScore
    members: Members | None = None
    damping: float | None = None
    scored: Scored | None = None

    def cells(self) -> list[str]:
        own = [f"{self.found.mean:.3f}", f"{self.found.low:.3f} to {self.found.high:.3f}"]
        if self.scored is None:
            return [self.name, *own, *[""] * 5]
        costs = [f"{self.scored.training:.1f}", f"{self.scored.serving:.1f}"]
        sizes = [f"{size / 2**20:.2f}" for size in (self.scored.members_bytes, self.scored.features_bytes)]
        return [self.name, *own, "" if self.damping is None else f"{self.damping:g}", *costs, *sizes]


class Tables:
    """Everything scored on the queries that tables are of."""

    def __init__(self, scorer: Scorer, bank: RetrainingBank, dampings: Dampings):
        self.scorer, self.bank, self.dampings = scorer, bank, dampings
        self.config, self.tabled = scorer.config, scorer.text.tabled
        self.outputs_SRQ = bank.outputs[:, :, self.tabled]

    def lds(self, scores_UQ: NDArray[np.float32]) -> LinearDatamodelingScore:
        return lds(
            scores_UQ[:, self.tabled], self.bank.masks, self.outputs_SRQ, confidence=CONFIDENCE, seed=self.config.seed
        )

    def trak(self, members: Members, dim: int) -> Row:
        damping = self.dampings.of(Trak, members.kind, dim)
        scored = self.scorer.trak(members, dim, damping)
        return Row(f"TRAK, {members.name}", self.lds(scored.scores_UQ), members, damping, scored)

    def ensembles(self, dim: int) -> list[Row]:
        label = f"ensembles, {dim} features"
        return [self.trak(members, dim) for members in tqdm(all_members(self.config), label, unit="ensemble")]

    def by_dim(self) -> dict[int, tuple[Row, Row]]:
        """1 model and all of them, with every number of features."""
        one, every = Members("models", 1), Members("models", self.config.models)
        dims = sorted({*self.config.projection_dims, *self.config.other_dims})
        return {dim: (self.trak(one, dim), self.trak(every, dim)) for dim in tqdm(dims, "features", unit="number")}

    def others(self) -> list[Row]:
        dim = max(self.config.projection_dims)
        damping = self.dampings.of(Influence, "models", dim)
        return [
            Row(name, self.lds(scored.scores_UQ), None, damping if "fisher" in name else None, scored)
            for name, scored in self.scorer.others(dim, damping).items()
        ]

    def baselines(self) -> list[Row]:
        found = baselines(self.scorer.text, self.scorer.trained.models[0])
        return [Row(f"{name} (baseline)", self.lds(scores_UQ)) for name, scores_UQ in found.items()]


def table(rows: Sequence[Row], ceiling: float | None = None) -> str:
    interval = f"{CONFIDENCE:.0%} interval"
    head = ["scores", "LDS", interval, "damping", "training, s", "serving, s", "members, MiB", "features, MiB"]
    cells = [row.cells() for row in rows]
    if ceiling is not None:
        cells.append(["noise ceiling", f"{ceiling:.3f}", *[""] * 6])
    return markdown(head, cells)


# The verdict


def cost_of(row: Row, cost: str) -> float:
    assert row.scored is not None
    return {"training": row.scored.training, "serving": row.scored.serving, "space": row.scored.members_bytes}[cost]


def reaches(row: Row, reference: Row) -> bool:
    """Whether it is not shown to be worse: the interval of the difference, over the same resamples, reaches 0."""
    difference = row.found.resampled - reference.found.resampled
    return bool(np.quantile(difference, (1 + CONFIDENCE) / 2) >= 0)


def verdict(kinds: dict[str, list[Row]], reference: Row) -> str:
    """For each kind and each cost, the cheapest ensemble that reaches the reference, and what it saves."""
    lines = []
    for name, rows in kinds.items():
        best = max(rows, key=lambda row: row.found.mean)
        cells = [name, f"{best.found.mean:.3f} ({short(best)})"]
        enough = [row for row in rows if reaches(row, reference)]
        for cost in CLAIMED:
            if enough:
                cheapest = min(enough, key=lambda row: (cost_of(row, cost), -row.found.mean))
                saved = 1 - cost_of(cheapest, cost) / cost_of(reference, cost)
                cells.append(f"{saved:+.0%} ({short(cheapest)}: {cheapest.found.mean:.3f})")
            else:
                cells.append("none is as good")
        lines.append(cells)
    lines.append(["the paper, up to", "", *(f"{claimed:+.0%}" for claimed in CLAIMED.values())])
    head = [f"as good as {short(reference)} ({reference.found.mean:.3f})", "best LDS"]
    return markdown([*head, *(f"{cost} saved" for cost in CLAIMED)], lines)


def short(row: Row) -> str:
    return row.name.removeprefix("TRAK, ")


def kinds_of(rows: list[Row], wider: list[Row]) -> dict[str, list[Row]]:
    """Ensembles by kind, and one model with more features."""
    found = {name: [row for row in rows if row.members and row.members.kind == kind] for kind, name in KINDS.items()}
    return {**found, "1 model, more features": wider} if wider else found


# The picture


STYLES = {
    "models": ("#1d2127", "o"),
    "dropout": ("#0b6aa8", "s"),
    "forward": ("#8a6bb8", "^"),
    "again": ("#7a8491", "v"),
    "lora": ("#c04d0a", "D"),
}
AXES = {
    "training": (1.0, "training, CPU seconds"),
    "serving": (1.0, "serving, CPU seconds"),
    "space": (2.0**20, "models and adapters, MiB"),
}


def draw_picture(rows_of_dim: dict[int, list[Row]], best_baseline: Row, path: Path) -> None:
    """LDS against each cost, panels for each number of features; a line for each kind and number of models."""
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 0.8 + 3.4 * len(rows_of_dim)), dpi=110, layout="constrained")
        panels = figure.subplots(len(rows_of_dim), len(AXES), sharex="col", sharey=True, squeeze=False)
        for (dim, rows), line in zip(rows_of_dim.items(), panels, strict=True):
            for cost, axes in zip(AXES, line, strict=True):
                draw_panel(axes, rows, cost)
                axes.axhline(best_baseline.found.mean, color="#626a75", linewidth=0.8, linestyle=":")
            line[0].set_ylabel(f"LDS, {dim:,} features")
        for cost, axes in zip(AXES, panels[-1], strict=True):
            axes.set_xlabel(AXES[cost][1])
        panels[0][0].annotate(
            f"{best_baseline.name.removesuffix(' (baseline)')}, the best baseline",
            (0.98, best_baseline.found.mean),
            xycoords=("axes fraction", "data"),
            ha="right",
            xytext=(0, 3),
            textcoords="offset points",
            color="#626a75",
        )
        handles, names = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=4, frameon=False)
        figure.savefig(path)


def draw_panel(axes: Axes, rows: list[Row], cost: str) -> None:
    lines: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        assert row.members is not None
        models = 0 if row.members.kind in ("models", "again") else row.members.models
        lines.setdefault((row.members.kind, models), []).append(row)
    for (kind, models), own in lines.items():
        color, marker = STYLES[kind]
        axes.plot(
            [cost_of(row, cost) / AXES[cost][0] for row in own],
            [row.found.mean for row in own],
            color=color,
            marker=marker,
            markerfacecolor=color if models < 2 else "white",
            markersize=4.5,
            linewidth=1.3,
            linestyle="-" if models < 2 else "--",
            label=f"{KINDS[kind]}, of {models} model{'s' if models > 1 else ''}" if models else KINDS[kind],
        )
    reference = lines["models", 0][-1].found
    axes.axhspan(reference.low, reference.high, color="#1d2127", alpha=0.06, linewidth=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#dfe1e2", linewidth=0.6)
    axes.set_axisbelow(True)


def remarks(scorer: Scorer, bank: RetrainingBank) -> list[str]:
    """What stands below the tables, a line each."""
    config, text, model = scorer.config, scorer.text, scorer.trained.models[0]
    over_seeds, over_subsets = spread(bank.outputs[:, :, text.tabled])
    losses = []
    for rows in (text.train, text.queries[text.tabled]):
        ids = torch.tensor(rows)
        losses.append(float(query_losses(model, [{"input_ids": ids, "labels": ids}]).mean()))
    return [
        f"{len(text.train)} rows of {config.row_tokens} tokens, {config.pieces} of each of {config.documents} "
        f"documents; {len(text.queries[text.tabled])} queries; {config.subsets} halves of the rows, "
        f"{config.retrainings} retrainings of each.",
        f"Noise: a query's loss has a standard deviation of {over_seeds:.3f} nats over seeds for the same half, of "
        f"{over_subsets:.3f} over halves (means of {config.retrainings} seeds).",
        f"The first model ({sum(parameter.numel() for parameter in model.parameters()):,} parameters): mean loss of "
        f"the rows {losses[0]:.2f}, of the queries {losses[1]:.2f} nats.",
        f"Seconds are of one CPU thread; {os.cpu_count()} CPU cores, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, seed {config.seed}.",
    ]


def report(scorer: Scorer, bank: RetrainingBank) -> str:
    """The tables, and `picture.png`."""
    config = scorer.config
    tried = try_dampings(config, scorer, bank)
    tables = Tables(scorer, bank, Dampings(config, tried))
    by_dim, trivial = tables.by_dim(), tables.baselines()
    others = table([*tables.others(), *trivial], trivial[0].found.ceiling)
    parts, rows_of_dim = [], {}
    for dim in config.projection_dims:
        rows = rows_of_dim[dim] = tables.ensembles(dim)
        wider = [replace(one, name=f"1 model, {more}") for more, (one, _) in by_dim.items() if more > dim]
        reference = next(row for row in rows if row.members == Members("models", config.models))
        parts += [f"### {dim:,} features", table(rows), verdict(kinds_of(rows, wider), reference)]
    pairs = [replace(row, name=f"{row.name}, {dim} features") for dim, pair in by_dim.items() for row in pair]
    parts += ["### Number of features", table(pairs), "### Others", others]
    parts += ["### Damping", damping_table(config, tried), "\n".join(remarks(scorer, bank))]
    best_baseline = max(trivial, key=lambda row: row.found.mean)
    draw_picture(rows_of_dim, best_baseline, Path(config.output_dir) / "picture.png")
    return "\n\n".join(parts)


def main() -> None:
    (config,) = HfArgumentParser(TrakEnsembles).parse_args_into_dataclasses()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # so that seconds compare
    check_kept(config)
    text = make_text(config)
    retraining = make_retraining(config, text)
    bank = make_bank(config, text, retraining)
    trained = train_all(config, retraining, text)
    written = report(Scorer(config, text, trained), bank)
    path = Path(config.output_dir) / "table.md"
    path.write_text(written + "\n", encoding="utf-8")
    print(f"\n{written}\n\nWritten: {path}, {path.with_name('picture.png')}")


if __name__ == "__main__":
    main()
