"""What a teacher cache holds, and what it refuses."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lad_fast import teacher_cache
from lad_fast.distributed import World
from lad_fast.teacher_cache import TeacherCache, choose_place

LENGTHS = np.array([3, 1, 5, 2, 4])
LAYERS, HIDDEN, CLASSES = 3, 8, 2


def make(tmp_path, place="cpu", dtype=torch.float32, num_layers=LAYERS, device="cpu"):
    return TeacherCache(
        LENGTHS, num_layers, HIDDEN, CLASSES, dtype=dtype, device=device, place=place, folder=tmp_path
    )  # fmt: skip


def outputs(index, width):
    """A batch of states (B, width, D) that tell layer, example and position, and logits that tell the example."""
    layer = torch.arange(LAYERS).view(-1, 1, 1, 1) * 1000.0
    states = layer + index.view(1, -1, 1, 1) * 100 + torch.arange(width).view(1, 1, -1, 1) + torch.arange(HIDDEN) / 16
    return torch.stack([index * 1.0, -index], dim=1), tuple(states)


@pytest.mark.cuda
@pytest.mark.parametrize("device", ("cuda", "cuda:0"))
@pytest.mark.parametrize("place", ("gpu", "cpu", "disk"))
def test_reads_what_was_written_on_a_gpu(tmp_path, place, device):
    cache = make(tmp_path, place, device=device)
    index = torch.tensor([4, 0, 2])
    logits, states = outputs(index, 6)
    cache.write(index, logits.to(device), [state.to(device) for state in states])
    for _ in range(3):  # memory that waits for a copy is used again
        for order in ([2, 4], [0, 2], [4]):
            index = torch.tensor(order)
            right_logits, right = outputs(index, 7)
            real = torch.arange(7) < torch.from_numpy(LENGTHS)[index][:, None]
            logits, states = cache.read(index, 7)
            assert torch.equal(logits.cpu(), right_logits)
            assert all(state.is_cuda for state in states)
            assert all(torch.equal(a.cpu()[real], b[real]) for a, b in zip(states, right, strict=True))


@pytest.mark.parametrize("written", ("padded", "packed"))
@pytest.mark.parametrize("place", ("cpu", "disk"))
def test_reads_what_was_written(tmp_path, place, written):
    cache = make(tmp_path, place)
    index = torch.tensor([4, 0, 2])
    assert not cache.holds(index)
    logits, states = outputs(index, 6)
    real = torch.arange(6) < torch.from_numpy(LENGTHS)[index][:, None]
    cache.write(index, logits, states if written == "padded" else [state[real] for state in states])
    assert cache.holds(index) and len(cache) == 3

    order = torch.tensor([2, 4])  # other company, other order, other width
    assert not cache.holds(torch.tensor([2, 1]))
    right_logits, right = outputs(order, 7)
    real = torch.arange(7) < torch.from_numpy(LENGTHS)[order][:, None]
    logits, states = cache.read(order, 7)
    assert torch.equal(logits, right_logits)
    assert all(torch.equal(a[real], b[real]) for a, b in zip(states, right, strict=True))
    assert all(state.shape == (2, 7, HIDDEN) and torch.isfinite(state).all() for state in states)
    logits, states = cache.read(order, None)
    assert all(torch.equal(a, b[real]) for a, b in zip(states, right, strict=True))


def test_keeps_its_dtype_and_gives_back_what_it_keeps(tmp_path):
    cache = make(tmp_path, dtype=torch.bfloat16)
    assert cache.nbytes == LAYERS * LENGTHS.sum() * HIDDEN * 2
    index = torch.tensor([2])
    logits, states = torch.randn(1, CLASSES), [torch.randn(1, 5, HIDDEN) for _ in range(LAYERS)]
    cache.write(index, logits, states)
    for kept, state in zip(cache.read(index, 5)[1], states, strict=True):
        assert kept.dtype == torch.bfloat16
        assert torch.equal(kept, state.bfloat16())


@pytest.mark.parametrize("place", ("cpu", "disk"))
def test_logits_alone(tmp_path, place):
    cache = make(tmp_path, place, num_layers=0)
    cache.write(torch.tensor([1, 3]), torch.tensor([[1.0, 2], [3, 4]]))
    logits, states = cache.read(torch.tensor([3]), 9)
    assert logits.tolist() == [[3, 4]] and states == ()


def test_the_file_has_no_name(tmp_path):
    cache = make(tmp_path, "disk")
    cache.write(torch.arange(5), *outputs(torch.arange(5), 5))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ValueError, match=r"teacher_cache is 'disk'; .* has no room for 0.0 GB \(.*No space left"):
        make(tmp_path, "disk")
    assert os.listdir(tmp_path) == []


def test_wrong_places_are_refused(tmp_path):
    with pytest.raises(ValueError, match="teacher_cache is 'gpu'; training on the CPU takes"):
        make(tmp_path, "gpu")
    with pytest.raises(ValueError, match="teacher_cache is 'tape'; it takes one of gpu, cpu, disk"):
        make(tmp_path, "tape")
    with pytest.raises(ValueError, match="teacher_cache is 'disk'"):
        make(tmp_path / "absent", "disk")


@pytest.mark.parametrize(
    ("memory", "disk", "place"), [(200, 0, "cpu"), (199, 200, "disk"), (199, 199, "off")]
)
def test_place_goes_by_what_is_free(tmp_path, monkeypatch, memory, disk, place):
    monkeypatch.setattr(teacher_cache, "_free_host_memory", lambda: memory)
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda folder: type("", (), {"free": disk}))
    assert choose_place(100, torch.device("cpu"), tmp_path) == place


def test_other_systems_than_linux(tmp_path, monkeypatch):
    """Without /proc, SC_AVPHYS_PAGES and posix_fallocate: macOS."""
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(os, "sysconf", None)
    monkeypatch.setattr(teacher_cache.Path, "exists", lambda path: False)
    assert choose_place(100, torch.device("cpu"), tmp_path) == "off"
    assert choose_place(0, torch.device("cpu"), tmp_path) == "cpu"
    with pytest.raises(ValueError, match="teacher_cache is 'disk'; linux keeps no room for a file ahead; take cpu"):
        make(tmp_path, "disk")


def test_free_memory_is_what_the_kernel_says():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < teacher_cache._free_host_memory() <= total


def test_several_processes_share_a_machines_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "_free_host_memory", lambda: 399)
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=400))
    assert choose_place(100, torch.device("cpu"), tmp_path) == "cpu"
    assert choose_place(100, torch.device("cpu"), tmp_path, World(local_size=2)) == "disk"


def test_all_processes_take_the_place_that_each_has_room_for(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "_free_host_memory", lambda: 200)
    monkeypatch.setattr(World, "gather", lambda world, value: [value, "disk"])
    assert choose_place(100, torch.device("cpu"), tmp_path, World()) == "disk"


@pytest.mark.parametrize(("limit", "free"), [("5000\n", 2000), ("max\n", 9 * 1024), ("999999999\n", 9 * 1024)])
def test_a_containers_limit_counts_less_what_it_uses(monkeypatch, limit, free):
    files = {
        "/proc/meminfo": "MemTotal: 99 kB\nMemAvailable: 9 kB\n", "/sys/fs/cgroup/memory.max": limit,
        "/sys/fs/cgroup/memory.current": "3000\n",
    }  # fmt: skip
    monkeypatch.setattr(teacher_cache.Path, "exists", lambda path: str(path) in files)
    monkeypatch.setattr(teacher_cache.Path, "read_text", lambda path: files[str(path)])
    assert teacher_cache._free_host_memory() == free
