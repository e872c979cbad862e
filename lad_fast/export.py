"""Classifiers as ONNX files, in float32 or with weights in 8 bits."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lad_fast.models import load_classifier, new_folder

__all__ = ["export_onnx"]

FILE = "model.onnx"
_TOLERANCE = 1e-4  # absolute and relative, of float32 logits against PyTorch's


def export_onnx(name_or_path: str | Path, output_dir: str | Path, int8: bool = False) -> Path:
    """Write a classifier as model.onnx, with its configuration and tokenizer beside it.

    Its inputs are what the tokenizer gives, (batch, sequence) int64 of any size up to the model's positions; its
    output is "logits" (batch, classes) float32.

    Args:
        name_or_path: a ``save_pretrained`` folder or a name on the hub.
        output_dir: a folder that is absent or empty.
        int8: weights in 8 bits, of which seven are used so that no processor's sums overflow, and products of what
            enters a layer in 8 bits too, scaled as it comes (dynamic quantisation by ONNX Runtime; PyTorch's own is
            deprecated and leaves embeddings, most of a small model, in float32).

    Returns:
        The path of model.onnx.

    Raises:
        ValueError: no finished classifier, one that cannot be exported or whose export computes something else, or a
            folder that is not empty.
        ImportError: a package of the extra "onnx" is missing.
    """
    try:
        import onnx  # noqa: F401 - PyTorch's exporter takes both
        import onnxscript  # noqa: F401
        from onnxruntime.quantization import quantize_dynamic
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'lad_fast[onnx]'") from error
    output_dir = Path(output_dir)
    with new_folder(output_dir) as folder:
        model, tokenizer = load_classifier(name_or_path, None, fine_tuned=True)
        logits = _Logits(model, tokenizer.model_input_names).eval()
        path = folder / FILE
        try:
            with _quiet():
                _export(logits, path)
        except Exception as error:  # what an exporter raises has no common type
            reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
            raise ValueError(f"model {name_or_path} could not be exported: {reason}") from error
        _check(name_or_path, logits, path)
        if int8:
            with _quiet():
                # Weights of 7 bits: with 8, processors without VNNI saturate sums of two products in 16 bits.
                quantize_dynamic(path, path, per_channel=True, reduce_range=True)
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return output_dir / FILE


class _Logits(nn.Module):
    """A classifier with the tokenizer's outputs as inputs, by place, and nothing but logits as output."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits

    def example(self, batch: int, length: int) -> tuple[Tensor, ...]:
        """Inputs by place: the last example is padded to the length of the others."""
        numbers = torch.Generator().manual_seed(0)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        ids = torch.randint(vocabulary, (batch, length), generator=numbers)
        mask = torch.ones_like(ids)
        mask[-1, (length + 1) // 2 :] = 0
        known = {"input_ids": ids, "attention_mask": mask}
        return tuple(known.get(name, torch.zeros_like(ids)) for name in self.names)


def _export(logits: _Logits, path: Path) -> None:
    inputs = logits.example(2, 8)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    torch.onnx.export(
        logits, inputs, path, input_names=logits.names, output_names=["logits"], dynamo=True,
        dynamic_shapes=((axes,) * len(inputs),), external_data=False, verbose=False,
    )  # fmt: skip


def _check(name_or_path: str | Path, logits: _Logits, path: Path) -> None:
    """Another batch and length than the exporter saw, against PyTorch: a size that it froze would show."""
    from onnxruntime import InferenceSession

    inputs = logits.example(3, 13)
    with torch.no_grad():
        expected = logits(*inputs)
    feed = {name: tensor.numpy() for name, tensor in zip(logits.names, inputs, strict=True)}
    found = torch.from_numpy(InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)[0])
    if not torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
        error = (found - expected).abs().max()
        raise ValueError(f"model {name_or_path} exports as something else: its logits differ by {error:.2g}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are missing and on names that it does not use."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "root")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
