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
    from .curation import Selection, ValueSampler, mixture_weights, select
    from .documents import pack_documents
    from .hub import push_values_to_hub
    from .ledger import load_audit, load_updates, load_value_history, load_values
    from .query import Values
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
    "Selection",
    "ShapleyConfig",
    "ShapleyTrainer",
    "TracIn",
    "Trak",
    "ValueSampler",
    "Values",
    "load_audit",
    "load_updates",
    "load_value_history",
    "load_values",
    "mixture_weights",
    "pack_documents",
    "push_values_to_hub",
    "select",
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
    "Selection": "curation",
    "ValueSampler": "curation",
    "mixture_weights": "curation",
    "select": "curation",
    "Values": "query",
    "ShapleyConfig": "trainer",
    "ShapleyTrainer": "trainer",
    "load_audit": "ledger",
    "load_updates": "ledger",
    "load_value_history": "ledger",
    "load_values": "ledger",
    "pack_documents": "documents",
    "push_values_to_hub": "hub",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
