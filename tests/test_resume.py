"""Runs that are killed, stopped, or find their files broken, against runs that nothing happens to."""

import dataclasses
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from functools import partialmethod
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from lad_fast import checkpoint, cli, training
from lad_fast.checkpoint import CheckpointError, Checkpoints, Interrupted
from lad_fast.data import Batches, TokenizedSplit
from lad_fast.glue import get_task
from lad_fast.models import save_checkpoint
from lad_fast.tracking import scalars
from lad_fast.training import DistillConfig, FinetuneConfig, distill, finetune

RTE = get_task("rte")
TIMES = ("tokens_per_second", "seconds", "peak_memory_mb")


def bert(num_layers=4, seed=0, dropout=0.1):
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=24, hidden_size=16, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16,
            num_hidden_layers=num_layers, num_labels=2, initializer_range=0.2, hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )  # fmt: skip


def split(num_examples, seed=0, name="train"):
    numbers = np.random.default_rng(seed)
    lengths = numbers.integers(4, 13, num_examples)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = numbers.integers(4, 24, offsets[-1]).astype(np.int32)
    return TokenizedSplit(
        RTE, name, ids, None, offsets, numbers.integers(0, 2, num_examples), 100 + np.arange(num_examples)
    )


def settings(output_dir, kind=DistillConfig, **options):
    common = {
        "task": "rte", "output_dir": output_dir, "batch_size": 4, "epochs": 3, "max_length": 16, "log_every": 3,
        "learning_rate": 3e-3, "progress": False, "device": "cpu", "precision": "float32", "save_steps": 2,
    }  # fmt: skip
    own = {"model": ""} if kind is FinetuneConfig else {"teacher": "", "student_layers": 2, "backend": "torch"}
    return kind(**common | own | options)


def train(output_dir, *, kind=DistillConfig, hook=None, layers=2, **options):
    """A whole run: 13 batches an epoch, dropout, gates, a teacher cache, an evaluation an epoch; a student of that many
    layers."""
    data = {"train": split(50), "evaluation": {"validation": split(20, seed=1, name="validation")}}
    if kind is FinetuneConfig:
        model = bert()
        if hook is not None:
            model.base_model.register_forward_pre_hook(hook)
        return finetune(settings(output_dir, kind, **options), **data, model=model)
    student = bert(layers, seed=1)
    if hook is not None:
        student.base_model.register_forward_pre_hook(hook)  # packed batches go there
    return distill(settings(output_dir, **options), **data, teacher=bert(), student=student)


def after(num_calls, action):
    """A forward hook that acts on one call of the model, and on no other."""
    calls = iter(range(10**9))
    return lambda *_: action() if next(calls) == num_calls else None


def send(number):
    return lambda: os.kill(os.getpid(), number)


def stopped(output_dir, num_calls=17, number=signal.SIGTERM, **options):
    """A run that a signal stops in the student's forward pass of that number."""
    with pytest.raises(Interrupted) as stop:
        train(output_dir, hook=after(num_calls, send(number)), **options)
    return stop.value


def outcome(folder):
    """Everything a run leaves but times and memory: weights to the bit, the log, the results."""

    def timeless(record):
        return {name: value for name, value in record.items() if name not in TIMES}

    tensors = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        for name, value in load_file(path).items():
            tensors[f"{path.relative_to(folder)}:{name}"] = value.numpy().tobytes()
    log = [timeless(json.loads(line)) for line in (folder / "log.jsonl").read_text().splitlines()]
    results = timeless(json.loads((folder / "results.json").read_text()))
    return tensors, log, {name: value for name, value in results.items() if name != "output_dir"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outcome of a run by its options; each is made once."""
    made = {}

    def get(**options):
        key = repr(sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            train(folder, **options)
            made[key] = outcome(folder)
        return made[key]

    return get


ENGINES = {
    "cached": {},
    "not cached": {"teacher_cache": "off"},
    "cached on disk, accumulating": {"teacher_cache": "disk", "gradient_accumulation_steps": 2},
    "packed": {"padding": "packed"},
    "padding counted": {"padding": "max_length", "mask_padding": False},
    "bfloat16, reversed": {"precision": "bfloat16", "reverse": True},
    "float16": {"precision": "float16"},
    "layer map": {"method": "last", "normalize_states": True},
    "attention, packed": {"method": "attention", "padding": "packed"},
    "logits": {"method": "logits"},
    "labels": {"method": "none"},
    "fine-tuning": {"kind": FinetuneConfig},
    "max_steps": {"max_steps": 20},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stopped_run_goes_on_to_the_bit(tmp_path, undisturbed, engine):
    """Stopped four times: in the first epoch, in an evaluation (steps and evaluations: 13 + 5 calls), in the second
    epoch and right after."""
    options = ENGINES[engine]
    tensors, log, results = undisturbed(**options)
    for num_calls in (5, 9, 6, 0):
        stop = stopped(tmp_path, num_calls, **options)
        assert stop.path.is_dir()
        assert not (tmp_path / "results.json").exists()
    train(tmp_path, **options)
    found = outcome(tmp_path)
    assert found[1] == log
    assert found[2] == results
    assert found[0] == tensors
    assert len(tensors) > 20


def test_one_example_to_train_on_and_one_to_score(tmp_path):
    data = {"train": split(1), "evaluation": {"validation": split(1, seed=1, name="validation")}}
    result = distill(settings(tmp_path), **data, teacher=bert(), student=bert(2, seed=1))
    assert result.steps == 3
    assert result.best_metrics["validation"]["accuracy"] in (0.0, 1.0)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_compiled_encoders(tmp_path, undisturbed, monkeypatch):
    # One length and no teacher, which has nothing to go on from: fewer graphs to compile, and no code to make of them.
    options = {"compile": True, "epochs": 2, "method": "none", "padding": "max_length", "layers": 1}
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    tensors, log, results = undisturbed(**options)
    add = training._Log.add
    with monkeypatch.context() as patch:  # a hook would be compiled too, again at each call
        patch.setattr(training._Log, "add", lambda log, *args: (add(log, *args), log.steps == 9 and send(15)()))
        with pytest.raises(Interrupted):
            train(tmp_path, **options)
    train(tmp_path, **options)
    found = outcome(tmp_path)
    assert found[1:] == (log, results)
    assert found[0] == tensors


def attempt(folder, **options):
    """Start the run in a process of its own: no import to wait for, and nothing shared but the folder."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            train(folder, **options)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def killed_until_done(folder, delays, **options):
    """Kill the run after each delay and start it again, until it ends by itself.

    Returns:
        For each kill, whether it met a save under way.
    """
    kills = []
    while True:
        before = set(folder.glob("checkpoints/.*"))
        pid = attempt(folder, **options)
        killer = threading.Timer(next(delays), os.kill, (pid, signal.SIGKILL))
        killer.start()
        # The child is left to be waited for until the timer can no longer meet another process of its number.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        killer.cancel()
        killer.join()
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, "a resumed run failed; its traceback is above"
            return kills
        kills.append(bool(set(folder.glob("checkpoints/.*")) - before))


KILLS = 30
FINE_TUNING_KILLS = 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside pytest's own threads
def test_thirty_kills_change_nothing(tmp_path, undisturbed):
    check_kills(tmp_path, undisturbed, KILLS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_kills_change_no_fine_tuning(tmp_path, undisturbed):
    check_kills(tmp_path, undisturbed, FINE_TUNING_KILLS, kind=FinetuneConfig)


def check_kills(tmp_path, undisturbed, least, **options):
    """At least so many kills at random moments, in as many runs as it takes."""
    options |= {"save_steps": 1}
    expected = undisturbed(**options)
    numbers, seconds = random.Random(20231), []
    for name in ("first", "second"):
        start = time.perf_counter()
        assert killed_until_done(tmp_path / name, iter([60]), **options) == []
        seconds.append(time.perf_counter() - start)
    kills, runs = [], 0
    while len(kills) < least:
        folder = tmp_path / str(runs)
        # Longer and longer, so that a run reaches a checkpoint also where starting takes most of its time; short again
        # for the next one: were they not, runs that have become faster than those timed above would not be killed.
        delays = (numbers.uniform(0, 0.5 * min(seconds) * 1.03**i) for i in count())
        kills += killed_until_done(folder, delays, **options)
        runs += 1
        assert outcome(folder) == expected, f"killed in {kills}"
        assert not (folder / "checkpoints").exists(), "a finished run needs no checkpoints"
        shutil.rmtree(folder)
    print(f"{len(kills)} kills in {runs} runs of {min(seconds):.2f} s: {sum(kills)} of them in a save")


POINTS = [
    "tensors written", "before the rename", "after the rename", "while old ones go", "while last is replaced",
    "before the results", "before the last checkpoint goes",
]  # fmt: skip


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_killed_inside_a_save(tmp_path, undisturbed, monkeypatch, point):
    """Random moments seldom meet a save's short steps: here each is met."""

    def die(*_args, **_kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    calls = iter(range(10**9))

    def on_call(number, function):
        return lambda *args, **kwargs: die() if next(calls) == number else function(*args, **kwargs)

    pid = os.fork()
    if pid == 0:
        if point == "tensors written":
            monkeypatch.setattr(checkpoint, "_digest", on_call(7, checkpoint._digest))
        elif point == "before the rename":
            monkeypatch.setattr(checkpoint, "sync", on_call(9, checkpoint.sync))
        elif point == "after the rename":
            monkeypatch.setattr(Checkpoints, "_prune", on_call(3, Checkpoints._prune))
        elif point == "while old ones go":
            monkeypatch.setattr(checkpoint, "_discard", on_call(3, checkpoint._discard))
        elif point == "while last is replaced":
            rename = Path.rename
            die_at_last = lambda path, to: die() if path.name == ".last.partial" else rename(path, to)  # noqa: E731
            monkeypatch.setattr(Path, "rename", die_at_last)
        elif point == "before the results":
            monkeypatch.setattr(training, "write_json", on_call(1, training.write_json))
        else:
            monkeypatch.setattr(Checkpoints, "clear", die)
        try:
            train(tmp_path)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert list((tmp_path / "checkpoints").iterdir())
    train(tmp_path)
    assert outcome(tmp_path) == undisturbed()


@pytest.fixture
def score(monkeypatch):
    """Call it with the accuracies that the next evaluations come to."""

    def come_to(*values):
        scores = iter(values)
        monkeypatch.setattr(training, "compute_metrics", lambda *_: {"accuracy": next(scores)})

    return come_to


def test_the_best_so_far_is_remembered(tmp_path, score):
    score(0.75)
    stopped(tmp_path, 20)
    score(0.5, 0.25)
    result = train(tmp_path)
    assert result.best_step == 13
    assert result.best_metrics == {"validation": {"accuracy": 0.75}}
    assert [line["metrics"]["validation"]["accuracy"] for line in result.history] == [0.75, 0.5, 0.25]


@pytest.mark.parametrize("moment", ["after an epoch's models", "between two renames of best"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_best_is_the_model_that_is_there(tmp_path, score, monkeypatch, moment):
    """A run is killed after its second epoch, which then comes out worse: on a GPU it may."""
    score(0.5)
    stopped(tmp_path, 20, save_steps=None)
    pid = os.fork()
    if pid == 0:
        rename, name = Path.rename, {"after an epoch's models": ".last.partial"}.get(moment, ".best.partial")
        die = lambda path, to: os.kill(os.getpid(), signal.SIGKILL) if path.name == name else rename(path, to)  # noqa: E731
        monkeypatch.setattr(Path, "rename", die)
        score(0.9)
        try:
            train(tmp_path, save_steps=None)
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert (tmp_path / "best").exists() == (moment == "after an epoch's models")
    score(0.4, 0.3)
    result = train(tmp_path, save_steps=None)
    told = json.loads((tmp_path / "best/training.json").read_text())
    expected = (26, 0.9) if moment == "after an epoch's models" else (13, 0.5)
    assert (result.best_step, result.best_metrics["validation"]["accuracy"]) == expected
    assert (told["step"], told["metrics"]["validation"]["accuracy"]) == expected
    assert not (tmp_path / ".best.old").exists()


@pytest.mark.parametrize("content", [None, "[", '{"step": 13}'])
def test_a_best_model_that_is_gone_is_out_of_the_running(tmp_path, score, caplog, content):
    score(0.75)
    stopped(tmp_path, 20)
    if content is None:
        shutil.rmtree(tmp_path / "best")
    else:
        (tmp_path / "best/training.json").write_text(content)
    score(0.5, 0.25)
    with caplog.at_level(logging.WARNING):
        assert train(tmp_path).best_step == 26
    assert f"best is {'absent' if content is None else 'damaged'}" in caplog.text
    assert json.loads((tmp_path / "best/training.json").read_text())["step"] == 26


def test_the_best_so_far_comes_along(tmp_path, score, caplog):
    score(0.75)
    path = stopped(tmp_path / "first", 20).path
    best = (tmp_path / "first/best/model.safetensors").read_bytes()
    score(0.5, 0.25)
    assert train(tmp_path / "second", resume=str(path)).best_step == 13
    assert (tmp_path / "second/best/model.safetensors").read_bytes() == best
    shutil.rmtree(tmp_path / "first/best")
    score(0.5, 0.25)
    with caplog.at_level(logging.WARNING):
        assert train(tmp_path / "third", resume=str(path)).best_step == 26
    assert "best is absent" in caplog.text


def test_a_signal_too_late_to_stop_the_run_is_not_lost(tmp_path, undisturbed):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # torch.compile's workers leave it ignored
    with pytest.raises(KeyboardInterrupt) as stop:
        train(tmp_path, hook=after(3 * (13 + 5) - 1, send(signal.SIGINT)))  # in the last batch of all
    assert not isinstance(stop.value, Interrupted)
    assert outcome(tmp_path) == undisturbed()


def test_stopped_while_the_cache_is_filled_again(tmp_path, undisturbed):
    stopped(tmp_path, 20)
    teacher = bert()
    teacher.base_model.register_forward_pre_hook(after(3, send(signal.SIGTERM)))
    calls = []
    teacher.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    evaluation = {"validation": split(20, seed=1, name="validation")}
    with pytest.raises(Interrupted):
        distill(settings(tmp_path), train=split(50), evaluation=evaluation, teacher=teacher, student=bert(2, seed=1))
    assert len(calls) == 4
    train(tmp_path)
    assert outcome(tmp_path) == undisturbed()


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(Path, "rename", lambda old, new: (done.append((str(old), str(new))), rename(old, new))[1])
    for name, save in (
        ("step-7", lambda: Checkpoints(tmp_path).save(7, {"a": [torch.ones(3)]}, tmp_path / "log")),
        ("last", lambda: save_checkpoint(tmp_path / "last", bert())),
    ):
        (tmp_path / "log").write_text("")
        save()
        (place,) = (i for i, entry in enumerate(done) if isinstance(entry, tuple) and entry[1].endswith(name))
        old, new = map(Path, done[place])
        assert set(done[:place]) == {str(old), *(str(old / path.name) for path in new.iterdir())}
        assert str(new.parent) in done[place:]
        done.clear()


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_last_checkpoints_are_kept(tmp_path):
    stopped(tmp_path, 10, save_total_limit=3)
    assert names(tmp_path) == ["step-10", "step-11", "step-8"]
    files = {path.name for path in (tmp_path / "checkpoints/step-8").iterdir()}
    assert files == {"tensors.safetensors", "state.json", "log.jsonl", "manifest.json"}
    shutil.rmtree(tmp_path)
    stopped(tmp_path, 5, save_steps=None)
    assert names(tmp_path) == ["step-6"]  # the minutes have not passed, so the signal's alone
    shutil.rmtree(tmp_path)
    stopped(tmp_path, 5, save_steps=None, save_minutes=1e-9)
    assert names(tmp_path) == ["step-5", "step-6"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number):
    before = signal.getsignal(number)
    stop = stopped(tmp_path, 6, number)
    assert stop.signal == number
    assert stop.path == tmp_path / "checkpoints/step-7"
    assert str(stop) == f"stopped by {number.name} after step 7; the same call goes on from {stop.path}"
    assert isinstance(stop, KeyboardInterrupt)
    assert signal.getsignal(number) is before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_line_says_how_it_stopped(tmp_path, capsys, number):
    """The whole way: a process, a signal, an exit code and one line; then the same command again."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no"]
    save_checkpoint(tmp_path / "model", bert(), BertTokenizer(vocab={word: i for i, word in enumerate(words)}))
    rows = [f"{i}\tyes no\tno\t{RTE.labels[i % 2]}" for i in range(60)]
    for name in ("train", "dev"):
        path = tmp_path / "data/RTE" / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    argv = ["finetune", "--task", "rte", "--model", str(tmp_path / "model"), "--data-dir", str(tmp_path / "data")]
    argv += ["--output-dir", str(tmp_path / "run"), "--max-length", "16", "--device", "cpu", "--batch-size", "1"]
    argv += ["--no-progress", "--epochs", "30", "--save-steps", "5", "--num-threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "lad_fast", *argv], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("run/checkpoints/step-*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert len(told.splitlines()) == 1, told
    assert told.startswith(f"lad-fast: stopped by {number.name} after step "), told
    assert cli.main([*argv, "--epochs", "2"]) == 2  # not the run it was
    assert "epochs was 30 and is 2" in capsys.readouterr().err


DIFFERENCES = [
    ({"epochs": 4}, "epochs was 3 and is 4"),
    ({"learning_rate": 1e-3, "seed": 1}, "learning_rate was 0.003 and is 0.001, seed was 42 and is 1"),
    ({"teacher_cache": "off"}, "teacher_cache was on and is off"),
    ({"precision": "bfloat16"}, "precision was float32 and is bfloat16"),
]


@pytest.mark.parametrize(("options", "message"), DIFFERENCES)
def test_another_configuration_is_refused(tmp_path, options, message):
    stopped(tmp_path)
    log = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message) as error:
        train(tmp_path, **options)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "log.jsonl").read_bytes() == log
    train(tmp_path, resume="never", **options)
    with pytest.raises(ValueError, match="was"):  # nor is a finished run replaced
        train(tmp_path)


def test_a_run_that_ended_before_its_first_checkpoint_is_not_replaced(tmp_path):
    def broken():
        raise RuntimeError("out of luck")

    options = {"save_steps": None, "save_minutes": 60}
    with pytest.raises(RuntimeError, match="out of luck"):
        train(tmp_path, hook=after(22, broken), **options)  # in the second epoch
    assert (tmp_path / "best").is_dir() and not list(tmp_path.glob("checkpoints/step-*"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"output_dir {tmp_path} is of another run: batch_size was 4 and is 5"):
        train(tmp_path, batch_size=5, **options)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    train(tmp_path, **options)  # the same run begins anew


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_run_is_not_replaced_by_going_on_from_a_checkpoint_elsewhere(tmp_path):
    train(tmp_path / "a", seed=5)
    path = stopped(tmp_path / "b").path
    before = contents(tmp_path / "a")
    with pytest.raises(ValueError, match=r"output_dir \S+/a is of another run: seed was 5 and is 42; take another"):
        train(tmp_path / "a", resume=str(path))
    assert contents(tmp_path / "a") == before


@pytest.mark.parametrize("resume", ("auto", "never"))
def test_files_of_others_stay(tmp_path, resume):
    """In checkpoints/, which other programs have too; among them what looks like a file of ours."""
    names = ("epoch=3.ckpt", "mine/model.ckpt", ".git/HEAD", "step-best/model.ckpt", "notes.txt")
    theirs = [tmp_path / "checkpoints" / name for name in names]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("theirs")
    left = tmp_path / "checkpoints/.step-1.partial"  # ours, of a kill
    left.mkdir()
    train(tmp_path, resume=resume)
    assert (tmp_path / "results.json").is_file()
    assert sorted(path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()) == sorted(theirs)
    assert not left.exists()


@pytest.mark.parametrize("resume", ("auto", "never"))
@pytest.mark.parametrize("name", ("config.json", "best/model.safetensors", "last/x", "tensorboard/events", "log.jsonl"))
def test_a_folder_that_no_run_wrote_is_refused(tmp_path, name, resume):
    """A model's own folder above all, whose config.json a run would write over."""
    if name == "config.json":
        save_checkpoint(tmp_path / "run", bert(), None)
    else:
        (tmp_path / "run" / name).parent.mkdir(parents=True)
        (tmp_path / "run" / name).write_text("theirs")
        (tmp_path / "run/config.json").write_text('{"model_type": "bert"}')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"output_dir is \S+/run; it holds config.json, which no run left there; take"):
        train(tmp_path / "run", resume=resume)
    (tmp_path / "run/config.json").unlink()
    if name not in ("config.json", "log.jsonl"):  # with a log it may be a run whose settings were lost
        with pytest.raises(ValueError, match=f"it holds {Path(name).parts[0]}, which no run left there"):
            train(tmp_path / "run", resume=resume)
        assert contents(tmp_path) == {path: text for path, text in before.items() if path.name != "config.json"}


@pytest.mark.parametrize(
    ("file", "content"),
    [("last/model.safetensors", b"cut"), ("results.json", b"null"), ("results.json", b"{"), ("last", None)],
)
def test_a_finished_run_that_is_damaged_is_one_line(tmp_path, monkeypatch, file, content):
    """Without `last` its path could be a name on the hub, which is not asked."""
    monkeypatch.chdir(tmp_path)
    train(Path("run"))
    path = tmp_path / "run" / file
    path.write_bytes(content) if content is not None else shutil.rmtree(path)
    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=r"what a finished run left there cannot be read .*; resume never starts anew"):
        train(Path("run"))
    train(Path("run"), resume="never")


def test_other_data_and_models_are_refused(tmp_path):
    def run(train=0, evaluation=1, teacher=0, student=1, dropout=0.1, hook=None):
        model = bert(2, seed=student, dropout=dropout)
        if hook is not None:
            model.register_forward_pre_hook(hook)
        data = {"train": split(50, train), "evaluation": {"validation": split(20, evaluation)}}
        distill(settings(tmp_path), **data, teacher=bert(4, teacher), student=model)

    with pytest.raises(Interrupted):
        run(hook=after(4, send(signal.SIGINT)))
    others = {
        "train": (2, "the training data differ"),
        "evaluation": (2, "the evaluation data differ"),
        "teacher": (2, "the teacher differs"),
        "student": (2, "the model at its start differs"),
        "dropout": (0.0, "the model at its start differs"),
    }
    for name, (value, message) in others.items():
        with pytest.raises(ValueError, match=message):
            run(**{name: value})
    run()


def test_settings_that_may_differ(tmp_path, undisturbed):
    stopped(tmp_path / "a", teacher_cache="disk")
    (tmp_path / "a").rename(tmp_path / "b")
    train(
        tmp_path / "b", save_steps=None, save_minutes=3.0, save_total_limit=1, progress=True, teacher_cache="cpu",
        num_threads=1, detect_anomaly=True, cache_dir=tmp_path / "cache",
    )  # fmt: skip
    assert outcome(tmp_path / "b") == undisturbed()


def test_a_finished_run_is_not_run_again(tmp_path, caplog):
    first = train(tmp_path)
    before = outcome(tmp_path)
    with caplog.at_level(logging.WARNING):
        again = train(tmp_path, hook=lambda *_: pytest.fail("the model ran"))
    assert "is finished" in caplog.text
    assert str(tmp_path) in caplog.text
    for name in (field.name for field in dataclasses.fields(first) if field.name not in ("model", "output_dir")):
        assert getattr(again, name) == getattr(first, name), name
    assert again.output_dir == tmp_path
    for (name, value), other in zip(first.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(value, other), name
    assert outcome(tmp_path) == before
    train(tmp_path, resume="never", seed=1)
    assert outcome(tmp_path)[0] != before[0]


def test_resuming_from_a_named_checkpoint(tmp_path, undisturbed):
    stopped(tmp_path / "run", 17)
    checkpoints = tmp_path / "run/checkpoints"
    oldest = min(checkpoints.iterdir(), key=lambda path: int(path.name.removeprefix("step-")))
    train(tmp_path / "other", resume=str(oldest))
    assert outcome(tmp_path / "other") == undisturbed()
    train(tmp_path / "third", resume=str(tmp_path / "run"))
    assert outcome(tmp_path / "third") == undisturbed()
    train(tmp_path / "run", resume=str(oldest))
    assert outcome(tmp_path / "run") == undisturbed()
    for path in (tmp_path / "nowhere", tmp_path / "third"):
        with pytest.raises(ValueError, match=f"resume is {path}; it takes"):
            train(tmp_path / "fourth", resume=str(path))


def damaged(path, how):
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
        return
    if how == "truncated":
        del content[len(content) // 2 :]
    elif how == "empty":
        content.clear()
    else:
        content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "gone"])
@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "log.jsonl", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, undisturbed, caplog, file, how):
    newest = stopped(tmp_path, 16).path
    damaged(newest / file, how)
    with caplog.at_level(logging.WARNING):
        train(tmp_path)
    assert f"{newest} is damaged" in caplog.text
    assert outcome(tmp_path) == undisturbed()


def test_a_manifest_too_deep_to_read_is_passed_over(tmp_path, undisturbed, caplog):
    newest = stopped(tmp_path, 16).path
    (newest / "manifest.json").write_text("[" * 10**5)
    with caplog.at_level(logging.WARNING):
        train(tmp_path)
    assert f"{newest} is damaged (RecursionError" in caplog.text
    assert outcome(tmp_path) == undisturbed()


def test_nothing_whole_is_no_new_start(tmp_path):
    stopped(tmp_path, 16)
    for path in (tmp_path / "checkpoints").iterdir():
        damaged(path / "state.json", "truncated")
    with pytest.raises(ValueError, match=f"output_dir is {tmp_path}; .*none .* is whole.*resume never"):
        train(tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        train(tmp_path, resume=str(path))


def test_checkpoints_hold_no_pickles(tmp_path):
    path = stopped(tmp_path, 6).path
    state = json.loads((path / "state.json").read_text())
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == {
        "tensors.safetensors", "state.json", "log.jsonl",
    }  # fmt: skip
    tensors = load_file(path / "tensors.safetensors")
    assert any("exp_avg_sq" in name for name in tensors)
    assert state["position"] == {"epoch": 1, "batches": 7}


def tmpfs(folder, size):
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if os.geteuid() or subprocess.run(options, check=False, capture_output=True).returncode:
        pytest.skip("takes the right to mount a tmpfs")
    return folder


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path, undisturbed):
    disk = tmpfs(tmp_path / "disk", "1500k")
    try:
        run = disk / "run"
        with pytest.raises(CheckpointError) as error:
            train(run, save_total_limit=99)
        message = str(error.value)
        assert message.startswith(f"output_dir is {run}; the checkpoint of step ")
        assert "No space left on device" in message
        assert "\n" not in message
        kept = names(run)
        assert len(kept) >= 2
        assert not any(name.startswith(".") for name in kept)
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        train(run)
        assert outcome(run) == undisturbed()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_size_limit_leaves_the_older_checkpoints(tmp_path, undisturbed):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    lower = after(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1])))
    try:
        with pytest.raises(CheckpointError, match=r"the checkpoint of step 6 could not be written .*File too large"):
            train(tmp_path, hook=lower)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-2", "step-4"]
    train(tmp_path)
    assert outcome(tmp_path) == undisturbed()


def test_a_full_disk_leaves_the_saved_models(tmp_path):
    save_checkpoint(tmp_path / "last", bert())
    before = (tmp_path / "last/model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{tmp_path / 'last'} could not be written .*File too large"):
            save_checkpoint(tmp_path / "last", bert(seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "last/model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_full_disk_names_the_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    lower = after(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1])))
    try:
        with pytest.raises(OSError, match=f"{tmp_path}/log.jsonl could not be written .*File too large"):
            train(tmp_path, hook=lower, save_steps=None)
        with pytest.raises(OSError, match=f"{tmp_path}/config.json could not be written .*File too large"):
            train(tmp_path, hook=never)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 4
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_full_disk_under_tensorboard_names_the_folder(tmp_path):
    pytest.importorskip("tensorboard")
    disk = tmpfs(tmp_path / "disk", "900k")

    def fill():
        free = os.statvfs(disk)
        (disk / "fill").write_bytes(bytes(free.f_bavail * free.f_frsize))

    try:
        with pytest.raises(OSError, match=f"^{disk}/run/tensorboard could not be written .*No space left on device"):
            train(disk / "run", log="tensorboard", save_steps=None, hook=after(8, fill), log_every=1)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_model_caught_between_two_renames_is_put_back(tmp_path):
    save_checkpoint(tmp_path / "last", bert())
    (tmp_path / "last").rename(tmp_path / ".last.old")
    before = (tmp_path / ".last.old/model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be written"):
            save_checkpoint(tmp_path / "last", bert(seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "last/model.safetensors").read_bytes() == before


def never(*_):
    pytest.fail("training started")


@pytest.mark.parametrize("name", [".lock", "log.jsonl", "best", "last", "results.json", "config.json", "tensorboard"])
def test_a_run_writes_through_no_link(tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "of others").write_text("precious")
    where = tmp_path / ("elsewhere" if name in ("best", "last", "tensorboard") else "of others")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(where)
    with pytest.raises(ValueError, match=f"output_dir is .*{name}"):
        train(tmp_path / "run", hook=never)
    assert (tmp_path / "of others").read_text() == "precious"


def test_checkpoints_may_lie_on_another_disk(tmp_path, undisturbed):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/file").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")
    stopped(tmp_path / "run")
    assert names(tmp_path / "run")
    train(tmp_path / "run")
    assert outcome(tmp_path / "run") == undisturbed()
    assert (tmp_path / "disk/file").read_text() == "precious"


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    for folder in (tmp_path / "run", tmp_path / "run/deeper"):
        with pytest.raises(ValueError, match=f"output_dir is {folder}; it takes a folder to write to"):
            train(folder, hook=never)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/checkpoints").write_text("")
    with pytest.raises(ValueError, match=f"output_dir is {tmp_path / 'other'}; it takes a folder to write to"):
        train(tmp_path / "other", hook=never)


def test_a_read_only_folder_is_refused(tmp_path):
    disk = tmpfs(tmp_path / "disk", "1m")
    try:
        stopped(disk / "run", 3)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for folder in (disk / "run", disk / "new"):
            with pytest.raises(ValueError, match=f"output_dir is {folder}; it takes .* Read-only file system"):
                train(folder, hook=never)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_in_use_is_refused(tmp_path):
    """While the first run is under way; not once it has ended, however it ended."""

    def second():
        with pytest.raises(ValueError, match=f"output_dir is {tmp_path}; another run .* {os.getpid()}"):
            train(tmp_path, hook=never)

    train(tmp_path, hook=after(3, second))
    train(tmp_path, resume="never", epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_steps": 0}, "save_steps is 0"),
        ({"save_minutes": 0.0}, "save_minutes is 0.0"),
        ({"save_total_limit": 0}, "save_total_limit is 0"),
        ({"resume": "maybe"}, "resume is maybe; it takes"),
    ],
)
def test_wrong_settings_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, hook=never, **options)


@pytest.fixture
def objectives(monkeypatch):
    """The objectives that runs make, as they make them."""
    made, make = [], training._make_objective

    def kept(*args):
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(training, "_make_objective", kept)
    return made


def set_nan(find):
    """An action that spoils what ``find`` finds."""

    def act():
        with torch.no_grad():
            find().fill_(float("nan"))

    return act


def spoil_gradients(parameter, row, steps, value=float("nan")):
    """Spoil a row of the parameter's gradients in backward passes of those numbers, from 1."""
    calls = iter(range(1, 10**9))

    def spoilt(gradient):
        if next(calls) not in steps:
            return gradient
        gradient = gradient.clone()
        gradient[row] = value
        return gradient

    parameter.register_hook(spoilt)


def first_epochs_ids(batch):
    """The ids of a batch of the first epoch, counted from 0."""
    data = Batches(split(50), 4, 0, shuffle=True, seed=42)
    data.set_epoch(1)
    return ", ".join(map(str, list(data)[batch]["ids"].tolist()))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("at_once", [False, True])
def test_numbers_that_are_not_finite_end_the_run(tmp_path, objectives, precision, at_once):
    """A gate of NaN in the fifth step: its aggregate's hidden loss is named, the other's and the logits' are not."""
    calls = []
    spoil = after(4, set_nan(lambda: objectives[0].gates.weight[2]))

    def hook(*_):
        calls.append(1)
        spoil()

    options = {"precision": precision, "detect_anomaly": at_once, "save_steps": None}
    with pytest.raises(FloatingPointError) as error:
        train(tmp_path, hook=hook, **options)
    parts = "loss, hidden_loss, hidden_losses[1], gradient of student, gradient of gates[0], gradient of gates[1], "
    parts += "gradient of gates[2]"
    told = f"step 5: not finite: {parts}; ids of its examples: {first_epochs_ids(4)}"
    assert str(error.value) == f"{told}; lad-fast replay {tmp_path}/not-finite-step-5 runs it again"
    assert len(calls) == (5 if at_once else 6)  # log_every is 3


def test_logits_that_are_not_finite_are_named(tmp_path, monkeypatch):
    classifier, calls = torch.nn.Linear.forward, count()

    def spoilt(layer, states):
        logits = classifier(layer, states)
        of_student = layer.out_features == 2 and logits.requires_grad
        return logits * float("nan") if of_student and next(calls) == 4 else logits

    monkeypatch.setattr(torch.nn.Linear, "forward", spoilt)
    with pytest.raises(FloatingPointError) as error:
        train(tmp_path)
    parts = "loss, logits_loss, gradient of student"
    assert str(error.value).startswith(f"step 5: not finite: {parts}; ids of its examples: {first_epochs_ids(4)}; ")


def test_a_gradient_that_is_not_finite_is_named(tmp_path, objectives):
    spoil = after(0, lambda: spoil_gradients(objectives[0].gates.weight, 1, {5}))
    with pytest.raises(FloatingPointError) as error:
        train(tmp_path, hook=spoil, gradient_accumulation_steps=2)
    examples = f"{first_epochs_ids(4)}, {first_epochs_ids(5)}"  # the third step's two batches
    told = f"step 3: not finite: gradient of gates[1]; ids of its examples: {examples}"
    assert str(error.value) == f"{told}; lad-fast replay {tmp_path}/not-finite-step-3 runs it again"


def test_no_checkpoint_is_made_of_numbers_that_are_not_finite(tmp_path, objectives):
    spoil = after(4, set_nan(lambda: objectives[0].gates.weight[2]))
    with pytest.raises(FloatingPointError, match="step 5: not finite"):
        train(tmp_path, hook=spoil, log_every=1000)
    assert names(tmp_path) == ["step-2", "step-4"]
    train(tmp_path)


def test_the_device_is_not_waited_for_between_log_lines(tmp_path, monkeypatch):
    checks, check = [], training._Log.check
    monkeypatch.setattr(training._Log, "check", lambda log: (checks.append(log.steps), check(log)))
    train(tmp_path, log_every=10, save_steps=None)
    assert checks == [10, 13, 20, 26, 30, 39]


def test_steps_that_the_loss_scaler_skips_are_counted(tmp_path, objectives, monkeypatch):
    scales, update = [], torch.amp.GradScaler.update

    def recorded(scaler):
        before = scaler.get_scale()
        update(scaler)
        scales.append(scaler.get_scale() < before)

    monkeypatch.setattr(torch.amp.GradScaler, "update", recorded)
    spoil = after(0, lambda: spoil_gradients(objectives[0].gates.bias, 0, {20, 24, 25}, float("inf")))
    train(tmp_path, precision="float16", hook=spoil)
    assert scales[19] and scales[23] and scales[24]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = {line["step"]: line["skipped_steps"] for line in log if "loss" in line}
    assert found == {step: sum(scales[:step]) for step in found}
    assert found[39] < 20


def test_a_loss_scaler_that_only_skips_ends_the_run(tmp_path, objectives):
    spoil = after(25, set_nan(lambda: objectives[0].gates.weight[2]))  # from step 21: each evaluation takes 5 calls
    with pytest.raises(FloatingPointError, match=r"step 61: not finite: loss, hidden_loss, hidden_losses.1., gradient"):
        train(tmp_path, precision="float16", hook=spoil, epochs=5)


def test_a_line_of_error_for_numbers_that_are_not_finite(monkeypatch, capsys, tmp_path):
    def broken(config):
        raise FloatingPointError("step 5: not finite: loss")

    monkeypatch.setattr(training, "distill", broken)
    argv = ["distill", "--task", "rte", "--teacher", "x", "--output-dir", str(tmp_path)]
    assert cli.main(argv) == 1
    assert capsys.readouterr().err == "lad-fast: error: step 5: not finite: loss\n"


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"precision": "float16"}], ids=str)
def test_a_stopped_run_goes_on_on_a_gpu(tmp_path, options):
    options = {"device": "cuda", "backend": None, "log_every": 1} | options
    train(tmp_path / "whole", **options)
    for num_calls in (5, 9, 6):
        stopped(tmp_path / "stopped", num_calls, **options)
    train(tmp_path / "stopped", **options)
    (_, right, _), (_, log, _) = outcome(tmp_path / "whole"), outcome(tmp_path / "stopped")
    losses, expected = ([line["loss"] for line in lines if "loss" in line] for lines in (log, right))
    assert losses == pytest.approx(expected, rel=1e-4)


# --- TensorBoard and Weights & Biases ---------------------------------------------------------------------------------


def of_log(folder):
    """What a tracker must hold: (name, step, number) of each number in log.jsonl."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return sorted((name, record["step"], value) for record in records for name, value in scalars(record).items())


def of_tensorboard(folder):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError)
    found = events.EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}, purge_orphaned_data=False).Reload()
    return sorted((name, e.step, e.value) for name in found.Tags()["scalars"] for e in found.Scalars(name))


def same(found, expected):
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    np.testing.assert_allclose([entry[2] for entry in found], [entry[2] for entry in expected], rtol=1e-6)


def test_scalars_are_named_by_their_places():
    gates = [{"open": 0.5, "state": None}]
    record = {"step": 3, "epoch": 1, "loss": 1.5, "task": "rte", "metrics": {"a": {"f1": 1}}, "gates": gates}
    assert scalars(record) == {"loss": 1.5, "metrics/a/f1": 1, "gates/0/open": 0.5}


def test_tensorboard_holds_the_log_and_no_step_twice(tmp_path, undisturbed):
    """Without the checkpoint it was stopped with, lines after the one before come again."""
    stop = stopped(tmp_path, 17, log="tensorboard")
    same(of_tensorboard(tmp_path), of_log(tmp_path))
    shutil.rmtree(stop.path)
    train(tmp_path, log="tensorboard")
    expected = of_log(tmp_path)
    same(of_tensorboard(tmp_path), expected)
    assert len({entry[:2] for entry in expected}) == len(expected) > 100
    assert outcome(tmp_path) == undisturbed(), "where the log goes changes nothing in the run"


def test_a_run_may_go_on_with_another_tracker(tmp_path):
    stopped(tmp_path, 17)
    assert not (tmp_path / "tensorboard").exists()
    train(tmp_path, log="tensorboard")
    same(of_tensorboard(tmp_path), of_log(tmp_path))


class FakeWandb(types.ModuleType):
    """Records what is asked of it."""

    class Error(Exception):
        pass

    def __init__(self, refusal=None):
        super().__init__("wandb")
        self.refusal, self.options, self.logged, self.finished = refusal, [], [], 0

    def init(self, **options):
        if self.refusal:
            raise self.Error(self.refusal)
        self.options.append(options)
        self.logged.clear()  # each is a run of its own
        return self

    def log(self, values, step):
        self.logged += [(name, step, value) for name, value in values.items()]

    def finish(self):
        self.finished += 1


def test_wandb_holds_the_log(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    stopped(tmp_path, 17, log="wandb")
    train(tmp_path, log="wandb")
    assert sorted(fake.logged) == of_log(tmp_path)
    assert fake.finished == len(fake.options) == 2
    assert fake.options[0] == fake.options[1]
    assert fake.options[0]["dir"] == str(tmp_path)
    assert fake.options[0]["config"]["learning_rate"] == "0.003"


def test_what_wandb_refuses_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("no API key\n"))
    with pytest.raises(ValueError, match=r"log is 'wandb'; wandb\.init says no API key; with WANDB_MODE=offline"):
        train(tmp_path, log="wandb")
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("log", "module", "message"),
    [
        ("tensorboard", "torch.utils.tensorboard", r"'tensorboard' needs .* pip install 'lad_fast\[tensorboard\]'"),
        ("wandb", "wandb", "'wandb' needs .* pip install wandb"),
    ],
)
def test_a_tracker_that_is_not_installed_is_told_before_training(tmp_path, monkeypatch, log, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        train(tmp_path / "run", log=log)
    assert not (tmp_path / "run").exists()


def test_all_generators_go_on_where_they_were():
    """Also those that only a model, or a data set, of one's own draws from."""

    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()

    random.gauss(0, 1)  # keeps a second one, as NumPy's normal numbers do
    np.random.randn()
    device = torch.device("cpu")
    state = json.loads(json.dumps(checkpoint.get_rng_state(device), default=lambda tensor: tensor.tolist()))
    state["torch"] = torch.tensor(state["torch"], dtype=torch.uint8)
    first = draw()
    draw()
    checkpoint.set_rng_state(state, device)
    assert draw() == first


def test_later_checkpoints_go_with_the_first_new_one(tmp_path):
    """A run that is taken up earlier than its newest must not go on from that one the next time."""
    (tmp_path / "log").write_text("")
    own = Checkpoints(tmp_path, limit=3)
    for step in (2, 4, 6, 3):
        own.save(step, {"step": step}, tmp_path / "log")
    assert names(tmp_path) == ["step-2", "step-3"]
    assert own.newest().state == {"step": 3}


def test_tensors_in_the_same_memory_are_kept(tmp_path):
    """As weights that are tied, and two that lie in one buffer."""
    (tmp_path / "log").write_text("")
    whole = torch.arange(6.0)
    checkpoint.write_checkpoint(tmp_path / "step-1", {"a": whole, "b": whole, "c": [whole[2:4]]}, tmp_path / "log")
    state = checkpoint.read_checkpoint(tmp_path / "step-1").state
    assert torch.equal(state["a"], whole) and torch.equal(state["b"], whole) and torch.equal(state["c"][0], whole[2:4])


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    (tmp_path / "log").write_text("")
    checkpoint.write_checkpoint(tmp_path / "step-1", {"a": 1}, tmp_path / "log")
    manifest = json.loads((tmp_path / "step-1/manifest.json").read_text())
    (tmp_path / "step-1/manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(ValueError, match=r"step-1 is damaged .*its format is 1; this version reads 2"):
        checkpoint.read_checkpoint(tmp_path / "step-1")


def test_minutes_are_counted_from_the_last_checkpoint(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    (tmp_path / "log").write_text("")
    own, due = Checkpoints(tmp_path, every_minutes=10), []
    for step in range(1, 7):
        now += 4 * 60
        if own.is_due(step):
            due.append(step)
            own.save(step, {}, tmp_path / "log")
    assert due == [3, 6]


def test_the_lock_names_one_process(tmp_path):
    for _ in range(2):
        with checkpoint.own_folder(tmp_path):
            assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_other_labels_are_other_data(tmp_path):
    def run(data):
        distill(settings(tmp_path, epochs=1), train=data, evaluation={}, teacher=bert(), student=bert(2, seed=1))

    run(split(20))
    data = split(20)
    data.labels = 1 - data.labels
    with pytest.raises(ValueError, match="the training data differ"):
        run(data)


def test_steps_skipped_in_a_row_are_counted_on(tmp_path, objectives):
    """Before a stop and behind it: 40 in all end the run."""

    def spoil():
        spoil_gradients(objectives[-1].gates.bias, 0, range(1, 1000), float("inf"))

    calls = iter(range(10**9))

    def hook(*_):
        call = next(calls)
        if call == 0:
            spoil()
        if call == 9:
            send(signal.SIGTERM)()

    options = {"precision": "float16", "epochs": 5, "save_steps": None}
    with pytest.raises(Interrupted):
        train(tmp_path, hook=hook, **options)
    with pytest.raises(FloatingPointError, match=r"step 41: not finite: gradient of gates\[0\]"):
        train(tmp_path, hook=after(0, spoil), **options)


def test_seconds_are_those_of_steps_alone(tmp_path, monkeypatch):
    """Neither evaluations, models nor checkpoints count; before a stop and behind it each step does."""
    clock = {"now": 0.0}
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock["now"])

    def taking(seconds, function):
        def slow(*args, **kwargs):
            clock["now"] += seconds
            return function(*args, **kwargs)

        return slow

    monkeypatch.setattr(training.DistillStep, "__call__", taking(1.0, training.DistillStep.__call__))
    monkeypatch.setattr(training, "evaluate", taking(1000.0, training.evaluate))
    monkeypatch.setattr(training, "save_checkpoint", taking(1000.0, training.save_checkpoint))
    monkeypatch.setattr(Checkpoints, "save", taking(1000.0, Checkpoints.save))
    assert train(tmp_path / "whole").seconds == 39
    stopped(tmp_path / "parts", 17)
    assert train(tmp_path / "parts").seconds == 39


def test_a_second_signal_does_what_it_did_before():
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with pytest.raises(Interrupted, match="stopped by SIGTERM"), checkpoint.StopSignals() as signals:
            signal.raise_signal(signal.SIGTERM)
            assert received == []
            signal.raise_signal(signal.SIGTERM)
            assert received == [signal.SIGTERM]
            signals.check()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_bar_goes_on_where_the_run_was(tmp_path, monkeypatch):
    bars, tqdm = [], training.tqdm
    stop = stopped(tmp_path, 17)
    monkeypatch.setattr(training, "tqdm", lambda **options: (bars.append(tqdm(**options)), bars[-1])[1])
    train(tmp_path)
    assert [bar.initial for bar in bars] == [stop.step]


def test_a_run_in_the_folder_at_hand_has_its_name(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "my_run").mkdir()
    monkeypatch.chdir(tmp_path / "my_run")
    train(Path(), log="wandb", epochs=1)
    assert fake.options[0]["name"] == "my_run"
