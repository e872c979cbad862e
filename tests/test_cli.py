"""The command line: what it takes, what it prints, and one line of error for what it does not take."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from lad_fast.cli import DistillCommand, EvaluateCommand, FinetuneCommand, main, parse
from lad_fast.demo import build_tokenizer
from lad_fast.glue import TASKS

ROWS = [("a film is dull", "it is dull", 0), ("a play is lovely", "it is dull", 1)] * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A tiny model with two labels, one with three, and folders of RTE and MNLI, whole and broken, as official TSVs."""
    root = tmp_path_factory.mktemp("cli")
    tokenizer = build_tokenizer([text for row in ROWS for text in row[:2]])
    tokenizer.model_max_length = 64
    torch.manual_seed(0)
    paths = {"root": root}
    for name, labels in (("model", TASKS["rte"].labels), ("three", TASKS["mnli"].labels)):
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
        paths[name] = root / name
        BertForSequenceClassification(config).save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])

    def write(data: str, split: str, lines: list[str]) -> None:
        path = root / data / "RTE" / f"{split}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n" if lines else "")
        paths[data] = root / data

    header = "index\tsentence1\tsentence2"
    labelled = [f"{i}\t{a}\t{b}\t{TASKS['rte'].labels[label]}" for i, (a, b, label) in enumerate(ROWS)]
    for split in ("train", "dev"):
        write("data", split, [f"{header}\tlabel", *labelled])
        write("empty", split, [])
        write("torn", split, [f"{header}\tlabel", *labelled[:2], "2\tno second sentence"])
        write("mislabelled", split, [f"{header}\tlabel", *labelled[:1], "1\ta\tb\tperhaps"])
    write("data", "test", [header, *(f"{i}\t{a}\t{b}" for i, (a, b, _) in enumerate(ROWS))])
    return paths


def train(command: str, **flags) -> list[str]:
    """The arguments of a finetune or distill command that is right but for ``flags``."""
    start = {"finetune": {"model": "{model}"}, "distill": {"teacher": "{model}", "student_layers": 1}}[command]
    common = {"task": "rte", "data_dir": "{data}", "output_dir": "{root}/run", "max_length": 16, "epochs": 1}
    return [command, *_flags(start | common | {"device": "cpu"} | flags)]


def infer(command: str, **flags) -> list[str]:
    common = {"model": "{model}", "task": "rte", "data_dir": "{data}", "max_length": 16, "device": "cpu"}
    if command == "predict":
        common["output_dir"] = "{root}/submission"
    return [command, *_flags(common | flags)]


def _flags(values: dict) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def filled(argv: list[str], folders: dict[str, Path]) -> list[str]:
    return [word.format(**folders) for word in argv]


WRONG_CALLS = [
    # (arguments, what the line of error must hold)
    ([], ["subcommand", "demo", "distill"]),
    (["destill"], ["destill", "distill"]),
    (["finetune"], ["--task", "--model", "--output-dir"]),
    (["distill", "--task", "rte", "--output-dir", "x"], ["--teacher"]),
    (["distill", "--task"], ["--task"]),
    (["demo", "extra"], ["extra"]),
    (["demo", "--seeds", "1"], ["--seeds"]),
    (["demo", "--seed", "one"], ["--seed", "one"]),
    (["demo", "--teacher-steps", "0"], ["teacher_steps", "0"]),
    (["demo", "--student-steps", "-3"], ["student_steps", "-3"]),
    (["doctor", "--task", "rte"], ["--task"]),
    (["report"], ["runs is empty", "at least one"]),
    (["report", "{model}"], ["model", "without log.jsonl"]),
    (["report", "--input", "{model}"], ["--input"]),
    (["export", "{model}"], ["--output-dir"]),
    (["export", "{model}", "--output-dir", "{data}"], ["output_dir", "data", "empty folder"]),
    (["export", "{data}", "--output-dir", "{root}/onnx"], ["data", "config.json"]),
    (["replay"], ["PATH", "not-finite-step-N"]),
    (["replay", "{root}/absent"], ["absent", "not-finite-step-N"]),
    (["replay", "{model}"], ["model", "not-finite-step-N"]),
    (train("finetune", batch_size="many"), ["--batch-size", "many"]),
    (train("finetune", batch_size=0), ["batch_size", "0"]),
    (train("finetune", epochs=0), ["epochs", "0"]),
    (train("finetune", max_steps=-1), ["max_steps", "-1"]),
    (train("finetune", gradient_accumulation_steps=0), ["gradient_accumulation_steps", "0"]),
    (train("finetune", learning_rate=-1), ["learning_rate", "-1"]),
    (train("finetune", learning_rate="nan"), ["learning_rate", "nan"]),
    (train("finetune", warmup_ratio=2), ["warmup_ratio", "2"]),
    (train("finetune", max_grad_norm=0), ["max_grad_norm", "0"]),
    (train("finetune", num_threads=0), ["num_threads", "0"]),
    (train("finetune", log_every=0), ["log_every", "0"]),
    (train("finetune", precision="float8"), ["--precision", "float8", "bfloat16"]),
    (train("finetune", padding="none"), ["--padding", "none", "longest"]),
    (train("finetune", device="toaster"), ["device", "toaster"]),
    (train("finetune", task="imdb"), ["task", "imdb", "rte"]),
    (train("finetune", max_length=2), ["max_length", "2"]),
    (train("finetune", max_length=1000), ["max_length", "1000", "64"]),
    (train("finetune", model="{root}/absent"), ["absent", "folder"]),
    (train("finetune", model="{data}"), ["data", "config.json"]),
    (train("finetune", data_dir="{root}/absent"), ["data_dir", "absent"]),
    (train("finetune", data_dir="{empty}"), ["train.tsv", "no examples"]),
    (train("finetune", data_dir="{torn}"), ["train.tsv", "line 4"]),
    (train("finetune", data_dir="{mislabelled}"), ["train.tsv", "line 3", "perhaps"]),
    (train("finetune", task="mrpc"), ["mrpc", "data"]),
    (train("finetune", task="csv"), ["train.csv", "data"]),
    (train("finetune", text_column="review"), ["text_column", "review", "csv"]),
    (infer("evaluate", task="csv"), ["validation.csv", "data"]),
    (train("finetune", log="paper"), ["--log", "paper", "tensorboard"]),
    (train("finetune", recipe="thesis"), ["--recipe", "thesis", "paper"]),
    (train("finetune", recipe="paper", task="cola"), ["cola", "rte"]),
    (["distill", "--recipe", "paper"], ["--recipe", "--task"]),
    (train("distill", method="magic"), ["--method", "magic", "lad"]),
    (train("distill", student_layers=0), ["student_layers", "0"]),
    (train("distill", student_layers=3), ["student_layers", "3", "2"]),
    (train("distill", student_init="published"), ["pretrained"]),
    (train("distill", temperature=0), ["temperature", "0"]),
    (train("distill", hidden_weight=-1), ["hidden_weight", "-1"]),
    (train("distill", norm="batch"), ["--norm", "batch", "sequence"]),
    (train("distill", backend="cuda"), ["--backend", "cuda", "triton"]),
    (train("distill", teacher="{three}"), ["three", "labels", "rte"]),
    (infer("evaluate", model="{three}"), ["three", "labels", "rte"]),
    (infer("evaluate", batch_size=0), ["batch_size", "0"]),
    (infer("evaluate", num_threads=0), ["num_threads", "0"]),
    (infer("evaluate", device="cuda:99"), ["device", "cuda:99"]),
    (infer("predict", task="imdb"), ["task", "imdb"]),
    (infer("predict", data_dir="{torn}"), ["test", "torn"]),
]


@pytest.mark.parametrize(("argv", "words"), WRONG_CALLS, ids=lambda value: " ".join(value)[:60])
def test_wrong_call(argv, words, folders, capsys):
    assert main(filled(argv, folders)) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("lad-fast: error: ")
    for word in words:
        assert word in line


def test_wrong_call_in_a_process_of_its_own(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lad_fast", "demo", "--seed", "one"],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "--seed" in line


def test_home_is_home_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    command = parse(["predict", "--task=rte", "--model=m", "--output-dir=~/out", "--data-dir=~", "--cache-dir=a~/~"])
    assert (command.output_dir, command.data_dir, command.cache_dir) == (tmp_path / "out", tmp_path, Path("a~/~"))


@pytest.mark.parametrize("command", ("distill --help", "doctor"))
def test_a_reader_that_leaves_early_is_no_error(command, tmp_path):
    """As `lad-fast distill --help | head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "lad_fast", *command.split()], cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("demo", ["runs/demo", "(default: 42)", "32 sentences each"]),
        ("finetune", ["(default: 3e-05)", "Tokens an example keeps", "Examples a batch", "{None,paper}"]),
        ("distill", ["(default: 1000.0)", "{None,triton,torch,reference}", "--no-mask-padding", "(default: 10)"]),
        ("evaluate", ["(default: 64)", "one line of JSON"]),
        ("predict", ["--output-dir PATH", "gluebenchmark.com"]),
        ("export", ["--output-dir PATH", "model.onnx", "--int8"]),
        ("replay", ["not-finite-step-N", "which of its tensors was the first"]),
        ("report", ["--output", "report.html in the run's folder"]),
        ("doctor", ["versions and devices"]),
    ],
)
def test_help(command, words, capsys):
    assert main([command, "--help"]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for word in words:
        assert word in out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lad-fast {metadata.version('lad_fast')}\n"
    assert main(["--help"]) == 0
    assert "--version" in capsys.readouterr().out


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GiB"), MemoryError()])
def test_running_out_of_memory_is_one_line(monkeypatch, capsys, error):
    def raises(config):
        raise error

    monkeypatch.setattr("lad_fast.cli.demo", raises)
    assert main(["demo"]) == 2
    told = capsys.readouterr().err
    assert "out of memory" in told.lower() and "--batch-size" in told and told.count("\n") == 1


def test_recipe_gives_defaults_that_flags_override():
    argv = ["distill", "--task", "mrpc", "--teacher", "t", "--output-dir", "o", "--recipe", "paper"]
    plain, config = parse(argv[:-2]), parse([*argv, "--epochs", "2", "--no-reverse"])
    assert isinstance(config, DistillCommand)
    assert (config.learning_rate, config.gate_learning_rate, config.hidden_weight) == (7e-4, 5e-6, 500)
    assert (config.padding, config.mask_padding, config.student_init) == ("max_length", False, "published")
    assert config.epochs == 2
    assert (plain.epochs, plain.padding, plain.mask_padding) == (10, "auto", True)

    assert config.max_steps is None and parse(argv).max_steps == 2292  # its steps are those of its epochs
    assert parse([*argv, "--batch_size=16"]).max_steps is None
    assert parse([*argv, "--epochs", "20", "--max-steps", "9"]).max_steps == 9

    teacher = parse(["finetune", "--recipe=paper", "--task=sst2", "--output-dir=o", "--learning-rate", "1e-3"])
    assert isinstance(teacher, FinetuneCommand)
    assert (teacher.learning_rate, teacher.max_steps) == (1e-3, 6315)
    assert "bert-base-uncased" in teacher.model


def test_parse_makes_the_dataclass_of_the_subcommand():
    config = parse(["evaluate", "--model", "m", "--task", "rte", "--data-dir", "d", "--precision", "bfloat16"])
    assert config == EvaluateCommand(model="m", task="rte", data_dir=Path("d"), precision="bfloat16")


def test_finetune_distill_evaluate_predict(folders, tmp_path, capsys):
    teacher, student, submission = tmp_path / "teacher", tmp_path / "student", tmp_path / "submission"
    quiet = ["--no-progress"]
    assert main([*filled(train("finetune", output_dir=teacher, learning_rate=1e-3), folders), *quiet]) == 0
    assert str(teacher / "best") in capsys.readouterr().out

    argv = train("distill", teacher=teacher / "best", output_dir=student)
    assert main([*filled(argv, folders), *quiet]) == 0
    assert str(student / "best") in capsys.readouterr().out
    assert (student / "best/gates.safetensors").is_file()

    assert main(filled(infer("evaluate", model=student / "best"), folders)) == 0
    *table, line = capsys.readouterr().out.splitlines()
    accuracy = json.loads(line)["metrics"]["validation"]["accuracy"]
    assert accuracy in [i / len(ROWS) for i in range(len(ROWS) + 1)]
    assert any("validation" in row and f"{accuracy:.4f}" in row for row in table)
    results = json.loads((student / "results.json").read_text())
    assert results["best_metrics"]["validation"]["accuracy"] == accuracy

    assert main(filled(infer("predict", model=student / "best", output_dir=submission), folders)) == 0
    header, *rows = (submission / "RTE.tsv").read_text().splitlines()
    assert header == "index\tprediction"
    assert [row.split("\t")[0] for row in rows] == [str(i) for i in range(len(ROWS))]
    assert {row.split("\t")[1] for row in rows} <= set(TASKS["rte"].labels)
    assert str(submission / "RTE.tsv") in capsys.readouterr().out


def test_doctor_finds_every_back_end_that_runs_here(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for backend in ("reference", "torch"):
        assert f"{backend} on cpu" in out
    assert out.count("ok: largest relative error") >= 2
    assert f"torch                {torch.__version__}" in out


def test_doctor_reports_a_wrong_back_end(capsys, monkeypatch):
    from lad_fast import doctor

    monkeypatch.setattr(doctor, "largest_error", lambda backend, device: 0.5 if backend == "torch" else 0.0)
    assert main(["doctor"]) == 1
    assert "WRONG: largest relative error 5.0e-01" in capsys.readouterr().out


def test_doctor_reports_a_broken_back_end(capsys, monkeypatch):
    from lad_fast import doctor

    def broken(backend, device):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "largest_error", broken)
    assert main(["doctor"]) == 1
    assert "BROKEN: RuntimeError: no such thing" in capsys.readouterr().out
