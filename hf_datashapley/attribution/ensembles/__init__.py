"""Members to average scores over: models, checkpoints, dropout masks, LoRA adapters."""

from .checkpoints import CheckpointEnsemble
from .cost import Cost
from .dropout import DropoutEnsemble
from .fingerprints import model_fingerprint
from .lora import LoraEnsemble
from .models import Ensemble, Models, as_ensemble, in_turn


__all__ = [
    "CheckpointEnsemble",
    "Cost",
    "DropoutEnsemble",
    "Ensemble",
    "LoraEnsemble",
    "Models",
    "as_ensemble",
    "in_turn",
    "model_fingerprint",
]
