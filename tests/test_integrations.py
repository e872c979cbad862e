"""LADTrainer against the training step of :mod:`lad_fast.step`, and as users of Trainer meet it."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    TrainerCallback,
)

pytest.importorskip("accelerate")
from lad_fast import AttentionObjective, GateStack, LADObjective, integrations
from lad_fast.integrations import LADTrainer, LADTrainingArguments
from lad_fast.models import build_student
from lad_fast.step import DistillStep


def bert(num_layers: int, seed: int, hidden_size: int = 16, num_labels: int = 2) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=24, hidden_size=hidden_size, num_attention_heads=2, intermediate_size=32, num_labels=num_labels,
        max_position_embeddings=16, num_hidden_layers=num_layers, initializer_range=0.2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


class Examples(Dataset):
    """Rows of up to 12 random tokens, and padding."""

    def __init__(self, num_examples: int, num_labels: int = 2, shortest: int = 3) -> None:
        torch.manual_seed(7)
        self.ids = torch.randint(4, 24, (num_examples, 12))
        self.lengths = torch.randint(shortest, 13, (num_examples,))
        self.labels = torch.randint(num_labels, (num_examples,)) if num_labels > 1 else torch.rand(num_examples)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict:
        mask = (torch.arange(12) < self.lengths[i]).long()
        return {"input_ids": self.ids[i] * mask, "attention_mask": mask, "labels": self.labels[i]}

    def batch(self, places: range) -> dict:
        rows = [self[i] for i in places]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def arguments(folder, **changes) -> LADTrainingArguments:
    options = {
        "output_dir": folder, "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2,
        "gate_learning_rate": 3e-2, "weight_decay": 0.1, "warmup_steps": 1, "logging_steps": 1, "use_cpu": True,
        "save_strategy": "no", "report_to": "none", "train_sampling_strategy": "sequential", "disable_tqdm": True,
    }  # fmt: skip
    return LADTrainingArguments(**options | changes)


def attention(student_hidden_size: int = 16) -> AttentionObjective:
    """An objective without gates."""
    torch.manual_seed(2)
    return AttentionObjective(4, 16, 2, hidden_weight=100.0, student_hidden_size=student_hidden_size, backend="torch")


def objective(student_hidden_size: int = 16) -> LADObjective:
    torch.manual_seed(2)
    gates = GateStack(4, 16, 12)
    return LADObjective(gates, 2, hidden_weight=100.0, student_hidden_size=student_hidden_size, backend="torch")


def trainer(folder, student_hidden_size=16, data=None, make=objective, **changes) -> LADTrainer:
    student = bert(2, 1, student_hidden_size)
    return LADTrainer(
        student, arguments(folder, **changes), teacher=bert(4, 0), objective=make(student_hidden_size),
        train_dataset=data or Examples(16), eval_dataset=Examples(8),
    )  # fmt: skip


def lines(run: LADTrainer) -> list[dict]:
    return [line for line in run.state.log_history if "loss" in line]


def all_parameters(*modules) -> list[torch.Tensor]:
    """All but the keys' bias, which attention does not depend on: rounding alone moves it, as far as AdamW steps."""
    named = (pair for module in modules for pair in module.named_parameters())
    return [parameter.detach().clone() for name, parameter in named if "key.bias" not in name]


@pytest.mark.parametrize(
    ("student_hidden_size", "accumulated", "make"), [(16, 1, objective), (16, 2, objective), (8, 1, objective),
                                                     (8, 2, objective), (16, 1, attention), (8, 1, attention)]
)  # fmt: skip
def test_trains_as_our_step_does(tmp_path, student_hidden_size, accumulated, make):
    """From one start over the same batches: the same losses, and the same student, gates and projections at the end."""
    data = Examples(4 * 4 * accumulated)
    run = trainer(tmp_path, student_hidden_size, data, make, gradient_accumulation_steps=accumulated)
    step = DistillStep(
        bert(2, 1, student_hidden_size), bert(4, 0), make(student_hidden_size), learning_rate=1e-2,
        gate_learning_rate=3e-2, weight_decay=0.1, total_steps=4, warmup_steps=1,
    )  # fmt: skip
    run.train()
    ours = []
    for i in range(4):
        starts = [4 * (accumulated * i + part) for part in range(accumulated)]
        ours.append(step(*(data.batch(range(start, start + 4)) for start in starts)))
    for line, losses in zip(lines(run), ours, strict=True):
        for name in ("loss", "hidden_loss", "logits_loss"):
            assert line[name] == pytest.approx(losses[name].item(), rel=2e-5), name
    for a, b in zip(
        all_parameters(run.model, run.objective), all_parameters(step.student, step.objective), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for ours, start in zip(run.objective.parameters(), make(student_hidden_size).parameters(), strict=True):
        assert not torch.equal(ours, start)


@pytest.mark.parametrize("make", (objective, attention))
def test_resumes_to_the_bit(tmp_path, make):
    whole = trainer(tmp_path / "whole", 8, make=make)
    whole.train()
    first = trainer(tmp_path / "parts", 8, make=make, save_strategy="steps", save_steps=2)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            control.should_training_stop = state.global_step == 2

    first.add_callback(Stop())
    first.train()
    second = trainer(tmp_path / "parts", 8, make=make)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    for a, b in zip(
        all_parameters(whole.model, whole.objective), all_parameters(second.model, second.objective), strict=True
    ):
        assert torch.equal(a, b)


def test_resumes_to_the_bit_where_it_was_broken_off(tmp_path):
    """In the same process, with half a step's gradients in the gates when it broke off."""

    class Break(TrainerCallback):
        def on_substep_end(self, args, state, control, **rest):
            if state.global_step == 2:
                raise RuntimeError("broken off")

    options = {"gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 2}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    run = trainer(tmp_path / "parts", save_strategy="steps", save_steps=2, **options)
    run.add_callback(Break())
    with pytest.raises(RuntimeError, match="broken off"):
        run.train()
    run.remove_callback(Break)
    run.train(resume_from_checkpoint=True)
    right, found = all_parameters(whole.model, whole.objective), all_parameters(run.model, run.objective)
    assert all(torch.equal(a, b) for a, b in zip(right, found, strict=True))
    assert lines(run) == lines(whole)


class Pairs(Examples):
    """With the second half of each row of another token type."""

    def __getitem__(self, i: int) -> dict:
        return super().__getitem__(i) | {"token_type_ids": (torch.arange(12) > 5).long()}


class OfNoTokenTypes(DistilBertForSequenceClassification):
    """Transformers' own would pass any argument on."""

    def forward(self, input_ids, attention_mask, labels=None, output_hidden_states=None):
        return super().forward(input_ids, attention_mask, labels=labels, output_hidden_states=output_hidden_states)


@pytest.mark.parametrize("remove_unused_columns", (True, False))
def test_a_teacher_gets_what_the_student_does_not_take(tmp_path, remove_unused_columns):
    torch.manual_seed(1)
    config = DistilBertConfig(
        vocab_size=24, dim=16, n_heads=2, hidden_dim=32, n_layers=2, max_position_embeddings=16, dropout=0.0,
        attention_dropout=0.0, seq_classif_dropout=0.0, initializer_range=0.2,
    )  # fmt: skip
    student, teacher, data = OfNoTokenTypes(config), bert(4, 0), Pairs(16)
    batch = data.batch(range(4))
    labels, types = batch.pop("labels"), batch.pop("token_type_ids")
    with torch.no_grad():
        ours = student(**batch, output_hidden_states=True)
        teacher.eval()
        theirs = [teacher(**b, output_hidden_states=True) for b in (batch | {"token_type_ids": types}, batch)]
    right, wrong = (
        objective()(ours, out, labels=labels, attention_mask=batch["attention_mask"]).loss.item() for out in theirs
    )
    own = torch.nn.functional.cross_entropy(ours.logits, labels).item()
    run = LADTrainer(
        student, arguments(tmp_path, max_steps=1, remove_unused_columns=remove_unused_columns), teacher=teacher,
        objective=objective(), train_dataset=data, eval_dataset=data,
    )  # fmt: skip
    assert run.evaluate(torch.utils.data.Subset(data, range(4)))["eval_loss"] == pytest.approx(own, rel=1e-5)
    assert run.predict(data).predictions.shape == (16, 2)
    run.train()
    assert lines(run)[0]["loss"] == pytest.approx(right, rel=1e-5) != pytest.approx(wrong, rel=1e-3)


def test_models_whose_outputs_are_tuples(tmp_path):
    expected, run = trainer(tmp_path / "named", max_steps=1), trainer(tmp_path / "tuples", max_steps=1)
    run.model.config.return_dict = run.teacher.config.return_dict = False
    for each in (expected, run):
        each.train()
    assert lines(run)[0]["loss"] == lines(expected)[0]["loss"]
    assert run.evaluate()["eval_loss"] == expected.evaluate()["eval_loss"]


def test_a_compiled_teacher(tmp_path):
    plain = trainer(tmp_path / "plain", max_steps=1)
    teacher = torch.compile(bert(4, 0), backend="eager")
    run = LADTrainer(
        bert(2, 1), arguments(tmp_path, max_steps=1), teacher=teacher, objective=objective(),
        train_dataset=Examples(16),
    )  # fmt: skip
    plain.train()
    run.train()
    assert lines(run)[0]["loss"] == pytest.approx(lines(plain)[0]["loss"], rel=1e-5)


def test_a_compiled_student(tmp_path):
    """Trainer takes no column off where it cannot tell which the model takes; nor do we."""
    plain = trainer(tmp_path / "plain", max_steps=1)
    run = LADTrainer(
        torch.compile(bert(2, 1), backend="eager"), arguments(tmp_path, max_steps=1, remove_unused_columns=False),
        teacher=bert(4, 0), objective=objective(), train_dataset=Examples(16),
    )  # fmt: skip
    plain.train()
    run.train()
    assert lines(run)[0]["loss"] == pytest.approx(lines(plain)[0]["loss"], rel=1e-5)


def test_a_wrapper_that_names_no_inputs_gets_them_all():
    class Wrapper(torch.nn.Module):
        def forward(self, *args, **options):
            return options

    assert integrations._inputs(Wrapper()) == {"args", "options"}
    assert "input_ids" in integrations._inputs(torch.compile(bert(2, 1), backend="eager"))


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    """A model with fresh adapters by PEFT, which change no output; forward of such a model names no token types."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type=peft.TaskType.SEQ_CLS, r=4, target_modules=["query", "value"])
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("who", ("student", "teacher"))
def test_models_with_adapters_get_token_types(tmp_path, who):
    def run(wrap) -> LADTrainer:
        student, teacher, data = bert(2, 1), bert(4, 0), Pairs(16)
        student, teacher = (wrap(student), teacher) if who == "student" else (student, wrap(teacher))
        return LADTrainer(student, arguments(tmp_path, max_steps=1), teacher=teacher, objective=objective(),
                          train_dataset=data, eval_dataset=data)  # fmt: skip

    plain, run = run(lambda model: model), run(adapted)
    assert run.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    plain.train()
    run.train()
    assert lines(run)[0]["loss"] == pytest.approx(lines(plain)[0]["loss"], rel=1e-5)


def test_a_student_is_built_of_a_teacher_whose_adapters_are_merged():
    teacher = adapted(bert(4, 0))
    with pytest.raises(ValueError, match="teacher is under PEFT's adapters"):
        build_student(teacher, 2)
    assert build_student(teacher.merge_and_unload(), 2).config.num_hidden_layers == 2


def test_adapters_of_a_student_resume_to_the_bit(tmp_path):
    def run(**changes) -> LADTrainer:
        torch.manual_seed(5)
        return LADTrainer(
            adapted(bert(2, 1)), arguments(tmp_path, **changes), teacher=bert(4, 0), objective=objective(),
            train_dataset=Pairs(16),
        )  # fmt: skip

    whole, parts = run(save_strategy="steps", save_steps=2), run()
    before = [parameter.clone() for parameter in whole.model.parameters()]
    whole.train()
    assert {"adapter_model.safetensors", "gates.safetensors"} <= {p.name for p in (tmp_path / "checkpoint-2").iterdir()}
    moved = {name for (name, p), was in zip(whole.model.named_parameters(), before, strict=True) if (p != was).any()}
    assert moved == {name for name, p in whole.model.named_parameters() if p.requires_grad}
    parts.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    right, found = (all_parameters(run.model, run.objective) for run in (whole, parts))
    assert all(torch.equal(a, b) for a, b in zip(right, found, strict=True))
    assert lines(parts) == lines(whole)


def test_the_seed_of_the_arguments_draws_the_gates(tmp_path):
    def gates(before: int, seed: int) -> torch.Tensor:
        student, teacher = bert(2, 1), bert(4, 0)
        torch.manual_seed(before)
        return LADTrainer(student, arguments(tmp_path, seed=seed), teacher=teacher, seq_len=12).objective.gates.weight

    assert torch.equal(gates(1, 5), gates(2, 5))
    assert not torch.equal(gates(1, 5), gates(1, 6))


def test_an_optimizer_without_the_gates_is_refused(tmp_path):
    def make(extra) -> LADTrainer:
        student, teacher, own = bert(2, 1), bert(4, 0), objective()
        optimizer = torch.optim.SGD([*student.parameters(), *extra(own)], lr=0.1)
        data = Examples(16)
        args = arguments(tmp_path, max_steps=2)  # the first one warms up
        return LADTrainer(
            student, args, teacher=teacher, objective=own, train_dataset=data, optimizers=(optimizer, None)
        )

    with pytest.raises(ValueError, match=r"without the objective's gates\.weight; add objective.parameters"):
        make(lambda own: ())
    run = make(lambda own: own.parameters())
    run.train()
    assert not torch.equal(run.objective.gates.weight, objective().gates.weight)
    make(lambda own: own.requires_grad_(False).parameters())


def test_a_checkpoint_is_a_plain_model_with_gates_beside_it(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=4)
    run.train()
    folder = tmp_path / "checkpoint-4"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    for a, b in zip(model.state_dict().values(), run.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    gates = GateStack.from_pretrained(folder)
    assert torch.equal(gates.weight, run.objective.gates.weight)
    assert not (folder / "projections.safetensors").exists()


def test_the_best_checkpoints_gates_come_back(tmp_path):
    run = trainer(
        tmp_path, eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", learning_rate=0.3,
    )  # fmt: skip
    run.train()
    best = GateStack.from_pretrained(run.state.best_model_checkpoint)
    assert torch.equal(best.weight, run.objective.gates.weight)
    assert run.state.best_model_checkpoint != str(tmp_path / "checkpoint-4")


def test_gates_of_another_kind_are_not_loaded(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    GateStack(4, 16, 11).save_pretrained(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="'seq_len': 11"):
        trainer(tmp_path, max_steps=5).train(resume_from_checkpoint=True)


def test_evaluation_is_the_students_own(tmp_path):
    run = trainer(tmp_path)
    data = Examples(8)
    batch = data.batch(range(8))
    with torch.no_grad():
        expected = run.model.eval()(**batch).loss.item()
    assert run.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_bfloat16(tmp_path):
    run = trainer(tmp_path, bf16=True)
    before = all_parameters(run.objective)
    run.train()
    exact = trainer(tmp_path)
    exact.train()
    first, right = lines(run)[0], lines(exact)[0]
    assert first["loss"] != right["loss"] and first["loss"] == pytest.approx(right["loss"], rel=0.05)
    assert all(p.dtype == torch.float32 for p in run.objective.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, all_parameters(run.objective), strict=True))


def test_a_gate_is_clipped_on_its_own(tmp_path):
    """A bound that no gradient reaches changes nothing; one below every gradient bounds each gate's first step's
    moment, and the student's not at all."""
    moments = []
    for bound in (1e9, 1e-6):
        run = trainer(tmp_path, max_steps=1, gate_max_grad_norm=bound, max_grad_norm=1e9, adam_beta1=0.0)
        run.train()
        state = run.optimizer.state
        moments.append([state[p]["exp_avg"].clone() for p in (*run.objective.parameters(), *run.model.parameters())])
    num = len(list(objective().parameters()))
    free, clipped = moments
    norms = torch.stack([m.flatten(1).norm(dim=1) for m in clipped[:num]]).norm(dim=0)
    assert (norms < 1.01e-6).all()
    assert all(torch.equal(a, b) for a, b in zip(free[num:], clipped[num:], strict=True))


def test_a_default_objective(tmp_path):
    run = LADTrainer(
        bert(2, 1, num_labels=1), arguments(tmp_path), teacher=bert(4, 0, num_labels=1), seq_len=12,
        train_dataset=Examples(16, num_labels=1),
    )  # fmt: skip
    assert run.objective.regression and run.objective.layers == (1, 3)
    run.train()
    assert lines(run)[-1]["loss"] < lines(run)[0]["loss"]
    assert not any(parameter.requires_grad for parameter in run.teacher.parameters())


def of_kind(problem_type: str):
    model = bert(2, 1)
    model.config.problem_type = problem_type
    return model


def test_arguments_that_do_not_fit(tmp_path):
    for name in ("model", "teacher"):
        with pytest.raises(TypeError, match=f"{name} is a str; it takes a sequence classifier, loaded"):
            LADTrainer(**{"model": bert(2, 1), "args": arguments(tmp_path), "teacher": bert(4, 0)} | {name: "a/model"})
    with pytest.raises(ValueError, match="gate_learning_rate is -1"):
        arguments(tmp_path, gate_learning_rate=-1.0)
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="teacher has 3 labels; the model has 2"):
        LADTrainer(bert(2, 1), args, teacher=bert(4, 0, num_labels=3))
    with pytest.raises(TypeError, match="it takes LADTrainingArguments"):
        LADTrainer(bert(2, 1), None, teacher=bert(4, 0))
    for options, message in (
        ({"model": None}, "model is None or made by model_init; it takes the student itself"),
        ({"model_init": lambda: bert(2, 1)}, "model is None or made by model_init"),
        ({"compute_loss_func": lambda *_, **__: None}, "compute_loss_func is set; the loss is that of objective"),
        ({"args": arguments(tmp_path, label_smoothing_factor=0.1)}, "label_smoothing_factor is 0.1"),
        ({"model": of_kind("multi_label_classification")}, "model is for multi_label_classification of 2 labels"),
        ({"teacher": of_kind("regression")}, "teacher is for regression of 2 labels; objectives take one class or one"),
    ):
        with pytest.raises(ValueError, match=message):
            LADTrainer(**{"model": bert(2, 1), "args": args, "teacher": bert(4, 0)} | options)


def test_a_teacher_that_cannot_teach_the_student(tmp_path):
    student, teacher = bert(2, 1), bert(4, 0)
    student.config.id2label, teacher.config.id2label = {0: "no", 1: "yes"}, {0: "yes", 1: "no"}
    with pytest.raises(ValueError, match=r"teacher has the labels \['yes', 'no'\]; the model has \['no', 'yes'\]"):
        LADTrainer(student, arguments(tmp_path), teacher=teacher)
    teacher.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    student.bert.embeddings = teacher.bert.embeddings
    with pytest.raises(ValueError, match=r"bert.embeddings.word_embeddings.weight is the teacher's bert.embeddings.wo"):
        LADTrainer(student, arguments(tmp_path), teacher=teacher)
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_parameters_that_nothing_would_train_are_refused(tmp_path):
    own = objective()
    own.scale = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="objective's scale would not be trained; LADTrainer trains gates and proj"):
        LADTrainer(bert(2, 1), arguments(tmp_path), teacher=bert(4, 0), objective=own)
    own.scale.requires_grad_(False)
    LADTrainer(bert(2, 1), arguments(tmp_path), teacher=bert(4, 0), objective=own)


def test_rows_without_labels_are_named(tmp_path):
    class Unlabelled(Examples):
        def __getitem__(self, i: int) -> dict:
            return {name: value for name, value in super().__getitem__(i).items() if name != "labels"}

    with pytest.raises(ValueError, match="the batch has no labels, only input_ids, attention_mask; train_dataset"):
        trainer(tmp_path, data=Unlabelled(16)).train()


def test_arguments_go_through_json(tmp_path):
    args = arguments(tmp_path)
    assert json.loads(args.to_json_string())["gate_learning_rate"] == 3e-2
    assert copy.deepcopy(args).gate_max_grad_norm == 1.0


def together(folder: str, **changes) -> LADTrainer:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    run = trainer(folder, 8, Examples(16, shortest=12), **options | changes)
    run.train()
    return run


def others_elsewhere(student_hidden_size: int) -> LADObjective:
    """Each process but the first with gates and projections of its own, which must not be what it trains."""
    made, rank = objective(student_hidden_size), int(os.environ["RANK"])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(rank)
    return made


def test_two_processes_train_as_one(tmp_path):
    """Trainer's model and the objective beside it: half of each batch in each process, and no padding."""
    alone = together(tmp_path / "one", per_device_train_batch_size=8)
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node=2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "two")], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "two/checkpoint-2"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        {path.name for path in (tmp_path / "one/checkpoint-2").iterdir()} - {"rng_state.pth"}
        | {"rng_state_0.pth", "rng_state_1.pth"}
    )
    gates, student = GateStack.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    for a, b in zip(
        all_parameters(alone.model, alone.objective.gates), all_parameters(student, gates), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_bound_clips_no_gate(tmp_path):
    moments = []
    for bound in (0.0, 1e9):
        run = trainer(tmp_path, max_steps=1, gate_max_grad_norm=bound, max_grad_norm=1e9)
        run.train()
        moments.append([run.optimizer.state[p]["exp_avg"].clone() for p in run.objective.parameters()])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*moments, strict=True))


if __name__ == "__main__":
    together(sys.argv[1], make=others_elsewhere, ddp_backend="gloo")
    torch.distributed.barrier()
    os._exit(0)  # Trainer leaves its group, whose threads may abort an interpreter that ends
