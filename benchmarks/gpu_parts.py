"""Parts of gpu.sh: what the sanitizer looks at, a profile of a training step, a training run from end to end.

Nothing here takes the command line, whose parser may be missing where nothing can be installed.

    python benchmarks/gpu_parts.py doctor
    python benchmarks/gpu_parts.py check
    python benchmarks/gpu_parts.py small
    python benchmarks/gpu_parts.py forms
    python benchmarks/gpu_parts.py profile DIR
    python benchmarks/gpu_parts.py train DIR
"""

import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from contestants import GRAPHS, make
from measuring import DEVICE
from objectives import Contestant, Problem
from objectives import Shape as ObjectiveShape
from transformers import BertForSequenceClassification
from workloads import MAX_LENGTH, SHARED, SIZES, made_up, package_folder

from lad_fast import GateStack, LADObjective
from lad_fast.demo import DemoConfig, build_tokenizer, demo
from lad_fast.doctor import doctor
from lad_fast.glue import get_task, load_split
from lad_fast.kernels import launch
from lad_fast.training import DistillConfig, FinetuneConfig, distill, finetune
from lad_fast.tuning import median_seconds


@dataclass(frozen=True)
class Case:
    """A call of the objective: examples of these lengths, D hidden size, L teacher layers, and how padding is told."""

    lengths: tuple[int, ...]
    hidden_size: int
    layers: int
    norm: str
    mode: str

    def gradients(
        self, dtype: torch.dtype, device: torch.device, backend: str, work: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
    ):  # fmt: skip
        """Loss and gradients by states rounded to ``dtype``, computed in ``work`` or else in ``dtype``; on the CPU."""
        torch.manual_seed(0)
        lengths, width = torch.tensor(self.lengths), max(self.lengths)
        shape = (int(lengths.sum()),) if self.mode == "packed" else (len(lengths), width)

        def normal(*size: int, keep: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(size).to(keep).to(work or keep).to(device)

        teacher = [normal(*shape, self.hidden_size) for _ in range(self.layers)]
        student = [normal(*shape, self.hidden_size).requires_grad_() for _ in range(self.layers // 2)]
        logits = normal(len(lengths), 2, keep=torch.float32).requires_grad_()
        other_logits = normal(len(lengths), 2, keep=torch.float32)
        gates = GateStack(self.layers, self.hidden_size, width, self.norm)
        objective = LADObjective(gates, self.layers // 2, backend=backend).to(device, work)
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)
        mask = (torch.arange(width) < lengths[:, None]).to(device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss = objective(
                student, teacher, logits, other_logits, torch.arange(len(lengths), device=device) % 2,
                attention_mask=mask if self.mode == "masked" else None,
                cu_seqlens=bounds if self.mode == "packed" else None,
            ).loss  # fmt: skip
        leaves = [*student, logits, *objective.parameters()]
        return [g.detach().double().cpu() for g in (loss, *torch.autograd.grad(loss, leaves))]


def cases(*sizes: tuple[tuple[int, ...], int, int]) -> list[Case]:
    return [
        Case(*size, norm, mode)
        for size in sizes
        for norm in ("sequence", "token")
        for mode in ("plain", "masked", "packed")
    ]


def forms(kind: str) -> list[launch.ChainLaunch]:
    """A launch in every form, with every tile that this GPU has for one of KINDS."""
    gpu, (dtype, autocast) = launch.gpu(DEVICE), KINDS[kind]
    return [
        launch.settings(forward, backward, tile, gpu.multiprocessors)
        for tile in launch.GEMM[gpu.architecture, launch.kind(dtype, autocast or dtype)]
        for forward, backward in (("triton", "triton"), ("cublas", "triton"), ("persistent", "persistent"))
    ]


SMALL = ((5, 9, 3), 72, 4)
USUAL = ((128, 31, 77, 1), 768, 6)
# The dtype of states, and autocast's. "mixed" is how a model trains in half precision: its states come out of layer
# norms, which autocast leaves in float32.
KINDS = {
    "float32": (torch.float32, None), "float16": (torch.float16, None), "bfloat16": (torch.bfloat16, None),
    "mixed": (torch.float32, torch.bfloat16),
}  # fmt: skip
# Of a gradient's norm: one rounding of every stored intermediate along the chain, or of every operand of a product.
TOLERANCE = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2, "mixed": 2e-2}


def at_once(function: Callable, *arguments: list) -> Iterator:
    """Results as by ``map``, of processes of their own: what takes long is compiling, one kernel after another.

    Kernels that were compiled lie in Triton's cache for every later process.
    """
    workers = max(1, min(14, (os.cpu_count() or 1) - 1))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(function, *arguments)


def _error(case: Case, kind: str, i_form: int) -> tuple[float, str]:
    """The worst relative error of loss and gradients against the reference in float64, and what was raised."""
    dtype, autocast = KINDS[kind]
    expected = case.gradients(dtype, torch.device("cpu"), "reference", work=torch.float64)
    try:
        with launch.forced(forms(kind)[i_form]):
            found = case.gradients(dtype, DEVICE, "triton", autocast=autocast)
    except Exception as error:  # behind some of them the process has no GPU any more: the first one tells
        return math.inf, f"{type(error).__name__}: {error}"
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
    return max(math.inf if math.isnan(error) else error for error in errors), ""


def check() -> None:
    """Every form against the reference in float64: both norms, padding counted, masked and packed, each kind.

    float16, whose kernels are bfloat16's but for a type, on small sizes alone: compiling them takes long.
    """
    every = [(case, kind) for case in cases(USUAL) for kind in KINDS if kind != "float16"]
    every += [(case, kind) for case in cases(SMALL) for kind in KINDS]
    work = [(case, kind, i) for case, kind in every for i in range(len(forms(kind)))]
    wrong = 0
    found = at_once(_error, *zip(*work, strict=True))
    for (case, kind, i), (error, raised) in zip(work, found, strict=True):
        choice, is_right = forms(kind)[i], error <= TOLERANCE[kind]
        wrong += not is_right
        how = f"{choice.forward} {choice.gemm.block_m} x {choice.gemm.block_n}"
        print("right" if is_right else "WRONG", f"{error:.1e} {case} {kind} {how} {raised}", flush=True)
    print(f"{len(work)} launches, {wrong} wrong")
    sys.exit(wrong > 0)


def small() -> None:
    """Every kind of Triton kernel, forward and backward, on odd sizes: what a sanitizer can follow in a minute."""
    for case in cases(SMALL):
        for choice in forms("bfloat16"):
            with launch.forced(choice):
                case.gradients(torch.bfloat16, DEVICE, "triton")


TIMED = (ObjectiveShape(480, 768, 12, seq_len=32), ObjectiveShape(4096, 768, 12))


def _seconds(shape: ObjectiveShape, kind: str, i_form: int) -> float:
    problem = Problem(shape, "bfloat16")
    problem.teacher = [state.to(KINDS[kind][0]) for state in problem.teacher]
    contestant = Contestant("triton", "objective", problem)
    with launch.forced(forms(kind)[i_form]):
        return median_seconds(contestant.step)


def time_forms() -> None:
    """Forward and backward of the objective in every form, at the sizes of the benchmarks' first table: with a cached
    teacher's states, and with those that it hands over."""
    kinds = ("bfloat16", "mixed")
    work = [(shape, kind, i) for shape in TIMED for kind in kinds for i in range(len(forms(kind)))]
    list(at_once(_seconds, *zip(*work, strict=True)))  # compiles; what it times runs beside the others
    for shape, kind, i in work:
        choice = forms(kind)[i]
        tile = f"{choice.gemm.block_m} x {choice.gemm.block_n}"
        how = f"{kind}, {choice.forward} and {choice.backward}, {tile}"
        print(f"{shape}, {how}: {1e6 * _seconds(shape, kind, i):.0f} us", flush=True)


def profile(folder: Path) -> None:
    """A trace and a table of kernels of one padded step, plain and replayed as a CUDA graph."""
    tables, examples = [], made_up(32)
    size = SIZES["base" if DEVICE.type == "cuda" else "minilm"]
    for name in ("ours, bfloat16", f"ours, bfloat16, {GRAPHS}"):
        if name.endswith(GRAPHS) and DEVICE.type != "cuda":
            continue
        runner = make(name, size, examples, "max_length", mask_padding=False)
        for _ in range(6):
            runner.run(examples)
        with torch.profiler.profile(record_shapes=True) as found:
            runner.run(examples)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
        stem = name.replace(", ", "-").replace(" ", "-")
        found.export_chrome_trace(str(folder / f"trace-{stem}.json.gz"))
        sort = "self_cuda_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
        tables.append(f"{name}\n{found.key_averages(group_by_input_shape=True).table(sort_by=sort, row_limit=60)}")
    (folder / "profile.txt").write_text("\n\n".join(tables), encoding="utf-8")


def train(folder: Path) -> None:
    """Fine-tune and distil on RTE from $LAD_FAST_SHARED; without it, the demo.

    The teacher starts from the small model's real weights where its package is installed, else at random.
    """
    if not (SHARED / "glue/rte").is_dir():
        print(f"no {SHARED}/glue/rte: the demo instead")
        demo(DemoConfig(output_dir=folder / "demo", progress=False))
        return
    common = {"task": "rte", "data_dir": SHARED / "glue", "epochs": 2, "progress": False}
    package = package_folder(SIZES["minilm"])
    model, tokenizer = (None, None) if package else _random_teacher()
    config = FinetuneConfig(model=str(package), output_dir=folder / "teacher", **common)
    _report("teacher", finetune(config, model=model, tokenizer=tokenizer))
    config = DistillConfig(
        teacher=str(folder / "teacher/best"), student_layers=3, output_dir=folder / "student", **common
    )
    _report("student", distill(config))


def _random_teacher():
    examples = load_split(get_task("rte"), "train", SHARED / "glue")
    tokenizer = build_tokenizer([*examples.texts, *examples.text_pairs])
    tokenizer.model_max_length = MAX_LENGTH
    size = SIZES["base"]
    return BertForSequenceClassification(size.config(size.teacher_layers)), tokenizer


def _report(name: str, result) -> None:
    print(f"{name}: {result.best_metrics}, {result.steps} steps, {result.tokens / result.seconds:.0f} tokens/s")


if __name__ == "__main__":
    what, *where = sys.argv[1:]
    parts = {"forms": time_forms, "check": check, "small": small, "profile": profile, "train": train}
    parts["doctor"] = lambda: sys.exit(doctor())
    parts[what](*map(Path, where))
