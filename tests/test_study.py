"""The study of strategies: its table, its order, what tuning sees, and that no finished run is run again."""

import json
import shutil
from contextlib import ExitStack

import numpy as np
import pytest
import study
import torch
from bench_record import README, between
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from lad_fast.data import TokenizedSplit
from lad_fast.glue import get_task
from lad_fast.models import load_classifier, save_checkpoint
from lad_fast.strategies import STRATEGIES

RTE = get_task("rte")


def split(name, num_examples, first_id):
    random = np.random.default_rng(first_id)
    lengths = random.integers(4, 13, num_examples)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = random.integers(4, 24, offsets[-1]).astype(np.int32)
    labels = random.integers(0, 2, num_examples)
    return TokenizedSplit(RTE, name, ids, None, offsets, labels, first_id + np.arange(num_examples))


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=24, hidden_size=16, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16,
        num_hidden_layers=4, initializer_range=0.2,
    )  # fmt: skip
    return BertForSequenceClassification(config)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A study of one task, two seeds and a tiny model; returns a function that makes it, as a new process would."""
    monkeypatch.setattr(study, "PLANS", {"rte": study.Plan(epochs=1, teacher_epochs=1, seeds=(1, 2))})
    # Left to itself the objective would run in Triton's slow interpreter.
    students = {name: options | {"backend": "torch"} for name, options in study.STUDENTS.items()}
    monkeypatch.setattr(study, "STUDENTS", students)
    monkeypatch.setattr(study, "STUDENT_LAYERS", 2)
    monkeypatch.setattr(study, "BATCH_SIZE", 8)
    monkeypatch.setattr(study, "MAX_LENGTH", 16)
    vocab = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, 24)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    save_checkpoint(tmp_path / "pretrained", bert(), tokenizer)

    def load(_):
        pretrained = lambda: load_classifier(tmp_path / "pretrained", RTE)[0]  # noqa: E731
        return study.Data(RTE, split("train", 40, 0), split("validation", 33, 1000), tokenizer, pretrained)

    return lambda: study.Study(tmp_path / "work", tmp_path / "study.json", 1, load)


@pytest.fixture
def seen(monkeypatch):
    """What each call of finetune, distill and evaluate was given: (function, ids of examples, output folder)."""
    calls = []

    def record(name):
        function = getattr(study, name)

        def recorded(*args, **options):
            if name == "evaluate":
                calls.append((name, set(args[1].split.ids.tolist()), None))
            else:
                assert options["evaluation"] == {}
                calls.append((name, set(options["train"].ids.tolist()), args[0].output_dir.name))
            return function(*args, **options)

        monkeypatch.setattr(study, name, recorded)

    for name in ("finetune", "distill", "evaluate"):
        record(name)
    return calls


def test_a_study_from_end_to_end(small, seen, tmp_path, monkeypatch):
    """Killed in its eleventh run, taken up, and run once more when finished."""
    whole = list(study.jobs(["rte"], [1, 2, 3]))
    assert len(whole) == 1 + 6 * 4 + 1 + 7 * 2

    distill = study.distill
    monkeypatch.setattr(study, "distill", lambda *a, **o: 1 / 0 if len(seen) == 20 else distill(*a, **o))
    with pytest.raises(ZeroDivisionError):
        small().run(["rte"], [1, 2])
    monkeypatch.setattr(study, "distill", distill)
    finished = {path.stem for path in (tmp_path / "work/rows").iterdir()}
    assert finished == {job.key for job in whole[:10]}
    small().run(["rte"], [1, 2])
    small().run(["rte"], [1, 2])
    trainings = [call for call in seen if call[0] != "evaluate"]
    assert len(trainings) == len(whole)
    names = [f"rte-{job.phase}" if job.model == study.TEACHER else job.key for job in whole]
    assert [folder for *_, folder in trainings] == names

    # Tuning trains on four fifths of the training split and scores on the rest; the validation split is scored once
    # a final run, after it.
    validation, part = set(range(1000, 1033)), None
    for job, training, scoring in zip(whole, trainings, [c for c in seen if c[0] == "evaluate"], strict=True):
        if job.phase == "tune":
            part = part or training[1]
            assert training[1] == part and len(part) == 32
            assert scoring[1] == set(range(40)) - part
        else:
            assert training[1] == set(range(40))
            assert scoring[1] == validation

    content = json.loads((tmp_path / "study.json").read_text())
    assert [row["key"] for row in content["runs"]] == [job.key for job in whole]
    assert not list((tmp_path / "work/running").iterdir())
    for row in content["runs"]:
        if row["phase"] == "final" and row["model"] != study.TEACHER:
            model = study.SETTING_OF.get(row["model"], row["model"])
            tuned = [r for r in content["runs"] if (r["phase"], r["model"]) == ("tune", model)]
            best = max(tuned, key=lambda r: r["score"])
            assert row["settings"]["learning_rate"] == best["settings"]["learning_rate"]
            assert row["settings"]["seed"] == row["number"]
        assert ("predictions" in row) == (row["phase"] == "final")
        if row["phase"] == "final":
            right = study.from_text(row["predictions"]) == study.from_text(content["labels"]["rte"])
            assert len(right) == 33 and right.mean() == pytest.approx(row["score"])
    text = study.table(content)
    assert "Complete" in text and "missing" not in text
    assert study.examples_error(content, "rte", "lad", "lad-published") is not None
    assert study.figure(content, tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(study, "TEACHER_LEARNING_RATE", 0.5)
    with pytest.raises(ValueError, match=r"rte-tune-teacher-0 was run with \{.*'learning_rate': 0.0001"):
        small().run(["rte"], [1, 2])


def test_a_result_file_alone_is_enough(small, seen, tmp_path, monkeypatch):
    """Of a work folder that is gone no run is made again, and no row lost."""
    first = list(study.jobs(["rte"], []))[:2]
    monkeypatch.setattr(study, "jobs", lambda tasks, seeds: iter(first))
    small().run(["rte"], [])
    (tmp_path / "work").rename(tmp_path / "elsewhere")
    again = small()
    again.run(["rte"], [])
    assert len(seen) == 4
    assert list(again.rows) == [job.key for job in first]


def test_a_result_file_from_elsewhere_is_gone_on_with(small, seen, tmp_path, monkeypatch):
    """Its teachers are not in it: the one that students still wait for is trained again, and no student is."""
    distill = study.distill
    monkeypatch.setattr(study, "distill", lambda *a, **o: 1 / 0 if len(seen) == 20 else distill(*a, **o))
    with pytest.raises(ZeroDivisionError):
        small().run(["rte"], [1])
    monkeypatch.setattr(study, "distill", distill)
    shutil.rmtree(tmp_path / "work")
    small().run(["rte"], [1])
    trained = [folder for name, _, folder in seen if name != "evaluate"]
    whole = list(study.jobs(["rte"], [1]))
    assert len(trained) == len(whole) + 1 and trained.count("rte-tune") == 2
    assert len({*trained} - {"rte-tune", "rte-final"}) == len(whole) - 2


def test_what_another_process_has_is_left_to_it_and_what_needs_it_waits(small, seen, monkeypatch):
    taken = study.Job("rte", "tune", "lad", 1)
    with ExitStack() as other:
        assert other.enter_context(small()._claim(taken.key))
        monkeypatch.setattr(study.time, "sleep", lambda _: other.close())  # it is killed, and leaves no row
        small().run(["rte"], [1])
    order = [folder for name, _, folder in seen if name != "evaluate"]
    late = [taken.key, "rte-final-lad-1"]
    assert order[-2:] == late
    names = [f"rte-{job.phase}" if job.model == study.TEACHER else job.key for job in study.jobs(["rte"], [1])]
    assert order[:-2] == [name for name in names if name not in late]


def test_what_another_process_did_meanwhile_is_not_done_again(small, seen, tmp_path, monkeypatch):
    """The second does all but what the first is at, and what needs that."""
    distill, first = study.distill, "rte-tune-none-0"

    class Waits(Exception):
        pass

    def wait(_):
        raise Waits

    def meanwhile(config, **options):
        monkeypatch.setattr(study, "distill", distill)
        with pytest.raises(Waits):
            small().run(["rte"], [1])
        return distill(config, **options)

    monkeypatch.setattr(study.time, "sleep", wait)
    monkeypatch.setattr(study, "distill", meanwhile)
    small().run(["rte"], [1])
    trained = [folder for name, _, folder in seen if name != "evaluate"]
    whole = {job.key for job in study.jobs(["rte"], [1])}
    assert len(trained) == len(set(trained)) == len(whole)
    assert trained[-2:] == [first, "rte-final-none-1"]
    assert {row["key"] for row in json.loads((tmp_path / "study.json").read_text())["runs"]} == whole


def test_what_another_process_did_just_before_is_not_done_again(small, seen, monkeypatch):
    """After this one had looked what is left, and before it takes the first of it."""
    is_ready = study.Study._is_ready

    def late(self, job):
        monkeypatch.setattr(study.Study, "_is_ready", is_ready)
        small().run(["rte"], [])
        return is_ready(self, job)

    monkeypatch.setattr(study.Study, "_is_ready", late)
    small().run(["rte"], [])
    trained = [folder for name, _, folder in seen if name != "evaluate"]
    assert len(trained) == len(set(trained)) == len(list(study.jobs(["rte"], [])))


def test_a_run_that_diverges_is_a_row_without_a_score(small, tmp_path, monkeypatch):
    def diverge(*_, **__):
        raise FloatingPointError("step 1: not finite: loss")

    first = list(study.jobs(["rte"], []))[:2]
    monkeypatch.setattr(study, "jobs", lambda tasks, seeds: iter(first))
    monkeypatch.setattr(study, "distill", diverge)
    small().run(["rte"], [])
    row = json.loads((tmp_path / "work/rows" / f"{first[1].key}.json").read_text())
    assert (row["score"], row["failed"]) == (None, "step 1: not finite: loss")
    with pytest.raises(ValueError, match="none has no scored trial on rte"):
        study.chosen([row], "rte", "none")


def test_a_teacher_that_diverges_ends_the_study(small, tmp_path, monkeypatch):
    def diverge(*_, **__):
        raise FloatingPointError("step 1: not finite: loss")

    monkeypatch.setattr(study, "finetune", diverge)
    with pytest.raises(FloatingPointError, match="step 1"):
        small().run(["rte"], [1])
    assert not list((tmp_path / "work/rows").iterdir())


def test_every_way_tries_as_many_settings():
    assert {len(study.grid(student)) for student in study.STUDENTS} == {4}
    for student, options in study.STUDENTS.items():
        assert len({json.dumps(setting) for setting in study.grid(student)}) == 4
        uses = STRATEGIES[options["method"]].uses_hidden_states
        assert all(("hidden_weight" in setting) == uses for setting in study.grid(student))


def test_seeds_are_outside_so_that_like_is_compared_with_like():
    final = [job for job in study.jobs(["sst2", "rte"], (1, 2, 4)) if job.phase == "final"]
    assert [job.task for job in final] == ["sst2"] * 15 + ["rte"] * 22  # sst2's plan has no fourth seed
    assert [job.number for job in final[:15]] == [0] + [1] * 7 + [2] * 7


def test_a_matched_way_is_not_tuned_and_differs_in_the_setting_alone():
    assert all(job.model not in study.SETTING_OF for job in study.jobs(["rte"], (1,)) if job.phase == "tune")
    assert study.STUDENTS["lad-matched"] == study.STUDENTS["lad"]


def test_tuning_splits_the_training_split_in_two():
    data = study.Data(RTE, split("train", 41, 0), None, None, None)
    part, held_out = data.parts()
    assert (len(part), len(held_out)) == (33, 8)
    assert sorted([*part.ids, *held_out.ids]) == list(range(41))
    i = 5
    place = int(part.ids[i])
    mine, whole = (s.input_ids[s.offsets[n] : s.offsets[n + 1]] for s, n in ((part, i), (data.train, place)))
    assert mine.tolist() == whole.tolist()
    assert part.labels[i] == data.train.labels[place]


def test_a_row_tells_the_commit_whose_code_was_loaded(small, seen, tmp_path, monkeypatch):
    first = list(study.jobs(["rte"], []))[:1]
    monkeypatch.setattr(study, "jobs", lambda tasks, seeds: iter(first))
    monkeypatch.setattr(study, "commit", lambda: "loaded")
    made = small()
    monkeypatch.setattr(study, "commit", lambda: "checked out meanwhile")
    made.run(["rte"], [])
    (row,) = json.loads((tmp_path / "study.json").read_text())["runs"]
    assert row["commit"] == "loaded"


def test_the_setting_with_the_best_score_is_chosen_and_the_first_of_equals():
    rows = [
        {"task": "rte", "phase": "tune", "model": "lad", "number": n, "score": score,
         "settings": {"learning_rate": n * 1.0, "hidden_weight": 2.0, "epochs": 3}}
        for n, score in ((3, 0.7), (1, 0.7), (2, 0.6), (0, None))
    ]  # fmt: skip
    rows.append(rows[0] | {"phase": "final", "score": 0.9})
    rows.append(rows[0] | {"model": "skip", "score": 0.9})
    assert study.chosen(rows, "rte", "lad") == {"learning_rate": 1.0, "hidden_weight": 2.0}


def test_the_estimate_goes_by_size_and_model():
    size = lambda job: {"lad": 10.0, "none": 1.0}[job.model] * (2 if job.phase == "final" else 1)  # noqa: E731
    rows = [{"task": "rte", "phase": "tune", "model": "lad", "number": 0, "seconds": 30.0}]
    left = [study.Job("rte", "final", "lad", 1), study.Job("rte", "tune", "none", 0)]
    assert study.seconds_left(left, rows, size) == 3.0 * 20 + 3.0 * 1  # none has not run: as lad's
    rows.append({"task": "rte", "phase": "tune", "model": "none", "number": 1, "seconds": 5.0})
    assert study.seconds_left(left, rows, size) == 3.0 * 20 + 5.0 * 1


def made_up(scores):
    """A result file whose final runs have these scores, by model, on rte."""

    def row(model, seed, score):
        return {
            "key": f"{model}{seed}", "task": "rte", "phase": "final", "model": model, "number": seed, "score": score,
            "settings": {"learning_rate": 1e-4}, "seconds": 60.0 + seed, "machine": "M", "threads": 2,
            "versions": {"torch": "2"}, "commit": "abc",
        }  # fmt: skip

    tasks = {"rte": ("accuracy", [1, 2, 3]), "cola": ("matthews", [1, 2])}
    plan = {
        "tasks": {task: {"metric": metric, "seeds": seeds, "epochs": 3} for task, (metric, seeds) in tasks.items()},
        "students": list(study.STUDENTS),
    }
    runs = [row(model, i + 1, score) for model, values in scores.items() for i, score in enumerate(values)]
    return {"plan": plan, "latency": None, "runs": runs}


SCORES = {"teacher": [0.7], "lad": [0.6, 0.62, 0.64], "lad-published": [0.61, 0.65, 0.63], "skip": [0.5, None]}
SCORES["lad-matched"] = [0.62, 0.63, 0.64]


def test_cells_are_mean_and_standard_error():
    content = made_up(SCORES)
    assert study.score_cell(content, "rte", "teacher") == "70.0"
    # stdev of 60, 62, 64 is 2; over the root of three
    assert study.score_cell(content, "rte", "lad") == "62.0 ± 1.2"
    assert study.score_cell(content, "rte", "skip") == "50.0 (1 of 3 seeds)"
    assert study.score_cell(content, "rte", "none") == study.score_cell(content, "cola", "lad") == "missing"


def test_the_comparison_is_in_standard_errors_of_the_difference():
    content = made_up(SCORES)
    # Both errors are 2 / sqrt(3), so that of the difference is sqrt(8 / 3) = 1.63; 1.0 is 0.6 of it.
    text = study.comparison(content)
    assert "RTE -1.0 (0.6 standard errors)" in text
    assert text.endswith("in 1 of 1 tasks.")
    behind = study.comparison(made_up(SCORES | {"lad": [0.5, 0.52, 0.54]}))
    assert "RTE -11.0 (6.7 standard errors)" in behind and behind.endswith("in 0 of 1 tasks.")
    assert "no task has two seeds" in study.comparison(made_up({"lad": [0.6], "lad-published": [0.6]}))


def test_pairs_are_alike_in_setting_and_seed():
    content = made_up({"lad": [0.9, 0.9], "lad-matched": [0.60, 0.62, 0.7], "lad-published": [0.61, 0.64]})
    tuned = {"lad": [0.5, 0.55, None], "lad-published": [0.49, 0.57, 0.6], "skip": [0.1]}
    content["runs"] += [
        content["runs"][0] | {"phase": "tune", "model": model, "number": number, "score": score}
        for model, scores in tuned.items()
        for number, score in enumerate(scores)
    ]
    # -1 and -2 by seeds, +1 and -2 by settings: mean -1, deviation sqrt(2). No pair: a third seed, a run that diverged.
    assert "RTE -1.0 ± 0.7 (4 pairs), all -1.0 ± 0.7 (4 pairs)." in study.paired(content)
    assert "CoLA" not in study.paired(content)
    content["runs"] += made_up({"teacher": [0.7]})["runs"]
    assert study.paired(content) in study.table(content)
    assert study.paired(made_up({"lad-matched": [0.6], "lad-published": [0.6]})).startswith("No two pairs")


def test_the_error_over_examples_is_that_of_a_paired_difference():
    """Of accuracies: the deviation of (right - right) over the root of N. Over seeds and examples: both squared."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 400)
    flips = {"lad": [0.3, 0.32], "lad-published": [0.25, 0.27]}
    predictions = {way: [labels ^ (random.random(400) < share) for share in shares] for way, shares in flips.items()}
    content = made_up({way: [(p == labels).mean() for p in runs] for way, runs in predictions.items()})
    content["plan"]["tasks"]["rte"]["metric"] = "accuracy"
    for row in content["runs"]:
        row["predictions"] = study.as_text(predictions[row["model"]][row["number"] - 1])
    assert study.examples_error(content, "rte", "lad", "lad-published") is None  # without labels
    content["labels"] = {"rte": study.as_text(labels)}
    right = {way: np.mean([p == labels for p in runs], axis=0) for way, runs in predictions.items()}
    difference = 100 * (right["lad"] - right["lad-published"])
    found = study.examples_error(content, "rte", "lad", "lad-published")
    assert found == pytest.approx(difference.std() / 400**0.5, rel=0.15)  # 200 draws know it to a twentieth
    (_, a), (_, b) = (study.mean_and_error(study.final_scores(content, "rte", way)) for way in flips)
    both = (a**2 + b**2 + found**2) ** 0.5
    assert f"{abs(difference.mean()) / both:.1f} with the examples')" in study.comparison(content)
    del content["runs"][0]["predictions"]
    assert study.examples_error(content, "rte", "lad", "lad-published") is None


def test_scores_and_classes_go_through_a_line():
    for values in (np.array([1, 0, 2]), np.array([0.1234567, 5.0, -0.00001234])):
        found = study.from_text(study.as_text(values))
        assert found.dtype.kind == values.dtype.kind
        np.testing.assert_allclose(found, values, rtol=1e-4)


def test_the_table_says_what_is_missing():
    text = study.table(made_up(SCORES))
    told = next(line for line in text.splitlines() if line.startswith("**Not complete**"))
    assert "RTE 2 of 3 seeds of layer map `skip` (PKD)" in told
    assert "RTE 3 of 3 seeds of not distilled" in told
    assert "CoLA as a whole" in told
    assert "LAD, fast path" not in told
    whole = {student: [0.6, 0.61, 0.62] for student in study.STUDENTS} | {"teacher": [0.7]}
    content = made_up(whole)
    del content["plan"]["tasks"]["cola"]
    assert study.missing(content) == []
    assert "Complete: every task, way and seed." in study.table(content)
    assert study.table(study.read(study.ROOT / "absent.json")) == "Not run yet: there is no result file."


def test_a_study_that_only_tunes_has_no_table_yet():
    row = {"task": "rte", "phase": "tune", "model": "lad", "number": 0, "score": 0.5}
    content = {"plan": {"tasks": {"rte": {"seeds": [1]}}, "students": ["lad"]}, "latency": None, "runs": [row, row]}
    assert study.table(content) == "Begun: 2 runs of tuning on RTE; no score on a validation split yet."


def test_latency_is_kept_beside_the_runs(small, tmp_path):
    made = small()
    result = tmp_path / "study.json"
    result.write_text(json.dumps(made_up(SCORES)))
    study.measure_latency(result, 1, made.load)
    content = json.loads(result.read_text())
    assert content["runs"] == made_up(SCORES)["runs"]
    teacher, student = content["latency"]["rows"]
    assert teacher["num_parameters"] > student["num_parameters"]
    assert all(row["ms"][size] > 0 for row in (teacher, student) for size in ("1", "32"))
    assert f"| student, 2 layers | {student['num_parameters'] / 1e6:.1f} M |" in study.table(content)
    for share, told in ((0.01, False), (0.42, True)):
        content["latency"]["other_jobs"] = share
        assert ("Others took 42 % of the processors" in study.table(content)) == told


def test_times_among_other_jobs_are_marked():
    content = made_up(SCORES)
    assert "1e-04; 62 s" in study.table(content)  # the median of lad's three runs
    for row in content["runs"]:
        row["other_jobs"] = 0.3 * (row["number"] == 1)
    assert "1e-04; ~62 s" in study.table(content)


def test_plans_fit_the_tasks():
    assert list(study.PLANS) == ["rte", "mrpc", "stsb", "cola", "sst2"] == list(study.TITLES)
    assert study.LABELS.keys() == {study.TEACHER, *study.STUDENTS}


def test_readme_has_the_study():
    text = README.read_text(encoding="utf-8")
    assert between(text, study.MARKERS) == study.table(study.read(study.RESULT)).strip()
