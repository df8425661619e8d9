"""What costs nothing: scores that know neither the model's gradients nor its training.

A method that does not beat them has not shown that gradients say more than likeness. All return float32
[units, queries], higher for what is named first; their unit means nothing. Units of several rows: join their texts,
or add up scores with `sum_over_units`.

Shapes: U units, Q queries, N rows, D width, B rows of a batch, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import default_data_collator

from ..attribution.losses import without_cache
from ..directions.validation import Collate, evaluating
from .one_update import Floats, Rows, token_losses
from .query_losses import batches_of


Scores = NDArray[np.float32]
WORD = re.compile(r"\w\w+")


def same_source(unit_sources: Sequence[Any], query_sources: Sequence[Any]) -> Scores:
    """1 where unit and query are of the same source, domain, author, ...; else 0."""
    found: Scores = (np.asarray(unit_sources)[:, None] == np.asarray(query_sources)[None]).astype(np.float32)
    return found


def bm25(units: Sequence[Any], queries: Sequence[Any]) -> Scores:
    """BM25 (Robertson et al., 1995) in Lucene's form, k1 = 1.5, b = 0.75, by the package `bm25s`.

    Args:
        units, queries: texts, cut into lower-case words of two letters and more; or lists of token ids, taken as they
            are. A query's repeated words count as often as they stand there.

    Raises:
        ImportError: the extra "evaluation" is not installed.
    """
    try:
        import bm25s
    except ModuleNotFoundError as error:
        raise ImportError(
            'bm25 needs bm25s, which is not installed: pip install "hf_datashapley[evaluation]"'
        ) from error
    index = bm25s.BM25(method="lucene")
    index.index([words(unit) for unit in units], show_progress=False)
    # By ids, since `get_scores` takes no query without a word.
    columns = [index.get_scores_from_ids(index.get_tokens_ids(words(query))) for query in queries]
    return np.stack(columns, axis=1).astype(np.float32)


def words(text: Any) -> list[str]:
    """Of a text, or of a list of token ids."""
    return WORD.findall(text.lower()) if isinstance(text, str) else [str(token) for token in text]


def cosine(unit_vectors: Any, query_vectors: Any) -> Scores:
    """Of embeddings, [U, D] and [Q, D]: a sentence encoder's, or `mean_hidden_states`. 0 for a vector of zeros."""
    units_UD, queries_QD = (np.asarray(vectors, dtype=np.float64) for vectors in (unit_vectors, query_vectors))
    if units_UD.ndim != 2 or queries_QD.ndim != 2 or units_UD.shape[1] != queries_QD.shape[1]:
        raise ValueError(
            f"vectors have shapes {units_UD.shape} and {queries_QD.shape}: give [units, width] and [queries, width]"
        )
    return (directions(units_UD) @ directions(queries_QD).T).astype(np.float32)


def directions(vectors_ND: Floats) -> Floats:
    length_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return vectors_ND / np.where(length_N1 == 0, 1.0, length_N1)


@torch.no_grad()
def mean_hidden_states(
    model: nn.Module,
    rows: Sequence[Any],
    *,
    layer: int = -1,
    batch_size: int = 16,
    data_collator: Collate = default_data_collator,
) -> Scores:
    """What the model makes of each row, meaned over its tokens (those of `attention_mask`, if there is one); [N, D].

    Costs a forward pass. The model is left as it was. Documents that share a row do not see each other.

    Args:
        layer: -1: the last hidden state; 0: the embeddings that go into the first block.
    """
    device = next(model.parameters()).device
    found = []
    with evaluating(model), without_cache(model):
        for batch in batches_of(rows, data_collator, batch_size, device):
            inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
            hidden_BTD = model(**inputs, output_hidden_states=True).hidden_states[layer].float()
            found.append(mean_over_tokens(hidden_BTD, batch).cpu())
    return torch.cat(found).numpy()


def mean_over_tokens(hidden_BTD: Tensor, batch: Rows) -> Tensor:
    """[B, D]"""
    if "attention_mask" not in batch:
        return hidden_BTD.mean(1)
    mask_BT1 = batch["attention_mask"][..., None].to(hidden_BTD.dtype)
    return (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)


@torch.no_grad()
def own_loss(
    model: nn.Module,
    rows: Sequence[Any],
    queries: int,
    *,
    batch_size: int = 16,
    data_collator: Collate = default_data_collator,
) -> Scores:
    """The row's own loss, the same for every query: what the model still finds hard, it may have learnt most from.

    The sum of its token losses, since a unit's gradient is that of the sum. Costs a forward pass. The model is left as
    it was.
    """
    device = next(model.parameters()).device
    with evaluating(model):
        batches = batches_of(rows, data_collator, batch_size, device)
        losses_N = torch.cat([token_losses(model, batch).sum(1).cpu() for batch in batches])
    return losses_N.float().numpy()[:, None].repeat(queries, axis=1)


def sum_over_units(scores_NQ: Any, labels_N: Any) -> Scores:
    """Scores of rows added up to those of the units that `labels` names, [N, Q] -> [U, Q]."""
    scores_NQ, labels_N = np.asarray(scores_NQ), np.asarray(labels_N)
    sums_UQ = np.zeros((int(labels_N.max()) + 1, scores_NQ.shape[1]))
    np.add.at(sums_UQ, labels_N, scores_NQ)
    return sums_UQ.astype(np.float32)


def trivial_baselines(
    model: nn.Module,
    units: Sequence[Any],
    queries: Sequence[Any],
    *,
    unit_sources: Sequence[Any] | None = None,
    query_sources: Sequence[Any] | None = None,
    batch_size: int = 16,
    data_collator: Collate = default_data_collator,
) -> dict[str, Scores]:
    """All of them by name, for tables, removal curves and tail-patches of rows: BM25 (over token ids), the cosines of
    mean embeddings and of mean last hidden states, the rows' own loss; and same source, where sources are given.

    Raises:
        ImportError: the extra "evaluation" is not installed.
    """
    found = {"BM25": bm25([row["input_ids"] for row in units], [row["input_ids"] for row in queries])}
    if unit_sources is not None and query_sources is not None:
        found["same source"] = same_source(unit_sources, query_sources)
    for name, layer in {"embedding cosine": 0, "last hidden state cosine": -1}.items():
        vectors = [
            mean_hidden_states(model, rows, layer=layer, batch_size=batch_size, data_collator=data_collator)
            for rows in (units, queries)
        ]
        found[name] = cosine(*vectors)
    found["loss"] = own_loss(model, units, len(queries), batch_size=batch_size, data_collator=data_collator)
    return found
