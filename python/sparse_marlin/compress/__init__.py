"""One-shot compression of a language model to 2:4-sparse codes, calibrated on text: `sparse_marlin.compress`."""

from .driver import compress
from .problem import Problem, Solution
from .solvers import DEFAULT_QUALITY, QUALITIES

__all__ = ["DEFAULT_QUALITY", "QUALITIES", "Problem", "Solution", "compress"]
