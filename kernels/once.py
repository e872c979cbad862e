"""Backward passes that are not differentiated themselves."""

from collections.abc import Callable

import torch

__all__ = ["once_differentiable"]


def once_differentiable(backward: Callable) -> Callable:
    """Refuses ``create_graph=True``.

    PyTorch's decorator of this name refuses what flows into a second backward. Into a loss flows a constant: its
    gradients would pass for constants too, and a penalty on them be lost without a word.
    """

    def wrapper(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph is True, but no fused gradient has a derivative of its own; backend='reference' has them"
            )
        return backward(ctx, *grads)

    return wrapper
