"""Threads, processes and devices: what runs at once, what is forked, what is missing, and what lies elsewhere."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import lad_fast
from lad_fast.data import Batches, TokenizedSplit, check_vocabulary, tokenize
from lad_fast.functional import chain_loss
from lad_fast.glue import DataError, Examples, get_task
from lad_fast.kernels import launch
from lad_fast.models import model_inputs
from lad_fast.step import DistillStep
from lad_fast.training import DistillConfig, FinetuneConfig, distill, evaluate, finetune

RTE = get_task("rte")


def bert(num_layers=2, seed=0, **config):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 24, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 2}
    return BertForSequenceClassification(
        BertConfig(**sizes | config, num_hidden_layers=num_layers, max_position_embeddings=16)
    )


def split(num_examples=20, types=False):
    numbers = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(numbers.integers(4, 13, num_examples))]).astype(np.int64)
    ids = numbers.integers(4, 24, offsets[-1]).astype(np.int32)
    labels = numbers.integers(0, 2, num_examples)
    return TokenizedSplit(
        RTE, "train", ids, np.zeros_like(ids) if types else None, offsets, labels, 100 + np.arange(num_examples)
    )


def run_python(code, *, folder, timeout=120, **environment):
    """What a fresh process printed."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=os.environ | environment, cwd=folder, capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def objective_and_gradients(seed, backend, device="cpu"):
    """Losses, aggregates and all gradients of a small problem that the seed decides."""
    numbers = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=numbers).to(device)

    layers, size = (2, 16) if launch.interpreted() and backend == "triton" else (4, 64)
    stack = lad_fast.GateStack(layers, size, 8).to(device)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.copy_(normal(*parameter.shape) / 4)
    objective = lad_fast.LADObjective(stack, num_student_layers=2, backend=backend)
    student = [normal(2, 8, size).requires_grad_() for _ in range(2)]
    logits, teacher = normal(2, 3).requires_grad_(), [normal(2, 8, size) for _ in range(layers)]
    out = objective(student, teacher, logits, normal(2, 3), torch.tensor([0, 2], device=device))
    aggregates = lad_fast.fused_aggregate(teacher, stack, backend=backend)
    (out.loss + sum(a.square().sum() for a in aggregates)).backward()
    gradients = [leaf.grad for leaf in (*student, logits, *stack.parameters())]
    return [tensor.detach().cpu() for tensor in (out.loss, out.hidden_losses, *aggregates, *gradients)]


def at_once(number, work):
    """``work(i)`` of so many threads that start together."""
    barrier = threading.Barrier(number)

    def started(i):
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(started, range(number)))


def assert_same(found, expected):
    for tensors, others in zip(found, expected, strict=True):
        for tensor, other in zip(tensors, others, strict=True):
            assert torch.equal(tensor, other)


@pytest.mark.parametrize(("backend", "rounds"), [("reference", 4), ("torch", 10), ("triton", 1)])
def test_eight_threads_compute_what_one_does(backend, rounds):
    if backend == "triton" and not launch.interpreted():
        pytest.skip("on a GPU: test_side_streams_and_threads")
    expected = [objective_and_gradients(seed, backend) for seed in range(8)]
    for _ in range(rounds):
        assert_same(at_once(8, lambda seed: objective_and_gradients(seed, backend)), expected)


def test_threads_train_models_of_their_own():
    """Made one after another, since weights are drawn from PyTorch's one generator; no dropout, for the same reason."""

    def made(seed):
        student = bert(1, seed, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        objective = lad_fast.LADObjective(lad_fast.GateStack(2, 16, 16), 1, backend="torch")
        return DistillStep(student, bert(2), objective, learning_rate=1e-3, total_steps=9, warmup_steps=1)

    def losses(step):
        return [step(batch)["loss"] for batch in Batches(split(), 4, 0, shuffle=False)]

    expected = [losses(made(seed)) for seed in range(4)]
    steps = [made(seed) for seed in range(4)]
    assert_same(at_once(4, lambda i: losses(steps[i])), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("index", [0, 1])
def test_side_streams_and_threads(index):
    """Launches on streams of their own share no counters; nor does it matter which device is the current one."""
    if torch.cuda.device_count() <= index:
        pytest.skip("takes two CUDA devices")
    device = torch.device("cuda", index)

    def on_a_stream(seed):
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            result = [objective_and_gradients(seed, "triton", device) for _ in range(20)][-1]
        stream.synchronize()
        return result

    with torch.cuda.device(0):
        expected = [objective_and_gradients(seed, "triton", device) for seed in range(8)]
        assert_same(at_once(8, on_a_stream), expected)
        assert torch.cuda.current_device() == 0


@pytest.mark.cuda
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_training_on_a_device_that_is_not_the_current_one(tmp_path, cuda_graphs):
    if torch.cuda.device_count() < 2:
        pytest.skip("takes two CUDA devices")
    losses = []
    for name in ("cuda:0", "cuda:1"):
        config = DistillConfig(
            task="rte", teacher="", output_dir=tmp_path / name, batch_size=4, epochs=3, max_length=16, progress=False,
            device=name, precision="float32", log_every=1, student_layers=1, cuda_graphs=cuda_graphs,
            padding="max_length",
        )  # fmt: skip
        without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        models = {"teacher": bert(2), "student": bert(1, 1, **without)}
        distill(config, train=split(), evaluation={}, **models)
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        losses.append([float(line.split('"loss": ')[1].split(",")[0]) for line in lines if '"loss"' in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert torch.cuda.current_device() == 0


def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch):
    entered, launched = [], []

    @contextmanager
    def guard(device):
        entered.append(device)
        yield
        entered.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: launched.append((grid, list(entered), sorted(arguments)))

    monkeypatch.setattr(torch.cuda, "device", guard)
    with FakeTensorMode():
        launch.launch(Kernel(), (3,), n=1, x_ptr=torch.empty(2, device="cuda:1"), y_ptr=None)
        launch.launch(Kernel(), (3,), n=1, x_ptr=torch.empty(2), y_ptr=None)
    names = sorted(["n", "x_ptr", "y_ptr", *launch.OPTIONS])
    assert launched == [((3,), [torch.device("cuda:1")], names), ((3,), [], names)]


def test_counters_belong_to_a_device_and_a_stream(monkeypatch):
    """Two launches that run at once never count in the same place; nor does a graph in one outside of it. What stays
    is allocated by another thread: by torch.compile's CUDA graphs, this one's memory is taken for theirs."""
    current, allocated_in = {"device": None, "stream": 0, "capturing": False}, []

    @contextmanager
    def guard(device):
        before, current["device"] = current["device"], device
        yield
        current["device"] = before

    def stream():
        assert current["device"] is not None, "asked outside of the device's guard"
        return current["stream"]

    def zeros(size, dtype, device, zeros=torch.zeros):
        allocated_in.append(threading.get_ident())
        return zeros(size, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current["capturing"])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch, "zeros", zeros)
    launch.forget_counters()
    try:
        found = {}
        for device in ("cuda:0", "cuda:1"):
            for current["stream"] in (0, 7):
                found[device, current["stream"]] = launch.counters(torch.device(device), 5).data_ptr()
                again = launch.counters(torch.device(device), 6).data_ptr()
                assert again == found[device, current["stream"]]
        assert len(set(found.values())) == len(allocated_in) == 4
        assert threading.get_ident() not in allocated_in
        current["capturing"] = True
        kept = [launch.counters(torch.device("cuda:1"), 5) for _ in range(2)]
        assert len({*found.values(), *(counters.data_ptr() for counters in kept)}) == 6
    finally:
        launch.forget_counters()


@pytest.mark.parametrize(
    ("context", "padding", "persistent"),
    [("fork", "longest", True), ("fork", "packed", False), ("spawn", "packed", True)],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside pytest's own threads
def test_workers_give_the_same_batches(context, padding, persistent):
    """Also those that were started in an earlier epoch."""
    batches = Batches(split(types=True), 3, 0, shuffle=True, seed=5, padding=padding)
    loader = DataLoader(
        batches, batch_size=None, num_workers=2, multiprocessing_context=context, timeout=120,
        persistent_workers=persistent,
    )  # fmt: skip
    for epoch in (1, 2):
        batches.set_epoch(epoch)
        for found, expected in zip(loader, batches, strict=True):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


CHILDREN = """
import multiprocessing, os, sys
sys.path.insert(0, {folder!r})
import torch
import test_processes

torch.set_num_threads(2)
torch.ones(600, 600) @ torch.ones(600, 600)
expected = test_processes.in_a_process()
for context in map(multiprocessing.get_context, ("fork", "spawn")):
    results = context.SimpleQueue()
    child = context.Process(target=test_processes.in_a_child, args=(results,), daemon=True)
    child.start()
    for array, tensor in zip(results.get(), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(array), tensor)
    child.join()
    print(context.get_start_method(), child.exitcode)
"""


def in_a_process():
    """An objective's numbers and the losses of a few steps."""
    torch.manual_seed(3)
    step = DistillStep(bert(), learning_rate=1e-3, total_steps=9, warmup_steps=1)
    losses = [step(batch)["loss"] for batch in Batches(split(), 4, 0, shuffle=False)]
    return [*objective_and_gradients(0, "torch"), *losses]


def in_a_child(results):
    torch.set_num_threads(1)
    results.put([tensor.numpy() for tensor in in_a_process()])


def test_children_with_one_thread_compute_after_their_parent_has(tmp_path):
    """A forked one with more would wait for OpenMP's threads, which a fork does not take along; README says so."""
    code = CHILDREN.format(folder=os.path.dirname(__file__))
    out = run_python(code, folder=tmp_path, timeout=90, OMP_NUM_THREADS="2", TRITON_INTERPRET="0")
    assert out.split() == ["fork", "0", "spawn", "0"]


USE = """
import torch, lad_fast
from lad_fast.doctor import facts
from lad_fast.step import DistillStep
from transformers import BertConfig, BertForSequenceClassification

sizes = dict(vocab_size=24, hidden_size=16, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16)
student, teacher = (BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=n)) for n in (1, 2))
objective = lad_fast.LADObjective(lad_fast.GateStack(2, 16, 16), 1)
step = DistillStep(student, teacher, objective, learning_rate=1e-3, total_steps=9, warmup_steps=1)
batch = {"input_ids": torch.randint(24, (2, 8)), "attention_mask": torch.ones(2, 8), "labels": torch.tensor([0, 1])}
assert step(batch)["loss"].isfinite()
z = torch.zeros(2, 3, requires_grad=True)
try:
    lad_fast.fused_distill_loss(z, z.detach(), torch.tensor([0, 1]), backend="triton")
except ValueError as error:
    print(error)
for fact in facts():
    print(*fact, sep=": ")
"""
REFUSED = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Finder())
"""


def test_without_triton(tmp_path):
    out = run_python(REFUSED + USE, folder=tmp_path, TRITON_INTERPRET="1").splitlines()
    assert out[0] == "backend 'triton' cannot run here: triton is not installed; use backend='torch'"
    assert "triton here: triton is not installed" in out


def broken_triton(folder, error):
    (folder / "triton").mkdir()
    (folder / "triton/__init__.py").write_text(f"raise {error}\n")
    return {"TRITON_INTERPRET": "1", "PYTHONPATH": str(folder)}


def test_with_a_broken_triton(tmp_path):
    environment = broken_triton(tmp_path, "ImportError('libtriton.so: no version information\\nmore')")
    out = run_python(USE, folder=tmp_path, **environment).splitlines()
    reason = "triton cannot be imported (ImportError: libtriton.so: no version information)"
    assert out[0] == f"backend 'triton' cannot run here: {reason}; use backend='torch'"
    assert f"triton here: {reason}" in out


def test_with_a_triton_that_breaks_pytorch(tmp_path):
    """PyTorch takes an ImportError for an absence; any other ends its optimizers and operators, and Transformers."""
    environment = broken_triton(tmp_path, "RuntimeError('no driver')")
    start, end = USE.index("from lad_fast.step"), USE.index("z = ")
    code = USE[:start] + USE[end:]
    code += "print(lad_fast.fused_distill_loss(z, z.detach(), torch.tensor([0, 1]), backend='reference'))"
    out = run_python(code, folder=tmp_path, **environment)
    first, *others, last = out.splitlines()
    reason = "triton cannot be imported (RuntimeError: no driver)"
    assert first == f"backend 'triton' cannot run here: {reason}; use backend='torch'"
    assert f"triton here: {reason}" in others
    assert last.startswith("tensor(0.5493")


@pytest.mark.parametrize("error", [OSError("libcuda.so: cannot open"), ImportError("cannot import name 'language'")])
def test_whatever_importing_triton_raises_is_the_reason(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(launch.importlib, "import_module", fail)
    launch.broken_triton.cache_clear()
    try:
        reason = f"triton cannot be imported ({type(error).__name__}: {error})"
        assert launch.why_not_triton(torch.device("cuda", 0)) == reason
        if launch.interpreted():
            z = torch.zeros(2, 3)
            with pytest.raises(ValueError, match="triton cannot be imported"):
                lad_fast.fused_distill_loss(z, z, torch.tensor([0, 1]), backend="triton")
            assert lad_fast.fused_distill_loss(z, z, torch.tensor([0, 1])).isfinite()
    finally:
        launch.broken_triton.cache_clear()


@pytest.mark.parametrize(
    ("hip", "version", "is_told"), [("6.4", "3.6.1+rocm", True), ("6.4", "3.10.0", False), (None, "3.6.0", False)]
)
def test_amds_gpus_take_a_triton_that_compiles_the_kernels(monkeypatch, hip, version, is_told):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr("triton.__version__", version)
    launch._too_old_triton.cache_clear()
    try:
        reason = launch.why_not_triton(torch.device("cuda", 0))
        assert reason == (f"triton {version} cannot compile the kernels for AMD's GPUs; 3.7 can" if is_told else None)
    finally:
        launch._too_old_triton.cache_clear()


def test_with_cuda_hidden(tmp_path):
    out = run_python(USE, folder=tmp_path, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0").splitlines()
    reason = "the tensors are on cpu, and TRITON_INTERPRET=1 is not set"
    assert out[0] == f"backend 'triton' cannot run here: {reason}; use backend='torch'"
    assert "GPU: none" in out


WINDOWS = """
import sys, types
import torch, transformers.modeling_utils  # which take msvcrt for a sign of Windows
sys.modules["fcntl"] = None
locked = set()
def locking(descriptor, mode, size):
    import os
    place = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
    if mode != 2 or size != 1:
        raise ValueError("not one byte, at once or not at all")
    if place in locked:
        raise PermissionError(13, "Permission denied")
    locked.add(place)
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
import pathlib
from lad_fast import training
from lad_fast.checkpoint import own_folder
folder = pathlib.Path("run")
with own_folder(folder):
    try:
        with own_folder(folder):
            print("twice")
    except ValueError as error:
        print(error)
"""


def test_without_fcntl_as_on_windows(tmp_path):
    out = run_python(WINDOWS, folder=tmp_path)
    assert out.startswith("output_dir is run; another run is writing there, process ")
    assert (tmp_path / "run/.lock").read_text().isdigit()


def tensors(device, number=2):
    return [torch.ones(2, 8, 16, device=device) for _ in range(number)]


ELSEWHERE = [
    ({"teacher": "meta"}, "teacher_hidden_states are on meta; student_hidden_states are on cpu"),
    ({"student": "meta"}, "teacher_hidden_states are on cpu; student_hidden_states are on meta"),
    ({"gates": "meta"}, "the gates are on meta; student_hidden_states are on cpu"),
    ({"student_logits": "meta"}, "student_logits are on meta; student_hidden_states are on cpu"),
    ({"teacher_logits": "meta"}, "teacher_logits are on meta; student_hidden_states are on cpu"),
    ({"labels": "meta"}, "labels are on meta; student_hidden_states are on cpu"),
]


@pytest.fixture
def no_kernels(monkeypatch):
    """Nothing of the library's may run."""
    from lad_fast.kernels import ops

    for name in ("aggregate", "chain_loss", "hidden_loss", "distill_loss"):
        monkeypatch.setattr(ops, name, lambda *_, **__: pytest.fail("a kernel ran"))


@pytest.mark.parametrize(("places", "message"), ELSEWHERE)
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_an_objective_of_two_devices_is_refused(no_kernels, places, message, backend):
    names = ("teacher", "student", "student_logits", "teacher_logits", "labels")
    at = {name: places.get(name, "cpu") for name in names}
    objective = lad_fast.LADObjective(lad_fast.GateStack(2, 16, 8), 1).to(places.get("gates", "cpu"))
    logits = {name: torch.zeros(2, 3, device=at[name]) for name in ("student_logits", "teacher_logits")}
    labels = torch.tensor([0, 1]).to(at["labels"])
    with pytest.raises(ValueError, match=message):
        objective(tensors(at["student"], 1), tensors(at["teacher"]), **logits, labels=labels, backend=backend)


def test_operators_of_two_devices_are_refused(no_kernels):
    gates = lad_fast.GateStack(2, 16, 8)
    calls = {
        "gates' weight is on meta; hidden_states is on cpu": lambda: lad_fast.fused_aggregate(
            tensors("cpu"), lad_fast.GateStack(2, 16, 8).to("meta")
        ),
        r"hidden_states\[1\] is on meta; hidden_states\[0\] is on cpu": lambda: lad_fast.fused_aggregate(
            [*tensors("cpu", 1), *tensors("meta", 1)], gates
        ),
        "aggregates is on meta; student_hidden_states is on cpu": lambda: lad_fast.fused_hidden_loss(
            tensors("cpu"), tensors("meta")
        ),
        "hidden_states is on cpu; student_hidden_states is on meta": lambda: chain_loss(
            tensors("meta", 1), tensors("cpu"), gates, (1,), attention_mask=torch.ones(2, 8)
        ),
        "teacher_logits is on meta; student_logits is on cpu": lambda: lad_fast.fused_distill_loss(
            torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), torch.tensor([0, 1])
        ),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_a_step_of_two_devices_is_refused():
    objective = lad_fast.LADObjective(lad_fast.GateStack(2, 16, 16), 1)
    options = {"learning_rate": 1e-3, "total_steps": 9, "warmup_steps": 1}
    with pytest.raises(ValueError, match="teacher is on meta; student is on cpu"):
        DistillStep(bert(1), bert(2).to("meta"), objective, **options)
    with pytest.raises(ValueError, match="objective is on meta; student is on cpu"):
        DistillStep(bert(1), bert(2), objective.to("meta"), **options)


def test_models_without_weights_are_refused(tmp_path):
    options = {"task": "rte", "output_dir": tmp_path, "device": "cpu", "max_length": 16, "progress": False}
    data = {"train": split(), "evaluation": {}}
    config = DistillConfig(teacher="", student_layers=1, **options)
    with pytest.raises(ValueError, match=r"teacher is on meta, .*training on cpu"):
        distill(config, **data, teacher=bert(2).to("meta"), student=bert(1))
    with pytest.raises(ValueError, match=r"student is on meta, .*training on cpu"):
        distill(config, **data, teacher=bert(2), student=bert(1).to("meta"))
    with pytest.raises(ValueError, match=r"model is on meta, .*training on cpu"):
        finetune(FinetuneConfig(model="", **options), **data, model=bert(1).to("meta"))
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("padding", ["longest", "packed"])
def test_tokens_that_a_model_does_not_embed_are_refused(tmp_path, padding):
    broken, typed = split(), split(types=True)
    broken.input_ids[broken.offsets[7] + 2] = 30522
    typed.token_type_ids[typed.offsets[8] - 1] = 2
    message = "split 'train' of rte: input_ids of the example with id 107 hold 30522; this Bert.* takes 0 to 23"
    options = {"task": "rte", "output_dir": tmp_path, "device": "cpu", "max_length": 16, "progress": False}
    config = FinetuneConfig(model="", padding=padding, **options)
    for data in ({"train": broken, "evaluation": {}}, {"train": split(), "evaluation": {"validation": broken}}):
        with pytest.raises(DataError, match=message):
            finetune(config, **data, model=bert())
    with pytest.raises(DataError, match=r"token_type_ids of the example with id 107 hold 2; .* takes 0 to 1"):
        finetune(config, train=typed, evaluation={}, model=bert())
    config = DistillConfig(teacher="", student_layers=1, padding=padding, **options)
    with pytest.raises(DataError, match=r"input_ids of the example with id 10. hold 23; .* takes 0 to 22"):
        distill(config, train=split(), evaluation={}, teacher=bert(vocab_size=23), student=bert(1))
    batches = Batches(broken, 4, 0, shuffle=False, padding=padding)
    with pytest.raises(ValueError, match="input_ids of the example with id 107 hold 30522"):
        for batch in batches:
            model_inputs(bert(), batch)
    if padding == "longest":
        with pytest.raises(ValueError, match="input_ids of the example with id 107 hold 30522"):
            evaluate(bert(), batches, RTE)
        with pytest.raises(ValueError, match=r"input_ids \[1\] hold 24; .* takes 0 to 23"):
            model_inputs(bert(), {"input_ids": torch.tensor([[1, 2], [3, 24]]), "attention_mask": torch.ones(2, 2)})


def test_a_cache_of_other_tokens_is_made_again(tmp_path, caplog):
    from lad_fast.demo import build_tokenizer

    texts = ["a film is dull", "a play is lovely"]
    tokenizer = build_tokenizer(texts)
    tokenizer.model_max_length = 64
    examples = Examples(RTE, "train", texts, texts, np.array([0, 1]), np.array([0, 1]))
    expected = tokenize(examples, tokenizer, 16, tmp_path)
    (path,) = tmp_path.glob("*.npz")
    with np.load(path) as file:
        arrays = dict(file)
    arrays["input_ids"][3] = len(tokenizer)
    np.savez(path, **arrays)
    found = tokenize(examples, tokenizer, 16, tmp_path)
    assert (found.input_ids == expected.input_ids).all()
    assert f"is damaged (ValueError: token {len(tokenizer)}; the tokenizer has {len(tokenizer)})" in caplog.text


@pytest.mark.parametrize("place", (0, -1))
def test_the_example_is_named_by_its_first_and_by_its_last_token(place):
    broken = split()
    broken.input_ids[broken.offsets[7] if place == 0 else broken.offsets[8] - 1] = 30522
    with pytest.raises(DataError, match="input_ids of the example with id 107 hold 30522"):
        check_vocabulary(broken, bert())
