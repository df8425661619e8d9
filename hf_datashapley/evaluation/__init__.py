"""How true values are: exact Shapley values of one update, and how far others are from them."""

from .fidelity import Fidelity, fidelity
from .shapley import ShapleyValues, exact_shapley, monte_carlo_shapley


__all__ = ["Fidelity", "ShapleyValues", "exact_shapley", "fidelity", "monte_carlo_shapley"]
