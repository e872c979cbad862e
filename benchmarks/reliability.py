"""Count the cases behind each promise and write the table in docs/reliability.md.

    python benchmarks/reliability.py   # collects the tests; fuzz runs are those of benchmarks/results/fuzz.json

A test counts once for each of its parameters and, drawn by Hypothesis, once for each example; what needs a GPU does
not count.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import bench_record
import pytest

PAGE = bench_record.ROOT / "docs/reliability.md"
MARKERS = ("<!-- promises: begin -->", "<!-- promises: end -->")
FUZZ = bench_record.RESULTS / "fuzz.json"


class Promise(NamedTuple):
    """A row: what is promised, the tests that hold it, and how many cases each of their items tries where not one."""

    text: str
    tests: tuple[str, ...]
    times: str = ""
    """A name in the test's module, of a number."""


RESUME, DATA, UNTRUSTED = "tests/test_resume.py", "tests/test_bad_data.py", "tests/test_untrusted.py"
PROMISES = (
    Promise(
        "A run that was killed at a random moment (SIGKILL) goes on to the same bits",
        (f"{RESUME}::test_thirty_kills_change_nothing",),
        "KILLS",
    ),
    Promise("So does a fine-tuning run", (f"{RESUME}::test_kills_change_no_fine_tuning",), "FINE_TUNING_KILLS"),
    Promise("So does one killed in any part of a save", (f"{RESUME}::test_killed_inside_a_save",)),
    Promise(
        "Checkpoints by steps and by minutes, of which the last few are kept; the best model is the one told of",
        (
            f"{RESUME}::test_minutes_are_counted_from_the_last_checkpoint",
            f"{RESUME}::test_the_last_checkpoints_are_kept",
            f"{RESUME}::test_the_best_so_far_is_remembered",
            f"{RESUME}::test_the_best_so_far_comes_along",
            f"{RESUME}::test_the_best_is_the_model_that_is_there",
            f"{RESUME}::test_a_best_model_that_is_gone_is_out_of_the_running",
        ),
    ),
    Promise(
        "SIGTERM and SIGINT end a run after a whole step with a checkpoint, a message and a code of their own",
        (
            f"{RESUME}::test_a_signal_finishes_the_step_and_saves",
            f"{RESUME}::test_the_command_line_says_how_it_stopped",
            f"{RESUME}::test_a_second_signal_does_what_it_did_before",
        ),
    ),
    Promise(
        "A run that was stopped goes on to the same bits, whatever its engine",
        (f"{RESUME}::test_a_stopped_run_goes_on_to_the_bit",),
    ),
    Promise(
        "Two processes train the same models to the bit, by two threads each, whatever their hash seeds (the demo)",
        ("tests/test_demo.py::test_every_process_makes_the_same_files",),
    ),
    Promise(
        "A damaged checkpoint is passed over for the one before it, or named",
        (
            f"{RESUME}::test_a_damaged_checkpoint_is_passed_over",
            f"{RESUME}::test_a_manifest_too_deep_to_read_is_passed_over",
            f"{RESUME}::test_nothing_whole_is_no_new_start",
        ),
    ),
    Promise(
        "A full disk leaves the older checkpoints and models, and is named",
        (
            f"{RESUME}::test_a_full_disk_leaves_the_older_checkpoints",
            f"{RESUME}::test_a_file_size_limit_leaves_the_older_checkpoints",
            f"{RESUME}::test_a_full_disk_leaves_the_saved_models",
            f"{RESUME}::test_a_full_disk_names_the_file",
            f"{RESUME}::test_a_full_disk_under_tensorboard_names_the_folder",
        ),
    ),
    Promise(
        "A folder that is read-only, a file, in use by another run or full of links is refused",
        (
            f"{RESUME}::test_a_read_only_folder_is_refused",
            f"{RESUME}::test_a_file_in_the_folders_place_is_refused",
            f"{RESUME}::test_a_folder_in_use_is_refused",
            f"{RESUME}::test_a_run_writes_through_no_link",
        ),
    ),
    Promise(
        "Numbers that are not finite end a run with the step, the parts and the examples",
        (
            f"{RESUME}::test_numbers_that_are_not_finite_end_the_run",
            f"{RESUME}::test_a_gradient_that_is_not_finite_is_named",
            f"{RESUME}::test_logits_that_are_not_finite_are_named",
            f"{RESUME}::test_no_checkpoint_is_made_of_numbers_that_are_not_finite",
            f"{RESUME}::test_a_loss_scaler_that_only_skips_ends_the_run",
        ),
    ),
    Promise(
        "Steps that a loss scaler skips are counted, and go on counting in a run that goes on",
        (
            f"{RESUME}::test_steps_that_the_loss_scaler_skips_are_counted",
            f"{RESUME}::test_steps_skipped_in_a_row_are_counted_on",
        ),
    ),
    Promise(
        "Such a step comes again to the bit from what the run leaves of it (`lad-fast replay`)",
        ("tests/test_replay.py",),
    ),
    Promise("Saturated and collapsed gates are told once, and no others", ("tests/test_gate_condition.py",)),
    Promise("Broken data load as written or are refused by file and row", (DATA, "tests/test_tasks.py")),
    Promise(
        "What is read is counted: examples, tokens, cut ones, labels, rows left out",
        (
            "tests/test_data.py::test_a_summary_counts_what_there_is",
            f"{DATA}::test_rows_that_the_task_leaves_out_are_counted",
        ),
    ),
    Promise(
        "Texts from data and models stay texts in reports and cards",
        ("tests/test_report.py::test_texts_from_files_are_only_texts", "tests/test_card.py::test_texts_stay_texts"),
    ),
    Promise(
        "Threads, forked and spawned processes, no or a broken Triton, two devices: the same numbers, or a named error",
        ("tests/test_processes.py",),
    ),
    Promise(
        "Two processes under torchrun train what one trains; killed, stopped or failing, they end with a message",
        ("tests/test_distributed.py",),
    ),
    Promise(
        "Model folders and gate files from strangers run no code and get no memory they only claim",
        (UNTRUSTED, "tests/test_published.py::test_what_does_not_fit_is_refused_by_name"),
    ),
    Promise("A wrong call is refused by an error that names the argument", ("tests/test_functional.py",)),
    Promise(
        "Wrong packed bounds that nobody reads, as on a GPU, give NaN; nothing outside is touched, nothing hangs",
        ("tests/kernels/test_forms.py::test_wrong_bounds_that_nobody_read",),
    ),
    Promise(
        "Gates in any layout in memory give the reference's numbers",
        ("tests/kernels/test_aggregate.py::test_gates_in_any_layout",),
    ),
    Promise(
        "Two thousand steps hold memory, open files and threads where two hundred left them",
        ("tests/test_soak.py::test_two_thousand_steps_take_no_more_than_two_hundred",),
    ),
)


class _Collected:
    """A pytest plugin that keeps what was collected."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def collect() -> list[pytest.Item]:
    """Every test of the files that promises name."""
    files = dict.fromkeys(test.partition("::")[0] for promise in PROMISES for test in promise.tests)
    collected, output = _Collected(), io.StringIO()
    with contextlib.redirect_stdout(output):
        code = pytest.main(
            ["--collect-only", "-q", "-p", "no:cacheprovider", *(str(bench_record.ROOT / file) for file in files)],
            plugins=[collected],
        )
    if code:
        raise SystemExit(output.getvalue())
    return collected.items


def cases(item: pytest.Item, times: str) -> int:
    """How many cases an item tries: the examples that Hypothesis may draw, or one."""
    test = getattr(item, "obj", None)
    if times:
        return getattr(item.module, times)
    if hasattr(test, "hypothesis"):
        return test._hypothesis_internal_use_settings.max_examples
    return 1


def count(promise: Promise, items: list[pytest.Item]) -> int:
    """Cases of a promise; an error where one of its tests is not there."""
    total = 0
    for test in promise.tests:
        file, _, name = test.partition("::")
        found = [
            item
            for item in items
            if item.path == bench_record.ROOT / file and name in ("", item.originalname) and not is_of_a_gpu(item)
        ]
        if not found:
            raise SystemExit(f"there is no test {test}")
        total += sum(cases(item, promise.times) for item in found)
    return total


def is_of_a_gpu(item: pytest.Item) -> bool:
    return item.get_closest_marker("cuda") is not None


def table() -> str:
    """The promises that tests hold, then what was tried at random."""
    items = collect()
    rows = []
    for promise in PROMISES:
        tests = ", ".join(f"`{test}`" for test in promise.tests)
        rows.append([promise.text, tests, f"{count(promise, items):,}"])
    return "\n\n".join([bench_record.markdown(["promise", "test", "cases"], rows), fuzz_part()])


FUZZED = {
    "PublicAPI": ("any calls of the public API: right, or refused by name", "test_the_public_api"),
    "Interpreted": ("the same with the kernels, in Triton's interpreter", "test_the_kernels"),
    "Training": ("a training step and its twin, loaded from its state: equal to the bit", "test_training_steps"),
}


def fuzz_part() -> str:
    if not FUZZ.exists():
        return "No long run of `make fuzz` has been recorded: there is no result file of one."
    result = json.loads(FUZZ.read_text(encoding="utf-8"))
    rows = [
        [text, f"`tests/test_fuzz.py::{test}`", f"{tried['runs']:,}", f"{tried['calls']:,}", f"{tried['seconds']:,} s"]
        for name, (text, test) in FUZZED.items()
        for tried in [result["machines"][name]]
    ]
    total = sum(tried["seconds"] for tried in result["machines"].values())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"By `make fuzz`, {total:,} s on {result['machine']}, {versions}, {result['date']}; the tests run a few:"
        f"\n\n{bench_record.markdown(['what is drawn', 'test', 'runs', 'calls', 'time'], rows)}"
    )


def main() -> None:
    bench_record.replace_between(PAGE, MARKERS, table())
    print(f"wrote {Path(PAGE).relative_to(bench_record.ROOT)}")


if __name__ == "__main__":
    main()
