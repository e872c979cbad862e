"""The command line ``lad-fast``: one dataclass a subcommand; tyro makes flags and help of their fields."""

import contextlib
import dataclasses
import io
import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TextIO, Union

import torch
import tyro
from transformers import PreTrainedModel

from lad_fast import __version__, distributed, training, tuning
from lad_fast.checkpoint import Interrupted
from lad_fast.cpu import set_num_threads
from lad_fast.data import Batches, tokenize
from lad_fast.demo import DemoConfig, demo
from lad_fast.doctor import doctor
from lad_fast.export import export_onnx
from lad_fast.glue import DataError, Task, check_metrics, load_split, write_submission
from lad_fast.kernels.launch import cache_file, why_not_triton
from lad_fast.models import (
    check_max_length,
    class_names,
    has_labels,
    load_classifier,
    load_tokenizer,
    most_tokens,
    new_folder,
    save_checkpoint,
)
from lad_fast.published import load_published
from lad_fast.replay import replay
from lad_fast.report import format_table, report
from lad_fast.tasks import CSV, DataConfig, find_task
from lad_fast.training import DistillConfig, Evaluation, FinetuneConfig, TrainingResult

PROGRAM = "lad-fast"


@dataclass(kw_only=True)
class FinetuneCommand(FinetuneConfig):
    """Fine-tune a pre-trained model on a GLUE task or on CSV files: the teacher."""

    recipe: Literal["paper"] | None = None
    """Take the published settings of the task; flags given besides override them."""


@dataclass(kw_only=True)
class DistillCommand(DistillConfig):
    """Distil a fine-tuned teacher into a student with fewer layers."""

    recipe: Literal["paper"] | None = None
    """Take the published settings of the task; flags given besides override them."""


@dataclass(kw_only=True)
class InferenceConfig(DataConfig):
    """What evaluation and prediction have in common."""

    model: str
    """Fine-tuned classifier: a save_pretrained folder or a name on the Hugging Face hub."""
    max_length: int | None = None
    """Tokens an example keeps, special ones included; None takes as many as in training, or 128 where that is not
    known."""
    batch_size: int = 64
    """Examples a batch."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the model's arithmetic. Training scores in its own, which is bfloat16 where the machine is faster in it."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    num_threads: int | None = None
    """CPU threads; None leaves PyTorch's choice."""


@dataclass(kw_only=True)
class EvaluateCommand(InferenceConfig):
    """Score a classifier on a task's labelled evaluation splits: a table, then one line of JSON."""


@dataclass(kw_only=True)
class PredictCommand(InferenceConfig):
    """Write a task's test predictions: files that gluebenchmark.com takes, or predictions.csv for CSV files."""

    output_dir: Path
    """Folder for the files, such as MNLI-m.tsv."""


@dataclass(kw_only=True)
class ImportCommand:
    """Turn an experiment's folder of the published code into a save_pretrained folder, gates beside the model."""

    directory: tyro.conf.Positional[Path]
    """The folder with config.json, model-STEP.pt and, of a student, gate_config.json and gate-I-STEP.pt."""
    output_dir: Path
    """New folder for it."""
    step: int | None = None
    """Of the model; None takes the last."""
    reverse: bool = False
    """The gates were trained from the last teacher layer to the first, which no file says."""
    tokenizer: str | None = None
    """Written beside the model: a save_pretrained folder or a hub's name, google-bert/bert-base-uncased as published;
    None leaves it out."""


@dataclass(kw_only=True)
class ExportCommand:
    """Write a classifier as an ONNX file, with its tokenizer beside it."""

    model: tyro.conf.Positional[str]
    """Fine-tuned classifier: a save_pretrained folder or a name on the Hugging Face hub."""
    output_dir: Path
    """New folder for model.onnx, config.json and the tokenizer."""
    int8: bool = False
    """Weights in 8 bits: smaller and faster on a CPU, predictions nearly the same."""


@dataclass
class ReplayCommand:
    """Run a training step again whose numbers were not finite, and tell which of its tensors was the first."""

    dump: tyro.conf.Positional[Path]
    """The folder not-finite-step-N that the run left in its output folder."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""


@dataclass
class ReportCommand:
    """Draw what a run has logged, or several beside each other: one HTML page that needs nothing else, and a PNG."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Output folders of finetune or distill, also of runs in progress."""
    output: Path | None = None
    """Page to write, the PNG beside it; None takes report.html in the run's folder, or comparison.html in the first."""


@dataclass
class DoctorCommand:
    """Show versions and devices, and check every back end against the reference."""


@dataclass
class BenchCommand:
    """Run the benchmark suite of a repository checkout and write what it measured."""

    full: bool = False
    """Larger sizes too, as the device's memory allows; otherwise about five minutes on two cores."""
    output_dir: Path | None = None
    """Folder for the result file and its figure; None: benchmarks/results, and renews the tables of README and docs."""
    tune: bool = False
    """Instead, measure how this GPU best launches the gates, for later runs; with --full at all sizes, in hours."""


class CommandLineError(ValueError):
    """A command line that does not parse; the message is one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``lad-fast``.

    Args:
        argv: The arguments after the program's name; None takes the process's own.

    Returns:
        The exit code: 0; 1 for something broken (doctor, training whose numbers are not finite, or a replay that does
        not come to what the run came to); 2 for wrong input, or memory or a disk without room; 128 + the signal's
        number (130, 143) for a run that SIGINT or SIGTERM stopped; 141 where nobody reads on, as of a pipe to ``head``.
        But for doctor's and this one, a line on stderr says more.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if list(argv) == ["--version"]:
            print(f"{PROGRAM} {__version__}")
            return 0
        command = parse(argv)
        if command is None:
            return 0
        name, run = COMMANDS[type(command)].name, COMMANDS[type(command)].run
        if distributed.is_launched() and type(command) not in (FinetuneCommand, DistillCommand):
            raise ValueError(f"{name} takes one process; torchrun is for finetune and distill")
        return run(command)
    except (ValueError, TypeError, ImportError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout):
            return 141  # as of a process that SIGPIPE ends
        _tell(f"error: {' '.join(str(error).split())}")
        return 2
    except (torch.OutOfMemoryError, MemoryError) as error:
        text = " ".join(str(error).split()) or "out of memory"
        _tell(f"error: {text[:300]}; a smaller --batch-size or --max-length takes less")
        return 2
    except FloatingPointError as error:
        _tell(f"error: {error}")
        return 1
    except Interrupted as stop:
        if not distributed.rank():
            _tell(str(stop))
        return 128 + stop.signal
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped", file=sys.stderr)
        return 130


def _is_unread(stream: TextIO) -> bool:
    """Whether a stream's reader has left, as ``head`` does once it has its lines; what is left for it is dropped."""
    poll = select.poll()  # systems without it have no such error
    poll.register(stream.fileno(), 0)
    if any(event & select.POLLERR for _, event in poll.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # the interpreter's end flushes once more
        return True
    return False


def _tell(text: str) -> None:
    """One line on stderr. Of several processes each tells, since the first to end may be the end of all."""
    number = distributed.rank()
    print(f"{PROGRAM}: {'' if number is None else f'process {number}: '}{text}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str]):
    """Turns arguments into the dataclass of their subcommand; None where help was asked for, and printed.

    Raises:
        CommandLineError: If they do not parse.
        ValueError: If ``--recipe`` has no settings for the task.
    """
    kinds = []
    for kind, command in COMMANDS.items():
        defaults = _recipe_defaults(kind, argv[1:]) if argv[:1] == [command.name] else {}
        markers = tyro.conf.subcommand(command.name, prefix_name=False, **defaults)
        kinds.append(Annotated[kind, markers])
    about = "Layer-wise Adaptive Distillation of BERT students. --version alone tells the version."
    command = _parse(Union[tuple(kinds)], argv, description=about)  # noqa: UP007 - the members are known only here
    if command is None:
        return None
    # A shell leaves the ~ of --output-dir=~/run to the program; a folder of that name is nobody's wish.
    values = {field.name: getattr(command, field.name) for field in dataclasses.fields(command)}
    paths = {name: Path(os.path.expanduser(value)) for name, value in values.items() if isinstance(value, Path)}
    return dataclasses.replace(command, **paths)


def _recipe_defaults(kind: type, argv: Sequence[str]) -> dict:
    """The default that ``--recipe`` among the arguments gives a subcommand, as a keyword of tyro's."""
    given = {word.split("=")[0].replace("_", "-") for word in argv}
    if kind not in (FinetuneCommand, DistillCommand) or "--recipe" not in given or given & {"-h", "--help"}:
        return {}

    @dataclass
    class Choice:
        recipe: Literal["paper"] | None = None
        task: str = ""

    choice, _ = _parse(Choice, argv, return_unknown_args=True, add_help=False)
    if choice.recipe is None:
        return {}
    if not choice.task:
        raise CommandLineError("task is missing; --recipe takes --task too")
    settings = training.recipe(choice.task, COMMANDS[kind].name)
    if given & {"--epochs", "--batch-size", "--gradient-accumulation-steps"}:
        settings["max_steps"] = None  # the paper's number of steps is that of its epochs and batches
    required = {f.name: tyro.MISSING for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    return {"default": kind(**(required | settings))}


def _parse(kind, argv: Sequence[str], **options):
    boxes = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxes):
            return tyro.cli(kind, prog=PROGRAM, args=list(argv), **options)
    except SystemExit as stop:
        if stop.code:
            raise CommandLineError(_in_one_line(boxes.getvalue())) from None
        return None


def _in_one_line(box: str) -> str:
    """The text of an error that tyro drew as a box of sections."""
    first, *lines = re.sub(r"\x1b\[[0-9;]*m", "", box).strip().splitlines()
    text = "\n".join(line.strip("│╰╯ ") for line in lines)
    sections = [" ".join(section.split()) for section in re.split("─{4,}", text)]
    # The boxes end with the way to the help text, and explain a value's flag at length; help does both.
    told = [s for s in sections if s and not s.startswith(("For full helptext", "Argument helptext"))]
    return f"{first.strip('╭╮─ ')}: {'; '.join(told)} ({PROGRAM} --help lists commands, COMMAND --help their flags)"


def run_demo(config: DemoConfig) -> int:
    demo(config)
    return 0


def run_training(train: Callable[..., TrainingResult], config: FinetuneConfig | DistillConfig) -> int:
    result = train(config)
    if distributed.rank():
        return 0
    rows = _metric_rows(result.best_metrics)
    print(format_table(("split", "metric", "best"), rows))
    print(
        f"{result.num_parameters:,} parameters, {result.steps} steps, {result.seconds:.0f} s of training; "
        f"the best checkpoint, of step {result.best_step}, is in {result.output_dir / 'best'}"
    )
    return 0


def run_evaluate(config: EvaluateCommand) -> int:
    task, predict = _load(config)
    check_metrics(task)
    metrics = {split: predict(split).metrics for split in task.eval_splits}
    print(format_table(("split", "metric", "score"), _metric_rows(metrics)))
    print(json.dumps({"model": config.model, "task": task.name, "metrics": metrics}))
    return 0


def run_predict(config: PredictCommand) -> int:
    task, predict = _load(config)
    for split in task.test_splits:
        found = predict(split)
        path = write_submission(task, split, found.ids, found.predictions, config.output_dir)
        print(f"{split}: {len(found.ids):,} predictions in {path}")
    return 0


def run_import(config: ImportCommand) -> int:
    """The exit code; see :func:`lad_fast.published.load_published`."""
    with new_folder(config.output_dir) as folder:
        tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
        found = load_published(config.directory, config.step, reverse=config.reverse)
        if tokenizer is not None and len(tokenizer) > found.model.config.vocab_size:
            size = found.model.config.vocab_size
            raise ValueError(f"tokenizer has {len(tokenizer)} tokens; the model's embeddings hold {size}")
        state = {"task": found.task.name, "step": found.step, "published": found.settings}
        save_checkpoint(folder, found.model, tokenizer, found.gates, state)
    gates = "no gates" if found.gates is None else f"{len(found.gates.weight)} gates"
    print(f"{config.output_dir}: step {found.step} of {found.task.name}, {gates}")
    return 0


def run_export(config: ExportCommand) -> int:
    path = export_onnx(config.model, config.output_dir, config.int8)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


def run_replay(config: ReplayCommand) -> int:
    found = replay(config.dump, config.device)
    print(found)
    return int(found.found != found.expected)


def run_report(config: ReportCommand) -> int:
    print(report(config.runs, config.output))
    return 0


def run_bench(config: BenchCommand) -> int:
    if config.tune:
        device = torch.device("cuda")
        if reason := "there is no CUDA device" if not torch.cuda.is_available() else why_not_triton(device):
            raise ValueError(f"--tune measures Triton's kernels on a GPU: {reason}")
        if config.output_dir is not None:
            raise ValueError(f"--tune writes {cache_file()}; it takes no --output-dir")
        tuning.tune(tuning.default_sizes(config.full), device)
        return 0
    script = Path(__file__).parents[1] / "benchmarks/bench_record.py"
    if not script.is_file():
        raise ValueError(f"bench takes a checkout of the repository; this installation has no {script.parent}")
    flags = ["--full"] if config.full else []
    if config.output_dir is not None:
        flags += ["--output-dir", str(config.output_dir.resolve())]
    return subprocess.run([sys.executable, str(script), "run", *flags], check=False).returncode


def _load(config: InferenceConfig) -> tuple[Task, Callable[[str], Evaluation]]:
    """The task, and a function that predicts one of its splits with the configured model."""
    task = None if config.task == CSV else find_task(config)
    set_num_threads(config.num_threads)
    device = training._pick_device(config.device)
    model, tokenizer = load_classifier(config.model, task, fine_tuned=True)
    if task is None:
        task = _find_csv_task(config, model)
    trained = training.check_texts("model", config.model, task)
    if (max_length := config.max_length) is None:
        most = min(DataConfig.max_length, most_tokens(model), tokenizer.model_max_length)
        max_length = trained.get("max_length", most)
    check_max_length(model, max_length)

    def predict(split: str) -> Evaluation:
        examples = load_split(task, split, config.data_dir)
        tokens = tokenize(examples, tokenizer, max_length, config.cache_dir)
        print(tokens.summary(max_length), file=sys.stderr)
        batches = Batches(tokens, config.batch_size, tokenizer.pad_token_id, shuffle=False, max_length=max_length)
        return training.evaluate(model, batches, task, device, config.precision)

    return task, predict


def _find_csv_task(config: InferenceConfig, model: PreTrainedModel) -> Task:
    """With the model's classes; in the spelling of train.csv where that is there and has the same, as in training."""
    names = class_names(model)
    if names:
        try:
            task = find_task(config)
        except DataError:  # no train.csv, which predictions do without
            pass
        else:
            if has_labels(model.config, task):
                return task
    return find_task(config, names)


def _metric_rows(metrics: dict[str, dict[str, float]]) -> list[tuple[str, str, str]]:
    return [(split, name, f"{value:.4f}") for split, values in metrics.items() for name, value in values.items()]


@dataclass(frozen=True)
class Command:
    """A subcommand: its name, and what runs it and returns the exit code."""

    name: str
    run: Callable[..., int]


COMMANDS: dict[type, Command] = {
    DemoConfig: Command("demo", run_demo),
    FinetuneCommand: Command("finetune", lambda config: run_training(training.finetune, config)),
    DistillCommand: Command("distill", lambda config: run_training(training.distill, config)),
    EvaluateCommand: Command("evaluate", run_evaluate),
    PredictCommand: Command("predict", run_predict),
    ImportCommand: Command("import", run_import),
    ExportCommand: Command("export", run_export),
    ReplayCommand: Command("replay", run_replay),
    ReportCommand: Command("report", run_report),
    BenchCommand: Command("bench", run_bench),
    DoctorCommand: Command("doctor", lambda config: doctor()),
}
