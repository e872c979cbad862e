"""Settings and fixtures that every test shares."""

import os
from pathlib import Path

import pytest
import torch

# Read once, when torch, triton and huggingface_hub are imported or first used: set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LAD_FAST_CACHE"] = os.devnull  # launches that somebody measured on this machine are not the tests'

# Tests run on one thread each: make test runs one worker per core, and sums then do not depend on the machine.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu", action="store_true",
        help="run what needs a GPU, and the kernels there, and nothing else; without it no test sees a GPU",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Without --gpu a machine with one runs what every machine does: kernels in Triton's interpreter, models on the
    CPU."""
    if config.getoption("--gpu"):
        if not torch.cuda.is_available():
            raise pytest.UsageError("--gpu: PyTorch sees no GPU here")
        return
    os.environ.update(CUDA_VISIBLE_DEVICES="-1", HIP_VISIBLE_DEVICES="-1", TRITON_INTERPRET="1")
    import fast_interpreter  # noqa: F401

    # The first backward: autograd starts threads for the devices that are in sight, and tests fork, which takes none
    # along. A FakeTensorMode before it would show one where PyTorch is built for CUDA.
    torch.ones((), requires_grad=True).backward()


SHARED = Path(os.environ.get("LAD_FAST_SHARED", Path(__file__).parents[2] / "shared"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = config.getoption("--gpu")
    for item in items:
        if item.get_closest_marker("cuda") and not on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU and --gpu"))
    if on_gpu:
        others = [item for item in items if not (item.get_closest_marker("cuda") or item.get_closest_marker("kernels"))]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden trajectories and real GLUE data, beside the repository or at $LAD_FAST_SHARED."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: set LAD_FAST_SHARED to the folder that holds golden/ and glue/")
    return SHARED


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 products go to oneDNN, also on a processor on which MKL is faster."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")
    from lad_fast.kernels import launch  # here: importing it imports Triton

    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setattr(launch, "_onednn_linear", launch._onednn_linear.__wrapped__)


@pytest.fixture
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills every float tensor that torch.empty and its kin allocate with NaN, so that unwritten memory shows."""

    def poison(allocate):
        def poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return poisoned

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
