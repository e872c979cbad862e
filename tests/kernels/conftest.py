"""Kernel tests run where the kernels do: on a GPU if there is one, otherwise in Triton's interpreter on the CPU."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def device():
    """The default device of every tensor that a test makes."""
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
