"""Seconds and bytes of attribution by size of groups, beside two baselines.

(a) *The loop* of single-row gradients: plain torch, a forward and a backward pass for each row and each checkpoint,
    and an inner product with one direction. What a kernel or a projection costs is not counted: this is a lower bound
    of what most papers compare with.
(b) *Rows by themselves*: our own estimators with groups of 1, which read many rows in a pass and keep them apart.
(c) *The same route with groups of 1*, the paper's own comparison. For "batched" that is a loop again, with what the
    estimator makes of each gradient.

Groups are random ones, of equal sizes. IF's seconds are those of `score`: its curvature is that of the rows whatever
the groups are, and would come to (a) and (b) alike. Everything else is `fit` and `score`. All are measured in turn, by
one thread, `repeats` times.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from group_setting import GROUPINGS, GroupAttribution, Text, make_partition, new_model, rows_of, token_losses
from group_values import BATCH, METHODS, OF_ROWS, Run, estimator, method_of_groups
from hf_datashapley.evaluation.markdown import markdown
from hf_datashapley.random_state import random_state_kept
from hf_datashapley.whole_files import write_whole


TIMED = (*METHODS, OF_ROWS["TRAK"])
ROUTES = ("summed", "batched")
# Of models and rows that the loop is compared with batches for; and how many rows.
WIDTHS, TOKENS, SHAPE_ROWS = (32, 64, 256), (8, 32, 128), 64


@dataclass(frozen=True)
class Timed:
    """`name`: the method, or what it is compared with; seconds of the CPU and of the clock, and bytes stored."""

    name: str
    route: str
    size: int
    cpu: float
    wall: float
    stored: int = 0


class Stopwatch:
    def __enter__(self) -> Stopwatch:
        self.cpu, self.wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu, self.wall = time.process_time() - self.cpu, time.perf_counter() - self.wall


# What is compared with


def loop_over_rows(run: Run, rows: Tensor, direction: list[Tensor]) -> list[float]:
    """Inner products of every row's gradient with one direction."""
    parameters = list(run.model.parameters())
    found = []
    for row in rows:
        gradients = torch.autograd.grad(token_losses(run.model, row[None]).sum(), parameters)
        found.append(float(sum((own * other).sum() for own, other in zip(gradients, direction, strict=True))))
    return found


def backward_only(run: Run, rows: Tensor) -> None:
    """Weights' gradients, as training has them, `BATCH` rows at a time: no way through whole gradients is faster."""
    parameters = list(run.model.parameters())
    for batch in rows.split(BATCH):
        torch.autograd.grad(token_losses(run.model, batch).sum(), parameters)


@torch.no_grad()
def forward_only(run: Run, rows: Tensor) -> None:
    for batch in rows.split(BATCH):
        token_losses(run.model, batch).sum()


def time_floor(run: Run, text: Text) -> Iterator[Timed]:
    gradients = torch.autograd.grad(token_losses(run.model, text.tabled).mean(), list(run.model.parameters()))
    passes: dict[str, Callable[[], object]] = {
        "loop": lambda: loop_over_rows(run, text.train, list(gradients)),
        "backward": lambda: backward_only(run, text.train),
        "forward": lambda: forward_only(run, text.train),
    }
    for name, make in passes.items():
        with Stopwatch() as watch:
            make()
        yield Timed(name, "", 1 if name == "loop" else BATCH, watch.cpu, watch.wall)


def time_shapes(config: GroupAttribution) -> Iterator[Timed]:
    """The loop and backward passes alone, of models and rows of other sizes, drawn at random: `route` is the width,
    `size` the tokens of a row."""
    for width in WIDTHS:
        for tokens in TOKENS:
            with random_state_kept():
                model = new_model(replace(config, width=width, row_tokens=tokens)).eval()
            run = Run([model], [])
            rows = torch.randint(config.vocabulary, (SHAPE_ROWS, tokens), generator=torch.Generator().manual_seed(0))
            direction = [parameter.detach() for parameter in model.parameters()]
            with Stopwatch() as loop:
                loop_over_rows(run, rows, direction)
            yield Timed("loop", f"width {width}", tokens, loop.cpu, loop.wall)
            with Stopwatch() as backward:
                backward_only(run, rows)
            yield Timed("backward", f"width {width}", tokens, backward.cpu, backward.wall)


# The groups, and the estimators


def time_groups(config: GroupAttribution, run: Run, text: Text) -> Iterator[Timed]:
    for grouping in GROUPINGS:
        for size in config.sizes:
            with Stopwatch() as watch:
                make_partition(config, grouping, size, run.model, text.train)
            yield Timed(grouping, "groups", size, watch.cpu, watch.wall)


def time_estimator(config: GroupAttribution, run: Run, text: Text, method: str, route: str, size: int) -> Timed:
    train, queries = rows_of(text.train), rows_of(text.tabled)
    partition = make_partition(config, "random", size, run.model, text.train)
    with tempfile.TemporaryDirectory() as folder:
        made = estimator(config, method, run, partition=partition, route=route, store_dir=folder)
        with Stopwatch() as fit:
            made.fit(train)
        with Stopwatch() as score:
            made.score(queries, mean=True)
        stored = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    counted = (score,) if method == "IF, EK-FAC" else (fit, score)
    return Timed(method, route, size, sum(own.cpu for own in counted), sum(own.wall for own in counted), stored)


def planned(config: GroupAttribution) -> list[tuple[str, str, int]]:
    """Method, route, size. Rows by themselves have no groups' kernel."""
    return [
        (method, route, size)
        for size in [1, *config.sizes]
        for method in TIMED
        for route in ROUTES
        if method in METHODS or (size > 1 and route == "summed")
    ]


def time_all(config: GroupAttribution, run: Run, text: Text) -> list[Timed]:
    """In turn, and each kept, so that a run that was stopped goes on."""
    found = []
    for repeat in range(config.repeats):
        folder = Path(config.output_dir) / "seconds" / str(repeat)
        found += kept_seconds(folder / "floor.json", lambda: time_floor(run, text))
        for method, route, size in tqdm(planned(config), f"seconds, repeat {repeat + 1}"):

            def make(method: str = method, route: str = route, size: int = size) -> list[Timed]:
                return [time_estimator(config, run, text, method, route, size)]

            found += kept_seconds(folder / f"{method}-{route}-{size}.json", make)
        found += kept_seconds(folder / "groups.json", lambda: time_groups(config, run, text))
        found += kept_seconds(folder / "shapes.json", lambda: time_shapes(config))
    return found


def kept_seconds(path: Path, make: Callable[[], Iterable[Timed]]) -> list[Timed]:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps([asdict(timed) for timed in make()], indent=1).encode())
    return [Timed(**timed) for timed in json.loads(path.read_text(encoding="utf-8"))]


class Seconds:
    """Medians over repeats."""

    def __init__(self, found: list[Timed]):
        self.found = found

    def of(self, name: str, route: str, size: int) -> Timed | None:
        own = [timed for timed in self.found if (timed.name, timed.route, timed.size) == (name, route, size)]
        if not own:
            return None
        cpu, wall = (float(np.median([vars(timed)[key] for timed in own])) for key in ("cpu", "wall"))
        return Timed(name, route, size, cpu, wall, own[0].stored)

    def loop(self, method: str, checkpoints: int) -> float:
        """CPU seconds of (a)."""
        found = self.of("loop", "", 1)
        assert found is not None
        return found.cpu * (checkpoints if method == "TracIn" else 1)


def runtime_table(config: GroupAttribution, seconds: Seconds) -> str:
    lines = []
    in_order = sorted(planned(config), key=lambda own: (TIMED.index(own[0]), ROUTES.index(own[1])))
    for method, route, size in in_order:
        timed, rows, same = (
            seconds.of(method, route, size),
            seconds.of(method_of_groups(method), "summed", 1),
            seconds.of(method_of_groups(method), route, 1),
        )
        if timed is None or rows is None or same is None:
            continue
        cells = [f"{method}, {route}, {size}", f"{timed.cpu:.2f}", f"{timed.wall:.2f}"]
        cells.append(f"{seconds.loop(method, config.checkpoints) / timed.cpu:.1f}")
        cells += [f"{rows.cpu / timed.cpu:.2f}", f"{same.cpu / timed.cpu:.2f}"]
        stored = [f"{timed.stored / 2**20:.3f}", f"{rows.stored / timed.stored:.1f}"] if timed.stored else ["", ""]
        lines.append(cells + stored)
    times = ["times (a)", "times (b)", "times (c)"]
    return markdown(["method, route, rows", "CPU s", "wall s", *times, "stored, MiB", "times less"], lines)


def groups_table(config: GroupAttribution, seconds: Seconds) -> str:
    lines = []
    for grouping in GROUPINGS:
        found = [seconds.of(grouping, "groups", size) for size in config.sizes]
        lines.append([grouping, *(f"{timed.cpu:.2f}" if timed else "" for timed in found)])
    return markdown(["CPU s of forming groups", *map(str, config.sizes)], lines)


def shapes_table(seconds: Seconds) -> str:
    """How many times the loop's seconds are those of backward passes alone."""
    lines = []
    for width in WIDTHS:
        pairs = [[seconds.of(name, f"width {width}", tokens) for name in ("loop", "backward")] for tokens in TOKENS]
        lines.append([f"width {width}", *(f"{a.cpu / b.cpu:.1f}" if a and b else "" for a, b in pairs)])
    head = f"the loop over passes of {BATCH} rows"
    return markdown([head, *(f"{tokens} tokens" for tokens in TOKENS)], lines)


def floor_line(config: GroupAttribution, seconds: Seconds) -> str:
    loop, backward, forward = (
        seconds.of(name, "", size) for name, size in (("loop", 1), ("backward", BATCH), ("forward", BATCH))
    )
    assert loop is not None and backward is not None and forward is not None
    return (
        f"(a), the loop over {config.rows} rows: {loop.cpu:.2f} CPU s ({loop.wall:.2f} s of the clock), "
        f"{1000 * loop.cpu / config.rows:.2f} ms a row; TracIn's is {config.checkpoints} of them. Backward passes "
        f"over all rows, {BATCH} at a time, with nothing else: {backward.cpu:.2f} CPU s, (a) is "
        f"{loop.cpu / backward.cpu:.1f} times that; forward passes alone: {forward.cpu:.2f} CPU s, "
        f"{loop.cpu / forward.cpu:.1f} times."
    )
