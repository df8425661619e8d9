"""Directions to score against: the validation gradient, through what the optimizer makes of a gradient."""
