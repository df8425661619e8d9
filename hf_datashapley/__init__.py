"""In-Run Data Shapley for Hugging Face Transformers: what each training sample did to the loss you care about.

The public names are imported when they are first used, so that ``import hf_datashapley`` stays cheap and the command
line can answer ``--help`` without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .attribution import (
        CheckpointEnsemble,
        DropoutEnsemble,
        GradCos,
        GradDot,
        Influence,
        LateValues,
        Less,
        LoraEnsemble,
        Partition,
        TracIn,
        Trak,
    )
    from .documents import pack_documents
    from .ledger import load_audit, load_updates, load_value_history, load_values
    from .trainer import ShapleyConfig, ShapleyTrainer

__version__ = "0.1.0.dev0"

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
    "ShapleyConfig",
    "ShapleyTrainer",
    "TracIn",
    "Trak",
    "load_audit",
    "load_updates",
    "load_value_history",
    "load_values",
    "pack_documents",
]

_HOME = {
    "CheckpointEnsemble": "attribution",
    "DropoutEnsemble": "attribution",
    "GradCos": "attribution",
    "GradDot": "attribution",
    "Influence": "attribution",
    "LateValues": "attribution",
    "Less": "attribution",
    "LoraEnsemble": "attribution",
    "Partition": "attribution",
    "TracIn": "attribution",
    "Trak": "attribution",
    "ShapleyConfig": "trainer",
    "ShapleyTrainer": "trainer",
    "load_audit": "ledger",
    "load_updates": "ledger",
    "load_value_history": "ledger",
    "load_values": "ledger",
    "pack_documents": "documents",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
