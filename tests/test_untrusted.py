"""Files from strangers: no code of theirs is run, no file outside their folder read, no claimed size allocated."""

import ast
import faulthandler
import io
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
)

from lad_fast import GateStack
from lad_fast.data import tokenize
from lad_fast.glue import Examples, get_task
from lad_fast.models import load_classifier, save_checkpoint

ROOT = Path(__file__).parents[1]
RTE = get_task("rte")
VOCABULARY = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"])}
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def time_limit():
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def marker(tmp_path):
    """What a payload would make."""
    return tmp_path / "payload-has-run"


@pytest.fixture
def model(tmp_path):
    """A good model folder."""
    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(vocab_size=24, max_position_embeddings=20, **SIZES))
    save_checkpoint(tmp_path / "model", bert, BertTokenizer(vocab=VOCABULARY))
    return tmp_path / "model"


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder, match: str, **options) -> None:
    """A ValueError of one short line that names the folder."""
    with pytest.raises(ValueError, match=match) as error:
        load_classifier(folder, RTE, **options)
    message = str(error.value)
    assert f"model {folder}" in message and "\n" not in message and len(message) < len(str(folder)) + 400, message


# --- pickles ----------------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


class Evaluated(Payload):
    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({self.marker!r})",)


def zipped(state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def legacy(state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def tarred(state) -> bytes:
    """The form before PyTorch 0.1.10: pickles in a tar file."""
    buffer = io.BytesIO()
    parts = {"storages": pickle.dumps(0), "tensors": pickle.dumps(0), "pickle": pickle.dumps(state)}
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tarred_storages(state) -> bytes:
    """The same with the payload where the storages are told."""
    buffer = io.BytesIO()
    parts = {"storages": pickle.dumps(state), "tensors": pickle.dumps(0), "pickle": pickle.dumps({})}
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def behind_a_zip(state) -> bytes:
    """A zip file to a reader that looks at the end, a pickle to one that looks at the start."""
    return pickle.dumps(state) + zipped({})


FORMATS = [zipped, legacy, tarred, tarred_storages, pickle.dumps, behind_a_zip]
SPOTS = {
    "alone": lambda payload, good: payload,
    "beside tensors": lambda payload, good: {**good, "more": payload},
    "as a key": lambda payload, good: {**good, payload: 0},
    "for a tensor": lambda payload, good: {**good, next(iter(good)): payload},
}
malicious = pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
anywhere = pytest.mark.parametrize("spot", SPOTS.values(), ids=SPOTS)


@malicious
@pytest.mark.parametrize("kind", [Payload, Evaluated])
def test_the_payloads_work(marker, tmp_path, write, kind):
    """Read without care each of them runs, but for those of readers that PyTorch no longer has."""
    (tmp_path / "file").write_bytes(write(kind(marker)))
    try:
        torch.load(tmp_path / "file", weights_only=False)
    except Exception as error:
        assert marker.exists() or "tar" in write.__name__, error
    assert marker.exists() or "tar" in write.__name__


def published_gates(num=3, hidden=4, seq_len=3):
    torch.manual_seed(0)
    return [
        {
            "linear.weight": torch.randn(hidden, hidden),
            "linear.bias": torch.randn(hidden),
            "layernorm.weight": torch.randn(seq_len, hidden),
            "layernorm.bias": torch.randn(seq_len, hidden),
        }
        for _ in range(num)
    ]


def write_gates(folder, states, write=zipped):
    for i, state in enumerate(states):
        (folder / f"gate-{i}-7.pt").write_bytes(state if isinstance(state, bytes) else write(state))


@malicious
@anywhere
@pytest.mark.parametrize("kind", [Payload, Evaluated])
def test_a_published_gate_runs_nothing(tmp_path, marker, write, spot, kind):
    good = published_gates()
    write_gates(tmp_path, [good[0], write(spot(kind(marker), good[1])), good[2]])
    with pytest.raises(ValueError, match=r"gate-1-7\.pt ") as error:
        GateStack.from_official_checkpoint(tmp_path, 7)
    assert not marker.exists()
    assert "\n" not in str(error.value) and "weights_only=False" not in str(error.value)


@malicious
@anywhere
def test_a_models_pickle_runs_nothing(model, marker, write, spot):
    good = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(write(spot(Payload(marker), good)))
    refused(model, "could not be loaded")
    assert not marker.exists()


@pytest.mark.parametrize("write", [zipped, legacy], ids=lambda write: write.__name__)
def test_a_models_good_pickle_loads(model, write):
    good = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(write(good))
    loaded, _ = load_classifier(model, RTE)
    assert torch.equal(loaded.classifier.weight, good["classifier.weight"])


@pytest.mark.parametrize("bomb", ["compressed", "expanded"])
def test_a_models_pickle_that_claims_more_than_it_is(model, bomb):
    """Entries that the model does not even have: memory that is mapped cannot be unpacked, nor a view be copied."""
    good = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    more = torch.zeros(1).expand(HUGE, HUGE) if bomb == "expanded" else torch.zeros(10**6)
    data = (compressed if bomb == "compressed" else zipped)({**good, "more": more})
    assert len(data) < 10**6
    (model / "pytorch_model.bin").write_bytes(data)
    if bomb == "compressed":
        refused(model, "could not be loaded")
    else:
        load_classifier(model, RTE)


def test_a_script_module_for_a_gate(tmp_path):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    write_gates(tmp_path, [buffer.getvalue()] * 3)
    with pytest.raises(ValueError, match=r"gate-0-7\.pt "):
        GateStack.from_official_checkpoint(tmp_path, 7)


def test_good_gates_load(tmp_path):
    good = published_gates()
    write_gates(tmp_path, good)
    stack = GateStack.from_official_checkpoint(tmp_path, 7)
    assert stack.config == {"num_layers": 3, "hidden_size": 4, "seq_len": 3, "norm": "sequence", "reverse": False}
    assert torch.equal(stack.weight, torch.stack([state["linear.weight"] for state in good[1:]]))


def compressed(state) -> bytes:
    """What torch.save never writes: a member that unpacks to more than the file."""
    buffer = io.BytesIO()
    source = zipfile.ZipFile(io.BytesIO(zipped(state)))
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in source.namelist():
            new.writestr(name, source.read(name))
    return buffer.getvalue()


HUGE = 10**6
BAD_GATES = {
    "a list": ([1, 2], "holds a list"),
    "a tensor": (torch.zeros(3), "holds a Tensor"),
    "other names": ({"weight": torch.zeros(3)}, "holds .*weight.*; a published gate holds"),
    "numbers for names": ({1: torch.zeros(3), "a": 2}, "holds .*; a published gate holds"),
    "no tensor": ({"linear.bias": [0.0] * 4}, "linear.bias is a list; it takes a tensor"),
    "integers": ({"linear.bias": torch.zeros(4, dtype=torch.int64)}, "linear.bias is torch.int64"),
    "sparse": ({"linear.weight": torch.eye(4).to_sparse()}, "linear.weight is .*; it takes"),
    "on no device": ({"linear.weight": torch.empty(HUGE, HUGE, device="meta")}, "linear.weight is .*; it takes"),
    "a size without its memory": ({"linear.weight": torch.zeros(1).expand(HUGE, HUGE)}, "linear.weight .*; it takes"),
    "norm without its memory": ({"layernorm.bias": torch.zeros(1).expand(HUGE, HUGE)}, "layernorm.bias .*; it takes"),
    "other sizes": ({"linear.weight": torch.zeros(4, 5)}, r"linear.weight is of shape \(4, 5\); it takes \(4, 4\)"),
    "another norm's length": ({"layernorm.weight": torch.zeros(9, 4)}, r"layernorm.weight is of shape \(9, 4\)"),
    "norm of three axes": ({"layernorm.weight": torch.zeros(1, 3, 4)}, "layernorm.weight is of shape"),
    "a scalar": ({"layernorm.weight": torch.zeros(())}, "layernorm.weight is of shape"),
    "NaN": ({"linear.bias": torch.full((4,), float("nan"))}, "linear.bias .*not finite"),
    "compressed": (compressed({"linear.weight": torch.zeros(1000, 1000)}), "claims [0-9]+ bytes"),
    "empty": (b"", "no zip file"),
    "text": (b"gate", "no zip file"),
    "cut": (zipped(published_gates()[1])[:-300], "no zip file"),
    "an empty zip file": (b"PK\5\6" + bytes(18), "no zip file"),
}  # fmt: skip


@pytest.mark.parametrize("where", [1, 2])
@pytest.mark.parametrize(("state", "message"), BAD_GATES.values(), ids=BAD_GATES)
def test_bad_published_gates(tmp_path, state, message, where):
    states = published_gates()
    if isinstance(state, dict) and set(state) <= set(states[1]):
        state = states[where] | state
    states[where] = state
    write_gates(tmp_path, states)
    # Of two gates whose norms differ, or with a norm that fits nothing else, it may be the other that is named.
    match = rf"gate-{where}-7\.pt[: ].*{message}|gate-[12]-7\.pt: \S+ is of shape .*; it takes \("
    with pytest.raises(ValueError, match=match) as error:
        GateStack.from_official_checkpoint(tmp_path, 7)
    assert len(str(error.value)) < 700 and "\n" not in str(error.value)


# --- gates.safetensors ------------------------------------------------------------------------------------------------

GATES = {"num_layers": 3, "hidden_size": 4, "seq_len": 3, "norm": "sequence", "reverse": False}
BAD_METADATA = {
    "none": None,
    "no configuration": {"other": "{}"},
    "no JSON": {"config": "{"},
    "a list": [1],
    "a number": 3,
    "deep": {"config": "[" * 10**5},
    "long number": {"config": '{"num_layers": ' + "9" * 5000 + "}"},
    "an entry too many": GATES | {"path": "../x"},
    "an entry too few": {"num_layers": 3, "hidden_size": 4},
    **{f"{name} is {value!r}": GATES | {name: value} for name in ("num_layers", "hidden_size", "seq_len")
       for value in (-1, 0, 1, 10**6, 10**12, 10**30, 2.5, float("nan"), float("inf"), "3", None, True, [3], {})},
    "whole float": GATES | {"hidden_size": 4.0},
    "another norm": GATES | {"norm": "token"},
    "unknown norm": GATES | {"norm": "../../etc/passwd"},
    "norm of a wrong type": GATES | {"norm": ["sequence"]},
    "reverse as text": GATES | {"reverse": "no"},
    "reverse as a number": GATES | {"reverse": 1},
}  # fmt: skip


@pytest.mark.parametrize("metadata", BAD_METADATA.values(), ids=BAD_METADATA)
def test_bad_metadata_of_gates(tmp_path, monkeypatch, metadata):
    GateStack(**GATES).save_pretrained(tmp_path)
    path = tmp_path / "gates.safetensors"
    tensors = load_file(path)
    if metadata is not None and not (isinstance(metadata, dict) and set(metadata) <= {"config", "other"}):
        metadata = {"config": json.dumps(metadata)}
    save_file(tensors, path, metadata=metadata)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("memory was taken"))
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        GateStack.from_pretrained(tmp_path)
    assert len(str(error.value)) < len(str(path)) + 500 and "\n" not in str(error.value)


@pytest.mark.parametrize("change_tensors", [
    lambda tensors: tensors.pop("bias"),
    lambda tensors: tensors.update(more=torch.zeros(1)),
    lambda tensors: tensors.update(bias=torch.zeros(2, 5)),
    lambda tensors: tensors.update(bias=torch.zeros(2, 4, dtype=torch.int64)),
    lambda tensors: tensors.clear(),
])  # fmt: skip
def test_bad_tensors_of_gates(tmp_path, change_tensors):
    GateStack(**GATES).save_pretrained(tmp_path)
    path = tmp_path / "gates.safetensors"
    tensors = load_file(path)
    change_tensors(tensors)
    save_file(tensors, path, metadata={"config": json.dumps(GATES)})
    with pytest.raises(ValueError, match=re.escape(str(path))):
        GateStack.from_pretrained(tmp_path)


def test_a_header_that_claims_more_than_the_file(tmp_path):
    path = tmp_path / "gates.safetensors"
    header = {"__metadata__": {"config": json.dumps(GATES | {"hidden_size": HUGE})}}
    for name in ("weight", "bias", "norm_weight", "norm_bias"):
        header[name] = {"dtype": "F32", "shape": [2, HUGE, HUGE], "data_offsets": [0, 8 * HUGE**2]}
    for text in (json.dumps(header).encode(), b"{" * 10**5):
        for size in (len(text), 2**62, 2**64 - 1):
            path.write_bytes(struct.pack("<Q", size) + text)
            with pytest.raises(ValueError, match=re.escape(str(path))):
                GateStack.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [GATES, GATES | {"norm": "token", "reverse": True}])
def test_good_gates_come_back(tmp_path, dtype, config):
    stack = GateStack(**config).to(dtype)
    stack.save_pretrained(tmp_path)
    again = GateStack.from_pretrained(tmp_path)
    assert again.config == config and again.weight.dtype == torch.float32
    assert torch.equal(again.weight, stack.weight.float())


# --- model folders: sizes ---------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
BAD_CONFIG = [
    *({name: value} for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                                 "vocab_size", "max_position_embeddings", "num_labels")
      for value in (-16, 0, 10**12, 10**30, NAN, INF, 1.5, "16", True, [16], {"a": 1})),
    {"type_vocab_size": -1}, {"type_vocab_size": 10**12}, {"n_layers": 10**7}, {"num_hidden_groups": 10**7},
    {"num_hidden_layers": 10**5}, {"num_labels": 10**8},
    *({name: value} for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
      for value in (-0.1, 1.1, NAN, INF, "0.1", [0.1])),
    *({"layer_norm_eps": value} for value in (-1e-12, 0, NAN, INF, 2, "1e-12")),
    *({"initializer_range": value} for value in (-1, NAN, INF, 10**9, "x")),
    {"sub_config": {"hidden_size": 10**12}}, {"anything": NAN}, {"anything": [[1, {"a": -INF}]]},
]  # fmt: skip


@pytest.fixture
def no_weights(monkeypatch):
    """Fails where a model is made or its weights are read: by then a claimed size would be allocated."""
    monkeypatch.setattr(
        AutoModelForSequenceClassification, "from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )


@pytest.mark.parametrize("entry", BAD_CONFIG, ids=lambda entry: str(entry)[:50])
def test_absurd_entries_are_named(model, no_weights, entry):
    change(model / "config.json", **entry)
    refused(model, rf"config\.json: .*{next(iter(entry))}.* is .*; it takes |config\.json .*(NaN|Infinity)")


@pytest.mark.parametrize(
    "entry",
    [
        {"label2id": {"dim": 0, "dropout": 7}}, {"classifier_dropout": 0}, {"num_labels": 3},
        {"num_nextn_predict_layers": 0}, {"type_vocab_size": 2, "anything": 10**30}, {"layer_norm_eps": 1e-5},
        {"id2label": {str(n): f"class {n}" for n in range(2000)}}, {"summary": {"deep": [{"er": [1.5, None]}]}},
    ],
    ids=lambda entry: str(entry)[:50],
)  # fmt: skip
def test_entries_that_are_not_absurd(model, entry):
    change(model / "config.json", **entry)
    load_classifier(model, RTE)


@pytest.mark.parametrize(
    "entry",
    [
        {"hidden_size": 10**6}, {"vocab_size": 10**8}, {"intermediate_size": 10**7}, {"type_vocab_size": 10**8},
        {"max_position_embeddings": 10**8}, {"num_hidden_layers": 900, "hidden_size": 4096},
        {"hidden_size": 10**8, "vocab_size": 10**8},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_the_weights_do_not_bear_out(model, no_weights, entry):
    change(model / "config.json", **entry)
    refused(model, r"config\.json claims (a model of [0-9]+ MB; its weights are 0 MB|sizes)")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '"x"', '{"a": NaN}', '{"a": -Infinity}', '{"hidden_size": 1e999}', "[" * 10**5,
     '{"hidden_size": ' + "9" * 5000 + "}", "\ufeff{}", '{"a": "\\ud800"}', '{"model_type": 5}', "{}"],
)  # fmt: skip
def test_config_that_is_none(model, text):
    (model / "config.json").write_text(text)
    refused(model, r"could not be loaded|config\.json:? (is no JSON|holds)")


def test_config_in_latin_1(model):
    (model / "config.json").write_bytes('{"a": "ü"}'.encode("latin-1"))
    refused(model, r"config\.json")


@pytest.mark.parametrize("length", [-5, 0, NAN, "128", [512], True])
def test_absurd_lengths_of_tokenizers(model, length):
    change(model / "tokenizer_config.json", model_max_length=length)
    refused(model, r"tokenizer_config\.json")


# --- model folders: other files ---------------------------------------------------------------------------------------


def outside(model) -> Path:
    """The model's weights, moved out of its folder."""
    target = model.parent / "outside.safetensors"
    (model / "model.safetensors").rename(target)
    return target


@pytest.mark.parametrize("kind", ["up", "absolute", "up from within", "folder"])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_shards_outside_the_folder(model, kind, index):
    target = outside(model)
    name = {
        "up": "../outside.safetensors",
        "absolute": str(target),
        "up from within": "./x/../../outside.safetensors",
        "folder": "..",
    }[kind]
    weights = {key: name for key in load_file(target)}
    (model / index).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    refused(model, rf"{re.escape(index)}: weight_map.* is {re.escape(repr(name))}; it takes .*name")


@pytest.mark.parametrize("weights", [[], {"a": 5}, {"a": None}, "x", None])
def test_indices_that_are_none(model, weights):
    outside(model)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    refused(model, "index.json|could not be loaded")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", ".."])
def test_weights_named_outside(model, name):
    outside(model)
    change(model / "config.json", transformers_weights=name)
    refused(model, r"config\.json: transformers_weights is .*; it takes .*name")


@pytest.mark.parametrize("entry", ["vocab_file", "tokenizer_file", "init_inputs", "fast_tokenizer_files"])
@pytest.mark.parametrize("name", ["../secret.txt", "/etc/passwd"])
def test_tokenizer_files_named_outside(model, entry, name):
    value = [name] if entry in ("init_inputs", "fast_tokenizer_files") else name
    change(model / "tokenizer_config.json", **{entry: value})
    refused(model, rf"tokenizer_config\.json: {entry}.* is {re.escape(repr(name))}; it takes .*name")


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", ".."])
def test_chat_templates_named_outside(model, name):
    """Transformers writes each to a file of its name."""
    change(model / "tokenizer_config.json", chat_template=[{"name": name, "template": "{{ 1 }}"}])
    refused(model, rf"tokenizer_config\.json: chat_template.* is {re.escape(repr(name))}; it takes .*name")
    change(model / "tokenizer_config.json", chat_template=[{"name": "default", "template": "{{ 1 }}"}])
    load_classifier(model, RTE)


def test_a_link_of_a_chat_template_that_leaves_the_folder(model):
    (model.parent / "outside.jinja").write_text("secret")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/a.jinja").symlink_to(model.parent / "outside.jinja")
    refused(model, r"additional_chat_templates/a\.jinja leads out of the folder")


def test_a_tokenizers_old_place_does_no_harm(model):
    """Old versions of Transformers wrote it down, and many published folders hold it."""
    change(model / "tokenizer_config.json", tokenizer_file="/root/nobody/.cache/tokenizer.json", name_or_path="a/b")
    assert load_classifier(model, RTE)[1]("a").input_ids == [2, 5, 3]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"])
def test_links_that_leave_the_folder(model, name):
    target = model.parent / f"outside-{name}"
    if (model / name).exists():
        (model / name).rename(target)
    else:
        target.write_text("[PAD]\n")
    for link in (target, Path("..") / target.name):
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(link)
        refused(model, rf"{re.escape(name)} leads out of the folder")


def test_a_link_of_gates_that_leaves_the_folder(tmp_path):
    GateStack(**GATES).save_pretrained(tmp_path / "there")
    (tmp_path / "here").mkdir()
    (tmp_path / "here/gates.safetensors").symlink_to(tmp_path / "there/gates.safetensors")
    with pytest.raises(ValueError, match=r"gates\.safetensors leads out of the folder"):
        GateStack.from_pretrained(tmp_path / "here")
    write_gates(tmp_path / "there", published_gates())
    for path in (tmp_path / "there").glob("*.pt"):
        (tmp_path / "here" / path.name).symlink_to(path)
    with pytest.raises(ValueError, match=r"gate-0-7\.pt leads out of the folder"):
        GateStack.from_official_checkpoint(tmp_path / "here", 7)


def test_links_within_the_folder_and_the_hubs_cache(model):
    (model / "model.safetensors").rename(model / "weights")
    (model / "model.safetensors").symlink_to("weights")
    load_classifier(model, RTE)
    snapshot = model.parent / "models--a--b/snapshots/0123"
    blobs = model.parent / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("config.json", "weights", "tokenizer.json", "tokenizer_config.json")):
        (model / name).rename(blobs / str(number))
        (snapshot / name.replace("weights", "model.safetensors")).symlink_to(Path("../../blobs") / str(number))
    load_classifier(snapshot, RTE)
    (model.parent / "link").symlink_to(snapshot)
    load_classifier(model.parent / "link", RTE)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "vocab.txt", "generation_config.json"])
def test_pipes_in_a_models_folder(model, name):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    refused(model, rf"{re.escape(name)} is no regular file")


def test_an_adapter_of_another_model(model):
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../other"}))
    refused(model, r"adapter_config\.json")


# --- model folders: code ----------------------------------------------------------------------------------------------


@pytest.fixture
def code(model, marker):
    """Modules in a model's folder that run when imported."""
    for name in ("evil", "modeling_evil", "configuration_evil", "tokenization_evil", "__init__", "conftest"):
        (model / f"{name}.py").write_text(
            f"import os\nos.mkdir({str(marker)!r})\nclass Evil:\n    pass\nEvilConfig = EvilTokenizer = Evil\n"
        )
    return model


AUTO_MAP = {
    "AutoConfig": "configuration_evil.EvilConfig",
    "AutoModel": "modeling_evil.Evil",
    "AutoModelForSequenceClassification": "modeling_evil.Evil",
    "AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"],
}


def test_the_remote_code_works(code, marker, monkeypatch, tmp_path):
    """With trust the module is imported: the tests below could fail."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    change(code / "config.json", auto_map=AUTO_MAP, model_type="evil")
    with pytest.raises(Exception):  # noqa: B017 - what the module gives is no configuration
        AutoConfig.from_pretrained(code, trust_remote_code=True)
    assert marker.exists()


def test_code_beside_a_known_model_is_not_run(code, marker):
    change(code / "config.json", auto_map=AUTO_MAP)
    change(code / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="EvilTokenizer")
    try:
        model, tokenizer = load_classifier(code, RTE)
    except ValueError as error:
        assert f"model {code}" in str(error)
    else:
        assert type(model) is BertForSequenceClassification and tokenizer("a").input_ids
    assert not marker.exists()


@pytest.mark.parametrize(
    "entries",
    [
        {"model_type": "evil", "auto_map": AUTO_MAP},
        {"model_type": "evil", "auto_map": AUTO_MAP, "trust_remote_code": True},
        {"model_type": "evil", "auto_map": {"AutoConfig": "other/repository--evil.EvilConfig"}},
        {"model_type": "evil", "auto_map": {"AutoConfig": "../evil.EvilConfig"}},
        {"model_type": "evil", "auto_map": {"AutoConfig": str(Path("/tmp/evil.EvilConfig"))}},
        {"model_type": None, "auto_map": AUTO_MAP},
    ],
)
def test_models_that_need_code_are_refused(code, marker, entries):
    change(code / "config.json", **entries)
    change(code / "tokenizer_config.json", trust_remote_code=True)
    refused(code, "could not be loaded")
    assert not marker.exists()


@pytest.mark.parametrize("tokenizer_class", ["EvilTokenizer", "tokenization_evil.EvilTokenizer", "os", "", 5, None])
def test_tokenizers_that_need_code(code, marker, tokenizer_class):
    for name in ("tokenizer.json", "vocab.txt"):
        (code / name).unlink(missing_ok=True)
    change(code / "tokenizer_config.json", auto_map={"AutoTokenizer": AUTO_MAP["AutoTokenizer"]})
    change(code / "tokenizer_config.json", tokenizer_class=tokenizer_class, trust_remote_code=True)
    try:
        _, tokenizer = load_classifier(code, RTE)
    except ValueError as error:
        assert f"model {code}" in str(error)
    else:
        assert type(tokenizer).__module__.startswith("transformers.")
    assert not marker.exists()


def test_a_folder_without_words_tokenises_nothing(model):
    """Transformers makes a tokenizer of special tokens alone, to which every word is unknown."""
    (model / "tokenizer.json").unlink()
    _, tokenizer = load_classifier(model, RTE)
    with pytest.raises(ValueError, match=rf"tokenizer of '{model}' has special tokens alone.* tokenizer\.json"):
        tokenize(Examples("sst2", "train", ["a", "b c"], labels=[0, 1]), tokenizer, 8)


@pytest.mark.parametrize("entry", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["evil/kernel", "kernels-community/flash-attn", {"": "evil/kernel@main:x"}])
def test_kernels_of_the_hub_are_not_asked_for(model, no_weights, entry, value):
    """Transformers would load and run them where the package kernels is installed."""
    change(model / "config.json", **{entry: value})
    refused(model, rf"config\.json: {entry}.* is .*/.*; it takes")


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation_internal"])
def test_plain_attention_may_be_named(model, name):
    change(model / "config.json", **{name: "eager"})
    load_classifier(model, RTE)


def test_a_cache_of_objects_is_not_unpickled(tmp_path, marker):
    tokenizer = BertTokenizer(vocab=VOCABULARY)
    examples = Examples("sst2", "train", ["a", "b c"], labels=[0, 1])
    good = tokenize(examples, tokenizer, 8, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    objects = np.empty(1, object)
    objects[0] = Payload(marker)
    np.savez(path, input_ids=objects, offsets=good.offsets)
    assert tokenize(examples, tokenizer, 8, tmp_path / "cache").input_ids.tolist() == good.input_ids.tolist()
    assert not marker.exists()


def test_the_source_reads_no_pickle_and_trusts_no_code():
    """Every call in the package: torch.load says weights_only=True, from_pretrained of Auto classes says no trust."""
    seen = set()
    for path in [*ROOT.glob("lad_fast/*.py"), *ROOT.glob("kernels/*.py")]:
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"dill", "cloudpickle", "joblib", "shelve", "marshal"}, path
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            where = f"{path}:{node.lineno}: {called}"
            assert called not in ("eval", "exec", "__import__", "pickle.load", "pickle.loads", "torch.jit.load"), where
            assert "trust_remote_code" not in keywords or keywords["trust_remote_code"] == "False", where
            assert keywords.get("allow_pickle", "False") == "False", where
            if called == "torch.load" or "weights_only" in keywords:
                assert keywords.get("weights_only") == "True", where
            seen.add(called)
    assert {"torch.load", "np.load", "safe_open", "AutoConfig.from_pretrained"} <= seen


# --- by hypothesis ----------------------------------------------------------------------------------------------------

MANY = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([-1, 0, 1, 2**31, 2**63, "../x", "/x"]) |
    st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
def loads_or_names_the_model(model, file: str, entry: str, value) -> None:
    """Whatever an entry of a JSON file holds, the model loads or is refused by name, in one line."""
    good = (model / file).read_text()
    change(model / file, **{entry: value})
    try:
        load_classifier(model, RTE)
    except ValueError as error:
        assert f"model {model}" in str(error) and "\n" not in str(error)
    finally:
        (model / file).write_text(good)


ENTRIES = [
    "architectures", "attention_probs_dropout_prob", "classifier_dropout", "dtype", "hidden_act", "hidden_dropout_prob",
    "hidden_size", "id2label", "initializer_range", "intermediate_size", "is_decoder", "label2id", "layer_norm_eps",
    "max_position_embeddings", "model_type", "num_attention_heads", "num_hidden_layers", "num_labels", "pad_token_id",
    "problem_type", "tie_word_embeddings", "torch_dtype", "type_vocab_size", "vocab_size", "_name_or_path",
]  # fmt: skip


@MANY
@given(entry=st.sampled_from(ENTRIES), value=JSON)
def test_any_entry_of_a_config(model, entry, value):
    loads_or_names_the_model(model, "config.json", entry, value)


TOKENIZER_ENTRIES = [
    "added_tokens_decoder", "additional_special_tokens", "auto_map", "backend", "chat_template", "cls_token",
    "do_lower_case", "extra_special_tokens", "fast_tokenizer_files", "init_inputs", "mask_token", "merges_file",
    "model_input_names", "model_max_length", "name_or_path", "pad_token", "padding_side", "special_tokens_map_file",
    "tokenizer_class", "tokenizer_file", "truncation_side", "unk_token", "vocab", "vocab_file",
]  # fmt: skip


@MANY
@given(entry=st.sampled_from(TOKENIZER_ENTRIES), value=JSON)
def test_any_entry_of_a_tokenizer(model, entry, value):
    loads_or_names_the_model(model, "tokenizer_config.json", entry, value)


@MANY
@given(data=st.data())
def test_gates_with_damaged_bytes(tmp_path, data):
    stack = GateStack(**GATES)
    stack.save_pretrained(tmp_path)
    path = tmp_path / "gates.safetensors"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, min(len(content) - 1, 400)))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([None, 0, 7, 100, -1]))])
    try:
        assert GateStack.from_pretrained(tmp_path).weight.shape == stack.weight.shape
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
