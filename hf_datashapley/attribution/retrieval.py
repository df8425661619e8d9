"""The units with the highest scores, and their texts; found while scores stream by.

Shapes: u units of a block, Q queries, k units of each.
"""

from __future__ import annotations

from collections.abc import Iterable

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .corpus import Corpus


def top_units(blocks: Iterable[tuple[int, Tensor]], k: int, lowest: bool) -> tuple[Tensor, Tensor]:
    """Units [k, Q], int64, and their scores, from the best on; equal scores in the order of units."""
    best_kQ: Tensor | None = None
    for start, block_uQ in blocks:
        own_uQ = torch.arange(start, start + len(block_uQ)).unsqueeze(1).expand(block_uQ.shape)
        scores_uQ = block_uQ.cpu()
        if best_kQ is None:
            best_kQ, found_kQ = scores_uQ, own_uQ
        else:
            best_kQ, found_kQ = torch.cat([best_kQ, scores_uQ]), torch.cat([found_kQ, own_uQ])
        order_kQ = best_kQ.sort(dim=0, descending=not lowest, stable=True).indices[:k]
        best_kQ, found_kQ = best_kQ.gather(0, order_kQ), found_kQ.gather(0, order_kQ)
    assert best_kQ is not None
    return found_kQ, best_kQ


def top_table(
    blocks: Iterable[tuple[int, Tensor]],
    corpus: Corpus,
    k: int,
    lowest: bool,
    tokenizer: PreTrainedTokenizerBase | None,
    text_column: str,
) -> datasets.Dataset:
    """A row for each query and rank, see `Attribution.top`.

    Raises:
        ValueError: `k` is less than 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: ask for at least one unit")
    units_kQ, scores_kQ = top_units(blocks, k, lowest)
    count, queries = units_kQ.shape
    units = units_kQ.T.flatten().numpy()
    columns = {"query": np.repeat(np.arange(queries), count), "rank": np.tile(np.arange(count), queries)}
    columns |= {name: own[units] for name, own in corpus.ids.items()}
    columns["score"] = scores_kQ.T.flatten().float().numpy()
    table = datasets.Dataset.from_dict({name: list(column) for name, column in columns.items()})
    texts = texts_of(corpus, units, tokenizer, text_column)
    return table if texts is None else table.add_column("text", texts)


def texts_of(
    corpus: Corpus, units: np.ndarray, tokenizer: PreTrainedTokenizerBase | None, text_column: str
) -> list[str] | None:
    """Of each unit, where there is a way to it."""
    if corpus.partition is not None:
        return None
    if corpus.reading.unit == "sample" and text_column in corpus.rows[0]:
        return [str(corpus.rows[int(unit)][text_column]) for unit in units]
    if tokenizer is None:
        return None
    return [tokenizer.decode(np.concatenate(list(corpus.tokens(int(unit))))) for unit in units]
