"""How true are values? Those of `ShapleyTrainer` against exact Shapley values of the same update.

1. A small GPT-2 and a small Pythia are trained to the middle of a run. From there one update of N samples is made with
   SGD and with AdamW, at learning rates up to far beyond sensible ones, once for each order of value; the truth is
   every one of the 2^N coalitions, each with a real step of the optimizer from the same state, in float64.
2. The same for the first updates from random initialisation, without warm-up, while Adam's second moments are young;
   and how much those updates weigh in the values of a whole run, without and with warm-up.
3. How alike the values of whole runs are: over training seeds, and over draws of validation rows.

    python examples/fidelity/fidelity.py
    python examples/fidelity/fidelity.py --corpus corpus.parquet --samples 10

The text is that of the Python installation, or a file's with a column `text`. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import itertools
import os
import platform
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import transformers
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from tqdm.auto import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)

import hf_datashapley
from hf_datashapley import ShapleyConfig, ShapleyTrainer
from hf_datashapley.demo.corpus import drop_near_duplicates, read_corpus
from hf_datashapley.demo.harvest import harvest
from hf_datashapley.demo.rows import tokenise, train_tokenizer
from hf_datashapley.evaluation import Fidelity, ShapleyValues, exact_shapley, fidelity


Floats = NDArray[np.float64]

CHARACTERS_PER_TOKEN = 4  # more than a small vocabulary reaches, so that there is text enough
# Characters: few and long documents would leave too few rows of a small run.
LEAST_HARVEST = 300_000
ROWS_OF_A_DOCUMENT = 16  # at most, so that there are many documents
HELD_OUT = 10  # one document in so many is for validation
WEIGHT_DECAY = 0.1  # of AdamW
PEAK = 1e-3  # AdamW's learning rate in whole runs

# What is compared, as `ShapleyConfig` asks for it.
SGD_PROXY = "SGD proxy"
FIRST, SECOND, PATH_1, PATH_3, OWEN_3 = "first", "second", "path, 1 node", "path, 3 nodes", "path, 3 nodes, owen"
ORDERS: dict[str, dict[str, Any]] = {
    SGD_PROXY: {"value_order": "first", "value_optimizer": "sgd"},
    FIRST: {"value_order": "first"},
    SECOND: {"value_order": "second"},
    PATH_1: {"value_order": "path", "path_nodes": 1},
    PATH_3: {"value_order": "path", "path_nodes": 3},
    OWEN_3: {"value_order": "path", "path_nodes": 3, "path_slope": "owen"},
}
# Under SGD the proxy is order "first", and the smoothed slope is the secant.
COMPARED: dict[type[Optimizer], list[str]] = {SGD: [FIRST, SECOND, PATH_1, PATH_3], AdamW: list(ORDERS)}


@dataclass
class Setting:
    """What is measured."""

    corpus: str | None = field(default=None, metadata={"help": "Parquet or JSONL file with a column `text`."})
    families: list[str] = field(default_factory=lambda: ["gpt2", "pythia"], metadata={"help": "gpt2 and pythia."})
    layers: int = 2
    width: int = 64
    vocabulary: int = 512
    length: int = field(default=64, metadata={"help": "Tokens in a row."})
    samples: int = field(default=8, metadata={"help": "Rows in an update, at most 12."})
    validation_rows: int = field(default=8, metadata={"help": "Rows that an update is scored against."})
    updates: int = field(default=300, metadata={"help": "Updates of AdamW up to the middle of the run."})
    batches: int = field(default=3, metadata={"help": "Different next updates in mid-training; results are means."})
    sgd_rates: list[float] = field(default_factory=lambda: [1e-2, 1e-1, 1.0, 10.0])
    adamw_rates: list[float] = field(default_factory=lambda: [1e-4, 1e-3, 3e-3, 3e-2])
    first_updates: int = field(default=10, metadata={"help": "Updates from random initialisation that are compared."})
    run_updates: int = field(default=128, metadata={"help": "Updates of a whole run, in two passes over its rows."})
    seeds: int = field(default=3, metadata={"help": "Whole runs that differ in their weights and order of rows."})
    draws: int = field(default=8, metadata={"help": "Draws of validation rows, an even number."})
    seed: int = 0
    threads: int = 1
    output_dir: str = field(default="runs/fidelity", metadata={"help": "Folder for fidelity.md and fidelity.png."})


# Rows and models


@dataclass
class Data:
    """Rows of exactly `length` tokens, in a random order; `documents` says which document a training row is from."""

    train: list[dict[str, list[int]]]
    documents: Sequence[int]
    validation: list[dict[str, list[int]]]


def make_data(setting: Setting) -> Data:
    most = max(setting.updates + setting.batches, setting.run_updates) * setting.samples
    if setting.corpus is None:
        documents = harvest(max(3 * most * setting.length * CHARACTERS_PER_TOKEN, LEAST_HARVEST), setting.seed)
    else:
        documents = read_corpus(setting.corpus)
        random.Random(setting.seed).shuffle(documents)
    documents = drop_near_duplicates(documents)
    tokenizer = train_tokenizer([document.text for document in documents], setting.vocabulary, setting.length)
    train: list[tuple[int, list[int]]] = []
    held_out: list[list[int]] = []
    for number, document in enumerate(tokenise(documents, tokenizer, setting.length)):
        rows = [row for row in document.rows if len(row) == setting.length][:ROWS_OF_A_DOCUMENT]
        if number % HELD_OUT:
            train += [(number, row) for row in rows]
        else:
            held_out += rows
    wanted = setting.draws * setting.validation_rows
    if len(train) < most or len(held_out) < wanted:
        raise ValueError(
            f"the text gives {len(train)} training rows and {len(held_out)} validation rows of {setting.length} "
            f"tokens, {most} and {wanted} are needed: give more text, or fewer --updates"
        )
    generator = random.Random(setting.seed)
    generator.shuffle(train)
    generator.shuffle(held_out)
    return Data(
        [labelled(row) for _, row in train[:most]],
        [number for number, _ in train[:most]],
        [labelled(row) for row in held_out[:wanted]],
    )


def labelled(row: list[int]) -> dict[str, list[int]]:
    # The first token is never predicted: unlabelled, no model can count it as a loss token.
    return {"input_ids": row, "labels": [-100, *row[1:]]}


def build_model(family: str, setting: Setting, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    heads = max(1, setting.width // 32)
    common = {"vocab_size": setting.vocabulary, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    if family == "gpt2":
        shape = {"n_layer": setting.layers, "n_embd": setting.width, "n_head": heads, "n_positions": setting.length}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        # The function of GPT-2's `gelu_new` in one kernel.
        config = GPT2Config(**shape, **dropout, **common, activation_function="gelu_pytorch_tanh")
        return GPT2LMHeadModel(config)
    if family == "pythia":
        shape = {
            "num_hidden_layers": setting.layers,
            "hidden_size": setting.width,
            "num_attention_heads": heads,
            "intermediate_size": 4 * setting.width,
            "max_position_embeddings": setting.length,
        }
        return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, **common))
    raise ValueError(f"--families {family}: choose among gpt2 and pythia")


# Runs and single updates


@dataclass
class State:
    """A model and its optimizer before an update."""

    weights: dict[str, Tensor]
    optimizer: dict[Any, Any]  # as in `Optimizer.state_dict()["state"]`

    @classmethod
    def of(cls, model: torch.nn.Module, optimizer: Optimizer) -> State:
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        state = {
            number: {name: entry.clone() for name, entry in entries.items()}
            for number, entries in optimizer.state_dict()["state"].items()
        }
        return cls(weights, state)

    def restore(self, model: torch.nn.Module, optimizer: Optimizer) -> None:
        """The learning rates of `optimizer` stay its own; its precision becomes the model's."""
        model.load_state_dict(self.weights)
        if isinstance(optimizer, AdamW):
            groups = optimizer.state_dict()["param_groups"]
            # A copy: torch takes the tensors over as they are, and steps write into them.
            optimizer.load_state_dict({"state": copy.deepcopy(self.optimizer), "param_groups": groups})


def make_optimizer(kind: type[Optimizer], model: torch.nn.Module, rate: float) -> Optimizer:
    if kind is SGD:
        return SGD(model.parameters(), lr=rate, fused=True)
    return AdamW(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY, fused=True)


def train(
    model: PreTrainedModel,
    optimizer: Optimizer,
    rows: Sequence[dict[str, list[int]]],
    validation: dict[str, list[dict[str, list[int]]]] | list[dict[str, list[int]]],
    setting: Setting,
    order: str,
    callback: TrainerCallback | None = None,
    **arguments: Any,
) -> Dataset:
    """The value history of a run; every validation row is used at every update."""
    targets = validation if isinstance(validation, dict) else {"": validation}
    datasets = {name: Dataset.from_list(list(target)) for name, target in targets.items()}
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "per_device_train_batch_size": setting.samples,
            "num_train_epochs": 1,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "max_grad_norm": 1.0,
            "value_momentum": "immediate",  # what acts in its own update; whole runs take the default
            "validation_batch_size": setting.validation_rows,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        trainer = ShapleyTrainer(
            model,
            ShapleyConfig(output_dir=folder, **{**settings, **ORDERS[order], **arguments}),
            train_dataset=Dataset.from_list(list(rows)),
            validation_dataset=datasets if isinstance(validation, dict) else datasets[""],
            optimizers=(optimizer, None),
            callbacks=[] if callback is None else [callback],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.value_history()


def true_values(
    family: str,
    state: State,
    rows: Sequence[dict[str, list[int]]],
    validation: Sequence[dict[str, list[int]]],
    kind: type[Optimizer],
    rate: float,
    setting: Setting,
) -> ShapleyValues:
    model = build_model(family, setting, seed=0).double()
    optimizer = make_optimizer(kind, model, rate)
    state.restore(model, optimizer)
    return exact_shapley(model, as_batch(rows), as_batch(validation), optimizer, max_grad_norm=1.0, progress=False)


def as_batch(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}


# 1. Mid-training


def mid_training(family: str, data: Data, setting: Setting) -> State:
    model = build_model(family, setting, setting.seed)
    optimizer = make_optimizer(AdamW, model, PEAK)
    rows = data.train[: setting.updates * setting.samples]
    warmup = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": max(1, setting.updates // 10)}
    train(model, optimizer, rows, data.validation[: setting.validation_rows], setting, FIRST, **warmup)
    return State.of(model, optimizer)


Compared = dict[str, list[Fidelity]]  # by order, one of each batch


def compare_rates(
    family: str, kind: type[Optimizer], rates: Sequence[float], state: State, data: Data, setting: Setting
) -> dict[float, Compared]:
    validation = data.validation[: setting.validation_rows]
    found: dict[float, Compared] = {}
    cases = list(itertools.product(rates, range(setting.batches)))
    for rate, batch in tqdm(cases, f"{family}, {kind.__name__}", leave=False):
        first = (setting.updates + batch) * setting.samples
        rows = data.train[first : first + setting.samples]
        truth = true_values(family, state, rows, validation, kind, rate, setting)
        for order in COMPARED[kind]:
            model = build_model(family, setting, seed=0)
            optimizer = make_optimizer(kind, model, rate)
            state.restore(model, optimizer)
            history = train(model, optimizer, rows, validation, setting, order)
            compared = fidelity(history["value"], truth.values, float(truth.actual[0]))
            found.setdefault(rate, {}).setdefault(order, []).append(compared)
    return found


# 2. The first updates


class Recorder(TrainerCallback):
    """Copies model and optimizer before every update."""

    def __init__(self) -> None:
        self.states: list[State] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.states.append(State.of(kwargs["model"], kwargs["optimizer"]))


EARLY = [SGD_PROXY, FIRST, PATH_3, OWEN_3]


def compare_first_updates(family: str, data: Data, setting: Setting) -> list[dict[str, Fidelity]]:
    """For each update, from the first: every order against exact values."""
    rows = data.train[: setting.first_updates * setting.samples]
    validation = data.validation[: setting.validation_rows]
    recorder = Recorder()
    histories = {}
    for order in EARLY:
        model = build_model(family, setting, setting.seed)
        callback = recorder if order == EARLY[0] else None
        histories[order] = train(
            model, make_optimizer(AdamW, model, PEAK), rows, validation, setting, order, callback
        ).to_pandas()
    found = []
    for number, state in enumerate(tqdm(recorder.states, f"{family}, first updates", leave=False)):
        own = rows[number * setting.samples : (number + 1) * setting.samples]
        truth = true_values(family, state, own, validation, AdamW, PEAK, setting)
        found.append(
            {
                order: fidelity(history.value[history.step == number + 1], truth.values, float(truth.actual[0]))
                for order, history in histories.items()
            }
        )
    return found


def weight_of_first_updates(family: str, data: Data, setting: Setting) -> dict[str, dict[str, list[float]]]:
    """Warm-up -> order -> share of the whole run's absolute value that updates 1, 1-3 and 1-10 have."""
    rows = data.train[: setting.run_updates * setting.samples]
    steps = max(1, setting.run_updates // 10)
    found: dict[str, dict[str, list[float]]] = {}
    cases = list(itertools.product((0, steps), EARLY))
    for warmup, order in tqdm(cases, f"{family}, warm-up", leave=False):
        model = build_model(family, setting, setting.seed)
        optimizer = make_optimizer(AdamW, model, PEAK)
        schedule = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": warmup}
        validation = data.validation[: setting.validation_rows]
        history = train(
            model, optimizer, rows, validation, setting, order, value_momentum=None, **schedule
        ).to_pandas()
        size = history.value.abs()
        shares = [size[history.step <= last].sum() / size.sum() for last in (1, 3, 10)]
        found.setdefault(f"{warmup} updates" if warmup else "none", {})[order] = shares
    return found


# 3. Reliability of whole runs

RELIABLE = [SGD_PROXY, FIRST, PATH_1]


def reliability(family: str, data: Data, setting: Setting) -> dict[str, dict[str, tuple[float, float]]]:
    """Order -> what is drawn anew -> mean rank correlation of two runs' values, of rows and of documents."""
    count = setting.run_updates * setting.samples // 2
    rows, documents = data.train[:count], data.documents[:count]
    draws = {
        f"draw{k}": data.validation[k * setting.validation_rows : (k + 1) * setting.validation_rows]
        for k in range(setting.draws)
    }
    found = {}
    values: dict[str, list[Floats]] = {}  # by order; [draws, rows] of each run
    cases = list(itertools.product(RELIABLE, range(setting.seeds)))
    for order, seed in tqdm(cases, "whole runs", leave=False):
        model = build_model(family, setting, setting.seed + seed)
        history = train(
            model,
            make_optimizer(AdamW, model, PEAK),
            rows,
            draws,
            setting,
            order,
            value_momentum=None,
            train_sampling_strategy="random",
            seed=setting.seed + seed,
            num_train_epochs=2,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=max(1, setting.run_updates // 10),
        )
        summed = history.to_pandas().groupby("sample_id").sum().sort_index()
        values.setdefault(order, []).append(summed[[f"value_{name}" for name in draws]].to_numpy().T)
    half = setting.draws // 2
    size = setting.validation_rows
    for order, runs in values.items():
        halves = [[run[:half].mean(0), run[half:].mean(0)] for run in runs]
        found[order] = {
            "training seed": agreement([[run.mean(0) for run in runs]], documents),
            f"draw of {size} validation rows": agreement([list(run) for run in runs], documents),
            f"draw of {half * size} validation rows": agreement(halves, documents),
        }
    return found


def agreement(groups: Sequence[Sequence[Floats]], documents: Sequence[int]) -> tuple[float, float]:
    """Mean Spearman over all pairs within each group of runs: of the rows' values, and of the documents' sums."""
    _, place = np.unique(documents, return_inverse=True)
    of_rows, of_documents = [], []
    for group in groups:
        for left, right in itertools.combinations(group, 2):
            of_rows.append(fidelity(left, right).spearman)
            of_documents.append(fidelity(np.bincount(place, weights=left), np.bincount(place, weights=right)).spearman)
    return float(np.mean(of_rows)), float(np.mean(of_documents))


# Tables and the picture


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(x: float) -> str:
    return f"{x:.2g}" if abs(x) < 100 else f"{x:.3g}"


def mean(compared: Sequence[Fidelity], name: str) -> float:
    """NaN (a Spearman of values that are all alike) counts as no agreement."""
    return float(np.mean(np.nan_to_num([vars(one)[name] for one in compared])))


def rate_tables(found: dict[float, Compared]) -> str:
    orders = list(next(iter(found.values())))
    errors, sums = [], []
    for rate, compared in found.items():
        cells = [
            f"{number(mean(one, 'relative_error'))} · {mean(one, 'spearman'):.2f} · {mean(one, 'rmse'):.1e}"
            for one in compared.values()
        ]
        errors.append([f"{rate:g}", *cells])
        actual = mean(compared[orders[0]], "actual")
        sums.append([f"{rate:g}", f"{actual:+.5f}", *(f"{mean(one, 'sum'):+.5f}" for one in compared.values())])
    return "\n\n".join(
        [
            "Relative error · Spearman · RMSE (nats):",
            table(["lr", *orders], errors),
            "Sum of the values, against what the samples did to the loss, l_v(w(0)) - l_v(w(1)), nats:",
            table(["lr", "actual", *orders], sums),
        ]
    )


def early_table(found: Sequence[dict[str, Fidelity]]) -> str:
    rows = [
        [
            str(update),
            *(f"{number(one.relative_error)} · {np.nan_to_num(one.spearman):.2f}" for one in compared.values()),
        ]
        for update, compared in enumerate(found, 1)
    ]
    return table(["update", *EARLY], rows)


def weight_table(found: dict[str, dict[str, list[float]]]) -> str:
    rows = [
        [warmup, *(" · ".join(f"{share:.1%}" for share in shares) for shares in of_orders.values())]
        for warmup, of_orders in found.items()
    ]
    return table(["warm-up", *EARLY], rows)


def reliability_table(found: dict[str, dict[str, tuple[float, float]]]) -> str:
    drawn = list(next(iter(found.values())))
    rows = [
        [order, *(f"{of_rows:.2f} · {of_documents:.2f}" for of_rows, of_documents in agreements.values())]
        for order, agreements in found.items()
    ]
    return table(["order", *(f"another {what}" for what in drawn)], rows)


COLORS = dict(zip(ORDERS, ("#888888", "#d55e00", "#cc79a7", "#56b4e9", "#0072b2", "#009e73"), strict=True))


def draw_picture(
    path: Path, rates: dict[str, dict[float, Compared]], early: Sequence[dict[str, Fidelity]], family: str
) -> None:
    matplotlib.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (kind, found) in zip(panels[:2], rates.items(), strict=True):
        for order in next(iter(found.values())):
            errors = [mean(compared[order], "relative_error") for compared in found.values()]
            plot(axes, list(found), errors, order)
        axes.set_xscale("log")
        axes.set_title(f"{kind}, one update in mid-training", fontsize=8)
        axes.set_xlabel("learning rate")
    for order in EARLY:
        errors = [compared[order].relative_error for compared in early]
        plot(panels[2], list(range(1, len(early) + 1)), errors, order)
    panels[2].set_title("AdamW from random initialisation", fontsize=8)
    panels[2].set_xlabel(f"update (lr {PEAK:g}, no warm-up)")
    panels[0].set_ylabel(f"relative error against exact values ({family})")
    panels[0].set_yscale("log")
    handles = {order: line for axes in panels for line, order in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110)


def plot(axes: Axes, x: Sequence[float], y: Sequence[float], order: str) -> None:
    axes.plot(x, y, marker="o", markersize=3, linewidth=1.3, color=COLORS[order], label=order)
    axes.axhline(1.0, color="#cccccc", linewidth=0.8, zorder=0)  # what values of 0 have
    axes.grid(axis="y", color="#eeeeee")


def main() -> None:
    (setting,) = HfArgumentParser(Setting).parse_args_into_dataclasses()
    torch.set_num_threads(setting.threads)
    transformers.logging.set_verbosity_error()
    disable_progress_bar()
    folder = Path(setting.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[str] = []

    def say(text: str) -> None:
        print(text + "\n", flush=True)
        parts.append(text)

    data = make_data(setting)
    say(
        f"`python {' '.join(sys.argv)}`, seed {setting.seed}: {os.cpu_count()} CPU cores ({setting.threads} used), "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"hf_datashapley {hf_datashapley.__version__}. {setting.layers} layers of width {setting.width}, vocabulary "
        f"{setting.vocabulary}; updates of {setting.samples} rows of {setting.length} tokens, scored against "
        f"{setting.validation_rows}; clipping at 1, weight decay {WEIGHT_DECAY:g} under AdamW."
    )
    rates: dict[str, dict[str, dict[float, Compared]]] = {}
    early: dict[str, list[dict[str, Fidelity]]] = {}
    for family in setting.families:
        say(f"## {family}: one update after {setting.updates}, mean of {setting.batches}")
        state = mid_training(family, data, setting)
        rates[family] = {}
        for kind, of_kind in ((SGD, setting.sgd_rates), (AdamW, setting.adamw_rates)):
            found = compare_rates(family, kind, of_kind, state, data, setting)
            rates[family][kind.__name__] = found
            say(f"### {family}, {kind.__name__}\n\n{rate_tables(found)}")
    for family in setting.families:
        early[family] = compare_first_updates(family, data, setting)
        say(
            f"## {family}: the first updates (AdamW, lr {PEAK:g}, from random initialisation, no warm-up)\n\n"
            f"Relative error · Spearman:\n\n{early_table(early[family])}"
        )
    family = setting.families[0]
    say(
        f"## {family}: what the first updates weigh\n\nShare of updates 1 · 1-3 · 1-10 in the absolute value of a "
        f"run of {setting.run_updates}:\n\n{weight_table(weight_of_first_updates(family, data, setting))}"
    )
    say(
        f"## Reliability of a value\n\nRank correlation of the values of two whole runs ({family}, "
        f"{setting.run_updates} updates, two passes, warm-up) that differ in one thing, rows · documents:\n\n"
        f"{reliability_table(reliability(family, data, setting))}"
    )
    draw_picture(folder / "fidelity.png", rates[family], early[family], family)
    (folder / "fidelity.md").write_text("\n\n".join(parts) + "\n")
    print(f"Written: {folder / 'fidelity.md'}, {folder / 'fidelity.png'}")


if __name__ == "__main__":
    main()
