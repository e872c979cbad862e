"""Random configurations, drawn by Hypothesis, against the float64 reference."""

import pytest
import torch
from cases import Case, check, run, run_loss
from hypothesis import given, settings
from hypothesis import strategies as st

from lad_fast.kernels import launch

# Groups of few values can have little variance, which magnifies rounding: looser than elsewhere.
TOLERANCE = 2e-4


def cases(most_examples: int, longest: int, widest: int):
    return st.builds(
        Case,
        batch=st.integers(1, most_examples),
        length=st.integers(1, longest),
        hidden_size=st.integers(8, widest),
        layers=st.just(4),
        wanted=st.permutations(range(4)).flatmap(lambda p: st.integers(1, 4).map(lambda n: tuple(p[:n]))),
        norm=st.sampled_from(("sequence", "token")),
        mode=st.sampled_from(("plain", "masked", "packed")),
        reverse=st.booleans(),
    )


@given(cases(3, 36, 70), st.integers(0, 2**16), st.sampled_from(("torch", "triton")))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_aggregation(case, seed, backend):
    inputs = case.build(torch.float32, seed)
    expected = run(case, inputs, torch.float64, "reference")
    check(run(case, inputs, torch.float32, backend), expected, TOLERANCE)


@given(cases(6, 20, 40), st.integers(0, 2**16), st.integers(1, 600))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_losses_in_any_cut_into_blocks(case, seed, block):
    """On the back end that cuts, and also where products are laid out for many rows."""
    inputs = case.build(torch.float32, seed)
    expected = run_loss(case, inputs, torch.float64, "reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "CPU_BLOCK_ELEMENTS", block)
        patch.setattr(launch, "PACKED_ROWS", 40)
        check(run_loss(case, inputs, torch.float32, "torch"), expected, TOLERANCE)
