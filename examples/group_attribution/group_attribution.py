"""What is gained, and what lost, by attributing to groups of rows instead of rows?

"Generalized Group Data Attribution" (Ley, Srinivas, Zhang, Rusak, Lakkaraju, arXiv 2410.09940) credits a property of
the model, here the mean loss of some queries, to groups of training data, and reports speed-ups of 10 to 50 with a
graceful loss of fidelity. This script measures both for influence functions, TracIn and TRAK on a small GPT-2, for
four ways of forming groups and sizes from 1 to 1,024: time and room (`group_runtime`), the loss after training again
without what is worth most or least (`group_removal`), and how well values find planted junk (`group_junk`).

All that takes time is kept in `output_dir`, and taken from there when the script runs again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import HfArgumentParser

from group_junk import JunkFinding
from group_pictures import draw_application, draw_removal, draw_runtime
from group_removal import PRUNED_BY, RANDOM, SAME_SOURCE, Removal, Retrainings
from group_runtime import Seconds, floor_line, groups_table, runtime_table, shapes_table, time_all
from group_setting import GROUPINGS, GroupAttribution, Text, TrainedOn, make_base, make_text, token_losses
from group_values import ADDITIVE, ALL_METHODS, METHODS, OF_GROUPS, OF_ROWS, Cell, Run, ValueBook
from hf_datashapley.evaluation.kept import check_begun
from hf_datashapley.evaluation.markdown import markdown


def check_kept(config: GroupAttribution) -> None:
    """
    Raises:
        ValueError: what lies in `output_dir` was made with other settings, of those that it depends on.
    """
    free = {"sizes", "fractions", "fraction", "pruned", "draws", "seeds", "seeds_elsewhere", "repeats", "workers"}
    own = {name: value for name, value in asdict(config).items() if name not in free | {"output_dir"}}
    check_begun(config.output_dir, own)


# The tables


def by_size(
    config: GroupAttribution, methods: Sequence[str], groupings: Sequence[str], head: str, show: Callable[[Cell], str]
) -> str:
    """A line for each method and grouping, a column for each size."""
    lines = []
    for method in methods:
        for grouping in groupings:
            own = [Cell(method, "rows", 1), *(Cell(method, grouping, size) for size in config.sizes)]
            lines.append([f"{method}, {grouping}", *map(show, own)])
    return markdown([head, "1", *map(str, config.sizes)], lines)


def removal_parts(config: GroupAttribution, removal: Removal) -> list[str]:
    parts = []
    for fraction in config.fractions:
        known = (f"{name} {removal.rise_without_known(name, fraction)}" for name in (RANDOM, SAME_SOURCE))

        def show(cell: Cell, fraction: float = fraction) -> str:
            return str(removal.rise_without_top(cell, fraction))

        parts.append(f"### Without the top {fraction:.0%} of the tokens")
        parts.append(by_size(config, METHODS, GROUPINGS, "rise of the loss", show))
        parts.append(f"Beside it: {', '.join(known)}.")
    return parts


def pruning_parts(config: GroupAttribution, removal: Removal) -> list[str]:
    parts = []
    for part in config.pruned:
        known = (f"{name} {removal.rise_without_known(name, part, last=True)}" for name in (RANDOM, SAME_SOURCE))

        def show(cell: Cell, part: float = part) -> str:
            return str(removal.rise_without_bottom(cell, part))

        parts.append(by_size(config, METHODS, [PRUNED_BY], f"without the lowest {part:.0%}", show))
        parts.append(f"Beside it: {', '.join(known)}.")
    return parts


def kernel_parts(config: GroupAttribution, removal: Removal) -> list[str]:
    kernels = [method for method in ALL_METHODS if method not in ADDITIVE]

    def rise(cell: Cell) -> str:
        return str(removal.rise_by_kernel(cell))

    def agreement(cell: Cell) -> str:
        return f"{removal.book.agreement(removal.with_kernel_of_groups(cell)):.3f}"

    exact = min(
        removal.book.agreement(Cell(method, grouping, size))
        for method in OF_ROWS.values()
        for grouping in GROUPINGS
        for size in config.sizes
    )
    return [
        by_size(config, kernels, GROUPINGS, f"rise without the top {config.fraction:.0%}", rise),
        "How near groups' scores come to the sums of their rows' scores, by Pearson's correlation over groups (with "
        f"the kernel of rows, {exact:.4f} at least):",
        by_size(config, OF_GROUPS, GROUPINGS, "correlation", agreement),
    ]


def junk_parts(config: GroupAttribution, finding: JunkFinding) -> list[str]:
    parts = ["### Junk"]
    for asked in finding.books:

        def show(cell: Cell, asked: str = asked) -> str:
            return f"{finding.auc(cell, asked):.3f}"

        parts.append(by_size(config, METHODS, GROUPINGS, f"AUC, asked about: {asked}", show))
    return [*parts, finding.remark]


def remarks(config: GroupAttribution, text: Text, removal: Removal) -> list[str]:
    """What stands below the tables, a line each."""
    model = removal.book.run.model
    with torch.no_grad():
        losses = [float(token_losses(model, rows).mean()) for rows in (text.train, text.tabled)]
    known = ", ".join(
        f"{fraction:.0%}: {removal.rise_without_known(SAME_SOURCE, fraction, chosen_on=True)}"
        for fraction in config.fractions
    )
    deviations = ", ".join(
        f"{method} {removal.book.deviation(Cell(method, GROUPINGS[-1], config.sizes[len(config.sizes) // 2])):.1e}"
        for method in ADDITIVE
    )
    return [
        f"{len(text.train)} rows of {config.row_tokens} tokens of {len(set(text.domains_N))} domains, "
        f"{int(text.of_targets_N.sum())} of those that are asked about ({', '.join(text.targets)}); "
        f"{len(text.tabled)} queries. Seeds: {config.seeds} without the top {config.fraction:.0%}, at random and by "
        f"source; {config.seeds_elsewhere} elsewhere. ± is a standard error over seeds.",
        f"On the queries that the setting was chosen on, the loss rises without rows of the same source by {known}.",
        "Groups' scores, fitted as groups, differ from the sums of their rows' by (the largest, over the largest "
        f"score): {deviations}.",
        f"The model ({sum(parameter.numel() for parameter in model.parameters()):,} parameters): mean loss of the "
        f"rows {losses[0]:.2f}, of the queries {losses[1]:.2f} nats.",
        f"One CPU thread; {os.cpu_count()} CPU cores, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, seed {config.seed}.",
    ]


def report(config: GroupAttribution, text: Text, removal: Removal, finding: JunkFinding, seconds: Seconds) -> str:
    """The tables; and the pictures."""
    folder = Path(config.output_dir)
    draw_removal(config, removal, folder / "removal.png")
    draw_application(config, removal, finding, folder / "applications.png")
    parts = []
    if seconds.found:
        draw_runtime(config, seconds, folder / "runtime.png")
        parts += ["### Seconds and bytes", runtime_table(config, seconds), floor_line(config, seconds)]
        parts += [groups_table(config, seconds), shapes_table(seconds)]
    parts += removal_parts(config, removal)
    parts += ["### The kernel of groups, and of rows", *kernel_parts(config, removal)]
    parts += ["### Pruning", *pruning_parts(config, removal)]
    parts += junk_parts(config, finding)
    parts += ["\n".join(remarks(config, text, removal))]
    return "\n\n".join(parts)


def main() -> None:
    (config,) = HfArgumentParser(GroupAttribution).parse_args_into_dataclasses()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # so that seconds compare
    check_kept(config)
    text = make_text(config)
    base = make_base(config, text)
    training = TrainedOn(config, base, text.train, text.queries)
    run = Run.of(training, len(text.train))
    book = ValueBook(config, "clean", run, text.train, text.tabled)
    removal = Removal(
        config, text, book, Retrainings(Path(config.output_dir) / "retrainings", training, config.workers)
    )
    removal.make()
    finding = JunkFinding.planted(config, text, base)
    written = report(config, text, removal, finding, Seconds(time_all(config, run, text)))
    path = Path(config.output_dir) / "table.md"
    path.write_text(written + "\n", encoding="utf-8")
    print(f"\n{written}\n\nWritten: {path}, and pictures beside it")


if __name__ == "__main__":
    main()
