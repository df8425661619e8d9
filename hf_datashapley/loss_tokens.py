"""Which rows carry how many loss terms: the tokens that a value is spread over.

A causal language model predicts the next token, so the first label of a row is never predicted; other models are
scored at the label's own position, and a model with one label a row (sequence classification) has one loss term.
"""

from peft import PeftModel
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


IGNORED = -100
CAUSAL_LM_NAMES = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model compares the labels with the predictions made one position earlier."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    return any(cls.__name__ in CAUSAL_LM_NAMES for cls in type(model).__mro__)


def count_loss_tokens(labels: Tensor, shifted: bool) -> Tensor:
    """Loss terms of each row, int64 [rows]; `labels` [rows, ...] with `IGNORED` where there is none."""
    if labels.is_floating_point():
        return labels.new_ones(labels.shape[0]).long()
    if labels.ndim == 1:
        return labels.ne(IGNORED).long()
    return loss_positions(labels, shifted).flatten(1).sum(1)


def loss_positions(labels: Tensor, shifted: bool) -> Tensor:
    """Where a label is predicted, bool [rows, positions]; `labels` [rows, positions]."""
    where = labels.ne(IGNORED)
    if shifted:
        where[:, 0] = False
    return where
