"""How true values are: exact Shapley values of one update, and retrainings that attributions have to foretell."""

from .bank import RetrainingBank, random_masks
from .baselines import bm25, cosine, mean_hidden_states, own_loss, same_source, sum_over_units, trivial_baselines
from .fidelity import Fidelity, fidelity
from .language_model import LanguageModelRetraining
from .lds import LinearDatamodelingScore, lds
from .query_losses import query_losses, query_margins
from .removal import Brittleness, RemovalCurve, brittleness, removal_curve
from .shapley import ShapleyValues, exact_shapley, monte_carlo_shapley
from .table import table
from .tail_patch import TailPatch, tail_patch


__all__ = [
    "Brittleness",
    "Fidelity",
    "LanguageModelRetraining",
    "LinearDatamodelingScore",
    "RemovalCurve",
    "RetrainingBank",
    "ShapleyValues",
    "TailPatch",
    "bm25",
    "brittleness",
    "cosine",
    "exact_shapley",
    "fidelity",
    "lds",
    "mean_hidden_states",
    "monte_carlo_shapley",
    "own_loss",
    "query_losses",
    "query_margins",
    "random_masks",
    "removal_curve",
    "same_source",
    "sum_over_units",
    "table",
    "tail_patch",
    "trivial_baselines",
]
