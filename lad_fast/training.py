"""Training runs: fine-tuning and distillation around the step of :mod:`lad_fast.step`, and the published recipes."""

import json
import logging
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, set_seed
from typing_extensions import Doc

from lad_fast import __version__
from lad_fast.card import model_card
from lad_fast.checkpoint import (
    Checkpoint,
    Checkpoints,
    Interrupted,
    StopSignals,
    digest,
    find_checkpoint,
    get_rng_state,
    own_folder,
    set_rng_state,
    write_checkpoint,
    write_json,
)
from lad_fast.cpu import bfloat16_pays, emulates, keep_freed_memory, set_num_threads
from lad_fast.data import Batches, TokenizedSplit, check_vocabulary, tokenize
from lad_fast.distributed import ALONE, World, current_world, joined
from lad_fast.functional import check_number
from lad_fast.glue import Task, check_metrics, compute_metrics, confusion_matrix, load_split, predictions_from_logits
from lad_fast.models import (
    build_student,
    check_max_length,
    load_classifier,
    model_inputs,
    put_back,
    quiet,
    run_model,
    save_checkpoint,
)
from lad_fast.packed import enable_packing, packs_fast
from lad_fast.step import HALF, DistillStep, Prepared, autocast, prepare_ahead
from lad_fast.strategies import STRATEGIES
from lad_fast.tasks import DataConfig, find_task
from lad_fast.teacher_cache import PADDED_ALIKE, TeacherCache, choose_place
from lad_fast.tracking import TRACKERS, Tracker

try:
    import resource
except ImportError:  # Windows
    resource = None

__all__ = [
    "RECIPES", "DistillConfig", "Evaluation", "FinetuneConfig", "TrainingResult", "distill",
    "evaluate", "finetune", "recipe",
]  # fmt: skip

_LOG = logging.getLogger(__name__)
VERSIONS = {"lad_fast": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
_METHODS = f"""What to learn from, with L layers of the teacher and K of the student; {
    "; ".join(f"{name}: {strategy.summary}" for name, strategy in STRATEGIES.items())
}."""
_MOST_SKIPPED = 40  # steps in a row: the loss scale has been halved from 2^16 to 2^-24, and will not help


@dataclass(kw_only=True)
class TrainingConfig(DataConfig):
    """What fine-tuning and distillation have in common."""

    regression: bool = False
    """Of csv: labels are numbers to predict, not classes."""
    output_dir: Path
    """Folder for best/, last/, log.jsonl, config.json, results.json and, until the run has ended, checkpoints/; and
    not-finite-step-N of a run that ended by such numbers."""
    resume: str = "auto"
    """auto: go on from the newest whole checkpoint in output_dir; a finished run is not run again, and another run's
    folder is refused. never: start anew and replace what is there. Or a checkpoint, or the folder of a run."""
    save_steps: int | None = None
    """Optimizer steps between checkpoints, beside those by time; None goes by time alone."""
    save_minutes: float = 10.0
    """Minutes between checkpoints: what a killed run loses at most."""
    save_total_limit: int = 2
    """Checkpoints kept, the newest; each takes about three times the model's size, as does one more being written."""
    epochs: int = 3
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, the learning rate's fall included; None goes by epochs."""
    batch_size: int = 32
    """Examples a batch; under torchrun of each process, so that two processes with 16 do what one does with 32."""
    gradient_accumulation_steps: int = 1
    """Batches an optimizer step; an epoch's last step may take fewer."""
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
    """Of the models' arithmetic; weights, losses and the optimizer stay float32. auto: bfloat16 where the GPU has
    it, or the processor multiplies faster in it; else float16 on a GPU and float32 on a CPU."""
    optimizer: Literal["auto", "torch", "apex"] = "auto"
    """Whose fused AdamW; auto takes PyTorch's."""
    cuda_graphs: bool = False
    """Capture forward and backward of each shape of padded batch, and replay them: no launch costs. GPU only."""
    compile: bool = False
    """Compile the encoders by torch.compile: a minute or more at the start, for less in each step."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N. Under torchrun each process takes a GPU of its own."""
    num_threads: int | None = None
    """CPU threads; None leaves PyTorch's choice."""
    seed: int = 42
    """Of data order, random weights and dropout."""
    log_every: int = 50
    """Optimizer steps between log lines: the only times that training waits for the GPU."""
    detect_anomaly: bool = False
    """Stop at the very step whose losses or gradients are not finite, not at the next log line; waits at each step."""
    progress: bool = True
    """Progress bar and one line an evaluation, on stderr."""
    log: Literal["none", "tensorboard", "wandb"] = "none"
    """Where the lines of log.jsonl go too: TensorBoard's files in output_dir/tensorboard, or Weights & Biases."""


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
    method: Annotated[Literal[tuple(STRATEGIES)], Doc(_METHODS)] = "lad"
    normalize_states: bool = False
    """For skip and last: divide hidden states by their L2 norm before they are compared, as PKD does."""
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
    the three with room, or off for a run of one epoch. Of several processes each keeps them all."""


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


@joined
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

    Processes that torchrun started, or that share an initialised process group, train one model together; each is
    given the same arguments and returns the same result. The first alone writes.

    Args:
        config: see :class:`FinetuneConfig`.
        task: instead of the one that ``config.task`` names.
        train, evaluation: tokenised data instead of what ``config`` names; evaluation by split name, {} for
            none.
        model, tokenizer: instead of ``config.model``; the model is trained in place.

    Raises:
        ValueError: a setting, model, data file or output folder that does not fit; the message names it.
        Interrupted: SIGINT or SIGTERM; a ``KeyboardInterrupt`` with the ``path`` of the checkpoint it left.
        CheckpointError: a checkpoint could not be written.
        FloatingPointError: losses or gradients are not finite; names the step, the examples, the parts and a dump.
    """
    device = _start(config)
    task = _find_task(config, task, evaluation)
    if model is None:
        model, tokenizer = current_world().in_turn(load_classifier, config.model, task)
    _check_classes("model", model, task)
    config = _settle(config, device, model)
    batches, evaluation = _load_batches(config, task, model, tokenizer, train, evaluation, device)
    with _own_run(config) as signals:
        step = DistillStep(_move("model", model, device), **_step_options(config, batches))
        return _run(config, task, step, batches, evaluation, tokenizer, signals)


@joined
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

    By several processes as :func:`finetune`.

    Args:
        config: see :class:`DistillConfig`.
        task: instead of the one that ``config.task`` names.
        train, evaluation: tokenised data instead of what ``config`` names; evaluation by split name, {} for
            none.
        teacher, tokenizer: instead of ``config.teacher``; the teacher comes back in eval mode, on the device
            trained on, with the attention of packed batches and compiled where the run was.
        student: instead of one built by ``config``; trained in place. Another hidden size than the teacher's
            gets one trained projection a layer.

    Raises:
        ValueError: a setting, model, data file or output folder that does not fit; the message names it.
        Interrupted: SIGINT or SIGTERM; a ``KeyboardInterrupt`` with the ``path`` of the checkpoint it left.
        CheckpointError: a checkpoint could not be written.
        FloatingPointError: losses or gradients are not finite; names the step, the examples, the parts and a dump.
    """
    device = _start(config)
    task = _find_task(config, task, evaluation)
    if teacher is None:
        teacher, tokenizer = current_world().in_turn(partial(load_classifier, fine_tuned=True), config.teacher, task)
        trained = check_texts("teacher", config.teacher, task)
        if (tokens := trained.get("max_length", 0)) > config.max_length and current_world().is_first:
            _LOG.warning("the teacher was trained on %s tokens an example; max_length is %s", tokens, config.max_length)
    _check_classes("teacher", teacher, task)
    if student is None:
        student = _make_student(config, task, teacher)
    _check_classes("student", student, task)
    config = _settle(config, device, student, teacher)
    batches, evaluation = _load_batches(config, task, student, tokenizer, train, evaluation, device)
    uses_teacher = STRATEGIES[config.method].uses_teacher
    if uses_teacher:
        check_vocabulary(batches.split, teacher)
    _move("teacher", teacher, device)
    _move("student", student, device)
    options = _step_options(config, batches)
    with _own_run(config) as signals:
        if not uses_teacher:
            step = DistillStep(student, **options)
        else:
            cache = _make_cache(config, batches, teacher, options["total_steps"])
            config = replace(config, teacher_cache="off" if cache is None else cache.place)
            step = DistillStep(
                student, teacher, _make_objective(config, task, teacher, student), teacher_cache=cache,
                gate_learning_rate=config.gate_learning_rate, mask_padding=config.mask_padding, **options,
            )  # fmt: skip
        return _run(config, task, step, batches, evaluation, tokenizer, signals)


@contextmanager
def _own_run(config: TrainingConfig) -> Iterator[StopSignals]:
    """The folder is this run's alone, and signals wait for a step's end, the same one in every process."""
    signals = StopSignals(current_world().agreement())
    with current_world().first_enters(own_folder(Path(config.output_dir))), signals, matmuls(config.precision):
        yield signals


@contextmanager
def matmuls(precision: str) -> Iterator[None]:
    """A context whose float32 products are rounded to "tf32", where that is the precision; after it as before."""
    if precision != "tf32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _move(role: str, model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{role} is on meta, without its weights; training on {device} takes a model that is loaded")
    model.to(device)
    if role != "teacher" and any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        model.float()  # as from_pretrained left a checkpoint in half precision
    return model


def _check_classes(role: str, model: PreTrainedModel, task: Task) -> None:
    if model.config.num_labels != task.num_labels:
        raise ValueError(f"{role} has num_labels = {model.config.num_labels}; task {task.name} takes {task.num_labels}")


def check_texts(role: str, model: str | Path, task: Task) -> dict[str, int]:
    """Check that a model was trained on examples of as many texts as the task's.

    Returns:
        How its training took examples: "max_length" tokens, "num_texts"; without what training.json does not tell.

    Raises:
        ValueError: training.json is damaged, or tells of single texts where the task has pairs, or the other way round.
    """
    path = Path(model).expanduser() / "training.json"
    if not path.is_file():
        return {}
    try:
        state = dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}); it takes what training left there") from error
    found = {name: state[name] for name in ("max_length", "num_texts") if state.get(name) is not None}
    for name, value in found.items():
        if type(value) is not int:
            raise ValueError(f"{path}: {name} is {str(value)[:100]}; it takes a number")
    if found.get("num_texts", len(task.text_columns)) != len(task.text_columns):
        was, column = ("pairs of texts", "None") if len(task.text_columns) == 1 else ("single texts", "set")
        raise ValueError(f"text_pair_column is {column}; {role} {model} was trained on {was}")
    return found


def _make_student(config: DistillConfig, task: Task, teacher: PreTrainedModel) -> PreTrainedModel:
    num_layers = getattr(teacher.config, "num_hidden_layers", 0)
    if not 1 <= config.student_layers <= num_layers:
        raise ValueError(f"student_layers is {config.student_layers}; this teacher takes 1 to {num_layers}")
    pretrained = None
    if config.student_init == "published":
        if config.pretrained is None:
            raise ValueError("pretrained is None; student_init 'published' takes the model before fine-tuning")
        pretrained, _ = current_world().in_turn(load_classifier, config.pretrained, task)
    return build_student(teacher, config.student_layers, config.student_init, pretrained=pretrained)


def _make_cache(
    config: DistillConfig, batches: Batches, teacher: PreTrainedModel, total_steps: int
) -> TeacherCache | None:
    """A cache where it is asked for, or by itself where batches come more than once and there is room."""
    by_itself = config.teacher_cache == "auto"
    comes_back = total_steps * config.gradient_accumulation_steps > len(batches)
    if config.teacher_cache == "off" or (by_itself and not comes_back):
        return None
    if (kind := teacher.config.model_type) not in PADDED_ALIKE and config.padding != "max_length":
        if by_itself:
            return None
        _LOG.warning("teacher_cache: whether a %s teacher makes the same of an example in any batch is not known", kind)
    num_layers = teacher.config.num_hidden_layers if STRATEGIES[config.method].uses_hidden_states else 0
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
    place = config.teacher_cache
    if by_itself:
        nbytes = num_layers * int(lengths.sum()) * hidden_size * dtype.itemsize
        place = choose_place(nbytes, teacher.device, output_dir, current_world())
        if place == "off":
            return None
    return TeacherCache(
        lengths, num_layers, hidden_size, teacher.config.num_labels,
        dtype=dtype, device=teacher.device, place=place, folder=output_dir, world=current_world(),
    )  # fmt: skip


def _make_objective(config: DistillConfig, task: Task, teacher: PreTrainedModel, student: PreTrainedModel):
    objective = STRATEGIES[config.method].make(
        config, teacher.config, student.config,
        temperature=config.temperature, soft_weight=config.soft_weight, hard_weight=config.hard_weight,
        regression=task.is_regression, backend=config.backend,
    )  # fmt: skip
    return objective.to(student.device) if isinstance(objective, nn.Module) else objective


def _start(config: TrainingConfig) -> torch.device:
    """Check what nothing further down checks, seed everything, pick the device."""
    counts = "epochs", "max_steps", "gradient_accumulation_steps", "batch_size", "log_every"
    for name in (*counts, "save_steps", "save_total_limit"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it takes at least 1")
    weights = "soft_weight", "hard_weight", "hidden_weight"
    for name in ("learning_rate", "gate_learning_rate", "weight_decay", "warmup_ratio", *weights):
        value = getattr(config, name, 0.0)
        check_number(name, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; it takes a number of at least 0")
    if config.warmup_ratio > 1:
        raise ValueError(f"warmup_ratio is {config.warmup_ratio}; it takes 0 to 1")
    for name, most in (("max_grad_norm", math.inf), ("save_minutes", math.inf), ("temperature", sys.float_info.max)):
        value = getattr(config, name, 1.0)
        check_number(name, value)
        if not 0 < value <= most:
            raise ValueError(f"{name} is {value}; it takes a number above 0")
    for name in ("precision", "padding", "optimizer", "method", "teacher_cache", "log"):
        known = get_args(get_type_hints(type(config)).get(name))
        value = getattr(config, name, None)
        if known and value not in known:
            raise ValueError(f"{name} is {value!r}; it takes one of {', '.join(known)}")
    if getattr(config, "normalize_states", False) is True and config.method not in ("skip", "last"):
        raise ValueError(f"normalize_states is True; it goes with method skip or last, not {config.method}")
    current_world().first(TRACKERS[config.log].check)
    current_world().first(_check_folder, Path(config.output_dir))
    set_num_threads(config.num_threads)
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed is {config.seed}; it takes 0 to {2**32 - 1}")
    set_seed(config.seed)
    device = _pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def _find_task(config: TrainingConfig, task: Task | None, evaluation: dict | None) -> Task:
    """The task passed or named, once its scores can be computed where any will be."""
    task = task or find_task(config, () if config.regression else None)
    if evaluation != {}:
        check_metrics(task)
    return task


def _settle(config: TrainingConfig, device: torch.device, *models: PreTrainedModel) -> TrainingConfig:
    """The configuration with "auto" replaced by what it comes to; models are made to take its batches."""
    precision, padding = config.precision, config.padding
    if precision == "auto":
        precision = fastest_precision(device)
    if device.type == "cpu" and precision in HALF and emulates(getattr(torch, precision)):
        _LOG.warning("this processor has no %s products: precision 'float32' is several times faster", precision)
    counts_padding = not getattr(config, "mask_padding", True)
    if padding == "auto":
        dtype = getattr(torch, precision) if precision in HALF else torch.float32
        can_be = not counts_padding and not config.cuda_graphs and all(packs_fast(m, device, dtype) for m in models)
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
    # Also where NVIDIA's apex is: PyTorch's fused form reads a loss scaler's verdict on the device.
    optimizer = "torch" if config.optimizer == "auto" else config.optimizer
    return replace(config, precision=precision, padding=padding, optimizer=optimizer)


def fastest_precision(device: torch.device) -> str:
    """The precision that "auto" takes on a device: the fastest that the hardware multiplies in."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    if device.type != "cpu":
        return "float32"
    return "bfloat16" if bfloat16_pays() else "float32"


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {name!r}; it takes auto, cpu, cuda or cuda:N ({reason})") from error
    if device.type == "meta":
        raise ValueError(f"device is {name!r}; it takes auto, cpu, cuda or cuda:N (no numbers there)")
    return device


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
    check_max_length(model, config.max_length)
    if tokenizer is None and (train is None or evaluation is None):
        raise ValueError("tokenizer is None; a model passed without tokenised data takes its tokenizer too")

    def load(split: str) -> TokenizedSplit:
        examples = load_split(task, split, config.data_dir)
        return tokenize(examples, tokenizer, config.max_length, config.cache_dir)

    train = current_world().in_turn(load, "train") if train is None else train
    if evaluation is None:
        evaluation = {split: current_world().in_turn(load, split) for split in task.eval_splits}
    for name, split in {"train": train, **evaluation}.items():
        if split.labels is None:
            raise ValueError(f"split {name} has no labels; training and evaluation take labelled ones")
        check_vocabulary(split, model)
        if config.progress and current_world().is_first:
            print(split.summary(config.max_length), file=sys.stderr)
    pad_token_id = model.config.pad_token_id if tokenizer is None else tokenizer.pad_token_id
    on_gpu = device.type == "cuda"
    # Widths of a multiple of 8 suit a GPU's matrix units; on a CPU they are only more padding (docs/performance.md).
    options = {"max_length": config.max_length, "pin_memory": on_gpu, "pad_to_multiple_of": 8 if on_gpu else 1}
    options |= {"part": current_world().rank, "parts": current_world().size}
    batch_size = config.batch_size * current_world().size
    train = Batches(
        train,
        batch_size,
        pad_token_id,
        shuffle=True,
        seed=config.seed,
        padding=config.padding,
        **options,
    )
    evaluation = {
        name: Batches(split, batch_size, pad_token_id, shuffle=False, **options)
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
        "world": current_world(),
    }


def _run(
    config: TrainingConfig,
    task: Task,
    step: DistillStep,
    batches: Batches,
    evaluation: dict[str, Batches],
    tokenizer,
    signals: StopSignals,
) -> TrainingResult:
    """Epochs of steps, with an evaluation and saved models after each; from a checkpoint, where there is one."""
    output_dir, device, world = Path(config.output_dir), step.student.device, step.world
    results = output_dir / "results.json"
    run = _describe(config, step, batches, evaluation)
    _refuse_unlike(world.gather(run))
    minutes = config.save_minutes if world.is_first else math.inf  # one clock tells all
    checkpoints = Checkpoints(
        output_dir, config.save_total_limit, config.save_steps, minutes, agree=world.agreement()
    )
    if config.resume == "auto" and world.first(results.exists):
        content, weights = world.first(_finished, output_dir, run, step.student)
        step.student.load_state_dict(weights)
        world.first(checkpoints.clear)
        return TrainingResult(**content, output_dir=output_dir, model=step.student)
    found = world.first(_take_folder, config, checkpoints, run)
    position, best = {"epoch": 1, "batches": 0}, None
    if world.rank:  # until here all drew the same; dropout is each process's own
        set_seed((config.seed + world.rank) % 2**32)
    tracker = TRACKERS[config.log](output_dir, asdict(config))
    dump = partial(_dump, config, task, step, batches)
    with world.first_enters(tracker), _Log(config, task.name, step, batches.split.ids, dump, tracker) as log:
        if found is not None:
            position, best = found.state["position"], world.first(_bring_best, found, output_dir, task)
            step.load_state_dict(found.state["step"])
            log.load_state_dict(found.state["log"], found.log)
            set_rng_state(found.state["rng"][world.rank], device)

        def save() -> Path:
            log.check()  # a checkpoint of numbers that are not finite would be the end of the run
            start = time.perf_counter()
            state = {
                "run": run, "position": position, "best": best, "log": log.state_dict(), "step": step.state_dict(),
                "rng": world.gather(get_rng_state(device)),
            }  # fmt: skip
            path = world.first(checkpoints.save, log.steps, state, log.path)
            log.since += time.perf_counter() - start
            return path

        try:
            if found is not None and step.teacher_cache is not None:
                _refill_cache(step, batches, position, signals)
            for epoch in range(position["epoch"], config.epochs + 1):
                batches.set_epoch(epoch)
                prepared = prepare_ahead(islice(batches, position["batches"], None), step.prepare, device)
                groups = _groups(prepared, config.gradient_accumulation_steps)
                for group in islice(groups, step.total_steps - log.steps):
                    before = _Before.of(step)
                    log.add(step(*group), step.grad_norms, group, before)
                    position["batches"] += len(group)
                    if log.steps % config.log_every == 0:
                        log.write_losses(epoch, step.scheduler.get_last_lr())
                    if checkpoints.is_due(log.steps):
                        save()
                    signals.check()
                log.write_losses(epoch, step.scheduler.get_last_lr())
                scored = {
                    name: evaluate(step.student, signals.watch(split), task, precision=config.precision, world=world)
                    for name, split in evaluation.items()
                }
                metrics = {name: split.metrics for name, split in scored.items()}
                state = {"task": task.name, "step": log.steps, "epoch": epoch, "metrics": metrics}
                told = {} if step.gates is None else world.first(step.look_at_gates, batches.first())
                if not task.is_regression:
                    told["confusion"] = {name: split.confusion.tolist() for name, split in scored.items()}
                log.write_metrics(state | told)
                sources = {role: getattr(config, role) for role in ("teacher", "model") if hasattr(config, role)}
                card = model_card(output_dir.resolve().name, task, state, run["settings"], sources, VERSIONS)
                inputs = {"max_length": config.max_length, "num_texts": len(task.text_columns)}
                saved = step.student, tokenizer, step.gates, state | inputs, card
                score = _score(task, metrics)
                # Without evaluation nothing tells epochs apart, and the last is taken.
                if best is None or score > best[0] or not metrics:
                    best = score, state
                    world.first(save_checkpoint, output_dir / "best", *saved)
                world.first(save_checkpoint, output_dir / "last", *saved)
                position = {"epoch": epoch + 1, "batches": 0}
                log.start_window()
                if log.steps == step.total_steps:
                    break
        except Interrupted as stop:
            stop.step, stop.path = log.steps, save()
            raise
    result = TrainingResult(
        best_metrics=best[1]["metrics"], last_metrics=metrics, best_step=best[1]["step"], history=log.history,
        seconds=log.seconds, steps=log.steps, tokens=log.tokens,
        num_parameters=step.student.num_parameters(), output_dir=output_dir, model=None,
    )  # fmt: skip
    content = asdict(result)
    del content["model"]
    world.first(write_json, results, content | {"run": run})
    world.first(checkpoints.clear)
    return replace(result, model=step.student)


# What does not change what is computed but by rounding; models and data are compared by content, not by path.
_MAY_DIFFER = {
    "output_dir", "data_dir", "text_column", "text_pair_column", "label_column", "regression", "cache_dir", "model",
    "teacher", "pretrained", "recipe", "resume", "save_steps", "save_minutes", "save_total_limit", "device",
    "num_threads", "log_every", "detect_anomaly", "progress", "log",
}  # fmt: skip


def _describe(config: TrainingConfig, step: DistillStep, batches: Batches, evaluation: dict[str, Batches]) -> dict:
    """What makes a run this one: settings by name, and digests of its data and models by what to say of others."""
    settings = {name: value for name, value in asdict(config).items() if name not in _MAY_DIFFER}
    if "teacher_cache" in settings:  # wherever it is, it holds the same numbers
        settings["teacher_cache"] = "off" if step.teacher_cache is None else "on"

    settings["processes"] = step.world.size

    def data(**splits: TokenizedSplit) -> str:
        return digest(
            *(
                part
                for name, split in splits.items()
                for part in (name, split.input_ids, split.token_type_ids, split.offsets, split.labels, split.ids)
            )
        )

    def model(model: PreTrainedModel) -> str:
        unlike = ("_name_or_path", "transformers_version")
        settings = {name: value for name, value in model.config.to_dict().items() if name not in unlike}
        return digest(json.dumps(settings, sort_keys=True, default=str), model.state_dict())

    digests = {
        "the training data differ": data(train=batches.split),
        "the evaluation data differ": data(**{name: split.split for name, split in evaluation.items()}),
        "the model at its start differs": model(step.student),
    }
    if step.teacher is not None:
        digests["the teacher differs"] = model(step.teacher)
    return json.loads(json.dumps({"settings": settings, "digests": digests}, default=str))


def _refuse_another(what: str, old: dict, new: dict) -> None:
    if found := _differences(old, new, "was"):
        raise ValueError(f"{what} is of another run: {found}; take another output_dir, or resume never to replace it")


def _refuse_unlike(runs: list[dict]) -> None:
    for number, run in enumerate(runs):
        if found := _differences(runs[0], run, "in process 0 is"):
            raise ValueError(f"process {number} runs something else: {found}; all take the same arguments and data")


def _differences(old: dict, new: dict, was: str) -> str:
    names = [*new["settings"], *(old["settings"].keys() - new["settings"].keys())]
    olds, news = ({name: run["settings"].get(name) for name in names} for run in (old, new))
    found = [f"{name} {was} {olds[name]} and is {news[name]}" for name in names if olds[name] != news[name]]
    found += [text for text, value in new["digests"].items() if value != old["digests"].get(text)]
    return ", ".join(found)


def _check_folder(output_dir: Path) -> None:
    """Raises a ValueError where a run would write over what no run wrote, a model's config.json above all."""
    names = ("config.json", "best", "last", "log.jsonl", "results.json", "tensorboard")
    there = [name for name in names if (output_dir / name).exists()]
    for name in names:
        if (output_dir / name).is_symlink():
            raise ValueError(f"output_dir is {output_dir}; its {name} is a link, which no run writes through")
    try:
        config = json.loads((output_dir / "config.json").read_text(encoding="utf-8"))
        is_run = "output_dir" in config
    except (OSError, ValueError, TypeError, RecursionError):  # absent or damaged
        is_run = "log.jsonl" in there
    if there and not is_run:
        raise ValueError(f"output_dir is {output_dir}; it holds {there[0]}, which no run left there; take another")


def _take_folder(config: TrainingConfig, checkpoints: Checkpoints, run: dict) -> Checkpoint | None:
    """The checkpoint to go on from; what an earlier run left otherwise makes room."""
    output_dir = Path(config.output_dir)
    found = find_checkpoint(config.resume, checkpoints)
    if found is not None:
        _refuse_another(f"checkpoint {found.path}", found.state["run"], run)
        _LOG.warning("%s: going on from %s", output_dir, found.path)
    if config.resume == "never":
        checkpoints.clear()
    elif (output_dir / "best").exists() and (begun := _begun(output_dir)):  # with or without a checkpoint there
        _refuse_another(f"output_dir {output_dir}", begun, run)
    (output_dir / "results.json").unlink(missing_ok=True)
    write_json(output_dir / "config.json", asdict(config) | {"versions": VERSIONS, "run": run})
    return found


def _begun(output_dir: Path) -> dict | None:
    """Which run wrote ``output_dir``; None where an earlier version did, or the file is damaged."""
    try:
        run = json.loads((output_dir / "config.json").read_text(encoding="utf-8"))["run"]
        return {name: dict(run[name]) for name in ("settings", "digests")}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _finished(output_dir: Path, run: dict, model: PreTrainedModel) -> tuple[dict, dict[str, Tensor]]:
    """Of the run that ended in ``output_dir``, if it is this one: its result, all but two fields, and last weights."""
    try:
        content = json.loads((output_dir / "results.json").read_text(encoding="utf-8"))
        old = content.pop("run")
        if not (folder := output_dir / "last").is_dir():  # which Transformers would take for a name on the hub
            raise FileNotFoundError(f"{folder} is absent")
        with quiet():
            last = type(model).from_pretrained(folder, dtype=torch.float32, local_files_only=True, weights_only=True)
        del content["output_dir"]
        TrainingResult(**content, output_dir=output_dir, model=model)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ValueError(  # damaged, written by an earlier version, or by hand
            f"output_dir is {output_dir}; what a finished run left there cannot be read ({type(error).__name__}: "
            f"{error}); resume never starts anew"
        ) from error
    _refuse_another(f"output_dir {output_dir}", old, run)
    _LOG.warning("%s: this run is finished; resume never starts it anew", output_dir)
    return content, last.state_dict()


def _score(task: Task, metrics: dict[str, dict[str, float]]) -> float:
    """What epochs are compared by."""
    return sum(values[task.best_metric] for values in metrics.values())


def _bring_best(found: Checkpoint, output_dir: Path, task: Task) -> list | None:
    """The best score so far and what is told of it; its model comes along, where the checkpoint is another folder's.

    The model in "best" counts, not what the checkpoint says of it: a run may have ended after an epoch and before its
    next checkpoint, and that epoch may not come out to the same bits again.
    """
    best, source, target = found.state["best"], found.path.parent.parent / "best", output_dir / "best"
    if best is None:
        return None
    put_back(source)
    try:
        told = json.loads((source / "training.json").read_text(encoding="utf-8"))
        state = {name: told[name] for name in best[1]}
        score = _score(task, state["metrics"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = "absent" if not source.is_dir() else f"damaged ({type(error).__name__}: {error})"
        _LOG.warning("%s: %s is %s; epochs before it are out of the running for best", found.path, source, why)
        return None
    if source.resolve() != target.resolve():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    return [score, state]


def _refill_cache(step: DistillStep, batches: Batches, position: dict, signals: StopSignals) -> None:
    """What the teacher made of the first epoch, again batch by batch as then: other batches would round otherwise."""
    batches.set_epoch(1)
    for batch in signals.watch(islice(batches, position["batches"] if position["epoch"] == 1 else None)):
        step.fill_cache(batch)


def _groups(batches: Iterable, size: int) -> Iterator[tuple]:
    """Tuples of ``size`` batches; the last one may be shorter."""
    iterator = iter(batches)
    return iter(lambda: tuple(islice(iterator, size)), ())


def _gate_warning(i: int, gate: dict) -> str:
    if gate["state"] == "collapsed":
        return f"gates[{i}] has collapsed: its values vary by {gate['variation']:.1g} over tokens: it ignores its input"
    shares = f"{gate['closed']:.0%} of its values are below 0.01 and {gate['open']:.0%} above 0.99"
    meaning = "it no longer learns"
    if gate["closed"] > 0.9:
        meaning = "its layer is left out"
    elif gate["open"] > 0.9:
        meaning = "what came before its layer is forgotten"
    return f"gates[{i}] is saturated: {shares}: {meaning}"


class _Before(NamedTuple):
    """What a step depends on and changes even where it leaves all weights alone."""

    generator: Tensor
    """State of the device's generator, which dropout draws from; kept on the host: no wait."""
    scale: Tensor | None
    """() the loss scale; None in another precision than float16, and before the first step."""

    @classmethod
    def of(cls, step: DistillStep) -> "_Before":
        device, scale = step.student.device, getattr(step.scaler, "_scale", None)  # get_scale() would wait
        generator = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        return cls(generator, None if scale is None else scale.clone())


class _Broken(NamedTuple):
    """A step whose numbers were not finite."""

    step: int
    parts: list[str]
    """What was not finite."""
    examples: list[int]
    """Their ids."""
    index: list[Tensor]
    """Of each of its batches, (B,): the examples' places in the split."""
    before: _Before
    weights: str
    """Which ones there are now: those "before the step" or, where they could not be kept, "after step N"."""


def _dump(
    config: TrainingConfig, task: Task, step: DistillStep, batches: Batches, log: Path, broken: _Broken
) -> Path:
    """Write all that :func:`lad_fast.replay.replay` takes to run a step again."""
    model, device = step.student, step.student.device
    inputs = []
    for index in broken.index:
        batch = batches.take(index.numpy())
        inputs.append({"batch": batch, "teacher": step.teach(step.prepare(batch))})
    state = step.state_dict()
    if step.scaler.is_enabled():
        scale = broken.before.scale
        state["scaler"]["scale"] = step.scaler._init_scale if scale is None else scale.item()
    teacher = None
    if step.teacher is not None:
        teacher = {name: getattr(step.teacher.config, name) for name in ("num_hidden_layers", "hidden_size")}
    described = {
        "config": asdict(config),
        "task": {"name": task.name, "is_regression": task.is_regression},
        "student": {
            "class": type(model).__name__,
            "config": model.config.to_dict(),
            "attention": model.config._attn_implementation,
        },
        "teacher": teacher,
        "options": {name: value for name, value in _step_options(config, batches).items() if name != "world"},
        "processes": step.world.size,
        "versions": VERSIONS,
        "device": str(device),
    }
    content = json.loads(json.dumps(described, default=str)) | broken._asdict() | {"inputs": inputs, "state": state}
    path = Path(config.output_dir) / f"not-finite-step-{broken.step}"
    write_checkpoint(path, content | {"before": broken.before._asdict()}, log)
    return path


def not_finite(values: dict[str, Tensor]) -> list[str]:
    """Names of what is not finite among losses and norms, as "loss" or, of several entries, "hidden_losses[1]"."""
    names = [f"{name}[{i}]" if value.dim() else name for name, value in values.items() for i in range(value.numel())]
    rows = _joined(values).isfinite().tolist()
    return [name for name, is_finite in zip(names, rows, strict=True) if not is_finite]


class _Log:
    """log.jsonl, the progress bar and the counters. Losses gather on the device until a line is due.

    Args:
        config: of the run.
        title: of the bar.
        step: whose losses they are.
        ids: (N,) of the training examples.
        dump: writes what it takes to run a :class:`_Broken` step again, beside the log, and returns where to.
        tracker: gets each line too; open in the first process.
    """

    def __init__(
        self,
        config: TrainingConfig,
        title: str,
        step: DistillStep,
        ids: np.ndarray,
        dump: Callable[[Path, _Broken], Path],
        tracker: Tracker,
    ) -> None:
        self.step, self.dump, self.world, self.tracker = step, dump, step.world, tracker
        self.show, self.checks_each_step, self.ids = config.progress and self.world.is_first, config.detect_anomaly, ids
        self.is_scaled, self.device = step.scaler.is_enabled(), step.student.device
        self.path = Path(config.output_dir) / "log.jsonl" if self.world.is_first else Path(os.devnull)
        self.file = self.path.open("w", encoding="utf-8")
        # disable=None: no bar where stderr is a file or a pipe.
        self.bar = tqdm(total=step.total_steps, desc=title, unit="step", disable=None if self.show else True)
        self.history: list[dict] = []
        self.steps = self.tokens = self.skipped = self.skipped_in_a_row = 0
        self.seconds = 0.0
        self.unchecked: list[tuple[int, dict[str, Tensor], list[Tensor], _Before]] = []
        self.start_window()

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()
        with suppress(OSError):  # each line has been flushed, or its failure is on its way
            self.file.close()

    _COUNTERS = (
        "steps", "tokens", "skipped", "skipped_in_a_row", "seconds", "history", "sums", "window_steps", "window_tokens",
    )  # fmt: skip

    def state_dict(self) -> dict:
        window_seconds = time.perf_counter() - self.since
        return {name: getattr(self, name) for name in self._COUNTERS} | {"window_seconds": window_seconds}

    def load_state_dict(self, state: dict, lines: bytes) -> None:
        """Go on from what :meth:`state_dict` gave, and the log's content then."""
        for name in self._COUNTERS:
            setattr(self, name, state[name])
        self.sums = {name: value.to(self.device) for name, value in self.sums.items()}
        self.since = time.perf_counter() - state["window_seconds"]
        self.file.write(lines.decode())
        self.file.flush()
        if self.world.is_first:
            for line in lines.splitlines():
                self.tracker.write(json.loads(line))
        self.bar.n = self.bar.initial = self.steps

    def start_window(self) -> None:
        """Forget the losses gathered so far, and start the clock."""
        self.sums: dict[str, Tensor] = {}
        self.window_steps = self.window_tokens = 0
        self.since = time.perf_counter()

    def add(
        self, losses: dict[str, Tensor], grad_norms: dict[str, Tensor], batches: tuple[Prepared, ...], before: _Before
    ) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.window_tokens += sum(batch.part.all_tokens for batch in batches)
        self.window_steps += 1
        self.steps += 1
        self.unchecked.append((self.steps, numbers(losses, grad_norms), [batch.index for batch in batches], before))
        if self.checks_each_step:
            self.check()
        self.bar.update()

    def check(self) -> None:
        """See that every step since the last check was finite; reads from the device.

        Under a loss scaler, which skips a step whose gradients are not finite, such steps are counted; 40 in a row are
        not its doing.

        Raises:
            FloatingPointError: names the first step that was not, what in it was not, its examples, and the command
                that runs it again.
        """
        unchecked, self.unchecked = self.unchecked, []
        if not unchecked:
            return
        rows = torch.stack([_joined(values) for _, values, *_ in unchecked]).isfinite().all(dim=1).tolist()
        for place, ((step, values, index, before), is_finite) in enumerate(zip(unchecked, rows, strict=True)):
            if is_finite:
                self.skipped_in_a_row = 0
                continue
            if self.is_scaled and self.skipped_in_a_row < _MOST_SKIPPED:
                self.skipped += 1
                self.skipped_in_a_row += 1
                continue
            parts, index = not_finite(values), self._whole(index)
            examples = self.ids[torch.cat(index).numpy()].tolist()
            # The scaler skips such a step, and only such; without one, it and all after it are held.
            is_kept = any(part.startswith("gradient") for part in parts)
            is_kept &= not any(rows[place:]) if self.is_scaled else self.step.holds
            weights = "before the step" if is_kept else f"after step {self.steps}"
            told = f"step {step}: not finite: {', '.join(parts)}; ids of its examples: {', '.join(map(str, examples))}"
            try:
                path = self.world.first(self.dump, self.path, _Broken(step, parts, examples, index, before, weights))
            except Exception as error:  # whatever it is, what is to be told is the numbers
                why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                raise FloatingPointError(f"{told}; no dump of it could be written ({why})") from error
            raise FloatingPointError(f"{told}; lad-fast replay {shlex.quote(str(path))} runs it again")

    def _whole(self, index: list[Tensor]) -> list[Tensor]:
        """Of each batch, the examples of all processes: the numbers are everybody's, so all come here."""
        gathered = (torch.cat(parts).tolist() for parts in zip(*self.world.gather(index), strict=True))
        return [torch.tensor(list(dict.fromkeys(places))) for places in gathered]

    def write_losses(self, epoch: int, learning_rates: list[float]) -> None:
        """Mean losses since the last line; but for checkpoints the one place that reads them from the device.

        Raises:
            FloatingPointError: see :meth:`check`.
        """
        if not self.window_steps:
            return
        self.check()
        values = iter(_joined(self.sums).div(self.window_steps).tolist())
        losses = {
            name: [next(values) for _ in range(len(value))] if value.dim() else next(values)
            for name, value in self.sums.items()
        }
        seconds = time.perf_counter() - self.since
        record = {"step": self.steps, "epoch": epoch, **losses, "lr": learning_rates[0]}
        if len(learning_rates) > 2:
            record["gate_lr"] = learning_rates[2]
        if self.is_scaled:
            record["skipped_steps"] = self.skipped
        record["tokens_per_second"] = round(self.window_tokens / seconds, 1)
        if (peak := _peak_memory(self.device)) is not None:
            record["peak_memory_mb"] = round(peak / 1e6, 1)
        self.seconds += seconds
        self.tokens += self.window_tokens
        self._write(record)
        self.bar.set_postfix_str(f"loss {losses['loss']:.4g}, {record['tokens_per_second']:,.0f} tokens/s")
        self.start_window()

    def write_metrics(self, record: dict) -> None:
        for i, gate in enumerate(record.get("gates", ())):
            told = any(earlier["gates"][i]["state"] == gate["state"] for earlier in self.history)
            if gate["state"] is not None and not told and self.world.is_first:
                _LOG.warning("step %d: %s", self.steps, _gate_warning(i, gate))
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
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(f"{self.path} could not be written ({error})") from error
        if self.world.is_first:
            self.tracker.write(record)


def _peak_memory(device: torch.device) -> int | None:
    """Bytes at most so far: on a GPU its tensors', else this process's; None on Windows, which does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def numbers(losses: dict[str, Tensor], grad_norms: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a step must be finite, by the names that messages use."""
    return losses | {f"gradient of {name}": value for name, value in grad_norms.items()}


def _joined(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values.values()])


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
    confusion: np.ndarray | None
    """(C, C) int64, examples by label (row) and prediction (column); None for regression and without labels."""


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    task: Task,
    device: torch.device | str | None = None,
    precision: str = "float32",
    world: World = ALONE,
) -> Evaluation:
    """Predict every example of ``batches``; the model comes back in the mode it was in.

    Args:
        model: a sequence classifier.
        batches: as :class:`~lad_fast.data.Batches` gives them, with ids; in any order.
        task: says what the logits mean.
        device: where to move the model first; None leaves it.
        precision: "float32", "bfloat16" or "float16".
        world: processes that each bring their part of the batches; all return the whole.
    """
    if device is not None:
        model.to(device)
    was_training = model.training
    model.eval()
    logits, labels, ids = [], [], []
    try:
        with autocast(model.device.type, precision):
            for batch in batches:
                if "counts" in batch and not batch["counts"][0, 0]:
                    continue  # its example is another process's
                logits.append(run_model(model, model_inputs(model, batch)[0])[0].float())
                ids.append(batch["ids"])
                if "labels" in batch:
                    labels.append(batch["labels"])
    finally:
        model.train(was_training)
    own = [torch.cat(values).cpu() if values else None for values in (ids, logits, labels)]
    columns = zip(*world.gather(own), strict=True)
    ids, logits, labels = ([part for part in parts if part is not None] for parts in columns)
    ids = torch.cat(ids).numpy()
    order = np.argsort(ids, kind="stable")
    logits = torch.cat(logits).numpy()[order]
    predictions = predictions_from_logits(task, logits)
    metrics, confusion = {}, None
    if labels:
        labels = torch.cat(labels).numpy()[order]
        metrics = compute_metrics(task, predictions, labels)
        confusion = None if task.is_regression else confusion_matrix(task, predictions, labels)
    return Evaluation(metrics, ids[order], predictions, logits, confusion)


@dataclass(frozen=True)
class Recipe:
    """Published settings of one task, for batches of 32."""

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
