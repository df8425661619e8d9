"""`validation_dataset`, as users give it, to named targets whose rows are paired as training rows are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..directions.validation import Collate, ValidationTarget
from . import requirements
from .batches import IdColumns
from .boundaries import check_mask


class ValidationCollator:
    """A collator whose rows lose their ids first, if they have any; documents of a row are apart, or are refused.

    (Of samples that the collator packs it is tried, see `packed`.)
    """

    def __init__(self, collate: Collate, columns: IdColumns, packs: bool):
        self.collate = collate
        self.columns = columns
        self.packs = packs

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collate([self.columns.without(row) for row in rows])
        if not self.packs:
            check_mask(batch)
        return batch


def read_targets(
    validation_dataset: Any,
    rows_and_collator: Callable[[Any], tuple[Any, Collate]],
    columns: IdColumns,
    shifted: bool,
    packs: bool,
    progress: bool,
) -> list[ValidationTarget]:
    """The targets of one dataset, whose target is called "", or of a dict of datasets.

    Raises:
        ValueError: there is none, or one without a name, without rows or without a label.
    """
    if validation_dataset is None or (isinstance(validation_dataset, dict) and not validation_dataset):
        raise ValueError(
            "validation_dataset is missing: name the rows whose loss is to be explained, or a dict of them by name"
        )
    named = validation_dataset if isinstance(validation_dataset, dict) else {"": validation_dataset}
    targets = []
    for name, dataset in named.items():
        if not isinstance(name, str) or (isinstance(validation_dataset, dict) and not name):
            raise ValueError(f"validation_dataset: {name!r} names a target; give each a name of its own, a string")
        argument = f"validation_dataset[{name!r}]" if name else "validation_dataset"
        requirements.check_rows(dataset, argument)
        requirements.check_map_style(dataset, argument)
        if len(dataset) == 0:
            raise ValueError(f"{argument} is empty: give it a row at least")
        rows, collate = rows_and_collator(dataset)
        targets.append(
            ValidationTarget.of(name, rows, ValidationCollator(collate, columns, packs), shifted, packs, progress)
        )
    return targets
