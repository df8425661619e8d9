"""The processes that train together (data parallel, one model each), and the sums that they make.

A collective waits for every rank, so whether one is made never depends on what a rank holds: its samples, its share of
the validation rows, who asks it for values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor


# Elements that small tensors are gathered to for one collective.
BUCKET = 4_194_304


@dataclass(frozen=True)
class Ranks:
    """This process's place among `count` of them; the one of a single process by default.

    `is_local_main`: the first process of its machine.
    """

    index: int = 0
    count: int = 1
    is_local_main: bool = True

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over the ranks, which then all hold the same bits.

        The tensors are of one type and device, of the same shapes on every rank.
        """
        if self.count == 1:
            return
        small: list[Tensor] = []
        for tensor in tensors:
            # By size alone: how a gradient lies in memory may differ from rank to rank.
            if tensor.numel() >= BUCKET:
                sum_together([tensor])
                continue
            if small and sum(t.numel() for t in small) + tensor.numel() > BUCKET:
                sum_together(small)
                small = []
            small.append(tensor)
        if small:
            sum_together(small)

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.count > 1:
            PartialState().wait_for_everyone()


def sum_together(tensors: list[Tensor]) -> None:
    if len(tensors) == 1 and tensors[0].is_contiguous():
        dist.all_reduce(tensors[0])
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, found in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(found.view(tensor.shape))
