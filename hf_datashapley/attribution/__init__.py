"""Values for what was not known while training: other validation sets, other queries, finished models."""

from .ensembles import CheckpointEnsemble, DropoutEnsemble, LoraEnsemble
from .grad_dot import GradCos, GradDot
from .influence import Influence
from .late_values import LateValues
from .partitions import Partition
from .tracin import Less, TracIn
from .trak import Trak


__all__ = [
    "CheckpointEnsemble",
    "DropoutEnsemble",
    "GradCos",
    "GradDot",
    "Influence",
    "LateValues",
    "Less",
    "LoraEnsemble",
    "Partition",
    "TracIn",
    "Trak",
]
