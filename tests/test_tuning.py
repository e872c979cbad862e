"""Tuning: what it tries, drops and keeps. It runs whole in Triton's interpreter, on a small GPU that is made up."""

import json
import os
import warnings
from dataclasses import replace

import pytest
import torch

from lad_fast import tuning
from lad_fast.cli import main
from lad_fast.kernels import launch
from lad_fast.kernels.launch import Device, GemmLaunch, Size

pytest.importorskip("triton")
from interpreting import concurrent_programs

from lad_fast.kernels import chain

# Shared memory for two stages of the only tile, so that the forms alone are left to choose: six.
GPU = Device("Small GPU", "sm_90", multiprocessors=4, shared_memory=12 * 1024)
SIZE = Size("ieee", 32, 32, "sequence")
REMEMBERED = (launch.tuned, launch.choose)
interpreted = pytest.mark.skipif(not launch.interpreted(), reason="Triton's kernels do not run in the interpreter")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAD_FAST_CACHE", str(tmp_path / "cache"))
    for function in REMEMBERED:
        function.cache_clear()
    yield tmp_path / "cache/launch.json"
    for function in REMEMBERED:
        function.cache_clear()


@pytest.fixture
def small_gpu(monkeypatch):
    monkeypatch.setattr(launch, "gpu", lambda device: GPU)
    for kind, block_k in (("ieee", 16), ("half", 32)):
        monkeypatch.setitem(launch.GEMM, ("sm_90", kind), (GemmLaunch(32, 32, block_k, 1, 2, 1, splits=2),))


def forms() -> tuple[str, str]:
    """Those that are being measured."""
    choice = launch.chain(None, None, None)
    return choice.forward, choice.backward


def seconds(fastest: tuple[str, str]):
    """A timer by which those forms take a second, and others more."""

    def timer(run) -> float:
        return 1.0 + (forms()[0] != fastest[0]) + (forms()[1] != fastest[1])

    return timer


def tune(sizes, timer) -> None:
    with concurrent_programs():
        tuning.tune(sizes, torch.device("cpu"), layers=4, seq_len=16, timer=timer)


@interpreted
@pytest.mark.parametrize(("kind", "fastest"), (("ieee", ("persistent", "triton")), ("half", ("cublas", "persistent"))))
def test_the_fastest_is_kept_and_found_again(kind, fastest, small_gpu, cache, capsys):
    size = replace(SIZE, kind=kind)
    assert launch.choose(GPU, size) == launch.heuristic(GPU, size)
    with warnings.catch_warnings(action="error"):
        tune([size], seconds(fastest))
        choice = launch.choose(GPU, size)
    assert (choice.forward, choice.backward) == fastest
    assert choice != launch.heuristic(GPU, size)
    row = json.loads(cache.read_text())[launch.cache_key(GPU)][str(size)]
    assert row["microseconds"] == 1e6 and row["gemm"]["block_m"] == 32
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(" us") for line in lines) == 6
    assert str(cache) in lines[-1]


@interpreted
def test_what_is_wrong_or_does_not_run_is_dropped_however_fast(small_gpu, monkeypatch, capsys):
    forward, backward, run = chain.forward, chain.backward, launch.launch

    def wrong_loss(*arguments):
        out = forward(*arguments)
        return out._replace(losses=out.losses * 1.01) if forms()[0] == "persistent" else out

    def unwritten_gradient(*arguments):
        grad_student, grad_hidden, grad_weight, *others = backward(*arguments)
        if forms()[1] == "persistent":
            grad_weight[0, 0, 0] = float("nan")
        return grad_student, grad_hidden, grad_weight, *others

    def refused(kernel, grid, **arguments):
        if forms()[0] == "cublas":
            raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
        run(kernel, grid, **arguments)

    monkeypatch.setattr(chain, "forward", wrong_loss)
    monkeypatch.setattr(chain, "backward", unwritten_gradient)
    monkeypatch.setattr(launch, "launch", refused)
    tune([SIZE], seconds(("persistent", "persistent")))
    choice = launch.choose(GPU, SIZE)
    assert (choice.forward, choice.backward) == ("triton", "triton")
    out = capsys.readouterr().out
    assert out.count("too many blocks in cooperative launch") == 2
    assert out.count("wrong by 1.0e-02") == 1 and out.count("wrong by nan") == 2
    assert out.count(" us\n") == 1


@interpreted
def test_where_nothing_is_right_the_heuristic_stays(small_gpu, monkeypatch, cache, capsys):
    monkeypatch.setattr(chain, "forward", lambda *arguments: 1 / 0)
    tune([SIZE], seconds(("triton", "triton")))
    assert json.loads(cache.read_text()) == {launch.cache_key(GPU): {}}
    assert launch.choose(GPU, SIZE) == launch.heuristic(GPU, SIZE)
    assert capsys.readouterr().out.count("ZeroDivisionError") == 6


@interpreted
def test_a_size_is_kept_when_it_is_done_and_rows_of_others_stay(small_gpu, cache):
    others = {"Another GPU": {"half 256 768 token": {"forward": "triton"}}, launch.cache_key(GPU): {"ieee 1": {}}}
    cache.parent.mkdir()
    cache.write_text(json.dumps(others))
    timed = []

    def timer(run) -> float:
        timed.append(run)
        if len(timed) > 6:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        tune([SIZE, replace(SIZE, norm="token")], timer)
    found = json.loads(cache.read_text())
    assert found.pop("Another GPU") == others["Another GPU"]
    assert set(found.pop(launch.cache_key(GPU))) == {"ieee 1", str(SIZE)}
    assert not found


@interpreted
def test_the_timer_gets_forward_and_backward_launched_as_forced(small_gpu, monkeypatch):
    kernels = []
    run = launch.launch
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, **a: kernels.append(kernel) or run(kernel, grid, **a))
    launches = {}

    def timer(step) -> float:
        kernels.clear()
        step()
        launches[forms()] = [kernels.count(kernel) for kernel in (chain._chain_fwd_kernel, chain._chain_bwd_kernel)]
        return 1.0

    tune([SIZE], timer)
    # Three gates, and behind them the sums.
    forward, backward = {"triton": 6, "cublas": 3, "persistent": 1}, {"triton": 7, "persistent": 1}
    assert launches == {(f, b): [forward[f], backward[b]] for f in forward for b in backward}


@pytest.mark.parametrize("norm", ("sequence", "token"))
@pytest.mark.parametrize("kind", ("half", "mixed", "tf32", "ieee"))
def test_a_size_is_measured_on_what_training_would_look_it_up_by(kind, norm, monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "why_not_triton", lambda device: None)
    monkeypatch.setattr(launch, "gpu", lambda device: GPU)
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, **arguments: None)
    monkeypatch.setattr(launch, "choose", lambda *key: seen.append(key) or launch.INTERPRETED)
    before = torch.backends.cuda.matmul.fp32_precision
    size = Size(kind, 256, 32, norm)
    with tuning._arithmetic(kind, torch.device("cpu")):
        tuning._Problem(size, torch.device("cpu"), layers=4, seq_len=128).step("triton")
    assert seen == [(GPU, size)] * 2  # forward and backward
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_default_sizes_are_buckets():
    quick, full = (tuning.default_sizes(full) for full in (False, True))
    assert set(quick) < set(full)
    assert len(set(full)) == len(full)
    assert {launch._bucket(size.tokens) for size in full} == {size.tokens for size in full}
    assert {size.tokens for size in full} == {launch._bucket(tokens) for tokens in range(1, 40_000)}


@pytest.mark.parametrize("when", ("written", "put in place"))
def test_the_old_file_stays_until_the_new_one_is_whole(when, cache, monkeypatch):
    tuning._keep("GPU", {"a": {}})
    old = cache.read_bytes()

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(*((json, "dumps") if when == "written" else (os, "replace")), killed)
    with pytest.raises(KeyboardInterrupt):
        tuning._keep("GPU", {"b": {}})
    assert cache.read_bytes() == old
    assert os.listdir(cache.parent) == [cache.name]


def test_a_damaged_file_is_replaced(cache):
    cache.parent.mkdir()
    cache.write_text("{")
    with pytest.warns(UserWarning, match="is not read"):
        tuning._keep("GPU", {"a": {}})
    assert json.loads(cache.read_text()) == {"GPU": {"a": {}}}


def test_a_folder_that_cannot_be_written_shows_before_anything_is_measured(small_gpu, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAD_FAST_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(OSError, match=r"file/cache/launch\.json cannot be written.*LAD_FAST_CACHE"):
        tuning.tune([None], torch.device("cpu"))


def wrong_call(argv: list[str], capsys) -> str:
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lad-fast: error: ")
    return line


def test_the_command_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = wrong_call(["bench", "--tune"], capsys)
    assert "--tune" in line and "no CUDA device" in line


def test_the_command_tunes(monkeypatch, capsys, cache):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning, "tune", lambda *arguments: calls.append(arguments))
    for full in (False, True):
        assert main(["bench", "--tune", *(["--full"] if full else [])]) == 0
        assert calls.pop() == (tuning.default_sizes(full), torch.device("cuda"))
    line = wrong_call(["bench", "--tune", "--output-dir", "x"], capsys)
    assert "--output-dir" in line and str(cache) in line


@pytest.mark.cuda
@pytest.mark.slow
def test_on_a_gpu(monkeypatch):
    """Each form with one tile, by the real clock."""
    device, size, every = torch.device("cuda"), Size("half", 256, 384, "sequence"), launch.candidates
    monkeypatch.setattr(launch, "candidates", lambda *key: every(*key)[:6])
    tuning.tune([size], device, layers=4)
    row = launch.tuned(launch.gpu(device))[str(size)]
    assert 1 < row["microseconds"] < 1e5


def test_the_table_begins_with_the_fastest(small_gpu):
    choices = launch.candidates(GPU, "ieee")[:4]
    lines = tuning._table(SIZE, choices, [3e-6, "wrong by nan", 1e-6, 2e-6]).splitlines()[2:]
    assert [line.split("  ")[-1].strip() for line in lines] == ["1 us", "2 us", "3 us", "wrong by nan"]


@interpreted
def test_a_size_that_does_not_fit_is_left_out(small_gpu, monkeypatch, cache, capsys):
    problem = tuning._Problem

    def small(size, *rest):
        if size.tokens > 32:
            raise torch.OutOfMemoryError
        return problem(size, *rest)

    monkeypatch.setattr(tuning, "_Problem", small)
    tune([replace(SIZE, tokens=64), SIZE], lambda run: 1.0)
    assert set(json.loads(cache.read_text())[launch.cache_key(GPU)]) == {str(SIZE)}
    assert f"{replace(SIZE, tokens=64)}: does not fit the GPU's memory" in capsys.readouterr().out
