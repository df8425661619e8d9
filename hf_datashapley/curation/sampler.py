"""Rows drawn by their values: better ones sooner and, where not all are drawn, more often.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.utils.data import Sampler


class ValueSampler(Sampler[int]):
    """Draws rows without replacement, the next one always with probability proportional to exp(z / temperature).

    z is the row's value less the mean of all, over their standard deviation, as QuRating does it (Wettig et al.,
    arXiv 2402.09739), here with values that a run has measured. Towards temperature 0 these are the `num_samples` best
    rows, best first; at a high one any, in any order; so that data are chosen by it, and not only their order,
    `num_samples` has to be less than the rows that there are. Rows without a value count as the mean.

    Drawn by the Gumbel top-k trick: one pass over the rows in each epoch, 40 bytes for each of them. The draws depend
    on `seed` and the epoch alone, so every process draws the same, a run that is resumed goes on with the same, and
    no other random number is moved.

    ```python
    class CuratedTrainer(ShapleyTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return ValueSampler(self.train_dataset["value"], num_samples=10_000, temperature=2.0)
    ```

    Args:
        values: of each row, None (or nan) where it has none: the column that `select` and `Values.join` add. Values
            per token, if rows differ in length.
        num_samples: rows of an epoch; None: all.
        temperature: in standard deviations of the values.
        seed: from 0.

    Raises:
        ValueError: there are fewer rows, the temperature is not positive, or a value is infinite.
    """

    def __init__(self, values: Any, num_samples: int | None = None, temperature: float = 1.0, seed: int = 0):
        value_R = as_floats(values)
        if num_samples is None:
            num_samples = len(value_R)
        if not 0 < num_samples <= len(value_R):
            raise ValueError(
                f"num_samples={num_samples}: there are {len(value_R):,} rows, and each is drawn once at most: give a "
                "number from 1 to that"
            )
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: give a number above 0")
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = 0
        self._logit_R = torch.from_numpy(standardized(value_R) / temperature)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        # Seeds that lie side by side give streams that have nothing in common.
        generator.manual_seed(
            int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)[0] >> 1)
        )
        uniform_R = torch.rand(len(self._logit_R), dtype=torch.float64, generator=generator)
        gumbel_R = -torch.log(-torch.log(uniform_R.clamp(min=1e-300)))
        yield from torch.topk(self._logit_R + gumbel_R, self.num_samples).indices.tolist()


def as_floats(values: Any) -> npt.NDArray[np.float64]:
    """float64 [R], nan where there is none. Raises: ValueError, one is infinite."""
    found = np.array(pa.array(values, type=pa.float64(), from_pandas=True).to_numpy(zero_copy_only=False))
    if np.isinf(found).any():
        raise ValueError(f"values: {int(np.isinf(found).sum())} of {len(found)} are infinite: leave these rows out")
    return found


def standardized(value_R: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of mean 0 and standard deviation 1; 0 where there is no value, and all 0 where all are the same."""
    known = ~np.isnan(value_R)
    spread = value_R[known].std() if known.any() else 0.0
    if spread == 0:
        return np.zeros(len(value_R))
    return np.where(known, (value_R - value_R[known].mean()) / spread, 0.0)
