"""Two processes under torchrun against one. torchrun runs this file too: see :func:`work`."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from lad_fast import cli, distributed
from lad_fast.checkpoint import own_folder
from lad_fast.data import Batches, TokenizedSplit
from lad_fast.distributed import World, current_world
from lad_fast.glue import get_task
from lad_fast.models import save_checkpoint
from lad_fast.replay import replay
from lad_fast.step import DistillStep
from lad_fast.training import DistillConfig, FinetuneConfig, distill, finetune

MRPC, STSB = get_task("mrpc"), get_task("stsb")  # F1 and correlations are of a whole split, and no mean of its parts'


def bert(num_layers, seed, dropout, num_labels, hidden_size=16):
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=24, hidden_size=hidden_size, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16, num_hidden_layers=num_layers, num_labels=num_labels, initializer_range=0.2,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )
    )  # fmt: skip


def split(name, num_examples, task, seed=0):
    numbers = np.random.default_rng(seed)
    lengths = numbers.integers(4, 13, num_examples)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = numbers.integers(4, 24, offsets[-1]).astype(np.int32)
    labels = (ids[offsets[:-1]] > 13).astype(np.int64)
    if task.is_regression:
        labels = (5 * labels).astype(np.float32)
    return TokenizedSplit(task, name, ids, None, offsets, labels, 100 + np.arange(num_examples))


def train(folder, processes, *, kind=DistillConfig, task=MRPC, hook=None, dropout=0.0, seed=0, **options):
    """A whole run with batches of 8, of which each epoch's last has a single example, and so has the evaluation's."""
    settings = {
        "task": task.name, "output_dir": folder, "batch_size": 8 // processes, "epochs": 3, "max_length": 16,
        "log_every": 1, "learning_rate": 1e-3, "progress": False, "device": "cpu", "precision": "float32",
    }  # fmt: skip
    settings |= {"model": ""} if kind is FinetuneConfig else {"teacher": "", "backend": "torch"}
    settings |= {"gate_learning_rate": 1e-3, "hidden_weight": 10.0} if kind is DistillConfig else {}
    data = {"train": split("train", 49, task, seed), "evaluation": {"validation": split("validation", 17, task, 1)}}
    model = partial(bert, dropout=dropout, num_labels=task.num_labels)
    if kind is FinetuneConfig:
        return finetune(kind(**settings | options), task=task, **data, model=model(4, 0))
    student = model(options.pop("student_layers", 2), 1, hidden_size=options.pop("hidden_size", 16))
    if hook is not None:
        student.base_model.register_forward_pre_hook(hook)
    return distill(kind(**settings | options), task=task, **data, teacher=model(4, 0), student=student)


CASES = {
    "sequence norm": {},
    "token norm, reversed": {"norm": "token", "reverse": True},
    "padding counted": {"mask_padding": False},
    "padding counted, as published": {"mask_padding": False, "padding": "max_length"},
    "no cache, accumulating": {"gradient_accumulation_steps": 3, "teacher_cache": "off"},
    "packed, cached on disk": {"padding": "packed", "teacher_cache": "disk"},
    "gates that take no part": {"student_layers": 1, "reverse": True},
    "projections": {"hidden_size": 8, "max_steps": 10},
    "layer map, projected": {"method": "skip", "hidden_size": 8, "max_steps": 10},
    "attention": {"method": "attention"},
    "attention, packed": {"method": "attention", "padding": "packed"},
    "logits": {"method": "logits"},
    "labels": {"method": "none"},
    "fine-tuning": {"kind": FinetuneConfig, "gradient_accumulation_steps": 2},
    "regression": {"kind": FinetuneConfig, "task": STSB},
}
DISTURBED = {"dropout": 0.1, "save_steps": 5}  # runs that are killed and stopped, against one that is not


def after(num_calls, action):
    """A forward hook that acts on one call of the model, and on no other."""
    calls = iter(range(10**9))
    return lambda *_: action() if next(calls) == num_calls else None


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise RuntimeError("out of luck")


def stop_torchrun():
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(2)  # torchrun passes it on meanwhile


def spoil(model):
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.fill_(torch.nan)


def work(jobs, folder):
    """What torchrun runs: jobs one after another in each of its processes, in groups that come and go."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    run = partial(train, processes=2, device=os.environ["LAD_FAST_TEST_DEVICE"])
    for job in jobs:
        # The first process alone has files to write, so another's folder must stay absent.
        own = folder / job if rank == 0 else folder / "another's"
        if job in CASES:
            run(folder / job if "disk" in job else own, **CASES[job])
        elif job == "given group":
            dist.init_process_group("gloo")
            run(own)
            assert dist.get_world_size() == 2, "a group that was given is left alone"
            dist.destroy_process_group()
        elif job == "told":

            def tell(*_):
                (folder / f"told {rank}").write_text(json.dumps([current_world().local_size, torch.initial_seed()]))

            run(own, hook=tell, method="none", max_steps=1)
        elif job == "finished":
            result = run(folder / "sequence norm" if rank == 0 else own)
            weights = result.model.classifier.weight.tolist()
            (folder / f"finished {rank}").write_text(json.dumps([result.steps, result.last_metrics, weights]))
        elif job in ("undisturbed", "disturbed"):
            run(own, **DISTURBED)
        elif job == "killed":
            run(folder / "disturbed", hook=after(7, kill) if rank == 1 else None, **DISTURBED)
        elif job == "stopped":
            run(folder / "disturbed", hook=after(2, stop_torchrun) if rank == 0 else None, **DISTURBED)
        elif job == "failing":
            run(own, hook=after(5, fail) if rank == 1 else None)
        else:
            assert not dist.is_initialized(), "a group that was made for a run ends with it"
            options = {
                "not finite": {"hook": lambda model, _: spoil(model) if rank else None},
                "all not finite": {"hook": lambda model, _: spoil(model)},
                "unlike": {"seed": rank},
                "in use": {},
            }[job]
            try:
                run(own, **options)
            except Exception as error:
                (folder / f"{job} {rank}").write_text(f"{type(error).__name__}: {error}")
            assert not dist.is_initialized(), "... or with its failure"


def torchrun(*arguments, device="cpu"):
    """Two processes; what torchrun printed and returned."""
    command = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node=2", "--standalone", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "LAD_FAST_TEST_DEVICE": device}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            output = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.terminate()  # and so its processes, which a kill would leave behind
            pytest.fail(f"hangs: {process.communicate()}")
        return subprocess.CompletedProcess(command, process.returncode, *output)


def launch(folder, *jobs, **options):
    return torchrun(__file__, folder, *jobs, **options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of what two processes did, all in one launch."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "in use").mkdir()
    with own_folder(folder / "in use"):
        others = "not finite", "all not finite", "unlike", "in use", "undisturbed", "given group", "told", "finished"
        done = launch(folder, *CASES, *others)
    assert done.returncode == 0, done.stderr
    return folder


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def numbers(record):
    """Every number of a log line by its place in it, but for times and memory."""
    if isinstance(record, dict):
        items = [item for item in record.items() if item[0] not in ("tokens_per_second", "peak_memory_mb")]
    else:
        items = enumerate(record)
    found = {}
    for name, value in items:
        inner = numbers(value) if isinstance(value, dict | list) else {"": value}
        found |= {f"{name}.{rest}": number for rest, number in inner.items() if isinstance(number, int | float)}
    return found


def check_curves(alone, together):
    """Losses and metrics to 3e-5, as sums are in another order and training carries that on, and they fall."""
    ours, theirs = lines(alone), lines(together)
    assert len(ours) == len(theirs) > 8
    for one, other in zip(ours, theirs, strict=True):
        assert numbers(other) == pytest.approx(numbers(one), rel=3e-5, abs=1e-9)
    assert ours[0]["loss"] > ours[-2]["loss"]


@pytest.mark.cuda
def test_two_gpus_do_what_one_does(tmp_path):
    """By NCCL; and one that fails ends both with its message."""
    if torch.cuda.device_count() < 2:
        pytest.skip("takes two GPUs")
    done = launch(tmp_path, "sequence norm", "packed, cached on disk", device="cuda")
    assert done.returncode == 0, done.stderr
    for case in ("sequence norm", "packed, cached on disk"):
        train(tmp_path / "alone" / case, 1, device="cuda", **CASES[case])
        check_curves(tmp_path / "alone" / case, tmp_path / case)
    failed = launch(tmp_path, "failing", device="cuda")
    assert failed.returncode != 0
    assert "RuntimeError: out of luck" in failed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_what_one_does(tmp_path, pair, case):
    """Half the batch each: losses, metrics, and final weights."""
    alone = train(tmp_path, 1, **CASES[case])
    check_curves(tmp_path, pair / case)
    results = json.loads((pair / case / "results.json").read_text())
    assert (results["tokens"], results["steps"]) == (alone.tokens, alone.steps)
    worst = 0.0
    for path in sorted(tmp_path.glob("*/*.safetensors")):
        other = load_file(pair / case / path.relative_to(tmp_path))
        for name, value in load_file(path).items():
            # Attention does not depend on keys' biases: their gradients are noise, which Adam makes steps of.
            if not name.endswith("key.bias"):
                worst = max(worst, (value - other[name]).abs().max().item())
    print(f"{case}: weights differ by {worst:.1e} at most")
    assert worst < 2e-6


def outcome(folder):
    """Everything a run leaves but times and memory: weights to the bit, the log, the results."""
    tensors = {
        f"{path.relative_to(folder)}:{name}": value.numpy().tobytes()
        for path in sorted(folder.glob("*/*.safetensors"))
        for name, value in load_file(path).items()
    }
    results = json.loads((folder / "results.json").read_text())
    del results["seconds"], results["output_dir"]
    return tensors, [numbers(line) for line in lines(folder)], results


@pytest.mark.slow
def test_killed_and_stopped_it_goes_on_to_the_bit(tmp_path, pair):
    """Dropout draws from each process's own generator. SIGKILL ends one process, SIGTERM comes to torchrun."""
    killed = launch(tmp_path, "killed")
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL)" in killed.stderr
    folder = tmp_path / "disturbed"
    assert [path.name for path in folder.glob("checkpoints/step-*")] == ["step-5"]
    with pytest.raises(ValueError, match="of another run: batch_size was 4 and is 8, processes was 2 and is 1"):
        train(folder, 1, **DISTURBED)

    stopped = launch(tmp_path, "stopped")  # by a signal to torchrun, which passes it on
    assert stopped.returncode != 0
    assert f"{folder}: going on from {folder}/checkpoints/step-5" in stopped.stderr
    assert "Interrupted: stopped by SIGTERM after step" in stopped.stderr
    assert not (folder / "results.json").exists()
    newest = max(int(path.name[5:]) for path in folder.glob("checkpoints/step-*"))
    assert newest % 5 != 0, "the signal's own checkpoint"

    done = launch(tmp_path, "disturbed")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("going on from") == 1, "the first process alone tells"
    assert outcome(folder) == outcome(pair / "undisturbed")
    alone = outcome(folder)[1]
    assert alone != outcome(pair / "sequence norm")[1], "dropout took part"


@pytest.mark.slow
def test_a_failing_process_ends_all_with_its_message(tmp_path):
    done = launch(tmp_path, "failing")
    assert done.returncode != 0
    assert "RuntimeError: out of luck" in done.stderr
    cause = done.stderr[done.stderr.index("Root Cause") :]
    assert "(local_rank: 1)" in cause
    assert "out of luck" in cause


def test_the_first_process_alone_writes(pair):
    assert not (pair / "another's").exists()
    assert {path.name for path in (pair / "sequence norm").iterdir()} == {
        ".lock", "best", "last", "config.json", "log.jsonl", "results.json",
    }  # fmt: skip


def test_a_group_that_was_given_does_the_same(pair):
    assert outcome(pair / "given group")[:2] == outcome(pair / "sequence norm")[:2]


def test_a_finished_run_is_what_each_process_returns(pair):
    folder = pair / "sequence norm"
    results = json.loads((folder / "results.json").read_text())
    weights = load_file(folder / "last/model.safetensors")["classifier.weight"].tolist()
    for rank in range(2):
        told = json.loads((pair / f"finished {rank}").read_text())
        assert told == [results["steps"], results["last_metrics"], weights]


MESSAGES = {
    "all not finite": "FloatingPointError: step 1: not finite: loss, hidden_loss,",
    "not finite": "FloatingPointError: step 1: not finite: loss, hidden_loss,",
    "unlike": "ValueError: process 1 runs something else: the training data differ; all take the same arguments",
    "in use": "ValueError: output_dir is {}; another run is writing there, process",
}


@pytest.mark.parametrize("job", MESSAGES)
def test_all_processes_end_with_one_message(pair, job):
    """Also with what one of them alone met: numbers in process 1, a lock in process 0."""
    told = [(pair / f"{job} {rank}").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert told[0].startswith(MESSAGES[job].format(pair / job))
    if "not finite" in job:
        assert len(told[0].partition("ids of its examples: ")[2].split(", ")) == 8, "of the whole batch"


def test_one_process_replays_what_two_met(pair):
    """All examples of the step, not the part of the process that wrote the dump."""
    told = (pair / "all not finite 0").read_text()
    found = replay(told.partition("lad-fast replay ")[2].removesuffix(" runs it again").strip("'"))
    assert found.found == found.expected != []
    assert len(found.examples) == 8
    assert found.notes == ["the run had 2 processes, this is one: dropout draws other numbers"]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Arguments of a fine-tuning, but for its folder and batch size, and the folder of its files."""
    folder = tmp_path_factory.mktemp("command")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    save_checkpoint(folder / "model", bert(2, 0, 0.0, 2), tokenizer)
    rows = [f"{i}\tyes no\t{'no ' * (i % 5)}yes\t{get_task('rte').labels[i % 2]}" for i in range(21)]
    (folder / "data/RTE").mkdir(parents=True)
    for name in ("train", "dev"):
        (folder / f"data/RTE/{name}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    argv = ["finetune", "--task", "rte", "--model", folder / "model", "--data-dir", folder / "data", "--epochs", 2]
    argv += ["--max-length", 16, "--log-every", 1, "--no-progress", "--precision", "float32", "--device", "cpu"]
    argv += ["--cache-dir", folder / "cache"]
    return [*map(str, argv)], folder


@pytest.mark.slow
def test_the_command_line(command, tmp_path, capsys):
    argv, folder = command
    done = torchrun("-m", "lad_fast", *argv, "--batch-size", "4", "--output-dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy") == 1, "a table of the first process"
    assert len(list((folder / "cache").iterdir())) == 2
    assert cli.main([*argv, "--batch-size", "8", "--output-dir", str(tmp_path / "one")]) == 0
    assert len(lines(tmp_path / "one")) == 8
    for one, other in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert numbers(other) == pytest.approx(numbers(one), rel=1e-5)


@pytest.mark.slow
def test_a_folder_in_use_ends_the_command(command, tmp_path):
    with own_folder(tmp_path):
        done = torchrun("-m", "lad_fast", *command[0], "--output-dir", tmp_path)
    assert done.returncode != 0
    assert f"error: output_dir is {tmp_path}; another run is writing there" in done.stderr
    assert "lad-fast: process " in done.stderr


def test_other_commands_take_one_process(monkeypatch, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["evaluate", "--task", "rte", "--model", "absent"]) == 2
    told = "lad-fast: process 1: error: evaluate takes one process; torchrun is for finetune and distill\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("padding", ["longest", "packed", "max_length"])
def test_parts_make_the_batch(padding):
    data = split("train", 49, MRPC)
    options = {"shuffle": True, "seed": 3, "padding": padding, "max_length": 16}
    whole = list(Batches(data, 8, 0, **options))
    parts = [list(Batches(data, 8, 0, **options, part=part, parts=3)) for part in range(3)]
    assert [len(part) for part in parts] == [7, 7, 7]
    for batch, *theirs in zip(whole, *parts, strict=True):
        ids = batch["ids"].tolist()
        assert [part["ids"].tolist() for part in theirs] == [ids[i::3] or ids[:1] for i in range(3)]
        tokens = batch["lengths" if padding == "packed" else "attention_mask"].sum().item()
        assert all(part["counts"][1].tolist() == [len(ids), tokens] for part in theirs)
        assert [part["counts"][0, 0].item() for part in theirs] == [len(ids[i::3]) for i in range(3)]
        assert sum(part["counts"][0, 1].item() for part in theirs) == tokens
        if padding != "packed":
            assert {part["input_ids"].shape[1] for part in theirs} == {batch["input_ids"].shape[1]}
    with pytest.raises(ValueError, match="parts is 2; it takes an integer of at least 3"):
        Batches(data, 8, 0, shuffle=False, part=2, parts=2)


def test_what_several_processes_do_not_take(tmp_path, monkeypatch):
    options = {"learning_rate": 1e-3, "total_steps": 1, "warmup_steps": 1, "world": World(size=2)}
    with pytest.raises(ValueError, match="cuda_graphs takes one process"):
        DistillStep(bert(2, 0, 0.0, 2), cuda_graphs=True, **options)
    (whole,) = Batches(split("train", 4, MRPC), 4, 0, shuffle=False)
    with pytest.raises(ValueError, match="batch has no 'counts'; several processes take those of Batches with part"):
        DistillStep(bert(2, 0, 0.0, 2), **options)(whole)

    launched = {"RANK": "1", "LOCAL_RANK": "99", "WORLD_SIZE": "100", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="device is 'cuda:0'; several processes take auto, cpu or cuda"):
        train(tmp_path, 1, device="cuda:0")
    with pytest.raises(ValueError, match="device is 'cuda'; process 99 of this machine has no GPU: there are"):
        train(tmp_path, 1, device="cuda")


def test_processes_know_how_many_they_are_and_draw_apart(pair):
    assert [json.loads((pair / f"told {rank}").read_text()) for rank in range(2)] == [[2, 42], [2, 43]]


def test_one_process_under_torchrun_is_alone(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert not distributed.is_launched() and distributed.rank() is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.is_launched() and distributed.rank() == 0


if __name__ == "__main__":
    work(sys.argv[2:], Path(sys.argv[1]))
