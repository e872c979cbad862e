"""Size, speed and scores of a student in PyTorch, as ONNX, and as ONNX in 8 bits; README's table of them.

    .venv/bin/python benchmarks/int8.py run runs/sst2/student/best  # some minutes with its training; needs ../shared
    .venv/bin/python benchmarks/int8.py readme                      # the table again, from the file

The table's student came of ($MINILM as in README)

    lad-fast finetune --task sst2 --data-dir ../shared/glue --max-steps 400 --num-threads 1 --learning-rate 1e-4 \\
        --model $MINILM --output-dir runs/sst2/teacher
    lad-fast distill --task sst2 --data-dir ../shared/glue --max-steps 400 --num-threads 1 --student-layers 3 \\
        --teacher runs/sst2/teacher/best --output-dir runs/sst2/student
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from bench_record import README, ROOT, machine, markdown, replace_between
from onnxruntime import InferenceSession, SessionOptions

from lad_fast.export import export_onnx
from lad_fast.glue import get_task, load_split
from lad_fast.models import load_classifier

RESULT = ROOT / "benchmarks/results/int8.json"
MARKERS = ("<!-- int8: begin -->", "<!-- int8: end -->")
SHAPES = ((1, 32), (32, 128))
ROUNDS = {(1, 32): 200, (32, 128): 10}
Logits = Callable[[dict[str, np.ndarray]], np.ndarray]


def run(folder: Path) -> None:
    torch.set_num_threads(1)
    task = get_task("sst2")
    model, tokenizer = load_classifier(folder, task, fine_tuned=True)
    examples = load_split(task, "validation", ROOT.parent / "shared/glue")

    def pytorch(inputs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return model(**{name: torch.from_numpy(values) for name, values in inputs.items()}).logits.numpy()

    with tempfile.TemporaryDirectory() as place:
        ways = {"PyTorch, float32": (pytorch, sum(p.numel() * p.element_size() for p in model.parameters()))}
        for name, int8 in (("ONNX, float32", False), ("ONNX, 8 bits", True)):
            path = export_onnx(folder, Path(place) / name, int8)
            ways[name] = onnx_logits(path), path.stat().st_size
        text = " ".join(examples.texts)  # of real words, to be cut at each length
        batches = {
            shape: dict(tokenizer([text] * shape[0], max_length=shape[1], truncation=True, return_tensors="np"))
            for shape in SHAPES
        }
        rows = [{"way": name, "bytes": size, **score(ways["PyTorch, float32"][0], logits, tokenizer, examples)}
                for name, (logits, size) in ways.items()]  # fmt: skip
        for shape, batch in batches.items():
            times = {name: [] for name in ways}
            for _ in range(ROUNDS[shape]):  # in turns: what slows the machine for a while slows all
                for name, (logits, _) in ways.items():
                    start = time.thread_time()
                    logits(batch)
                    times[name].append(time.thread_time() - start)
            for row in rows:
                row[f"{shape[0]} x {shape[1]}"] = round(statistics.median(times[row["way"]]), 6)
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    size = {"layers": model.config.num_hidden_layers, "width": model.config.hidden_size}
    content = {"machine": machine(), "versions": versions, "model": size, "rows": rows}
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    readme()


def onnx_logits(path: Path) -> Logits:
    options = SessionOptions()
    options.intra_op_num_threads = 1  # in the calling thread, whose time is taken
    session = InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(["logits"], inputs)[0]


def score(expected: Logits, logits: Logits, tokenizer, examples) -> dict:
    """Accuracy, and how far predictions and logits are PyTorch's."""
    pairs = []
    for start in range(0, len(examples), 32):
        inputs = dict(tokenizer(examples.texts[start : start + 32], padding=True, return_tensors="np"))
        pairs.append((expected(inputs), logits(inputs)))
    theirs, ours = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return {
        "accuracy": round(float((ours.argmax(1) == examples.labels).mean()), 4),
        "same": round(float((ours.argmax(1) == theirs.argmax(1)).mean()), 4),
        "difference": float(f"{np.abs(ours - theirs).max():.2g}"),
    }


def table(content: dict) -> str:
    """README's part between the markers."""
    model, versions = content["model"], content["versions"]
    shapes = [f"{batch} x {length}" for batch, length in SHAPES]
    header = ["model", "size", *(f"B x S = {shape}" for shape in shapes), "accuracy", "same predictions", "logits off"]
    rows = [
        [
            row["way"], f"{row['bytes'] / 1e6:.1f} MB", *(f"{1e3 * row[shape]:.3g} ms" for shape in shapes),
            f"{100 * row['accuracy']:.1f}", f"{100 * row['same']:.1f} %", f"{row['difference']:.2g}",
        ]
        for row in content["rows"]
    ]  # fmt: skip
    return (
        f"A student of {model['layers']} layers, {model['width']} wide, on SST-2's validation split. Measured on "
        f"{content['machine']}, torch\n{versions['torch']}, onnxruntime {versions['onnxruntime']}; medians of one "
        f"thread's processor time, which other jobs hardly change.\n\n{markdown(header, rows)}"
    )


def readme() -> None:
    replace_between(README, MARKERS, table(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    measure = commands.add_parser("run")
    measure.add_argument("folder", type=Path)
    measure.set_defaults(run=lambda arguments: run(arguments.folder))
    commands.add_parser("readme").set_defaults(run=lambda _: readme())
    arguments = parser.parse_args()
    arguments.run(arguments)
