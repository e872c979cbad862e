"""The README.md beside a trained model: what it does, its scores, and how it came about, as the hub takes it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from lad_fast.glue import TASKS, Task

__all__ = ["model_card"]

_HUB_METRICS = {"macro_f1": "f1", "matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}
_GLUE = "nyu-mll/glue"
_MOST_CLASSES = 50  # shown; config.json has all


def model_card(
    name: str,
    task: Task,
    state: Mapping,
    settings: Mapping,
    sources: Mapping[str, str],
    versions: Mapping[str, str],
) -> str:
    """Markdown under the front matter in which the hub reads what a model is.

    Args:
        name: of the model.
        task: what it was trained on.
        state: "step", "epoch" and "metrics" by evaluation split, as training.json has them.
        settings: of the run, by name.
        sources: models it came from by role, "teacher" or "model", "" where they have no name; of a local folder only
            the name is told.
        versions: of libraries.
    """
    shown = {role: _public_name(source) for role, source in sources.items() if source}
    metrics = state["metrics"]
    is_glue = TASKS.get(task.name) == task
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["lad_fast", *(["knowledge-distillation"] if "teacher" in sources else [])],
        base_model=[source for source in shown.values() if _is_hub_name(source)] or None,
        datasets=[_GLUE] if is_glue else None,
        metrics=[_HUB_METRICS.get(metric, metric) for metric in task.metrics],
        model_name=name if any(metrics.values()) else None,
        eval_results=_results(task, metrics, is_glue) or None,
    )
    what = f"predicts the score of task {task.name}"
    if not task.is_regression:
        more = ", …" if task.num_labels > _MOST_CLASSES else ""
        what = f"tells the {task.num_labels} classes of task {task.name}: "
        what += ", ".join(map(_plain, task.labels[:_MOST_CLASSES])) + more
    how = "Fine-tuned", "from"
    if "teacher" in sources:
        how = ("Trained on labels alone", "as a student of") if settings["method"] == "none" else ("Distilled", "from")
    origin = f"{how[0]} {how[1]} {_plain(' and '.join(shown.values()))}" if shown else how[0]
    example = '"a text"' if len(task.text_columns) == 1 else '{"text": "a text", "text_pair": "and its second"}'
    scores = [(split, name, f"{value:.4f}") for split, values in metrics.items() for name, value in values.items()]
    parts = [
        f"# {_plain(name)}",
        f"A text classifier that {what}. {origin} by lad_fast.",
        f'```python\nfrom transformers import pipeline\n\nclassify = pipeline("text-classification", model="PATH")\n'
        f"classify({example})\n```",
        f"## Scores\n\nAfter step {state['step']}, epoch {state['epoch']}.\n\n"
        + (_table(("split", "metric", "score"), scores) if scores else "It was not evaluated."),
        "## Recipe\n\n" + _table(("setting", "value"), settings.items()),
        "## Versions\n\n" + _table(("library", "version"), versions.items()),
    ]
    return f"---\n{data.to_yaml().strip()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _results(task: Task, metrics: Mapping[str, Mapping[str, float]], is_glue: bool) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-classification", metric_type=_HUB_METRICS.get(metric, metric), metric_name=metric,
            metric_value=value,
            dataset_type=_GLUE if is_glue else task.name, dataset_name=f"GLUE {task.name}" if is_glue else task.name,
            dataset_config=task.name if is_glue else None, dataset_split=split,
        )
        for split, values in metrics.items()
        for metric, value in values.items()
    ]  # fmt: skip


def _public_name(source: str) -> str:
    """A hub's name as it is; of a folder, which is nobody else's, its name without what lies above."""
    path = Path(source).expanduser()
    if not path.exists() and not path.is_absolute():
        return str(source)
    path = path.resolve()
    return path.parent.name if path.name in ("best", "last") else path.name


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII) is not None


def _table(head: Sequence[str], rows) -> str:
    lines = [head, ["---"] * len(head), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value) -> str:
    """Text that Markdown and the HTML in it leave as it is, in one line."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", " ".join(str(value).split()))
