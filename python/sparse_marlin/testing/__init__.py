"""What the tests judge multiplications with, and users may: generators, a float64 reference, the acceptance rule."""

from .compare import acceptance, assert_accepted, assert_same_bits, reference
from .generate import (
    activations,
    coordinate_codes,
    dequantized,
    group_scales,
    one_hot_activations,
    poisoned_allocations,
    random_codes,
    random_scales,
)

__all__ = [
    "acceptance",
    "activations",
    "assert_accepted",
    "assert_same_bits",
    "coordinate_codes",
    "dequantized",
    "group_scales",
    "one_hot_activations",
    "poisoned_allocations",
    "random_codes",
    "random_scales",
    "reference",
]
