"""Inputs for operator tests, and the one way in which they compare a back end with the float64 reference."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

import lad_fast
from lad_fast.functional import chain_loss

GATES = ("weight", "bias", "norm_weight", "norm_bias")


@dataclass(frozen=True)
class Case:
    """A gate chain to run: sizes, norm, padding, order."""

    batch: int = 3
    length: int = 5
    hidden_size: int = 24
    layers: int = 4
    wanted: tuple[int, ...] = (1, 3)
    norm: str = "sequence"
    mode: str = "plain"
    reverse: bool = False
    seq_len: int = 8

    def build(self, dtype: torch.dtype, seed: int = 0) -> dict:
        """States of teacher and student and upstream gradients, rounded to ``dtype``; float32 gates; the padding."""
        generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        num_tokens = self.batch * self.length
        shape = (num_tokens, self.hidden_size) if self.mode == "packed" else (self.batch, self.length, self.hidden_size)
        seq_len = max(self.seq_len, self.length)
        gates, size = self.layers - 1, self.hidden_size
        affine = (gates, seq_len, size) if self.norm == "sequence" else (gates, size)
        mask = cu_seqlens = None
        if self.mode == "masked":
            lengths = torch.randint(0, self.length + 1, (self.batch,), generator=generator)
            lengths[0] = self.length
            mask = (torch.arange(self.length) < lengths[:, None]).long()
        if self.mode == "packed":
            cuts = torch.randint(0, num_tokens + 1, (self.batch,), generator=generator).tolist()
            bounds = sorted({*cuts, *range(0, num_tokens, seq_len), num_tokens})  # no example above seq_len
            cu_seqlens = torch.tensor(bounds)
        return {
            "hidden": [draw(*shape).to(dtype) for _ in range(self.layers)],
            "grads": [draw(*shape).to(dtype) for _ in self.wanted],
            "gates": [
                draw(gates, size, size) / size**0.5, draw(gates, size) * 0.3,
                1 + 0.3 * draw(*affine), 0.3 * draw(*affine),
            ],
            "attention_mask": mask,
            "cu_seqlens": cu_seqlens,
            "student": [draw(*shape).to(dtype) for _ in self.wanted],
        }  # fmt: skip


def operands(case: Case, inputs: dict) -> tuple[list, list, tuple, tuple]:
    """What the operators take of :meth:`Case.build`: states of teacher and student (T, D); the four parameters; and
    row_mask, cu_seqlens and seq_len."""
    hidden, student = ([h.reshape(-1, case.hidden_size) for h in inputs[name]] for name in ("hidden", "student"))
    weight, bias, *affine = inputs["gates"]
    mask, cu_seqlens = inputs["attention_mask"], inputs["cu_seqlens"]
    if case.mode != "packed" and case.norm == "sequence":
        affine = [parameter[:, : case.length].contiguous() for parameter in affine]
    where = (
        None if mask is None else mask.bool().reshape(-1),
        None if cu_seqlens is None else cu_seqlens.int(),
        0 if case.mode == "packed" else case.length,
    )
    return hidden, student, (weight, bias, *affine), where


def run(case: Case, inputs: dict, dtype: torch.dtype, backend: str, function=None) -> dict[str, torch.Tensor]:
    """Aggregates and all gradients. ``function`` replaces ``lad_fast.fused_aggregate``."""
    function = function or lad_fast.fused_aggregate
    hidden = [h.detach().to(dtype).requires_grad_() for h in inputs["hidden"]]
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    gates = [g.detach().clone().to(gate_dtype).requires_grad_() for g in inputs["gates"]]
    outputs = function(
        hidden,
        gates,
        case.wanted,
        inputs["attention_mask"],
        inputs["cu_seqlens"],
        reverse=case.reverse,
        backend=backend,
    )
    torch.autograd.backward(outputs, [g.to(dtype) for g in inputs["grads"]])
    result = {f"aggregate {layer}": out.detach() for layer, out in zip(case.wanted, outputs, strict=True)}
    return result | gradients(hidden, gates)


def gradients(hidden: list, gates) -> dict[str, torch.Tensor]:
    result = {f"grad of layer {i}": h.grad for i, h in enumerate(hidden)}
    return result | {f"grad of {name}": g.grad for name, g in zip(GATES, gates, strict=True)}


def run_loss(
    case: Case, inputs: dict, dtype: torch.dtype, backend: str, function=None, upstream=None
) -> dict[str, torch.Tensor]:
    """Hidden losses through the chain and all gradients, from an upstream gradient of 1, 2, ... for student layer 1,
    2, ... ``function`` replaces ``chain_loss``. With ``upstream``, K gradients in its place, the teacher needs none."""
    function = function or chain_loss
    hidden, student = ([h.detach().to(dtype).requires_grad_() for h in inputs[name]] for name in ("hidden", "student"))
    if upstream is not None:
        hidden = [h.detach() for h in hidden]
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    gates = [g.detach().clone().to(gate_dtype).requires_grad_() for g in inputs["gates"]]
    stack = SimpleNamespace(**dict(zip(GATES, gates, strict=True)), reverse=case.reverse)
    where = inputs["attention_mask"], inputs["cu_seqlens"]
    losses = function(student, hidden, stack, case.wanted, *where, 50.0, backend=backend)
    losses.backward((torch.arange(1.0, len(losses) + 1) if upstream is None else upstream).to(losses.dtype))
    result = {"losses": losses.detach()} | {f"grad of student layer {k}": h.grad for k, h in enumerate(student)}
    return result | gradients(hidden, gates)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of ``expected``; infinite where ``actual`` is not finite."""
    actual, expected = actual.double(), expected.double()
    if not torch.isfinite(actual).all():
        return float("inf")
    return ((actual - expected).norm() / expected.norm()).item()


def check(actual: dict, expected: dict, tolerance: float) -> None:
    """Each tensor within ``tolerance`` of the reference, and zero where the reference has no gradient.

    Where the reference's float64 numbers are rounding noise around an exact zero (a group of one element has a
    constant norm), ours must be noise too.
    """
    for name, right in expected.items():
        ours = actual[name]
        if right is None or not right.any():
            assert ours is None or not ours.any(), f"{name} must be zero"
            continue
        if right.abs().max() < 1e-12:
            assert ours.abs().max() < 1e-4, f"{name} must be noise around zero"
            continue
        assert ours is not None, f"{name} is missing"
        error = relative_error(ours, right)
        assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"


# float32: sums of up to thousands of terms at 6e-8 each. Half types: one rounding of every stored intermediate
# (aggregate, gate, carried gradient) along the chain at 4e-3 (bfloat16) and 5e-4 (float16); the interpreter
# truncates bfloat16 stores, which doubles that. Measured worst cases are about half of each.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}
