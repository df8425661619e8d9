"""Which of a run's targets is meant."""

from __future__ import annotations

from ..ledger.layout import value_columns


def column_of(target: str | None, targets: list[str]) -> str:
    """The column with a target's values; None: of the only one.

    Raises:
        ValueError: there are several, or none of that name.
    """
    names = ", ".join(targets)
    if target is None and len(targets) > 1:
        raise ValueError(f"target: this run has values for {names}: name the one that is meant")
    if target is not None and targets == [""]:
        raise ValueError(f"target={target!r}: this run's validation target has no name: leave target out")
    if target is not None and target not in targets:
        raise ValueError(f"target={target!r}: this run has values for {names}: name one of these")
    return value_columns([targets[0] if target is None else target])[0]
