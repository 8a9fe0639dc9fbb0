"""Tests that catch mutations of several packages."""

from __future__ import annotations

PLAIN_MATMUL = ("test_one_process_equals_plain_torch[True-none]",)
RESUME = ("test_resume_in_the_same_layout_changes_no_bit[fp64-1]",)


def small(*names: str) -> tuple[str, ...]:
    """The two-rank cases of test_equivalence.SMALL."""
    return tuple(f"test_two_ranks_equal_one[{name}]" for name in names)


def shape(name: str) -> tuple[str, ...]:
    """A case of test_shapes: FAMILY-LAYOUT."""
    return (f"test_shapes::test_layout_equals_one_process[{name}]",)


def hf(name: str) -> tuple[str, ...]:
    """A family's comparison with transformers."""
    return (f"test_import_gives_transformers_logits_and_gradients[{name}]",)


def norms(*cases: str) -> tuple[str, ...]:
    """Cases of the test that counts the norm of a known gradient in several layouts."""
    return tuple(f"test_the_norm_equals_that_of_the_unsharded_gradient[{case}]" for case in cases)
