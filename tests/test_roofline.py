"""The counts behind the benchmarks' roofs, on shapes that can be counted by hand."""

from collections import Counter

import pytest
import torch
from measuring import DTYPES, Roofs
from roofline import gate_flops, ideal_bytes, rows, step_flops, trace_objective, tracing
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForSequenceClassification
from workloads import Size

from lad_fast.kernels import launch

ROOFS = Roofs(1e9, dict.fromkeys(DTYPES, 1e9))


def test_a_trace_counts_products_bytes_and_syncs_but_no_views():
    a, b = torch.randn(8, 16), torch.randn(4, 16)
    with tracing() as trace:
        (a @ b.T).sum().item()
    assert [name for name, _, _ in trace.kernels] == ["mm", "sum"]
    assert trace.flops == 2 * 8 * 16 * 4
    assert trace.num_bytes == 4 * (8 * 16 + 16 * 4 + 8 * 4) + 4 * (8 * 4 + 1)
    assert trace.syncs == 1
    assert trace.floor_seconds(ROOFS, "float32") == pytest.approx((1024 + 4 * 224 - 1024 + 4 * 33 + 128) / 1e9)


def test_the_reference_runs_the_products_that_are_needed():
    assert trace_objective("reference", 64, 32, 4, "float32", seq_len=16).flops == gate_flops(64, 32, 4)


def test_the_published_form_runs_the_backward_of_a_gate_once_a_student_layer_above_it():
    # L 4, K 2: gates 1 .. 3, targets behind gates 1 and 3; the first gate's input needs no gradient.
    product = 2 * 64 * 32**2
    assert trace_objective("published", 64, 32, 4, "float32", seq_len=16).flops == product * (3 + 1 + 5)


def test_published_form_waits_at_every_gate_and_loss():
    trace = trace_objective("published", 64, 32, 4, "float32", seq_len=16)
    assert trace.syncs == 4 + 3
    assert trace_objective("torch", 64, 32, 4, "float32", seq_len=16).syncs == 0


def test_triton_launches_far_fewer_kernels():
    triton, reference = (trace_objective(name, 64, 32, 4, "float32", seq_len=16) for name in ("triton", "reference"))
    assert 0 < len(triton.kernels) < len(reference.kernels) / 2


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize(
    ("forward", "backward", "launches"),
    (("persistent", "persistent", 4), ("triton", "persistent", 26), ("cublas", "persistent", 26)),
)
def test_launches_of_the_objective(forward, backward, launches, masked):
    """L 12, both passes and all losses, every kernel counted: 4 where the chain is one launch a pass, at most 3 a gate
    elsewhere."""
    settings = launch.settings(forward, backward, launch.GEMM["sm_90", "half"][0], multiprocessors=132)
    trace = trace_objective("triton", 4096, 768, 12, "bfloat16", settings=settings, masked=masked)
    names = Counter(name for name, _, _ in trace.kernels)
    # What a GPU does not run: counters that it keeps, and float32 operands for a CPU's product of all dW.
    not_there = Counter(zeros=3, _to_copy=2)
    assert names >= not_there
    assert (names - not_there).total() == launches <= max(4, 3 * 11)
    assert trace.flops == gate_flops(4096, 768, 12)


def test_no_variant_is_faster_than_the_ideal():
    *variants, ideal = rows(ROOFS, "float32", 128, 32, 4)
    assert ideal["bytes"] == ideal_bytes(128, 32, 4, "float32")
    assert all(row["flops"] >= ideal["flops"] and row["floor_s"] >= ideal["floor_s"] for row in variants)


def test_step_flops_are_those_of_the_models():
    size, lengths = Size(3, 1, 32, 2, 64), [16] * 4
    forward = []
    for layers in (3, 1):
        model = BertForSequenceClassification(size.config(layers))
        model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter:
            hidden = model.bert.embeddings(torch.zeros(4, 16, dtype=torch.long))
            model.bert.encoder(hidden)
        forward.append(counter.get_total_flops())
    assert step_flops(size, lengths) == forward[0] + 3 * forward[1] + gate_flops(64, 32, 3)
    assert step_flops(size, lengths, with_teacher=False) == 3 * forward[1] + gate_flops(64, 32, 3)
