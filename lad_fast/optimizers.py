"""AdamW in one pass over all parameters: PyTorch's fused form, or NVIDIA apex's where it is really there."""

import importlib

import torch

__all__ = ["has_apex", "make_adamw"]


def has_apex() -> bool:
    """Whether NVIDIA's apex is here; PyPI's package of the same name is something else and has no optimizers."""
    try:
        return hasattr(importlib.import_module("apex.optimizers"), "FusedAdam")
    except ImportError:
        return False


def make_adamw(groups: list[dict], learning_rate: float, kind: str = "torch") -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay, betas 0.9 and 0.999, eps 1e-8.

    Args:
        groups: parameter groups, each with its ``weight_decay``, and with ``lr`` where it differs.
        learning_rate: of the other groups.
        kind: "torch" for ``torch.optim.AdamW(fused=True)``, "apex" for ``apex.optimizers.FusedAdam``.

    Raises:
        ValueError: an unknown kind, or "apex" without NVIDIA's apex or without a GPU.
    """
    if kind not in ("torch", "apex"):
        raise ValueError(f"optimizer is {kind!r}; it takes 'torch' or 'apex'")
    if kind == "torch":
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    if not has_apex():
        raise ValueError("optimizer is 'apex'; NVIDIA's apex, with FusedAdam, is not installed; use 'torch'")
    if not all(parameter.is_cuda for group in groups for parameter in group["params"]):
        raise ValueError("optimizer is 'apex'; its FusedAdam takes parameters on a GPU; use 'torch' here")
    from apex.optimizers import FusedAdam

    return FusedAdam(groups, lr=learning_rate, adam_w_mode=True)
