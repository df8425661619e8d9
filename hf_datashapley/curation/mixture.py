"""How much of each domain to train on next.

Shapes: G groups.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..ledger.groups import By
from ..query import Values
from ..query.targets import column_of


def mixture_weights(
    values: Values | str | Path,
    by: By,
    dataset: Dataset | None = None,
    *,
    target: str | None = None,
    temperature: float = 1.0,
    key: str | None = None,
    id_column: str | None = None,
) -> dict[Any, float]:
    """The share of the next run's tokens that each group should have, by what its tokens did in this one.

        share_g  ~  tokens_g exp(z_g / temperature),        z_g = (v_g - mean) / standard deviation

    with v_g the group's value per loss token, and its mean and standard deviation over all loss tokens. A value per
    token is the slope of the target's loss in a group's share, so this is one step of exponentiated gradient from the
    mixture that was trained on, as DoGE makes it in every update (Fan et al., arXiv 2310.15393). Assumption: a step;
    what more of a group would do once it has been seen more often, values do not know. A high temperature leaves the
    mixture as it was, a low one takes the best group alone.

    Shares are of tokens: the probabilities of `datasets.interleave_datasets` where all rows are of one length, as
    packed rows are. Where they are not, divide each by its group's mean number of tokens in a row, and all by their
    sum.

    ```python
    shares = mixture_weights("out", "domain", corpus, target="code")
    interleave_datasets([packed[domain] for domain in shares], probabilities=list(shares.values()), seed=0)
    ```

    Args:
        values, target: the run, and whose loss, as `select` takes them.
        by, dataset, key, id_column: the groups, as `Values.by_group` takes them.
        temperature: in standard deviations of the groups' values per token.

    Returns:
        By group, in the order of their names; they sum to 1. A group without a loss token has 0.

    Raises:
        ValueError: the temperature is not positive, the groups do not fit, or there are no values.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: give a number above 0")
    if not isinstance(values, Values):
        values = Values.open(values)
    column = column_of(target, values.targets)
    table = values.by_group(by, dataset, key=key, id_column=id_column)
    groups = table.with_format("arrow")[:]
    token_G, value_G = groups["tokens"].to_numpy(), groups[column].to_numpy()
    if not token_G.sum():
        raise ValueError("no group has a loss token that was trained on: there is nothing to weigh them by")
    share_G = token_G / token_G.sum()
    each_G = value_G / token_G.clip(min=1)
    mean = (share_G * each_G).sum()
    spread = np.sqrt((share_G * (each_G - mean) ** 2).sum())
    z_G = (each_G - mean) / spread if spread > 0 else np.zeros(len(each_G))
    # The largest is taken away before exp, so that a low temperature does not overflow.
    weight_G = share_G * np.exp((z_G - z_G[token_G > 0].max()) / temperature)
    labels = groups[table.column_names[0]].to_pylist()
    return dict(zip(labels, (weight_G / weight_G.sum()).tolist(), strict=True))
