"""Who takes part in the benchmarks of whole training steps, all from the same weights."""

from collections.abc import Callable
from typing import NamedTuple

from baselines import PlainStep, PublishedStep
from measuring import DEVICE, DTYPES
from workloads import MAX_LENGTH, Size, Workload, batches, models

from lad_fast.packed import enable_packing
from lad_fast.step import DistillStep, prepare_ahead
from lad_fast.teacher_cache import TeacherCache

ON_GPU = DEVICE.type == "cuda"
SETTINGS = {"learning_rate": 1e-4, "gate_learning_rate": 1e-6, "total_steps": 10**6, "warmup_steps": 100}
PUBLISHED = "published, float32"
GRAPHS, CACHED = "CUDA graphs", "cached teacher"
CONTESTANTS = (
    PUBLISHED, "plain, float32", "plain, bfloat16", "ours, float32", "ours, bfloat16",
    f"ours, bfloat16, {GRAPHS}", f"ours, bfloat16, {CACHED}",
)  # fmt: skip


class Runner(NamedTuple):
    """A contestant."""

    run: Callable[[Workload], None]
    """Trains on a workload's batches, one step each."""
    step: object
    padding: str
    """How its batches come; see :class:`lad_fast.data.Batches`."""


def published(size: Size, workload: Workload) -> Runner:
    student, teacher, objective = models(size, DEVICE)
    step = PublishedStep(student, teacher, objective, **SETTINGS, tokenizer=workload.tokenizer, max_length=MAX_LENGTH)

    def run(workload: Workload) -> None:
        for batch in workload.text_batches():
            step(*batch)

    return Runner(run, step, "max_length")


def plain(size: Size, precision: str, padding: str, mask_padding: bool) -> Runner:
    student, teacher, objective = models(size, DEVICE)
    step = PlainStep(student, teacher, objective, **SETTINGS, dtype=DTYPES[precision], mask_padding=mask_padding)
    def run(workload: Workload) -> None:
        for batch in batches(workload, padding):
            step(batch)

    return Runner(run, step, padding)


def ours(
    size: Size, precision: str, padding: str, mask_padding: bool, option: str | None = None,
    examples: Workload | None = None,
) -> Runner:  # fmt: skip
    """The library's step, fed as its training loop feeds it.

    ``option`` is None, :data:`GRAPHS`, or :data:`CACHED`: the teacher's outputs on ``examples`` are kept from their
    first pass on.
    """
    student, teacher, objective = models(size, DEVICE)
    if padding == "packed":
        for model in (student, teacher):
            enable_packing(model)
    cache = None
    if option == CACHED:
        cache = TeacherCache(
            examples.tokens.lengths, size.teacher_layers, size.hidden_size, 2, dtype=DTYPES[precision], device=DEVICE,
            place="gpu" if ON_GPU else "cpu",
        )  # fmt: skip
    step = DistillStep(
        student, teacher, objective, **SETTINGS, mask_padding=mask_padding, precision=precision, teacher_cache=cache,
        cuda_graphs=option == GRAPHS,
    )  # fmt: skip

    def run(workload: Workload) -> None:
        for batch in prepare_ahead(batches(workload, padding), step.prepare, DEVICE):
            step(batch)

    return Runner(run, step, padding)


def make(name: str, size: Size, workload: Workload, padding: str, mask_padding: bool) -> Runner:
    """The contestant of this name; the library's packs what others pad to the longest, where it does so by itself."""
    kind, precision, *option = name.split(", ")
    if kind == "published":
        return published(size, workload)
    if kind == "plain":
        return plain(size, precision, padding, mask_padding)
    option = option[0] if option else None
    packs = padding == "longest" and ON_GPU and precision == "bfloat16" and option != GRAPHS
    return ours(size, precision, "packed" if packs else padding, mask_padding, option, workload)
