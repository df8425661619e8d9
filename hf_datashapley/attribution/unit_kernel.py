"""The kernel of members' features where groups are scored, and the groups' features, in one pass over the members:

    K = sum over members i of phi_i phi_i^T           group  sum over its members i of c_i P g_i

with phi_i = w_i P g_i, and w_i and c_i the estimator's factors. A kernel of groups' features
(Ley et al., arXiv 2410.09940) knows the spread between groups alone, this one all of it; and a group's score is
the sum of the scores that its members would have by themselves.

Nothing of a member is kept. The sum so far is, F x F numbers beside the shards, after each of them: a run that is
killed goes on, and ends with the same bytes. (Where the kernel's file is lost, members are gone over again.) Cost: F^2
products for each member; a row is read once for each shard of groups that it has members of, and once more where it
ends one of the runs of `TOGETHER` members.

Shapes: G groups of a shard, U members, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..free_memory import free_memory
from ..grouping import Grouping
from ..ranks import Ranks
from ..whole_files import write_whole
from .corpus import Corpus
from .measures import Measure, Sums, over_units


# Of members' features that are made together.
TOGETHER_BYTES = 64 * 2**20
TOGETHER = 1024

# The numbers of some members, what was measured of them -> w [U], c [U], each None for 1.
Factors = Callable[[np.ndarray, Sums], tuple[Tensor | None, Tensor | None]]


class Members:
    """The members of groups, as they lie in the rows: one shard of groups after the other.

    Args:
        train: whose units are groups.
        shard: so many groups make a shard.

    Attributes:
        corpus: whose units are the members, in this order.
        unit: of each member its number among all of them, int64 [members].
        group: of each its group.
    """

    def __init__(self, train: Corpus, shard: int):
        assert train.partition is not None
        labels = train.partition.labels
        self._shard = labels // shard
        self.unit = np.argsort(self._shard, kind="stable")
        self.group, self._shard = labels[self.unit], self._shard[self.unit]
        place = np.empty(len(labels), dtype=np.int64)
        place[self.unit] = np.arange(len(labels))
        self.corpus = train.parted(Grouping(place, len(labels)))
        self._size = shard

    def range_of(self, start: int) -> tuple[int, int]:
        """The members of the shard whose first group it is, from one to another."""
        first, last = np.searchsorted(self._shard, [start // self._size, start // self._size + 1])
        return int(first), int(last)


class KernelSum:
    """Of the shards that are done, in files of the processes that make it.

    Args:
        folder: that all of them see.
        member: of the ensemble.
        width: F.

    Raises:
        ValueError: there is no memory for it.
    """

    def __init__(self, folder: Path, member: int, width: int, ranks: Ranks):
        self.folder, self.member = folder, member
        self.path = folder / f"kernel-{member}-{ranks.index:05d}.safetensors"
        check_memory(width)
        begun = self.path.is_file()
        self._gram = read(self.path, "gram") if begun else torch.zeros(width, width, dtype=torch.float64)
        self._own = read(self.path, "starts").tolist() if begun else []
        self._done = self.done()
        self._start = 0

    def begin(self, start: int) -> None:
        """The shard that begins there comes next."""
        self._start = start

    def add(self, features_UF: Tensor) -> None:
        """Of the shard; once, also where it had to be made again because its file was lost."""
        if self._start not in self._done:
            own = features_UF.cpu().double()
            self._gram.addmm_(own.T, own)

    def finish(self) -> None:
        """The shard is written."""
        if self._start not in self._done:
            self._own.append(self._start)
            write_whole(self.path, save({"gram": self._gram, "starts": torch.tensor(self._own)}))

    def done(self) -> set[int]:
        """Where shards begin that it holds, of all processes."""
        return {start for path in self._paths() for start in read(path, "starts").tolist()}

    def total(self) -> Tensor:
        """Over all processes, which are done; a copy."""
        return torch.stack([read(path, "gram") for path in self._paths()]).sum(0)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"kernel-{self.member}-*.safetensors"))


def read(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            found: Tensor = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and fit again") from error
    return found


def kernel_bytes(width: int) -> int:
    """On disk, of a member of the ensemble and a process; twice that while it is written."""
    return 8 * width**2


def check_memory(width: int) -> None:
    needed = 3 * kernel_bytes(width)  # the sum, its Cholesky factor, and one of them in the making
    if needed > free_memory(torch.device("cpu")):
        raise ValueError(
            f"kernel='unit' makes a matrix of {width:,} x {width:,} features, {needed / 2**30:.0f} GiB in all: set a "
            "smaller projection_dim, or kernel='group'"
        )


def grouped_sums(
    members: Members, measure: Measure, width: int, model: nn.Module, factors: Factors, kernel: KernelSum
) -> Callable[[int, int], Sums]:
    """Makes what is stored of the groups from one to another, and adds their members to the kernel."""
    together = max(1, min(TOGETHER, TOGETHER_BYTES // (4 * width)))

    def make(start: int, stop: int) -> Sums:
        total: Sums | None = None
        begin, end = members.range_of(start)
        for first in range(begin, end, together):
            last = min(first + together, end)
            sums = over_units(members.corpus, first, last, measure, width, model)
            for_kernel, for_group = factors(members.unit[first:last], sums)
            kernel.add(times(sums.numbers, for_kernel))
            own = Sums(times(sums.numbers, for_group), sums.loss, sums.miss, sums.tokens)
            total = added(total, own, torch.from_numpy(members.group[first:last] - start), stop - start)
        assert total is not None
        return total

    return make


def times(x_UF: Tensor, factor_U: Tensor | None) -> Tensor:
    return x_UF if factor_U is None else x_UF * factor_U.to(x_UF).unsqueeze(1)


def added(total: Sums | None, own: Sums, group_U: Tensor, groups: int) -> Sums:
    place = group_U.to(own.numbers.device)

    def plus(before: Tensor | None, x: Tensor) -> Tensor:
        sums = x.new_zeros(groups, *x.shape[1:]) if before is None else before
        return sums.index_add_(0, place, x)

    before = (None,) * 4 if total is None else (total.numbers, total.loss, total.miss, total.tokens)
    return Sums(*map(plus, before, (own.numbers, own.loss, own.miss, own.tokens)))
