"""CUDA graphs of a step's forward and backward: hundreds of launches become one."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["StepGraphs"]

_BEFORE_CAPTURE = 2  # times that a shape runs plainly first: a rare one would not earn its capture back
_MOST = 32  # graphs kept; each holds a batch's inputs and outputs


class StepGraphs:
    """Replays of forward and backward, one graph for each shape of batch; captured when a shape comes again.

    Gradients accumulate into the parameters' ``grad``, which must stay where they are between steps.

    Args:
        run: forward and backward of a prepared batch; returns tensors in tuples and dicts.
        zero_grad: sets all gradients to zero, in place.
        device: a GPU.

    Raises:
        ValueError: a device that is no GPU.
    """

    def __init__(self, run: Callable, zero_grad: Callable[[], None], device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"cuda_graphs takes a model on a GPU; this one is on {device}")
        self._run, self._zero_grad, self._device = run, zero_grad, device
        self._graphs: dict[tuple, _Graph] = {}
        self._seen: Counter[tuple] = Counter()
        # One stream for all captures: graphs share a pool's memory only where they were captured on the same one.
        self._pool, self._side = None, torch.cuda.Stream(device)

    def __call__(self, batch):
        """What ``run`` returns for the batch, valid until the next call; None where it is not replayed."""
        if "packing" in batch.inputs:  # its number of tokens hardly comes twice
            return None
        batch = batch._replace(index=None, part=None)  # of no use on the device
        leaves, structure = pytree.tree_flatten(batch)
        key = (str(structure), *((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves))
        if key not in self._graphs:
            self._seen[key] += 1
            if self._seen[key] <= _BEFORE_CAPTURE or len(self._graphs) == _MOST:
                return None
            self._graphs[key] = self._capture(leaves, structure)
        return self._graphs[key].replay(leaves)

    def _capture(self, leaves: list, structure) -> "_Graph":
        static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        batch = pytree.tree_unflatten(static, structure)
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        # Libraries make their workspaces on a first run, which a capture does not allow.
        with torch.cuda.stream(self._side), torch.random.fork_rng([self._device]):
            self._run(batch)
        torch.cuda.current_stream(self._device).wait_stream(self._side)
        self._zero_grad()
        graph = torch.cuda.CUDAGraph()
        # Without a stream it would take one of whichever device was captured on first.
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, stream=self._side):
            outputs = self._run(batch)
        self._pool = graph.pool()
        return _Graph(graph, static, outputs)


class _Graph:
    def __init__(self, graph: torch.cuda.CUDAGraph, static: list, outputs) -> None:
        self.graph, self.static, self.outputs = graph, static, outputs

    def replay(self, leaves: list):
        for mine, theirs in zip(self.static, leaves, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(theirs, non_blocking=True)
        self.graph.replay()
        return self.outputs
