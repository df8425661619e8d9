"""What estimators take as `members`: an ensemble is an iterable of models that are ready to be differentiated."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import nn

from .cost import Cost, model_bytes
from .fingerprints import model_fingerprint
from .kept import evaluating


class Ensemble(Protocol):
    """Members come one after the other, each the same in every iteration, and may share their weights: a member is
    only to be used while it is the current one. It is on its device, in eval mode, and exactly the parameters that
    count require grad. Afterwards, also after an exception, what the ensemble was made of is as it was.

    `outputs()` are the models whose outputs weight units (TRAK's Q): the members themselves, unless `forward_only`;
    `fingerprints()` tell members apart from all others, for what is stored of them.
    """

    @property
    def cost(self) -> Cost: ...
    @property
    def forward_only(self) -> bool: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[nn.Module]: ...
    def outputs(self) -> Iterator[nn.Module]: ...
    def fingerprints(self) -> list[str]: ...


class Models:
    """Models that are in memory, as they are.

    Args:
        models: one, or some.
        training_seconds: how long training all of them took, if it is known.
    """

    forward_only = False

    def __init__(self, models: nn.Module | Sequence[nn.Module], training_seconds: float | None = None):
        if not isinstance(models, nn.Module | list | tuple):
            raise ValueError(f"a {type(models).__name__} was given for models: give a model, or a list of models")
        self.models = [models] if isinstance(models, nn.Module) else list(models)
        self.training_seconds = training_seconds
        if not self.models:
            raise ValueError("members is an empty list: give a model, some models, or an ensemble")
        for number, model in enumerate(self.models):
            if not isinstance(model, nn.Module):
                raise ValueError(
                    f"member {number} is a {type(model).__name__}, not a torch.nn.Module: give models, or "
                    "CheckpointEnsemble(paths) for folders"
                )

    @property
    def cost(self) -> Cost:
        count, size = len(self.models), sum(model_bytes(model) for model in self.models)
        return Cost(count, count, 0, self.training_seconds, size, 0)

    def __len__(self) -> int:
        return len(self.models)

    def __iter__(self) -> Iterator[nn.Module]:
        for model in self.models:
            with evaluating(model):
                yield model

    def outputs(self) -> Iterator[nn.Module]:
        return iter(self)

    def fingerprints(self) -> list[str]:
        return [model_fingerprint(model) for model in self.models]


@contextmanager
def in_turn(models: Iterable[nn.Module]) -> Iterator[Iterator[nn.Module]]:
    """Members one after the other, of which the last one that was current is back as it was at the end.

    A loop that an exception leaves keeps its generator, and with it the member, for as long as the exception lives.
    """
    iterator = iter(models)
    try:
        yield iterator
    finally:
        if isinstance(iterator, Generator):
            iterator.close()


def as_ensemble(members: nn.Module | Sequence[nn.Module] | Ensemble) -> Ensemble:
    """An ensemble as it is; a model, or a list of them, as one."""
    if isinstance(members, nn.Module | list | tuple):
        return Models(members)
    if not all(hasattr(members, name) for name in ("outputs", "fingerprints", "forward_only")):
        raise ValueError(
            f"members is a {type(members).__name__}: give a model, a list of models, or an ensemble "
            "(CheckpointEnsemble(paths) for folders)"
        )
    return members  # type: ignore[return-value]
