"""float16 and bfloat16 at the ends of their range: BERT's outlier features, and groups without variance."""

from dataclasses import replace

import pytest
import torch
from cases import TOLERANCE, Case, check, run_loss
from interpreting import concurrent_programs

from lad_fast.kernels import launch

# The interpreter's sigmoid is 1 / (1 + exp(-x)): 0 where exp overflows, as it should be.
pytestmark = [pytest.mark.kernels, pytest.mark.filterwarnings("ignore:overflow encountered in exp")]
BACKENDS = ("torch", "triton", "persistent", "cublas")
# Large values in a few features of every token, as published BERT models have them in their upper layers.
OUTLIERS = {3: 60.0, 17: -60.0, 18: 45.0}


@pytest.fixture
def backend(request):
    """Name of a back end; a form of Triton's is chosen on the way."""
    if request.param == "torch":
        yield "torch"
        return
    backward = "persistent" if request.param == "persistent" else "triton"
    with launch.forced(replace(launch.INTERPRETED, forward=request.param, backward=backward)):
        yield "triton"


def compare(case: Case, inputs: dict, dtype: torch.dtype, backend: str, tolerance: float) -> None:
    expected = run_loss(case, inputs, torch.float64, "reference")
    with concurrent_programs():
        actual = run_loss(case, inputs, dtype, backend)
    assert all(value is None or value.isfinite().all() for value in actual.values())
    check(actual, expected, tolerance)


@pytest.mark.parametrize("norm", ("sequence", "token"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_outlier_features(backend, dtype, norm):
    """A row's sum of squares reaches 10^4, an example's 10^5 and more: past float16's largest number, 65504."""
    case = Case(batch=3, length=24, hidden_size=40, layers=3, wanted=(0, 2), norm=norm, mode="masked", seq_len=24)
    inputs = case.build(dtype)
    for state in inputs["hidden"]:
        for feature, value in OUTLIERS.items():
            state[..., feature] += value
    # As large on both sides: a student of such a teacher has them too.
    for state in inputs["student"]:
        state[..., 3] += 1.0
    assert torch.finfo(torch.float16).max < 24 * 60.0**2
    # The interpreter truncates bfloat16, and the outliers carry most of a gradient: their rounding is not averaged out.
    compare(case, inputs, dtype, backend, TOLERANCE[dtype] * (3 if dtype == torch.bfloat16 else 1))


# What rounding a mean of 60 leaves (6e-8 of it), rstd magnifies 316 times.
CONSTANT_TOLERANCE = {torch.float32: 60 * 6e-8 * 316, torch.float16: TOLERANCE[torch.float16]}


@pytest.mark.parametrize("value", (0.0, 1.5, 60.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_constant_rows_have_no_variance(backend, dtype, value):
    """Two layers that agree and are constant along a row: the blend is that constant, and rstd is 1 / sqrt(eps)."""
    case = Case(batch=3, length=7, hidden_size=40, layers=2, wanted=(1,), norm="token")
    inputs = case.build(dtype)
    for state in inputs["hidden"]:
        state[:, 2] = value
        state[1] = value
    compare(case, inputs, dtype, backend, CONSTANT_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_constant_examples_have_no_variance(backend, dtype):
    case = Case(batch=3, length=7, hidden_size=40, layers=2, wanted=(1,), norm="sequence")
    inputs = case.build(dtype)
    for state in inputs["hidden"]:
        state[1] = 60.0
    compare(case, inputs, dtype, backend, CONSTANT_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_groups_of_one_number_have_no_variance(backend, dtype):
    """Blends of unlike layers, which a half type cannot hold: each is its own mean, however it is kept."""
    case = Case(batch=5, length=1, hidden_size=1, layers=3, wanted=(1, 2), seq_len=1)
    inputs = case.build(dtype)
    expected = run_loss(case, inputs, torch.float64, "reference")
    with concurrent_programs():
        actual = run_loss(case, inputs, dtype, backend)
    names = ["losses", "grad of student layer 0", "grad of student layer 1"]
    check({name: actual[name] for name in names}, {name: expected[name] for name in names}, TOLERANCE[dtype])
