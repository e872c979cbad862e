"""The objective's forward and backward, back end beside back end: ``pytest benchmarks/``.

Before anything is timed, the same case has to give the reference's loss and gradients. Sizes are BERT-base's (D 768,
L 12, K 6): 480 tokens, a packed SST-2 batch; 4096, the published batch of 32 examples padded to 128.
"""

import pytest
import torch

from lad_fast import GateStack, LADObjective

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton", "torch") if DEVICE == "cuda" else ("reference", "torch")


def case(num_tokens: int):
    torch.manual_seed(0)
    objective = LADObjective(GateStack(12, 768, 128), 6).to(DEVICE)
    shape = (num_tokens // 32, 32, 768) if num_tokens == 480 else (num_tokens // 128, 128, 768)
    student = [torch.randn(shape, device=DEVICE).requires_grad_() for _ in range(6)]
    teacher = [torch.randn(shape, device=DEVICE) for _ in range(12)]
    logits = [torch.randn(shape[0], 2, device=DEVICE) for _ in range(2)]
    labels = torch.randint(2, shape[:1], device=DEVICE)
    leaves = [*student, *objective.parameters()]

    def step(backend: str) -> list[torch.Tensor]:
        loss = objective(student, teacher, *logits, labels, backend=backend).loss
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    return step


def synchronized(step, backend: str):
    result = step(backend)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return result


@pytest.mark.parametrize("num_tokens", (480, 4096))
@pytest.mark.parametrize("backend", BACKENDS)
def test_objective_forward_and_backward(benchmark, backend, num_tokens):
    benchmark.group = f"objective, {num_tokens} tokens, float32, {DEVICE}, {torch.get_num_threads()} threads"
    step = case(num_tokens)
    for ours, right in zip(step(backend), step("reference"), strict=True):
        # float32 sums in another order, over up to 4096 tokens and 12 layers
        assert (ours - right).norm() <= 1e-4 * right.norm()
    benchmark.pedantic(synchronized, (step, backend), rounds=5, warmup_rounds=1)
