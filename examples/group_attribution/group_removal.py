"""Training again without what is worth most, or without what is worth least: were the values right?

Groups are taken in the order of their value per token. The last one is taken in part, by rows drawn at random, so that
each method takes the same number of tokens at every size of groups. What is measured is the rise of the mean loss of
the queries over that of the training on all rows with the same seed.

Shapes: N rows, Q queries, R seeds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from group_setting import Floats, GroupAttribution, Text, TrainedOn
from group_values import ALL_METHODS, METHODS, Cell, ValueBook, Values, cells, method_of_groups
from hf_datashapley.evaluation import RetrainingBank


Mask = NDArray[np.bool_]
RANDOM, SAME_SOURCE = "rows at random", "rows of the same source"
PRUNED_BY = "gradients"  # the groups that the least valuable rows are dropped by


def ranked(values: Values, highest: bool, seed: int) -> NDArray[np.int64]:
    """Rows in the order in which they are removed: groups by their value, rows of a group as they are drawn."""
    generator = np.random.default_rng(seed)
    key_N = -values.values_N if highest else values.values_N
    return np.lexsort((generator.random(len(key_N)), values.labels_N, key_N))


def without(removed: NDArray[np.int64], rows: int) -> Mask:
    mask_N = np.ones(rows, bool)
    mask_N[removed] = False
    return mask_N


def budget(fraction: float, rows: int) -> int:
    return max(1, round(fraction * rows))


def drawn(text: Text, name: str, draw: int, seed: int) -> NDArray[np.int64]:
    """An order of removal that knows nothing, or only which domains are asked about: those first, at random."""
    order_N = np.random.default_rng([seed, draw]).permutation(len(text.train))
    if name == RANDOM:
        return order_N
    asked_N = text.of_targets_N[order_N]
    return np.concatenate([order_N[asked_N], order_N[~asked_N]])


class Retrainings:
    """Losses by the rows trained on and the seed, from banks in one folder.

    A bank's masks are fixed once it is begun. What is asked for later goes into another one beside it, and what any of
    them has is not done again.
    """

    def __init__(self, folder: Path, training: TrainedOn, workers: int):
        self.folder, self.training, self.workers = folder, training, workers
        self.settings = training.settings
        self._places: dict[tuple[bytes, int], tuple[RetrainingBank, int]] = {}
        self._count = 0
        while (self.folder / f"bank-{self._count}").is_dir():
            self._add(RetrainingBank.at(self.folder / f"bank-{self._count}"))

    def _add(self, bank: RetrainingBank) -> None:
        self._count += 1
        for place, mask_N in enumerate(bank.masks):
            self._places[key(mask_N, bank.seeds[0])] = bank, place

    def make(self, masks: Iterable[Mask], seed: int) -> None:
        """Trains on each of them with the seed, unless that was done."""
        wanted = {key(mask_N, seed): mask_N for mask_N in masks}
        new = [mask_N for name, mask_N in wanted.items() if name not in self._places]
        if new:
            self._add(RetrainingBank(self.folder / f"bank-{self._count}", new, None, [seed], self.settings))
        for bank in dict.fromkeys(self._places[name][0] for name in wanted):
            bank.run(self.training, self.workers)

    def losses(self, mask_N: Mask, seed: int) -> Floats | None:
        """[Q]; None where it was not made."""
        bank, place = self._places.get(key(mask_N, seed), (None, 0))
        path = None if bank is None else bank.path(place, 0)
        return np.load(path) if path is not None and path.is_file() else None

    def rise(self, masks: list[Mask], seeds: int, queries: slice) -> Mean:
        """Of the mean loss of some queries over the whole data's, over the masks of one kind and the seeds."""
        found = []
        for seed in range(seeds):
            made = [self.losses(mask_N, seed) for mask_N in [np.ones_like(masks[0]), *masks]]
            known = [losses_Q[queries].mean() for losses_Q in made if losses_Q is not None]
            if len(known) == len(made):
                found.append(np.mean(known[1:]) - known[0])
        return Mean(np.array(found))


def key(mask_N: Mask, seed: int) -> tuple[bytes, int]:
    return np.packbits(mask_N).tobytes(), seed


@dataclass(frozen=True)
class Mean:
    """Over seeds, [R], of which there may be none yet."""

    found_R: Floats

    @property
    def mean(self) -> float:
        return float(self.found_R.mean()) if len(self.found_R) else float("nan")

    @property
    def error(self) -> float:
        """Standard error over seeds."""
        return float(self.found_R.std(ddof=1) / np.sqrt(len(self.found_R))) if len(self.found_R) > 1 else float("nan")

    def __str__(self) -> str:
        if not len(self.found_R):
            return ""
        return f"{self.mean:+.3f}" + (f" ± {self.error:.3f}" if len(self.found_R) > 1 else "")


class Removal:
    """Every part of the rows that is trained on, by the place in the tables that it is for."""

    def __init__(self, config: GroupAttribution, text: Text, book: ValueBook, bank: Retrainings):
        self.config, self.text, self.book, self.bank = config, text, book, bank
        self.rows = len(text.train)

    @staticmethod
    def with_kernel_of_groups(cell: Cell) -> Cell:
        """Where that makes no difference."""
        return Cell(method_of_groups(cell.method), cell.grouping, cell.size) if cell.is_rows else cell

    def top(self, cell: Cell, fraction: float) -> list[Mask]:
        order_N = ranked(self.book.of(cell), True, self.config.seed)
        return [without(order_N[: budget(fraction, self.rows)], self.rows)]

    def bottom(self, cell: Cell, fraction: float) -> list[Mask]:
        order_N = ranked(self.book.of(cell), False, self.config.seed)
        return [without(order_N[: budget(fraction, self.rows)], self.rows)]

    def known(self, name: str, fraction: float, last: bool = False) -> list[Mask]:
        """At random, or with regard to nothing but the source; `last`: of what is worth least."""
        count = budget(fraction, self.rows)
        orders = [drawn(self.text, name, draw, self.config.seed) for draw in range(self.config.draws)]
        return [without(order_N[-count:] if last else order_N[:count], self.rows) for order_N in orders]

    def cells(self) -> list[Cell]:
        return list(cells(METHODS, self.config.sizes))

    def pruned_cells(self) -> list[Cell]:
        return [cell for cell in self.cells() if cell.is_rows or cell.grouping == PRUNED_BY]

    def kernel_cells(self) -> list[Cell]:
        return [cell for cell in cells(ALL_METHODS, self.config.sizes) if cell.method not in METHODS]

    def make(self) -> None:
        """What is retrained with several seeds first: one budget of removal, and what values are compared with."""
        config, cells_of = self.config, self.cells()
        rest = [part for part in config.fractions if part != config.fraction]
        for seed in range(config.seeds):
            self.bank.make(self.compared(), seed)
            self.bank.make((mask_N for cell in cells_of for mask_N in self.top(cell, config.fraction)), seed)
        for seed in range(config.seeds_elsewhere):
            for part in rest:
                self.bank.make((mask_N for cell in cells_of for mask_N in self.top(cell, part)), seed)
            for part in config.pruned:
                self.bank.make((mask_N for cell in self.pruned_cells() for mask_N in self.bottom(cell, part)), seed)
            self.bank.make(
                (mask_N for cell in self.kernel_cells() for mask_N in self.top(cell, config.fraction)), seed
            )

    def compared(self) -> list[Mask]:
        """All rows, and what is removed at random or by its source."""
        found = [np.ones(self.rows, bool)]
        for name in (RANDOM, SAME_SOURCE):
            found += [mask_N for part in self.config.fractions for mask_N in self.known(name, part)]
            found += [mask_N for part in self.config.pruned for mask_N in self.known(name, part, last=True)]
        return found

    def rise_without_top(self, cell: Cell, fraction: float) -> Mean:
        often = fraction == self.config.fraction and cell.method in METHODS
        return self.bank.rise(self.top(cell, fraction), self.seeds(often), self.tabled)

    def rise_by_kernel(self, cell: Cell) -> Mean:
        """As many seeds for all kernels."""
        top = self.top(self.with_kernel_of_groups(cell), self.config.fraction)
        return self.bank.rise(top, self.seeds(False), self.tabled)

    def rise_without_bottom(self, cell: Cell, part: float) -> Mean:
        return self.bank.rise(self.bottom(cell, part), self.seeds(False), self.tabled)

    def rise_without_known(self, name: str, fraction: float, last: bool = False, chosen_on: bool = False) -> Mean:
        """`chosen_on`: of the queries that the setting was chosen on."""
        asked = slice(self.tabled.stop, None) if chosen_on else self.tabled
        return self.bank.rise(self.known(name, fraction, last), self.config.seeds, asked)

    def seeds(self, often: bool) -> int:
        return self.config.seeds if often else self.config.seeds_elsewhere

    @property
    def tabled(self) -> slice:
        return slice(0, len(self.text.tabled))
