"""`ShapleyTrainer` and `ShapleyConfig`: a `transformers.Trainer` that values what it trains on."""

from .config import ShapleyConfig
from .trainer import ShapleyTrainer


__all__ = ["ShapleyConfig", "ShapleyTrainer"]
