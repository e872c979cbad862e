"""How a launch is chosen on made-up GPUs: by the heuristic, by what was measured, or as forced."""

import json
import os
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lad_fast
from lad_fast import tuning
from lad_fast.doctor import launches
from lad_fast.kernels import launch
from lad_fast.kernels.launch import Device, Size, candidates, choose, heuristic

triton = pytest.importorskip("triton")
chain = pytest.importorskip("lad_fast.kernels.chain")

KIB = 1024
H200 = Device("NVIDIA H200", "sm_90", 132, 227 * KIB)
A100 = Device("NVIDIA A100-SXM4-80GB", "sm_80", 108, 163 * KIB)
RTX = Device("NVIDIA GeForce RTX 4070", "sm_80", 46, 99 * KIB)
B200 = Device("NVIDIA B200", "sm_100", 148, 227 * KIB)
MI300 = Device("AMD Instinct MI300X", "gfx942", 304, 64 * KIB, registers=131072)
GPUS = (H200, A100, RTX, B200, MI300)
SIZE = Size("half", 4096, 768, "sequence")


REMEMBERED = (launch.tuned, launch.choose, launch.gpu)


def forget() -> None:
    for function in REMEMBERED:
        function.cache_clear()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The cache file of a test: absent, and nothing of it remembered before or after."""
    monkeypatch.setenv("LAD_FAST_CACHE", str(tmp_path))
    forget()
    yield tmp_path / "launch.json"
    forget()


def other_than_the_heuristic(device: Device = H200, size: Size = SIZE) -> launch.ChainLaunch:
    return next(c for c in candidates(device, size.kind) if c != heuristic(device, size))


def write(cache: Path, row, device: Device = H200, size: Size = SIZE) -> None:
    cache.write_text(json.dumps({launch.cache_key(device): {str(size): row}}))


@pytest.mark.parametrize(
    ("device", "kind", "tokens", "hidden_size", "tile"),
    (
        (H200, "half", 4096, 768, (128, 128, 64)),  # 192 tiles
        (H200, "half", 2048, 1024, (64, 64, 64)),  # 128 of the larger tile, for 132 multiprocessors
        (A100, "half", 2048, 1024, (128, 128, 32)),  # for 108
        (A100, "half", 256, 384, (64, 64, 64)),  # too few of either
        (RTX, "half", 1024, 768, (128, 128, 32)),  # 48 tiles, for 46
        (RTX, "half", 512, 768, (64, 64, 64)),
        (H200, "mixed", 16384, 768, (128, 64, 64)),
        (MI300, "half", 16384, 768, (128, 128, 32)),
        (replace(H200, shared_memory=99 * KIB), "half", 4096, 768, (128, 128, 64)),  # three stages of 32 KiB
        (replace(H200, shared_memory=96 * KIB), "half", 4096, 768, (64, 64, 64)),  # and nothing beside them
        (replace(H200, shared_memory=99 * KIB), "mixed", 16384, 768, (64, 64, 64)),  # its states are float32
        (replace(H200, shared_memory=16 * KIB), "half", 4096, 768, (64, 64, 64)),  # the last one if none fits
        (replace(H200, registers=32768), "half", 4096, 768, (64, 64, 64)),
    ),
)
def test_the_heuristic_takes_the_largest_tile_that_fits_and_still_fills_the_gpu(
    device, kind, tokens, hidden_size, tile
):
    choice = heuristic(device, Size(kind, tokens, hidden_size, "token"))
    assert (choice.gemm.block_m, choice.gemm.block_n, choice.gemm.block_k) == tile
    assert choice.multiprocessors == device.multiprocessors
    form = "triton" if device is MI300 else "persistent"
    assert (choice.forward, choice.backward) == (form, form)


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
@pytest.mark.parametrize("kind", ("half", "mixed", "tf32", "ieee"))
def test_what_may_be_measured(device, kind):
    """All tiles of the architecture among it, so that nothing measured is slower than the heuristic."""
    found = candidates(device, kind)
    assert set(launch.GEMM[device.architecture, kind]) <= {choice.gemm for choice in found}
    assert all(heuristic(device, Size(kind, t, 768, "token")) in found for t in (256, 16384))
    forms = {(choice.forward, choice.backward) for choice in found}
    assert len(forms) == 6
    assert len({choice.gemm.num_stages for choice in found}) > 1
    # A thread may take 256 registers, and programs that wait need all blocks at once.
    assert all(c.gemm.blocks_per_sm * c.gemm.num_warps * 32 * 256 <= device.registers for c in found)
    assert len(set(found)) == len(found)


@pytest.fixture
def no_interpreter(monkeypatch):
    """Choose as for a tensor on an H200."""
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "gpu", lambda device: H200)


def test_lengths_share_a_launch_by_buckets(no_interpreter, monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "choose", lambda device, size: seen.append(size))
    lengths = (1, 255, 256, 257, 512, 513, 16383, 16384, 16385, 10**6)
    for num_tokens in lengths:
        launch.chain(torch.empty(num_tokens, 40, device="meta"), torch.bfloat16, per_token=True)
    assert seen[0] == Size("mixed", 256, 40, "token")
    assert [size.tokens for size in seen] == [256, 256, 256, 512, 512, 1024, 16384, 16384, 16384, 16384]


@pytest.mark.parametrize(
    ("kind", "num_tokens", "block_m"),
    [("half", 480, 64), ("half", 900, 128), ("half", 1700, 128), ("half", 2816, 128), ("half", 2848, 0),
     ("mixed", 480, 64), ("mixed", 900, 128), ("mixed", 1408, 128), ("mixed", 1440, 0)],
)  # fmt: skip
def test_packed_batches_take_a_tile_whose_programs_all_run_at_once(no_interpreter, kind, num_tokens, block_m):
    """The smaller one, of which each multiprocessor gets one, would be more than run at once, and two launches a gate.

    132 multiprocessors take 22 row tiles of 128 columns, 11 of 64.
    """
    state = torch.empty(num_tokens, 768, dtype=torch.bfloat16 if kind == "half" else torch.float32, device="meta")
    norm_weight = torch.empty(1, 128, 768, device="meta")
    cu_seqlens = torch.empty(num_tokens // 32 + 1, dtype=torch.int32, device="meta")
    plan = chain._Plan(state, torch.bfloat16, norm_weight, None, cu_seqlens, 0)
    form, tile, waiting = plan.forward_launch()
    if block_m:
        assert (form, tile.block_m) == ("persistent", block_m)
        row_tiles, columns = -(-num_tokens // tile.block_m), -(-768 // tile.block_n)
        assert waiting == row_tiles * columns <= plan.choice.programs(tile)
    else:
        assert (form, tile, waiting) == ("triton", plan.choice.gemm, 0)


def test_a_forced_tile_gets_no_other(no_interpreter):
    state = torch.empty(900, 768, dtype=torch.bfloat16, device="meta")
    tile = launch.GEMM["sm_90", "half"][1]
    where = torch.empty(1, 128, 768, device="meta"), None, torch.empty(30, dtype=torch.int32, device="meta"), 0
    with launch.forced(launch.settings("persistent", "persistent", tile, 132)):
        assert chain._Plan(state, torch.bfloat16, *where).forward_launch() == ("triton", tile, 0)


def test_what_was_measured_goes_before_the_heuristic(no_interpreter, cache):
    measured = other_than_the_heuristic()
    write(cache, asdict(measured) | {"microseconds": 1.0})
    state = torch.empty(4000, 768, dtype=torch.bfloat16, device="meta")
    assert launch.chain(state, torch.bfloat16, per_token=False) == measured
    # But not for another bucket, kind of product, width or norm.
    for other, per_token in ((state[:2000], False), (state.float(), False), (state[:, :384], False), (state, True)):
        choice = launch.chain(other, torch.bfloat16, per_token)
        assert choice.gemm in launch.GEMM["sm_90", launch.kind(other.dtype, torch.bfloat16)]


@pytest.mark.parametrize("of", ("GPU", "Triton", "library"))
def test_measurements_of_others_are_no_matter(of, cache, monkeypatch):
    measured = other_than_the_heuristic()
    write(cache, asdict(measured))
    device = H200
    assert choose(device, SIZE) == measured
    if of == "GPU":
        device = replace(H200, name="NVIDIA H100 80GB HBM3")
    else:
        monkeypatch.setattr(triton if of == "Triton" else lad_fast, "__version__", "0.0.1")
    forget()
    with warnings.catch_warnings(action="error"):
        assert choose(device, SIZE) == heuristic(device, SIZE)


DAMAGED_FILES = {
    "empty": b"",
    "torn": b'{"NVIDIA H200',
    "no text": b"\xff\xfe\x00",
    "a list": b"[]",
    "no rows": b'{"NVIDIA H200": 3}',
    "no row": b'{"NVIDIA H200": {"half 4096 768 sequence": [1]}}',
    "nested too deep": b"[" * 200_000,
}


def assert_one_warning(cache: Path, *words: str) -> None:
    with warnings.catch_warnings(record=True, action="always") as found:
        for _ in range(2):
            assert choose(H200, SIZE) == heuristic(H200, SIZE)
    (warning,) = (str(w.message) for w in found)
    assert str(cache) in warning
    for word in words:
        assert word in warning


@pytest.mark.parametrize("content", DAMAGED_FILES.values(), ids=DAMAGED_FILES)
def test_a_damaged_file_costs_a_warning(content, cache):
    cache.write_bytes(content)
    assert_one_warning(cache, "is not read")


def test_a_file_that_cannot_be_read_costs_a_warning(cache):
    cache.mkdir()
    assert_one_warning(cache, "is not read", os.strerror(21))


@pytest.mark.parametrize(
    "change",
    (
        {"forward": "autotuned"},
        {"backward": "cublas"},
        {"multiprocessors": 16},  # a part of the GPU
        {"rows_per_sweep": None},
        {"gemm": asdict(launch.GemmLaunch(256, 256, 64, 8, 3, 1))},
        {"gemm": {"block_m": 128}},
        {"gemm": "128 x 128"},
        {"colour": "red"},
    ),
    ids=str,
)
def test_a_row_that_this_version_cannot_launch_costs_a_warning(change, cache):
    write(cache, asdict(other_than_the_heuristic()) | change)
    assert_one_warning(cache, str(SIZE), "tune")


def test_choosing_measures_and_launches_nothing(no_interpreter, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("measured")

    for module, names in ((tuning, ("tune", "median_seconds")), (launch, ("launch",)), (triton.testing, ("do_bench",))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    for num_tokens in (10, 1000, 100_000):
        state = torch.empty(num_tokens, 768, dtype=torch.bfloat16, device="meta")
        size = Size("half", launch._bucket(num_tokens), 768, "sequence")
        assert launch.chain(state, torch.bfloat16, per_token=False) == heuristic(H200, size)


def test_a_forced_launch_goes_before_all_others(no_interpreter):
    state = torch.empty(4096, 768, dtype=torch.bfloat16, device="meta")
    outer, inner = candidates(H200, "half")[:2]
    with launch.forced(outer):
        with pytest.raises(KeyError), launch.forced(inner):
            assert launch.chain(state, torch.bfloat16, per_token=False) == inner
            raise KeyError
        assert launch.chain(state, torch.bfloat16, per_token=False) == outer
    assert launch.chain(state, torch.bfloat16, per_token=False) == heuristic(H200, SIZE)


def test_where_the_cache_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LAD_FAST_CACHE", str(tmp_path / "own"))
    assert launch.cache_file() == tmp_path / "own/launch.json"
    monkeypatch.setenv("LAD_FAST_CACHE", "")
    assert launch.cache_file() == tmp_path / "xdg/lad_fast/launch.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert launch.cache_file() == tmp_path / ".cache/lad_fast/launch.json"


def test_what_is_kept_is_chosen_for_any_length_in_one_graph(monkeypatch):
    """As torch.compile sees it on a GPU: shapes are symbols, and their bytes must fit."""
    monkeypatch.setattr(launch, "room_for_gates", lambda device: 11 * 4 * 6 * 8)

    def kept(state):
        return state + 1 if launch.keep_gates("auto", state, 11) else state - 1

    compiled = torch.compile(kept, fullgraph=True, backend="eager", dynamic=True)
    assert [compiled(torch.zeros(length, 8))[0, 0].item() for length in (5, 6, 7, 8)] == [1, 1, -1, -1]


PROPERTIES = {"name": "GPU", "major": 9, "minor": 0, "multi_processor_count": 132}


@pytest.mark.parametrize(
    ("properties", "hip", "architecture", "shared_memory", "registers"),
    (
        ({"shared_memory_per_block_optin": 232448, "regs_per_multiprocessor": 65536}, None, "sm_90", 232448, 65536),
        ({"major": 12, "shared_memory_per_block_optin": 101376}, None, "sm_80", 101376, 65536),
        ({"major": 10}, None, "sm_100", 99 * KIB, 65536),
        ({"regs_per_multiprocessor": 131072}, "7.0", "gfx942", 64 * KIB, 131072),
    ),
)
def test_what_is_read_of_a_gpu(properties, hip, architecture, shared_memory, registers, monkeypatch):
    found = SimpleNamespace(**PROPERTIES | properties)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.version, "hip", hip)
    expected = Device("GPU", architecture, 132, shared_memory, registers)
    assert launch.gpu(torch.device("cuda", 0)) == expected


def test_doctor_says_where_launches_come_from(cache):
    assert "heuristic" in launches(H200)
    write(cache, asdict(other_than_the_heuristic()))
    forget()
    assert "1 sizes as measured" in launches(H200) and str(cache) in launches(H200)
