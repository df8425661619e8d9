"""The demo from end to end: gather text, cut rows, train under `ShapleyTrainer`, measure, write, print.

Text is harvested from the Python installation (or read with --corpus), junk is planted in it, a byte-level BPE and a
small language model are trained from scratch, and every row is valued against held-out documents of named domains.
The settings were fixed beforehand, for 2 cores and four minutes; what came out is printed as it came out.
"""

from __future__ import annotations

import random
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback

from ..ledger import load_audit, load_updates
from ..report import write_report
from ..trainer import ShapleyConfig, ShapleyTrainer
from . import harvest, junk, measure, models
from .config import DemoConfig
from .corpus import Document, choose_targets, drop_near_duplicates, hold_out, read_corpus
from .measure import align
from .progress import OneLineProgress
from .rows import (
    SHORTEST,
    TokenisedDocument,
    draw,
    pad_rows,
    tokenise,
    train_tokenizer,
    training_rows,
    validation_rows,
)
from .throughput import measure_throughput


ROW_TOKENS = 256
CHARACTERS_PER_TOKEN = 4  # more than a BPE of this size reaches, so that enough is harvested
LEAST_CHARACTERS = 2_000_000  # for a short run too, so that there are documents enough to hold out
ORDERS = {
    "first": "to first order. That orders documents; it overstates amounts, most of all early in training",
    "second": "to second order; what momentum and weight decay did alone is nobody's",
    "path": "along each step of the optimizer; what momentum and weight decay did alone is nobody's",
}
WRITTEN = {
    "report.html": "the pictures, the best and the worst documents",
    "documents.parquet": "a value for each document and target",
    "samples.parquet": "a value for each row",
    "values": "the ledger: every update (hf_datashapley.load_value_history)",
    "model": "the trained model and its tokenizer",
}


def demo(config: DemoConfig) -> None:
    """Harvests, trains, measures, writes and prints."""
    started = time.perf_counter()
    vocabulary, longest_row = models.limits_of(config.model)

    say(1, f"Corpus: {config.corpus or 'the text of this Python installation'}")
    documents, targets = gather(config)

    say(2, "Tokens: documents cut into rows")
    row_tokens = min(ROW_TOKENS, longest_row or ROW_TOKENS)
    data = make_rows(config, documents, targets, vocabulary, row_tokens)
    folder = new_run_folder(config.output_dir)

    def make_model() -> PreTrainedModel:
        return models.make_model(config.model, vocabulary, row_tokens, config.seed)

    model = make_model()
    size = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} million parameters"
    say(3, f"Training: {config.model}, {size}, every row valued against {' and '.join(targets)}")
    training: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": config.updates,
        "per_device_train_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "warmup_steps": max(1, config.updates // 10),
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "logging_steps": 10,
        # Unset, it follows transformers' verbosity: once that is low, Trainer prints every row of its log instead.
        "disable_tqdm": False,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
        "seed": config.seed,
    }
    valuation: dict[str, Any] = {
        "value_order": config.value_order,
        "path_nodes": config.path_nodes,
        "path_slope": config.path_slope,
        "value_optimizer": config.value_optimizer,
        "value_momentum": config.value_momentum,
        "value_kernel": config.value_kernel,
        "validation_batch_size": config.validation_batch_size,
        "validation_interval": config.validation_interval,
    }
    trainer = ShapleyTrainer(
        model=model,
        args=ShapleyConfig(**training, **valuation, audit_steps=config.audit_steps or 0),
        train_dataset=data.train,
        validation_dataset=data.validation,
        data_collator=pad_rows,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(OneLineProgress())
    clock = time.perf_counter()
    trainer.train()
    clock = time.perf_counter() - clock
    trainer.save_model(str(folder / "model"))
    data.tokenizer.save_pretrained(str(folder / "model"))

    say(4, "Throughput: short blocks of Trainer and ShapleyTrainer in turn, on the same rows")
    throughput = measure_throughput(make_model, data.train, data.validation, training, valuation)
    scored = config.validation_batch_size * len(targets) / config.validation_interval
    if config.value_order == "path":
        scored *= config.path_nodes
    ceiling = config.batch_size / (config.batch_size + scored)
    cost: dict[str, object] = {
        "throughput kept": f"{throughput.kept:.2f} of Trainer's",
        "seconds per update": f"{throughput.plain:.3f} Trainer, {throughput.shapley:.3f} ShapleyTrainer",
        "ceiling of the method": f"about {ceiling:.2f}: {scored:g} validation to {config.batch_size} training rows",
        "training": f"{clock:.0f} s",
    }
    if config.audit_steps:
        cost["audit"] = f"3 validation forward passes every {config.audit_steps} updates, not in the throughput"

    say(5, "Values and report")
    updates, audit = load_updates(trainer.value_dir), load_audit(trainer.value_dir)
    samples = measure.label(trainer.values(), data.units)
    per_document = measure.document_values(samples)
    samples.to_parquet(folder / "samples.parquet")
    per_document.to_parquet(folder / "documents.parquet")
    write_report(
        folder / "report.html",
        values=trainer.values(),
        history=trainer.value_history(),
        updates=updates,
        units=data.units,
        settings={"parameters": size, **asdict(config)},
        cost=cost,
        title=f"{config.model} on {config.corpus or 'the text of a Python installation'}",
        audit=audit,
    )

    print(f"\n{align(measure.domain_table(per_document))}")
    print(
        "\nValues are nats of validation loss: how far training on the documents lowered the target's loss (+) or\n"
        f"raised it (-), {ORDERS[config.value_order]}:"
    )
    print(align(measure.loss_table(updates, samples, targets)))
    if len(audit):
        print(
            f"\nDo they add up? Sums over {len(set(audit['step']))} audited updates, nats: what the values (each with "
            "what it moved in that\nvery update) and what momentum and weight decay alone say, which together is "
            "predicted, and the measured\nfall of the loss on the same rows:"
        )
        print(align(measure.audit_table(audit, targets)))
    print(
        "\nHow well value ranks documents (AUC: the chance that a document of the target's own domain has more value\n"
        "per token than one of the others; 0.5 is chance), as it came out:"
    )
    print(align(measure.ranking_table(per_document, targets)))
    print("\nWhat the values cost:")
    print(align([[name, str(what)] for name, what in cost.items()], numbers=False))
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Written:")
    print(align([[str(folder / name), what] for name, what in WRITTEN.items()], numbers=False))


def say(number: int, what: str) -> None:
    print(f"\n[{number}/5] {what}", flush=True)


def new_run_folder(output_dir: str) -> Path:
    """The next free `run-<number>`; earlier runs stay as they are, since a ledger is never overwritten."""
    root = Path(output_dir)
    root.mkdir(parents=True, exist_ok=True)
    numbers = [int(run.name[4:]) for run in root.glob("run-*") if run.name[4:].isdecimal()]
    folder = root / f"run-{max(numbers, default=0) + 1}"
    folder.mkdir()
    return folder


def gather(config: DemoConfig) -> tuple[list[Document], list[str]]:
    """Documents in a random order, without near-duplicates, not yet with junk; and the targets among the domains."""
    if config.corpus is None:
        wanted = config.updates * config.batch_size * ROW_TOKENS * CHARACTERS_PER_TOKEN
        found = harvest.harvest(max(wanted, LEAST_CHARACTERS), config.seed)
        missing = [target for target in harvest.TARGETS if target not in {document.domain for document in found}]
        if missing and config.targets is None:
            raise ValueError(
                f"this Python installation holds no text of the domain {missing[0]!r}; searched were .py files below "
                f"{sysconfig.get_path('stdlib')}, pydoc_data.topics and the installed distributions: name other "
                "--targets, bring text with --corpus, or use another Python"
            )
    else:
        found = read_corpus(config.corpus)
        random.Random(config.seed).shuffle(found)
    documents = drop_near_duplicates(found)
    table = [["domain", "documents", "characters"]]
    for domain in sorted({document.domain for document in documents}):
        members = [document for document in documents if document.domain == domain]
        table.append([domain, f"{len(members):,}", f"{sum(len(document.text) for document in members):,}"])
    print(align(table))
    print(f"{len(found) - len(documents):,} near-duplicates were left out.")
    return documents, choose_targets(documents, config.targets, harvest.TARGETS if config.corpus is None else ())


@dataclass(frozen=True)
class DemoData:
    train: Dataset
    units: Dataset
    validation: dict[str, Dataset]
    tokenizer: PreTrainedTokenizerBase


def make_rows(
    config: DemoConfig, documents: list[Document], targets: list[str], vocabulary: int, row_tokens: int
) -> DemoData:
    """Held-out rows for the targets, and as many training rows, planted junk among them, as the updates take."""
    rows = config.updates * config.batch_size
    real, held_out = hold_out(documents, targets, config.seed)
    if not real:
        raise ValueError("every document was held out as a target: name fewer --targets, or give more text")
    planted = junk.plant_junk(real, int(config.junk_share * rows * row_tokens), config.seed)

    tokenizer = models.tokenizer_of(config.model)
    if tokenizer is None:
        # About as much text as will be trained on: all of a large --corpus would take long and add nothing.
        texts = [document.text for document in planted]
        left = rows * row_tokens * CHARACTERS_PER_TOKEN
        for document in real:
            if left > 0:
                texts.append(document.text)
                left -= len(document.text)
        tokenizer = train_tokenizer(texts, vocabulary, row_tokens)

    validation = {
        target: validation_rows(list(tokenise(kept, tokenizer, row_tokens)), config.seed)
        for target, kept in held_out.items()
    }
    drawn: list[TokenisedDocument] = []
    for kind in junk.TYPES:
        of_kind = [document for document in planted if document.junk == kind]
        drawn += draw(tokenise(of_kind, tokenizer, row_tokens), int(config.junk_share * rows / len(junk.TYPES)))
    left = rows - sum(len(document.rows) for document in drawn)
    # A last batch that is not full is an update like the others.
    drawn += draw(tokenise(real, tokenizer, row_tokens), left, enough=config.batch_size - 1)
    data = training_rows(drawn, tokenizer)
    tokens = sum(len(row) for document in drawn for row in document.rows)
    planted_count = sum(document.document.junk is not None for document in drawn)
    unused = len(real) + planted_count - len(drawn)
    print(
        align(
            [
                ["training documents", f"{len(drawn):,}, {planted_count} of them planted junk; {unused:,} not needed"],
                ["training rows", f"{len(data.dataset):,} of up to {row_tokens} tokens, {tokens:,} tokens in all"],
                ["cut off", f"{sum(d.dropped for d in drawn):,} tokens, documents' last rows shorter than {SHORTEST}"],
                *(
                    [f"validation rows: {target}", f"{len(validation[target]):,} of {len(kept)} held-out documents"]
                    for target, kept in held_out.items()
                ),
                ["passes over the rows", f"{rows / max(1, len(data.dataset)):.2f}"],
            ],
            numbers=False,
        )
    )
    return DemoData(data.dataset, data.units, validation, tokenizer)
