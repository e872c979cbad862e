"""Training runs: fine-tuning and distillation around the step of :mod:`lad_fast.step`, and the published recipes."""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, set_seed

from lad_fast.cpu import keep_freed_memory
from lad_fast.data import Batches, TokenizedSplit, tokenize
from lad_fast.functional import fused_distill_loss
from lad_fast.gates import GateStack
from lad_fast.glue import Task, compute_metrics, get_task, load_split, predictions_from_logits
from lad_fast.models import build_student, load_classifier, model_inputs, run_model, save_checkpoint
from lad_fast.objective import LADObjective
from lad_fast.packed import can_pack, enable_packing
from lad_fast.step import HALF, DistillStep, Prepared, autocast, prepare_ahead
from lad_fast.teacher_cache import TeacherCache, choose_place

__all__ = [
    "RECIPES", "DistillConfig", "Evaluation", "FinetuneConfig", "TrainingResult", "distill",
    "evaluate", "finetune", "recipe",
]  # fmt: skip


@dataclass(kw_only=True)
class TrainingConfig:
    """What fine-tuning and distillation have in common."""

    task: str
    """GLUE task: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli."""
    output_dir: Path
    """Folder for best/, last/, log.jsonl, config.json and results.json; an earlier run's are replaced."""
    data_dir: Path | None = None
    """Folder with GLUE as Parquet files or official TSV files; None takes it from the Hugging Face hub."""
    cache_dir: Path | None = None
    """Folder that keeps tokenised data between runs; None keeps nothing."""
    epochs: int = 3
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, the learning rate's fall included; None goes by epochs."""
    batch_size: int = 32
    """Examples a batch."""
    gradient_accumulation_steps: int = 1
    """Batches an optimizer step; an epoch's last step may take fewer."""
    max_length: int = 128
    """Tokens an example keeps, special ones included."""
    padding: Literal["auto", "longest", "packed", "max_length"] = "auto"
    """Like lengths together, padded to the batch's longest example or packed without padding; or all padded to
    max_length, plainly shuffled. auto packs where a flash kernel takes packed batches: on a GPU, in half precision."""
    learning_rate: float = 3e-5
    """AdamW's peak rate, after warm-up."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the rate rises from 0; at least one step."""
    weight_decay: float = 0.01
    """AdamW's decay; biases and layer norms are left out."""
    max_grad_norm: float = 1.0
    """Gradients above this norm are scaled down to it."""
    precision: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "auto"
    """Of the models' arithmetic; weights, losses and the optimizer stay float32. auto: bfloat16 where the processor
    or GPU multiplies it, else float16 on a GPU and float32 on a CPU."""
    optimizer: Literal["auto", "torch", "apex"] = "auto"
    """Whose fused AdamW; auto takes PyTorch's."""
    cuda_graphs: bool = False
    """Capture forward and backward of each shape of padded batch, and replay them: no launch costs. GPU only."""
    compile: bool = False
    """Compile the encoders by torch.compile: a minute or more at the start, for less in each step."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    num_threads: int | None = None
    """CPU threads; None leaves PyTorch's choice."""
    seed: int = 42
    """Of data order, random weights and dropout."""
    log_every: int = 50
    """Optimizer steps between log lines: the only times that training waits for the GPU."""
    progress: bool = True
    """Progress bar and one line an evaluation, on stderr."""


@dataclass(kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Fine-tune a pre-trained model into a teacher."""

    model: str
    """Pre-trained model: a save_pretrained folder or a name on the Hugging Face hub."""


@dataclass(kw_only=True)
class DistillConfig(TrainingConfig):
    """Distil a fine-tuned teacher into a student with fewer layers."""

    teacher: str
    """Fine-tuned classifier: a save_pretrained folder or a name on the Hugging Face hub."""
    epochs: int = 10
    """Passes over the training data."""
    learning_rate: float = 1e-4
    """AdamW's peak rate for the student, after warm-up."""
    student_layers: int = 6
    """Layers of the student, at most the teacher's."""
    student_init: Literal["teacher", "published", "random"] = "teacher"
    """Start from the teacher's layers, embeddings, pooler and classifier; or from the layers and pooler of
    --pretrained with the rest random, as published; or all random."""
    pretrained: str | None = None
    """The model before fine-tuning, for --student-init published."""
    method: Literal["lad", "logits", "none"] = "lad"
    """Learn from hidden layers and logits; from logits and labels; or from labels alone."""
    gate_learning_rate: float = 5e-6
    """AdamW's peak rate for the gates, after warm-up."""
    temperature: float = 10.0
    """Softens both sides' logits in the soft loss."""
    soft_weight: float = 0.5
    """Weight of the soft loss, against the teacher's logits."""
    hard_weight: float = 0.5
    """Weight of the hard loss, against the labels."""
    hidden_weight: float = 1000.0
    """Weight of the hidden loss (mu), shared among the student's layers."""
    norm: Literal["sequence", "token"] = "sequence"
    """The gates' layer norm: over all tokens of an example, as published, or over each token."""
    reverse: bool = False
    """Run the gates from the last teacher layer to the first."""
    mask_padding: bool = True
    """Keep padding out of norms and hidden loss; False counts it, as published."""
    backend: Literal["triton", "torch", "reference"] | None = None
    """Of the objective; None takes triton on a GPU, torch elsewhere."""
    teacher_cache: Literal["auto", "gpu", "cpu", "disk", "off"] = "auto"
    """Where to keep the teacher's outputs, so that epochs after the first run no teacher. auto takes the first of
    the three with room, or off for a run of one epoch."""


@dataclass
class TrainingResult:
    """What a training run came to; all but the model is also written to results.json.

    Attributes:
        best_metrics, last_metrics: metrics by evaluation split, of best/ and last/; empty without evaluation.
        best_step: optimizer step of best/.
        history: the evaluation lines of log.jsonl.
        seconds: spent in training steps; evaluation and checkpoints left out.
        steps: optimizer steps.
        tokens: real tokens seen.
        num_parameters: of the trained model.
        output_dir: the run's folder.
        model: the trained model as after the last step; the best one lies in best/.
    """

    best_metrics: dict[str, dict[str, float]]
    last_metrics: dict[str, dict[str, float]]
    best_step: int
    history: list[dict]
    seconds: float
    steps: int
    tokens: int
    num_parameters: int
    output_dir: Path
    model: PreTrainedModel | None


def finetune(
    config: FinetuneConfig,
    *,
    task: Task | None = None,
    train: TokenizedSplit | None = None,
    evaluation: dict[str, TokenizedSplit] | None = None,
    model: PreTrainedModel | None = None,
    tokenizer=None,
) -> TrainingResult:
    """Train a classifier on labels and write its checkpoints.

    Args:
        config: see :class:`FinetuneConfig`.
        task: instead of the GLUE task that ``config.task`` names.
        train, evaluation: tokenised data instead of what ``config`` names; evaluation by split name, {} for
            none.
        model, tokenizer: instead of ``config.model``; the model is trained in place.

    Raises:
        ValueError: a setting, model or data file that does not fit; the message names it.
    """
    device = _start(config)
    task = task or get_task(config.task)
    if model is None:
        model, tokenizer = load_classifier(config.model, task)
    _check_classes("model", model, task)
    config = _settle(config, device, model)
    batches, evaluation = _load_batches(config, task, model, tokenizer, train, evaluation, device)
    step = DistillStep(model.to(device), **_step_options(config, batches))
    return _run(config, task, step, batches, evaluation, tokenizer)


def distill(
    config: DistillConfig,
    *,
    task: Task | None = None,
    train: TokenizedSplit | None = None,
    evaluation: dict[str, TokenizedSplit] | None = None,
    teacher: PreTrainedModel | None = None,
    tokenizer=None,
    student: PreTrainedModel | None = None,
) -> TrainingResult:
    """Train a student under a teacher and write its checkpoints, with the gates beside it.

    Args:
        config: see :class:`DistillConfig`.
        task: instead of the GLUE task that ``config.task`` names.
        train, evaluation: tokenised data instead of what ``config`` names; evaluation by split name, {} for
            none.
        teacher, tokenizer: instead of ``config.teacher``; the teacher comes back in eval mode, on the device
            trained on, and otherwise unchanged.
        student: instead of one built by ``config``; trained in place. Another hidden size than the teacher's
            gets one trained projection a layer.

    Raises:
        ValueError: a setting, model or data file that does not fit; the message names it.
    """
    device = _start(config)
    task = task or get_task(config.task)
    if teacher is None:
        teacher, tokenizer = load_classifier(config.teacher, task, fine_tuned=True)
    _check_classes("teacher", teacher, task)
    if student is None:
        student = _make_student(config, task, teacher)
    _check_classes("student", student, task)
    config = _settle(config, device, student, teacher)
    batches, evaluation = _load_batches(config, task, student, tokenizer, train, evaluation, device)
    teacher.to(device)
    student.to(device)
    options = _step_options(config, batches)
    if config.method == "none":
        step = DistillStep(student, **options)
    else:
        cache = _make_cache(config, batches, teacher, options["total_steps"])
        config = replace(config, teacher_cache="off" if cache is None else cache.place)
        step = DistillStep(
            student, teacher, _make_objective(config, task, teacher, student), teacher_cache=cache,
            gate_learning_rate=config.gate_learning_rate, mask_padding=config.mask_padding, **options,
        )  # fmt: skip
    return _run(config, task, step, batches, evaluation, tokenizer)


def _check_classes(role: str, model: PreTrainedModel, task: Task) -> None:
    if model.config.num_labels != task.num_labels:
        raise ValueError(f"{role} has num_labels = {model.config.num_labels}; task {task.name} takes {task.num_labels}")


def _make_student(config: DistillConfig, task: Task, teacher: PreTrainedModel) -> PreTrainedModel:
    num_layers = getattr(teacher.config, "num_hidden_layers", 0)
    if not 1 <= config.student_layers <= num_layers:
        raise ValueError(f"student_layers is {config.student_layers}; this teacher takes 1 to {num_layers}")
    pretrained = None
    if config.student_init == "published":
        if config.pretrained is None:
            raise ValueError("pretrained is None; student_init 'published' takes the model before fine-tuning")
        pretrained, _ = load_classifier(config.pretrained, task)
    return build_student(teacher, config.student_layers, config.student_init, pretrained=pretrained)


def _make_cache(
    config: DistillConfig, batches: Batches, teacher: PreTrainedModel, total_steps: int
) -> TeacherCache | None:
    """A cache where it is asked for, or by itself where batches come more than once and there is room."""
    by_itself = config.teacher_cache == "auto"
    comes_back = total_steps * config.gradient_accumulation_steps > len(batches)
    if config.teacher_cache == "off" or (by_itself and not comes_back):
        return None
    num_layers = teacher.config.num_hidden_layers if config.method == "lad" else 0
    lengths = batches.split.lengths
    if num_layers and not config.mask_padding:
        if config.padding != "max_length":
            if by_itself:
                return None
            raise ValueError(
                f"teacher_cache is {config.teacher_cache!r}; where padding counts (no mask_padding) it takes "
                "padding = 'max_length', since a cached state's padding must not change from batch to batch"
            )
        lengths = np.full_like(lengths, config.max_length)
    dtype = getattr(torch, config.precision) if config.precision in HALF else torch.float32
    hidden_size, output_dir = teacher.config.hidden_size, Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    place = config.teacher_cache
    if by_itself:
        nbytes = num_layers * int(lengths.sum()) * hidden_size * dtype.itemsize
        place = choose_place(nbytes, teacher.device, output_dir)
        if place == "off":
            return None
    return TeacherCache(
        lengths, num_layers, hidden_size, teacher.config.num_labels,
        dtype=dtype, device=teacher.device, place=place, folder=output_dir,
    )  # fmt: skip


def _make_objective(config: DistillConfig, task: Task, teacher: PreTrainedModel, student: PreTrainedModel):
    weights = {
        "temperature": config.temperature,
        "soft_weight": config.soft_weight,
        "hard_weight": config.hard_weight,
        "regression": task.is_regression,
        "backend": config.backend,
    }
    if config.method == "logits":
        return partial(fused_distill_loss, **weights)
    size = teacher.config.num_hidden_layers, teacher.config.hidden_size
    return LADObjective(
        GateStack(*size, config.max_length, config.norm, config.reverse),
        student.config.num_hidden_layers,
        hidden_weight=config.hidden_weight,
        student_hidden_size=student.config.hidden_size,
        **weights,
    ).to(student.device)


def _start(config: TrainingConfig) -> torch.device:
    """Check what nothing further down checks, seed everything, pick the device."""
    counts = "epochs", "max_steps", "gradient_accumulation_steps", "batch_size", "log_every", "num_threads"
    for name in counts:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it takes at least 1")
    for name in ("learning_rate", "gate_learning_rate", "weight_decay", "warmup_ratio"):
        value = getattr(config, name, 0.0)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; it takes a number of at least 0")
    if config.warmup_ratio > 1:
        raise ValueError(f"warmup_ratio is {config.warmup_ratio}; it takes 0 to 1")
    if not config.max_grad_norm > 0:
        raise ValueError(f"max_grad_norm is {config.max_grad_norm}; it takes a number above 0")
    for name in ("precision", "padding", "optimizer", "method", "teacher_cache"):
        known = get_args(get_type_hints(type(config)).get(name))
        value = getattr(config, name, None)
        if known and value not in known:
            raise ValueError(f"{name} is {value!r}; it takes one of {', '.join(known)}")
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed is {config.seed}; it takes 0 to {2**32 - 1}")
    set_seed(config.seed)
    device = _pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def _settle(config: TrainingConfig, device: torch.device, *models: PreTrainedModel) -> TrainingConfig:
    """The configuration with "auto" replaced by what it comes to; models are made to take its batches."""
    precision, padding = config.precision, config.padding
    if precision == "auto":
        precision = fastest_precision(device)
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    counts_padding = not getattr(config, "mask_padding", True)
    if padding == "auto":
        flash = device.type == "cuda" and precision in HALF
        can_be = flash and not counts_padding and not config.cuda_graphs and all(map(can_pack, models))
        padding = "packed" if can_be else "longest"
    if padding == "packed":
        if counts_padding:
            raise ValueError("padding is 'packed'; without mask_padding padding counts, and packed batches have none")
        for model in models:
            enable_packing(model)
    if config.cuda_graphs and (device.type != "cuda" or padding == "packed"):
        raise ValueError("cuda_graphs takes a GPU and padded batches: --padding longest or max_length")
    if config.compile:
        for model in models:
            model.base_model.compile(dynamic=True)
    return replace(config, precision=precision, padding=padding)


def fastest_precision(device: torch.device) -> str:
    """The precision that "auto" takes on a device: the fastest that the hardware multiplies in."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    if device.type != "cpu":
        return "float32"
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if has_bfloat16 else "float32"


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {name!r}; it takes auto, cpu, cuda or cuda:N ({reason})") from error


def _load_batches(
    config: TrainingConfig,
    task: Task,
    model: PreTrainedModel,
    tokenizer,
    train,
    evaluation,
    device: torch.device,
) -> tuple[Batches, dict[str, Batches]]:
    """Batches for training and, by split name, for evaluation, of data passed or named by ``config``."""
    positions = getattr(model.config, "max_position_embeddings", config.max_length)
    if config.max_length > positions:
        raise ValueError(f"max_length is {config.max_length}; this model takes at most {positions} tokens")
    if tokenizer is None and (train is None or evaluation is None):
        raise ValueError("tokenizer is None; a model passed without tokenised data takes its tokenizer too")

    def load(split: str) -> TokenizedSplit:
        examples = load_split(task, split, config.data_dir)
        return tokenize(examples, tokenizer, config.max_length, config.cache_dir)

    train = load("train") if train is None else train
    if evaluation is None:
        evaluation = {split: load(split) for split in task.eval_splits}
    for name, split in {"train": train, **evaluation}.items():
        if split.labels is None:
            raise ValueError(f"split {name} has no labels; training and evaluation take labelled ones")
    pad_token_id = model.config.pad_token_id if tokenizer is None else tokenizer.pad_token_id
    on_gpu = device.type == "cuda"
    # Widths of a multiple of 8 suit a GPU's matrix units; on a CPU they are only more padding (docs/performance.md).
    options = {"max_length": config.max_length, "pin_memory": on_gpu, "pad_to_multiple_of": 8 if on_gpu else 1}
    train = Batches(
        train,
        config.batch_size,
        pad_token_id,
        shuffle=True,
        seed=config.seed,
        padding=config.padding,
        **options,
    )
    evaluation = {
        name: Batches(split, config.batch_size, pad_token_id, shuffle=False, **options)
        for name, split in evaluation.items()
    }
    return train, evaluation


def _step_options(config: TrainingConfig, batches: Batches) -> dict:
    total_steps = config.epochs * math.ceil(len(batches) / config.gradient_accumulation_steps)
    if config.max_steps is not None:
        total_steps = min(total_steps, config.max_steps)
    return {
        "learning_rate": config.learning_rate,
        "total_steps": total_steps,
        "warmup_steps": max(1, round(total_steps * config.warmup_ratio)),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "precision": config.precision,
        "optimizer": config.optimizer,
        "cuda_graphs": config.cuda_graphs,
    }


def _run(
    config: TrainingConfig,
    task: Task,
    step: DistillStep,
    batches: Batches,
    evaluation: dict[str, Batches],
    tokenizer,
) -> TrainingResult:
    """Epochs of steps, with an evaluation and checkpoints after each."""
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    _write_json(output_dir / "config.json", asdict(config))
    best = None
    with _Log(output_dir / "log.jsonl", task.name, step.total_steps, config.progress) as log:
        for epoch in range(1, config.epochs + 1):
            batches.set_epoch(epoch)
            prepared = prepare_ahead(batches, step.prepare, step.student.device)
            for group in _groups(prepared, config.gradient_accumulation_steps):
                log.add(step(*group), group)
                if log.steps % config.log_every == 0:
                    log.write_losses(epoch, step.scheduler.get_last_lr())
                if log.steps == step.total_steps:
                    break
            log.write_losses(epoch, step.scheduler.get_last_lr())
            metrics = {
                name: evaluate(step.student, split, task, precision=config.precision).metrics
                for name, split in evaluation.items()
            }
            state = {"task": task.name, "step": log.steps, "epoch": epoch, "metrics": metrics}
            log.write_metrics(state)
            score = sum(values[task.best_metric] for values in metrics.values())
            # Without evaluation nothing tells epochs apart, and the last is taken.
            if best is None or score > best[0] or not metrics:
                best = score, state
                save_checkpoint(output_dir / "best", step.student, tokenizer, step.gates, state)
            save_checkpoint(output_dir / "last", step.student, tokenizer, step.gates, state)
            log.start_window()
            if log.steps == step.total_steps:
                break
    result = TrainingResult(
        best_metrics=best[1]["metrics"], last_metrics=metrics, best_step=best[1]["step"], history=log.history,
        seconds=log.seconds, steps=log.steps, tokens=log.tokens,
        num_parameters=step.student.num_parameters(), output_dir=output_dir, model=None,
    )  # fmt: skip
    content = asdict(result)
    del content["model"]
    _write_json(output_dir / "results.json", content)
    return replace(result, model=step.student)


def _groups(batches: Iterable, size: int) -> Iterator[tuple]:
    """Tuples of ``size`` batches; the last one may be shorter."""
    iterator = iter(batches)
    return iter(lambda: tuple(islice(iterator, size)), ())


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


class _Log:
    """log.jsonl, the progress bar and the counters. Losses gather on the device until a line is due."""

    def __init__(self, path: Path, title: str, total_steps: int, show: bool) -> None:
        self.show = show
        self.file = path.open("w", encoding="utf-8")
        # disable=None: no bar where stderr is a file or a pipe.
        self.bar = tqdm(total=total_steps, desc=title, unit="step", disable=None if show else True)
        self.history: list[dict] = []
        self.steps = self.tokens = 0
        self.seconds = 0.0
        self.start_window()

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()
        self.file.close()

    def start_window(self) -> None:
        """Forget the losses gathered so far, and start the clock."""
        self.sums: dict[str, Tensor] = {}
        self.window_steps = self.window_tokens = 0
        self.since = time.perf_counter()

    def add(self, losses: dict[str, Tensor], batches: tuple[Prepared, ...]) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.window_tokens += sum(batch.num_tokens for batch in batches)
        self.window_steps += 1
        self.steps += 1
        self.bar.update()

    def write_losses(self, epoch: int, learning_rates: list[float]) -> None:
        """Mean losses since the last line; the one place that reads them from the device."""
        if not self.window_steps:
            return
        flat = torch.cat([value.reshape(-1) for value in self.sums.values()]).div(self.window_steps)
        values = iter(flat.tolist())
        losses = {
            name: [next(values) for _ in range(len(value))] if value.dim() else next(values)
            for name, value in self.sums.items()
        }
        seconds = time.perf_counter() - self.since
        record = {"step": self.steps, "epoch": epoch, **losses, "lr": learning_rates[0]}
        if len(learning_rates) > 2:
            record["gate_lr"] = learning_rates[2]
        record["tokens_per_second"] = round(self.window_tokens / seconds, 1)
        self.seconds += seconds
        self.tokens += self.window_tokens
        self._write(record)
        self.bar.set_postfix_str(f"loss {losses['loss']:.4g}, {record['tokens_per_second']:,.0f} tokens/s")
        self.start_window()

    def write_metrics(self, record: dict) -> None:
        self.history.append(record)
        self._write(record)
        if self.show:
            text = "; ".join(
                f"{split} " + ", ".join(f"{name} {value:.4f}" for name, value in values.items())
                for split, values in record["metrics"].items()
            )
            where = f"{record['task']} epoch {record['epoch']} step {record['step']}"
            self.bar.write(f"{where}: {text}", file=sys.stderr)

    def _write(self, record: dict) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


class Evaluation(NamedTuple):
    """What a model makes of one split, in the order of the examples' ids."""

    metrics: dict[str, float]
    """The task's official metrics; empty for a split without labels."""
    ids: np.ndarray
    """(N,) int64."""
    predictions: np.ndarray
    """(N,) class ids, or floats for regression."""
    logits: np.ndarray
    """(N, C) float32."""


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    task: Task,
    device: torch.device | str | None = None,
    precision: str = "float32",
) -> Evaluation:
    """Predict every example of ``batches``; the model comes back in the mode it was in.

    Args:
        model: a sequence classifier.
        batches: as :class:`~lad_fast.data.Batches` gives them, with ids; in any order.
        task: says what the logits mean.
        device: where to move the model first; None leaves it.
        precision: "float32", "bfloat16" or "float16".
    """
    if device is not None:
        model.to(device)
    was_training = model.training
    model.eval()
    logits, labels, ids = [], [], []
    try:
        with autocast(model.device.type, precision):
            for batch in batches:
                logits.append(run_model(model, model_inputs(model, batch)[0])[0].float())
                ids.append(batch["ids"])
                if "labels" in batch:
                    labels.append(batch["labels"])
    finally:
        model.train(was_training)
    ids = torch.cat(ids).cpu().numpy()
    order = np.argsort(ids, kind="stable")
    logits = torch.cat(logits).cpu().numpy()[order]
    predictions = predictions_from_logits(task, logits)
    metrics = compute_metrics(task, predictions, torch.cat(labels).cpu().numpy()[order]) if labels else {}
    return Evaluation(metrics, ids[order], predictions, logits)


@dataclass(frozen=True)
class Recipe:
    """Published settings of one task (DESIGN section 1), for batches of 32."""

    num_examples: int
    learning_rate: float
    gate_learning_rate: float
    epochs: int
    warmup_ratio: float
    temperature: float
    soft_weight: float
    hard_weight: float
    hidden_weight: float
    teacher_learning_rate: float
    teacher_steps: int
    teacher_warmup_steps: int


RECIPES: dict[str, Recipe] = {
    #              examples    lr  gate lr  ep  warm   T soft hard    mu  teacher lr  steps  warm-up
    "rte": Recipe(2490, 7e-4, 3e-5, 10, 0.1, 10, 0.5, 0.5, 1000, 7e-5, 385, 115),
    "mrpc": Recipe(3668, 7e-4, 5e-6, 20, 0.1, 10, 0.5, 0.5, 500, 7e-5, 345, 1),
    "sst2": Recipe(67349, 1e-4, 1e-6, 20, 0.3, 20, 0.5, 0.5, 1000, 2e-5, 6315, 1894),
    "qnli": Recipe(104743, 1e-4, 1e-6, 4, 0.1, 10, 0.5, 0.5, 1000, 3e-5, 9822, 3274),
    "qqp": Recipe(363846, 5e-4, 5e-7, 5, 0.1, 10, 0.7, 0.3, 1000, 2e-5, 34110, 10233),
    "mnli": Recipe(392702, 1e-4, 5e-7, 4, 0.1, 10, 0.5, 0.5, 500, 3e-5, 36816, 10000),
}
_BERT_BASE = "google-bert/bert-base-uncased"


def recipe(task: str, command: Literal["distill", "finetune"] = "distill") -> dict:
    """Published settings as keywords of :class:`DistillConfig` or :class:`FinetuneConfig`.

    ``max_steps`` holds the published number of steps, counted for batches of 32: another batch size or more
    epochs take another ``max_steps``, or None.

    Raises:
        ValueError: the paper has no settings for the task, or an unknown command.
    """
    if task not in RECIPES:
        raise ValueError(f"task is {task!r}; the paper has recipes for {', '.join(RECIPES)}")
    row, batch_size = RECIPES[task], 32
    common = {
        "batch_size": batch_size, "max_length": 128, "padding": "max_length", "weight_decay": 0.01,
        "max_grad_norm": 1.0, "seed": 42, "precision": "float32",
    }  # fmt: skip
    if command == "finetune":
        return common | {
            "model": _BERT_BASE,
            "learning_rate": row.teacher_learning_rate,
            "epochs": math.ceil(row.teacher_steps / math.ceil(row.num_examples / batch_size)),
            "max_steps": row.teacher_steps,
            "warmup_ratio": row.teacher_warmup_steps / row.teacher_steps,
        }
    if command != "distill":
        raise ValueError(f"command is {command!r}; it takes 'distill' or 'finetune'")
    published = (
        "learning_rate", "gate_learning_rate", "epochs", "warmup_ratio", "temperature", "soft_weight",
        "hard_weight", "hidden_weight",
    )  # fmt: skip
    return (
        common
        | {name: getattr(row, name) for name in published}
        | {
            "max_steps": round(row.num_examples / batch_size * row.epochs),
            "student_layers": 6,
            "student_init": "published",
            "pretrained": _BERT_BASE,
            "mask_padding": False,
            "norm": "sequence",
            "reverse": False,
        }
    )
