"""ONNX files compute what PyTorch computes, in any batch and length; in 8 bits nearly so."""

import copy
import shutil
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from small import bert
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lad_fast import export
from lad_fast.cli import main
from lad_fast.export import export_onnx
from lad_fast.models import save_checkpoint

SHAPES = [(1, 1), (1, 5), (2, 8), (5, 3), (3, 14)]  # the exporter sees (2, 8)
SIZES = {"vocab_size": 24, "max_position_embeddings": 18, "initializer_range": 0.2}


def roberta():
    config = RobertaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **SIZES)
    return RobertaForSequenceClassification(config)


def distilbert():
    config = DistilBertConfig(dim=16, hidden_dim=32, n_heads=2, n_layers=2, **SIZES)
    return DistilBertForSequenceClassification(config)


def saved(folder, model, **options):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrs"]
    save_checkpoint(folder, model, BertTokenizer(vocab={word: i for i, word in enumerate(words)}, **options))
    return model.eval()


def both(model, path, batch, length):
    """Logits of PyTorch and of the ONNX file on the same padded batch."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(batch * 100 + length)
    mask = (np.arange(length) < rng.integers(1, length + 1, (batch, 1))).astype(np.int64)
    inputs = {"input_ids": rng.integers(5, 24, (batch, length)) * mask, "attention_mask": mask}
    if "token_type_ids" in (names := [entry.name for entry in session.get_inputs()]):
        inputs["token_type_ids"] = rng.integers(0, 2, (batch, length))
    assert set(inputs) == set(names)
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()
    (found,) = session.run(["logits"], inputs)
    return expected, found


def check_shapes(model, path):
    for shape in SHAPES:
        expected, found = both(model, path, *shape)
        assert np.abs(expected).max() > 0.01
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, its folder and its ONNX file."""
    root = tmp_path_factory.mktemp("export")
    model = saved(root / "model", bert(3))
    return model, root / "model", export_onnx(root / "model", root / "new/onnx")


def test_logits_are_pytorchs_in_any_shape(exported):
    model, folder, path = exported
    check_shapes(model, path)
    assert path == folder.parent / "new/onnx/model.onnx"
    assert [file.name for file in path.parents[1].iterdir()] == ["onnx"]


@pytest.mark.parametrize("make", [roberta, distilbert])
def test_other_families(tmp_path, make):
    torch.manual_seed(0)
    model = saved(tmp_path / "model", make(), model_input_names=["input_ids", "attention_mask"])
    check_shapes(model, export_onnx(tmp_path / "model", tmp_path / "onnx"))


def test_8_bits_predict_nearly_the_same(exported, tmp_path, capsys):
    model, folder, full = exported
    assert main(["export", str(folder), "--output-dir", str(tmp_path / "int8"), "--int8"]) == 0
    path = tmp_path / "int8/model.onnx"
    assert str(path) in capsys.readouterr().out
    expected, found = both(model, path, 200, 12)
    # A weight is off by at most 1/126 of its row's largest, an activation by 1/255 of its range; over three layers
    # that stays within a twentieth of the logits' spread, and turns none but predictions near a tie. With weights of
    # 8 bits, processors of AVX2 alone were off by an eighth: their sums of two products saturate in 16 bits.
    error, spread = np.abs(found - expected).max(), np.ptp(expected)
    assert 0 < error < spread / 20
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.95
    assert path.stat().st_size < full.stat().st_size


def test_the_folder_has_what_a_server_needs(exported):
    model, _, path = exported
    tokenizer = AutoTokenizer.from_pretrained(path.parent)
    inputs = tokenizer("a b", "c", return_tensors="np")
    (found,) = onnxruntime.InferenceSession(path).run(None, dict(inputs))
    with torch.no_grad():
        expected = model(**tokenizer("a b", "c", return_tensors="pt")).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_into_the_current_folder(exported, tmp_path, monkeypatch):
    """Which no rename replaces, as none does a mounted one."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = export_onnx(exported[1], ".")
    assert path.samefile(folder / "model.onnx")
    names = sorted(file.name for file in exported[2].parent.iterdir())
    assert sorted(file.name for file in folder.iterdir()) == names
    assert [file.name for file in tmp_path.iterdir()] == ["here"]


def test_what_does_not_fit_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    saved(tmp_path / "model", bert(1))
    with pytest.raises(ValueError, match=r"output_dir is .*model, which is there"):
        export_onnx(tmp_path / "model", tmp_path / "model")
    with pytest.raises(ValueError, match="is no finished classifier"):
        saved(tmp_path / "headless", bert(1).bert)
        export_onnx(tmp_path / "headless", tmp_path / "onnx")
    monkeypatch.setattr(export, "_export", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match="could not be exported: ZeroDivisionError"):
        export_onnx(tmp_path / "model", tmp_path / "onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["headless", "model"]


def test_an_export_of_something_else_is_refused(exported, tmp_path, monkeypatch):
    model, _, path = exported
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.classifier.bias += 1
    saved(tmp_path / "other", other)
    monkeypatch.setattr(export, "_export", lambda _, target: shutil.copy(path, target))
    with pytest.raises(ValueError, match="exports as something else: its logits differ by 1"):
        export_onnx(tmp_path / "other", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_missing_package_is_told_with_its_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", "model", "--output-dir", str(tmp_path / "onnx")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "lad-fast: error: onnxscript is not installed: pip install 'lad_fast[onnx]'"
    ]


def test_the_configuration_lies_beside_the_file(exported):
    model, _, path = exported
    config = AutoConfig.from_pretrained(path.parent)
    assert config.id2label == model.config.id2label and config.model_type == "bert"
