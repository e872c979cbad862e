"""What kernels read and write in Triton's interpreter, against the formulas of benchmarks/kernel_counts.py."""

from collections import Counter, defaultdict

import pytest
import torch
from cases import Case, operands
from interpreting import concurrent_programs, counted_traffic
from kernel_counts import FORMULAS, Counts

pytest.importorskip("triton")
from lad_fast.kernels import chain, hidden_loss, launch, logit_loss

CASE = Case(batch=3, length=64, hidden_size=64, layers=4, wanted=(1, 3), seq_len=64)
GATES = 3


def step_of(arguments: dict) -> str:
    """The formula's name for a launch of a chain kernel."""
    if "STAGES" in arguments:
        return f"backward, {arguments['STAGES']}"
    step = {"matmul": "product", "given": "behind cuBLAS", "none": "norm"}[arguments["PRODUCT"]]
    return "forward, both in one" if step == "product" and arguments["NORM"] else f"forward, {step}"


@pytest.fixture
def traffic(monkeypatch):
    """By step: bytes loaded and stored by argument, and launches."""
    found = defaultdict(lambda: {"loaded": Counter(), "stored": Counter(), "launches": 0})
    run = launch.launch

    def count(kernel, grid, **arguments):
        with counted_traffic() as counted:
            run(kernel, grid, **arguments)
        (one,) = counted.values()
        entry = found[step_of(arguments)]
        entry["loaded"] += one.loaded
        entry["stored"] += one.stored
        entry["launches"] += 1

    monkeypatch.setattr(launch, "launch", count)
    return found


def run_chain(forward: str, backward: str, keep: str = "gates") -> Counts:
    """Forward and backward of the case in bfloat16, whose interpreter tiles hold half an example each."""
    tile = launch.INTERPRETED.gemm
    settings = launch.ChainLaunch(forward, backward, tile, tile, launch.TileLaunch(8, 32, 1), multiprocessors=48)
    hidden, student, (weight, *rest), where = operands(CASE, CASE.build(torch.bfloat16))
    with launch.forced(settings), concurrent_programs():
        out = chain.forward(
            hidden, student, list(CASE.wanted), weight, *rest, *where, 1e-5, torch.bfloat16, 1.0, keep
        )  # fmt: skip
        chain.backward(
            [], out.losses, out.factor, hidden, student, list(CASE.wanted), out.weight, *rest, out.states, out.gates,
            out.mean, out.rstd, *where, True, False, True,
        )  # fmt: skip
    tokens, width = hidden[0].shape
    return Counts(tokens, CASE.length, width, 2, 2, settings.gemm, settings.gate, settings.multiprocessors)


def expected(counts: Counts, steps: dict[str, int]) -> tuple[int, int]:
    found = [(times * loads, times * stores) for step, times in steps.items() for loads, stores in [counts.bytes(step)]]
    return sum(loads for loads, _ in found), sum(stores for _, stores in found)


ALONE = ("hidden loss alone, forward", "hidden loss alone, backward")
LOSS, GRADIENT = "forward, a student's loss", "backward, a student's gradient"
# Launches by their step, and the formulas that add up to it.
STEPS = {
    ("triton", "triton", "gates"): {
        "forward, product": {"forward, product": GATES},
        "forward, norm": {"forward, norm": GATES, LOSS: 2},
        "backward, product": {"backward, product": GATES, GRADIENT: 2},
        "backward, gate": {"backward, gate": GATES},
        "backward, sums": {"backward, sums": GATES},
    },
    ("cublas", "triton", "states"): {
        "forward, behind cuBLAS": {"forward, behind cuBLAS": GATES, LOSS: 2},
        "backward, product": {"backward, product": GATES, "backward, gates again": GATES, GRADIENT: 2},
    },
    ("persistent", "persistent", "gates"): {
        "forward, both in one": {"forward, both in one": GATES, LOSS: 2, "forward, weights cast": GATES},
        "backward, all": {
            "backward, product": GATES, "backward, gate": GATES, "backward, sums": GATES, GRADIENT: 2,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("form", STEPS, ids=" ".join)
def test_the_chain_moves_what_is_counted(form, traffic):
    counts = run_chain(*form)
    if form[2] == "states":
        counts = Counts(**{**vars(counts), "g": 0})
    for step, formulas in STEPS[form].items():
        loads, stores = expected(counts, formulas)
        # The top position's product has nothing to multiply, and nothing to carry.
        if "backward, product" in formulas:
            names = counts.names()
            loads -= sum(names[x] * names[y] * names[z] * 2 for x, y, z in ("NTD", "MDD")) + 2 * names["T"] * names["D"]
        if "forward, product" in formulas or "forward, both in one" in formulas or "forward, behind cuBLAS" in formulas:
            stores += 2 * counts.T * counts.D  # the chain's start, kept for the weights' gradient
        found = traffic[step]
        assert found["loaded"].total() == pytest.approx(loads, rel=0.1), (step, found["loaded"])
        assert found["stored"].total() == pytest.approx(stores, rel=0.1), (step, found["stored"])


@pytest.mark.parametrize("form", (("triton", "triton"), ("persistent", "persistent")), ids=" ".join)
def test_a_state_is_read_once_a_pass(form, traffic):
    """Hidden states and students, forward and backward; a gate's values are written once and read once."""
    run_chain(*form)
    state = 2 * 3 * 64 * 64

    def total(direction: str, kind: str, name: str) -> int:
        return sum(entry[kind][name] for step, entry in traffic.items() if step.startswith(direction))

    for direction in ("forward", "backward"):
        assert total(direction, "loaded", "layers") == GATES * state
        assert total(direction, "loaded", "students") == 2 * state
    assert total("forward", "stored", "gates_ptr") == total("backward", "loaded", "gates_ptr") == GATES * state
    assert total("backward", "stored", "grad_students") == 2 * state
    assert total("backward", "stored", "grad_linear_ptr") == GATES * state


def test_losses_move_what_is_counted():
    """The hidden loss alone: 2 states in; in backward 2 in and 2 out. The logit loss: each logit twice, once out; with
    scores for labels: three numbers an example in, two out. Examples' losses are read again, and the hidden losses."""
    states = [torch.randn(100, 96) for _ in range(2)]
    counts = Counts(100, 100, 96, 4, 4, launch.INTERPRETED.gemm, launch.INTERPRETED.gate, 1)
    with counted_traffic() as found:
        losses, factor = hidden_loss.hidden_loss_forward(states[:1], states[1:], None, 1.0)
        hidden_loss.hidden_loss_backward(losses, states[:1], states[1:], None, factor, True, True)
        logits, labels = torch.randn(2, 9, 5), torch.zeros(9, dtype=torch.int64)
        logit_loss.distill_loss_forward(*logits, labels, 10.0, 0.5, 0.5, False, torch.ones(4))
        logit_loss.distill_loss_forward(*logits[:, :, :1], labels.float(), 10.0, 0.5, 0.5, True, None)
    kernels = ("hidden_loss_fwd", "hidden_loss_bwd", "logit_loss", "regression_loss")
    forward, backward, logit, regression = (found[f"_{name}_kernel"] for name in kernels)
    for name, kernel in zip(ALONE, (forward, backward), strict=True):
        loads, stores = counts.bytes(name)
        assert kernel.loaded.total() == pytest.approx(loads, rel=0.01)
        assert kernel.stored.total() == pytest.approx(stores, abs=4 * 100)  # forward's partial sums
    # Besides: the counter, once a program, and its zero; and the sums, three or one.
    assert logit.loaded.total() == 4 * logits[0].nbytes + labels.nbytes + 2 * 4 * 9 + 4 * 4
    assert logit.stored.total() == logits[0].nbytes + 2 * 4 * 9 + 4 * 4
    assert (regression.loaded.total(), regression.stored.total()) == (4 * 9 * 4 + 4, 2 * 9 * 4 + 3 * 4)


def test_every_formula_is_held_to_a_kernel():
    held = {name for steps in STEPS.values() for formulas in steps.values() for name in formulas}
    assert held | set(ALONE) == set(FORMULAS)
