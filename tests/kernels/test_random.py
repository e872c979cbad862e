"""Random configurations, drawn and shrunk by Hypothesis, against the float64 reference."""

from dataclasses import replace

import pytest
import torch
from cases import Case, check, run, run_loss
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreting import concurrent_programs

from lad_fast.kernels import launch

# Groups of few values can have little variance, which magnifies rounding: looser than elsewhere.
pytestmark = pytest.mark.kernels
TOLERANCE = 2e-4
SEEDS = st.integers(0, 2**16)


def cases(most_examples: int, longest: int, widest: int, deepest: int = 4):
    return st.integers(2, deepest).flatmap(
        lambda layers: st.builds(
            Case,
            batch=st.integers(1, most_examples),
            length=st.integers(1, longest),
            hidden_size=st.integers(8, widest),
            layers=st.just(layers),
            wanted=st.permutations(range(layers)).flatmap(
                lambda p: st.integers(1, len(p)).map(lambda n: tuple(p[:n]))
            ),
            norm=st.sampled_from(("sequence", "token")),
            mode=st.sampled_from(("plain", "masked", "packed")),
            reverse=st.booleans(),
        )
    )


def example(most: int):
    """On a GPU fewer: there every size is a kernel to be compiled."""
    most = most if launch.interpreted() else most // 10
    return settings(max_examples=most, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@given(cases(3, 36, 70), SEEDS, st.sampled_from(("torch", "triton")))
@example(30)
def test_aggregation(case, seed, backend):
    inputs = case.build(torch.float32, seed)
    expected = run(case, inputs, torch.float64, "reference")
    check(run(case, inputs, torch.float32, backend), expected, TOLERANCE)


@given(
    cases(3, 20, 40), SEEDS, st.sampled_from(("triton", "cublas", "persistent")),
    st.sampled_from(("triton", "persistent")), st.integers(1, 16),
)  # fmt: skip
@example(100)
def test_losses_in_any_form(case, seed, forward, backward, multiprocessors):
    """Also where fewer programs than tiles run at once, so that forms give way to others or take turns."""
    inputs = case.build(torch.float32, seed)
    expected = run_loss(case, inputs, torch.float64, "reference")
    choice = replace(launch.INTERPRETED, forward=forward, backward=backward, multiprocessors=multiprocessors)
    with launch.forced(choice), concurrent_programs(order=seed):
        check(run_loss(case, inputs, torch.float32, "triton"), expected, TOLERANCE)


@given(cases(6, 20, 40), SEEDS, st.integers(1, 600))
@example(30)
def test_losses_in_any_cut_into_blocks(case, seed, block):
    """On the back end that cuts, also where products are laid out for many rows or take several blocks' rows."""
    inputs = case.build(torch.float32, seed)
    expected = run_loss(case, inputs, torch.float64, "reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "CPU_BLOCK_ELEMENTS", block)
        patch.setattr(launch, "product_rows", lambda weight: 3 * block // case.hidden_size)  # in float32 too
        patch.setattr(launch, "PACKED_ROWS", 40)
        check(run_loss(case, inputs, torch.float32, "torch"), expected, TOLERANCE)
