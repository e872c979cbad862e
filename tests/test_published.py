"""Folders of the published code, written here in its layout from the recorded runs, and read by the library."""

import json

import pytest
import torch
from golden import Golden
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lad_fast import GateStack, LADObjective
from lad_fast.cli import main
from lad_fast.demo import build_tokenizer
from lad_fast.published import load_published

STEP = 20
TASKS = {"rte_l12_k6": "rte", "mnli_l12_k4_reverse": "mnli", "stsb_l12_k6": "stsb"}
# The classes' places in the hub's order by the published ones: RTE's are numbered the other way round.
ORDER = {"rte": [1, 0], "mnli": [0, 1, 2], "stsb": [0]}


@pytest.fixture(params=TASKS)
def recorded(request, shared):
    return TASKS[request.param], Golden(shared / "golden" / f"{request.param}.npz")


def write(folder, task: str, golden: Golden, part: str, step: int = STEP, with_gates: bool = True) -> None:
    """``part`` of a run ("init" or "final") as ``fine_tune``'s training loop and configurations write it."""
    meta = golden.meta
    folder.mkdir(parents=True, exist_ok=True)
    student = {
        "task": task, "model": "bert", "experiment": "LAD", "dataset": "train", "num_class": meta["classes"],
        "d_emb": 128, "d_model": meta["d"], "d_ff": meta["ff"], "num_attention_heads": meta["heads"],
        "num_hidden_layers": meta["K"], "max_seq_len": meta["s"], "type_vocab_size": 2, "dropout": meta["dropout"],
        "softmax_temp": meta["temp"], "soft_weight": meta["soft"], "hard_weight": meta["hard"],
        "hidden_mse_weight": meta["mu"], "lr": meta["lr"], "total_step": meta["steps"], "device_id": -1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(student))
    state = {
        name.removeprefix(f"student_{part}/"): torch.from_numpy(value)
        for name, value in golden.arrays.items()
        if name.startswith(f"student_{part}/")
    }
    # A buffer that Transformers kept in state dicts then.
    state["encoder.embeddings.position_ids"] = torch.arange(meta["s"])[None]
    torch.save(state, folder / f"model-{step}.pt")
    if with_gates:
        (folder / "gate_config.json").write_text(json.dumps({"dimension": meta["d"], "max_seq_length": meta["s"]}))
        for i in range(meta["L"]):
            prefix = f"gate_{part}/{i}/"
            gate = {
                name.removeprefix(prefix): torch.from_numpy(value)
                for name, value in golden.arrays.items()
                if name.startswith(prefix)
            }
            torch.save(gate, folder / f"gate-{i}-{step}.pt")


@torch.no_grad()
def test_students_and_gates_go_on_where_the_published_run_was(tmp_path, recorded):
    """The first step's recorded losses come out of the imported start."""
    task, golden = recorded
    meta = golden.meta
    write(tmp_path, task, golden, "init", step=0)
    found = load_published(tmp_path, reverse=meta["reverse"])
    teacher = golden.model("teacher", meta["L"]).eval()
    inputs = golden.batch(0)
    labels = inputs.pop("labels")
    objective = LADObjective(
        found.gates, meta["K"], meta["temp"], meta["soft"], meta["hard"], meta["mu"], regression=task == "stsb"
    )
    order = ORDER[task]
    student = found.model(**inputs, output_hidden_states=True)
    theirs = teacher(**inputs, output_hidden_states=True)
    if task != "stsb":
        labels = torch.tensor([order.index(label) for label in labels.tolist()])
    out = objective(
        student.hidden_states[1:], theirs.hidden_states[1:], student.logits, theirs.logits[:, order], labels
    )
    # The contract's tolerance for recorded losses (golden/README.md).
    expected = torch.from_numpy(golden.arrays["hidden_loss"][0]).float()
    torch.testing.assert_close(out.hidden_losses, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(out.logits_loss.item(), float(golden.arrays["logits_loss"][0]), rtol=1e-4, atol=0)


@torch.no_grad()
def test_the_command_writes_what_transformers_loads(tmp_path, recorded, capsys):
    task, golden = recorded
    write(tmp_path / "theirs", task, golden, "init", step=3)
    write(tmp_path / "theirs", task, golden, "final", step=STEP)
    reverse = ["--reverse"] if golden.meta["reverse"] else []
    assert main(["import", str(tmp_path / "theirs"), "--output-dir", str(tmp_path / "ours"), *reverse]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'ours'}: step {STEP} of {task}, 11 gates\n"
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    theirs = golden.model("student_final", golden.meta["K"]).eval()
    inputs = golden.batch(0)
    del inputs["labels"]
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits[:, ORDER[task]], rtol=0, atol=1e-6)
    gates = GateStack.from_pretrained(tmp_path / "ours")
    assert gates.reverse == golden.meta["reverse"]
    for name, values in golden.gates("gate_final").items():
        torch.testing.assert_close(getattr(gates, name), torch.stack([torch.from_numpy(v) for v in values]))
    state = json.loads((tmp_path / "ours/training.json").read_text())
    assert (state["task"], state["step"], state["published"]["d_model"]) == (task, STEP, golden.meta["d"])


def test_a_folder_in_use_is_left_alone(tmp_path, shared, capsys):
    theirs, used = tmp_path / "theirs", tmp_path / "used"
    write(theirs, "rte", Golden(shared / "golden/rte_l12_k6.npz"), "final")
    (used / "other_run").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for folder in (used, theirs):
        assert main(["import", str(theirs), "--output-dir", str(folder)]) == 2
        assert "it takes a new or an empty folder" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tokenizer_from_a_folder_of_its_own(tmp_path, shared, capsys):
    golden = Golden(shared / "golden/rte_l12_k6.npz")
    write(tmp_path / "theirs", "rte", golden, "final")
    build_tokenizer(["one word or two"]).save_pretrained(tmp_path / "tokenizer")
    flags = ["--tokenizer", str(tmp_path / "tokenizer"), "--output-dir", str(tmp_path / "ours")]
    assert main(["import", str(tmp_path / "theirs"), *flags]) == 0, capsys.readouterr().err
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").tokenize("two") == ["two"]


def test_a_folder_without_gates_is_a_model_alone(tmp_path, recorded):
    task, golden = recorded
    write(tmp_path, task, golden, "final", with_gates=False)
    found = load_published(tmp_path)
    assert found.gates is None and found.step == STEP


class Malicious:
    def __reduce__(self):
        return print, ("run",)


def spoil(folder, how: str) -> None:
    model, config = folder / f"model-{STEP}.pt", folder / "config.json"
    settings = json.loads(config.read_text())
    state = torch.load(model, weights_only=True)
    if how == "pickle":
        torch.save({"encoder": Malicious()}, model)
    elif how == "link":
        (folder.parent / "elsewhere.pt").write_bytes(model.read_bytes())
        model.unlink()
        model.symlink_to(folder.parent / "elsewhere.pt")
    elif how == "lacking":
        del state["encoder.pooler.dense.weight"]
        torch.save(state, model)
    elif how == "no head":
        del state["linear_layer.weight"], state["linear_layer.bias"]
        torch.save(state, model)
    elif how == "empty":
        torch.save({}, model)
    elif how == "nan":
        state["linear_layer.bias"][0] = torch.nan
        torch.save(state, model)
    elif how == "claims":
        config.write_text(json.dumps(settings | {"d_model": 768}))
    elif how == "heads":
        config.write_text(json.dumps(settings | {"num_attention_heads": 7}))
    elif how == "task":
        config.write_text(json.dumps(settings | {"task": "boolq"}))
    elif how == "json":
        config.write_text("[" * 10**5)
    elif how == "gates":
        (folder / "gate_config.json").write_text('{"dimension": 9}')
    elif how == "gate":
        (folder / f"gate-4-{STEP}.pt").unlink()
    elif how == "no config":
        config.unlink()
    elif how == "no model":
        model.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    {
        "pickle": "tensors alone", "link": "leads out of the folder", "lacking": "pooler.dense.weight",
        "no head": "no BERT classifier of 2 classes",
        "empty": "has no matrix", "nan": "not finite", "claims": "d_model is 768; the tensors are of",
        "heads": "num_attention_heads is 7", "task": "task is 'boolq'", "json": "is no JSON", "gates": "dimension is 9",
        "gate": "missing gate-4-20.pt", "no config": "no config.json", "no model": "no model-STEP.pt",
    }.items(),
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(tmp_path, shared, capsys, how, message):
    folder = tmp_path / "theirs"
    write(folder, "rte", Golden(shared / "golden/rte_l12_k6.npz"), "final")
    spoil(folder, how)
    assert main(["import", str(folder), "--output-dir", str(tmp_path / "ours")]) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1 and told.out == ""
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("file", "claim", "message"),
    [
        ("config.json", {"num_hidden_layers": 7}, "num_hidden_layers is 7; the tensors are of 6"),
        ("config.json", {"num_hidden_layers": "6"}, "num_hidden_layers is '6'; the tensors are of 6"),
        ("config.json", {"d_ff": 9}, "d_ff is 9"),
        ("config.json", {"num_class": 3}, "num_class is 3; the tensors are of 2"),
        ("gate_config.json", {"max_seq_length": 99}, "max_seq_length is 99; the tensors are of"),
    ],
)
def test_every_claim_is_compared_with_the_tensors(tmp_path, shared, file, claim, message):
    write(tmp_path, "rte", Golden(shared / "golden/rte_l12_k6.npz"), "final")
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | claim))
    with pytest.raises(ValueError, match=message):
        load_published(tmp_path)


def test_heads_and_dropout_are_the_settings_or_berts(tmp_path, shared):
    """A teacher's configuration tells neither."""
    golden = Golden(shared / "golden/rte_l12_k6.npz")
    write(tmp_path, "rte", golden, "final", with_gates=False)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text()) | {"dropout": 0.3}
    path.write_text(json.dumps(settings))
    config = load_published(tmp_path).model.config
    assert config.num_attention_heads == golden.meta["heads"]
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.3, 0.3)
    del settings["num_attention_heads"], settings["dropout"]
    path.write_text(json.dumps(settings))
    config = load_published(tmp_path).model.config
    assert config.num_attention_heads == max(1, golden.meta["d"] // 64)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.1)


@pytest.mark.parametrize("first", ["there", "another step's", "missing"])
def test_gates_without_their_configuration_are_not_left_out(first, tmp_path, shared):
    write(tmp_path, "rte", Golden(shared / "golden/rte_l12_k6.npz"), "final")
    (tmp_path / "gate_config.json").unlink()
    gate = next(tmp_path.glob("gate-0-*.pt"))
    if first == "another step's":
        gate.rename(tmp_path / "gate-0-99.pt")
    elif first == "missing":
        gate.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no gate_config\.json"):
        load_published(tmp_path)


def test_gates_of_another_step_are_not_left_out(tmp_path, shared):
    write(tmp_path, "rte", Golden(shared / "golden/rte_l12_k6.npz"), "final")
    for path in list(tmp_path.glob("gate-*-*.pt")):
        path.rename(path.with_name(path.name.rsplit("-", 1)[0] + "-99.pt"))
    with pytest.raises(FileNotFoundError, match=r"files gate-\*-\d+\.pt"):
        load_published(tmp_path)
