"""The faster forward on a CPU computes what PyTorch's own does."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification

from lad_fast import cpu
from lad_fast.cpu import FasterOnCPU, emulates, faster_forward
from lad_fast.kernels import launch
from lad_fast.models import run_model
from lad_fast.step import DistillStep


def called(function) -> set[str]:
    """Names of the operators that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages()}


def classifier(dropout: float) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
    )  # fmt: skip
    return BertForSequenceClassification(config).train()


def batch() -> dict:
    mask = (torch.arange(9) < torch.tensor([9, 4, 7])[:, None]).long()
    return {"input_ids": torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(0)), "attention_mask": mask}


@pytest.mark.parametrize("has_bias", (True, False))
@pytest.mark.parametrize("shape", ((7, 24), (3, 5, 24), (1, 1, 24), (24,)))
def test_linear(shape, has_bias, monkeypatch, onednn):
    """Also where the weight is laid out for many rows, and with an input that is not contiguous."""
    torch.manual_seed(0)
    weight, bias = torch.randn(10, 24, requires_grad=True), torch.randn(10, requires_grad=True) if has_bias else None
    leaves = [weight, *([bias] if has_bias else [])]
    for x in (torch.randn(shape), torch.randn(*shape[:-1], 48)[..., ::2]):
        x.requires_grad_()
        expected = F.linear(x.double(), weight.double(), bias.double() if has_bias else None)
        upstream = torch.randn(expected.shape)
        right = torch.autograd.grad(expected, [x, *leaves], upstream.double())
        for rows in (1, 10**9):
            monkeypatch.setattr(launch, "PACKED_ROWS", rows)
            with FasterOnCPU():
                actual = F.linear(x, weight, bias)
            assert actual.dtype == torch.float32
            ours = torch.autograd.grad(actual, [x, *leaves], upstream)
            for a, b in zip((actual, *ours), (expected, *right), strict=True):
                torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)


def test_linear_of_each_examples_first_row_hands_over_dense_operands(monkeypatch, onednn):
    """A pooler's: for a transposed operand with gaps between its rows oneDNN has only code a hundred times slower."""
    seen, product = [], launch.onednn_linear(torch.ones(1))

    def noted(x, weight, *rest):
        seen.append(weight)
        return product(x, weight, *rest)

    monkeypatch.setattr(launch, "onednn_linear", lambda operand: noted)
    monkeypatch.setattr(launch, "is_intels", lambda: False)
    states, layer = torch.randn(3, 5, 8, requires_grad=True), torch.nn.Linear(8, 4)
    with FasterOnCPU():
        layer(states[:, 0]).sum().backward()
    assert len(seen) == 3
    assert all(weight.is_contiguous() or weight.T.is_contiguous() for weight in seen)
    torch.testing.assert_close(layer.weight.grad, states[:, 0].sum(dim=0).expand(4, 8))


@pytest.mark.parametrize("is_intels", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_weight_gradient(monkeypatch, onednn, dtype, is_intels):
    """Whoever multiplies, it is grad.T @ x; float32 sums 37 terms, bfloat16 rounds its result."""
    monkeypatch.setattr(launch, "is_intels", lambda: is_intels)
    grad, x = torch.randn(37, 5, dtype=dtype), torch.randn(37, 9, dtype=dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    actual = launch.weight_gradient(grad, x)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), grad.double().T @ x.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("cpuinfo", "name", "expected"),
    [
        ("vendor_id\t: GenuineIntel\n", "", True),
        ("vendor_id\t: AuthenticAMD\n", "Intel64 Family 6 Model 85, GenuineIntel", False),
        (None, "Intel64 Family 6 Model 85, GenuineIntel", True),
        (None, "AMD64 Family 25 Model 17, AuthenticAMD", False),
        (None, "", False),
    ],
)
def test_intels_processor_is_told(monkeypatch, cpuinfo, name, expected):
    def read_text(path, **options):
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(launch.Path, "read_text", read_text)
    monkeypatch.setattr(launch.platform, "processor", lambda: name)
    assert launch.is_intels.__wrapped__() is expected


@pytest.mark.parametrize(
    ("has_amx", "has_avx512", "is_intels", "expected"),
    [
        (True, True, True, True),
        (False, True, True, False),
        (False, True, False, True),
        (False, False, False, False),
        (False, False, True, False),
    ],
)
def test_bfloat16_pays_where_its_products_are_faster(monkeypatch, has_amx, has_avx512, is_intels, expected):
    """An instruction alone does not tell: without AMX Intel's processors take longer with theirs."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512)
    monkeypatch.setattr(launch, "is_intels", lambda: is_intels)
    assert cpu.bfloat16_pays() is expected


def test_float32_products_go_to_onednn_with_avx512_alone(monkeypatch):
    for has_avx512 in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda has_avx512=has_avx512: has_avx512)
        runs = launch._onednn_linear.__wrapped__(torch.float32) is not None
        assert runs == (has_avx512 and torch.backends.mkldnn.is_available())
    assert launch._onednn_linear.__wrapped__(torch.float64) is None


def test_bfloat16_products_that_onednn_refuses_are_emulated():
    if not torch.backends.mkldnn.is_available():
        assert emulates(torch.bfloat16)
        return
    a, product = torch.ones(8, 8, dtype=torch.bfloat16), torch.ops.mkldnn._linear_pointwise
    if not emulates(torch.bfloat16):
        assert torch.equal(product(a, a, None, "none", [], ""), 8 * a)
        return
    with pytest.raises(RuntimeError):
        product(a, a, None, "none", [], "")


def test_linear_in_other_dtypes_and_without_rows_is_pytorchs():
    layer = torch.nn.Linear(4, 3)
    with FasterOnCPU():
        assert layer(torch.ones(0, 4)).shape == (0, 3)
        x = torch.ones(2, 4, dtype=torch.float64)
        assert torch.equal(layer.double()(x), x @ layer.weight.T + layer.bias)
        with pytest.raises(RuntimeError):
            layer(torch.ones(2, 4))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("shape", ((300, 301), (5, 100, 77), (1,), (0, 3)))
def test_dropout(dtype, shape):
    torch.manual_seed(0)
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    with FasterOnCPU():
        y = F.dropout(x, 0.1)
    y.sum().backward()
    assert torch.equal(x.grad, y)  # the same elements, scaled alike
    kept = y != 0
    assert (y[kept] == torch.ones((), dtype=dtype) / 0.9).all()
    if x.numel() > 1:  # five standard deviations of a share of independent draws
        assert abs(kept.double().mean() - 0.9) < 5 * math.sqrt(0.09 / x.numel())


@pytest.mark.parametrize("p", (0.001, 0.5, 0.999))
def test_dropout_keeps_each_element_as_often(p):
    torch.manual_seed(1)
    with FasterOnCPU():
        draws = torch.stack([F.dropout(torch.ones(64), p) != 0 for _ in range(4000)]).double()
    error = 5.5 * math.sqrt(p * (1 - p) / 4000)  # of 64 means, and of 63 correlations of neighbours
    assert (draws.mean(dim=0) - (1 - p)).abs().max() < error
    neighbours = (draws[:, 1:] - (1 - p)) * (draws[:, :-1] - (1 - p))
    assert neighbours.mean(dim=0).abs().max() < 5.5 * p * (1 - p) / math.sqrt(4000) + 5 / 4000


@pytest.mark.parametrize("p", (1e-6, 0.001, 0.1, 1 / 3, 0.4999, 0.5, 0.9, 0.999, 1 - 1e-6))
def test_dropout_by_bytes_is_by_numbers_of_two_bytes(p):
    compare, least = cpu._least_high_bytes(p)
    high, low = torch.arange(256)[:, None], torch.arange(256)
    expected = 256 * high + low >= round(p * 65536)
    assert torch.equal(compare((high - 128).to(torch.int8), least[:256]), expected)
    assert torch.equal(least[256:], least[:256])


def test_dropout_turns_which_elements_a_low_byte_falls_on():
    """With few low bytes that drop anything, an element of a call's every row would else never be dropped."""
    torch.manual_seed(0)
    kept = torch.stack([cpu._keep((256 * 16,), 4 / 65536).view(16, 256) for _ in range(4000)])
    columns = (kept == 0).sum(dim=(0, 1)).nonzero()[:, 0]
    assert len(columns) > 200  # of a thousand drops


def test_dropout_follows_the_seed_and_leaves_the_rest_to_pytorch():
    x = torch.ones(1000)
    with FasterOnCPU():
        torch.manual_seed(3)
        first, second = F.dropout(x, 0.5), F.dropout(x, 0.5)
        torch.manual_seed(3)
        assert torch.equal(F.dropout(x, 0.5), first)
        assert not torch.equal(first, second)
        assert F.dropout(x, 0.5, training=False) is x
        assert torch.equal(F.dropout(x, 0.0), x)
        assert not F.dropout(x, 1.0).any()
        with pytest.raises(ValueError, match="probability"):
            F.dropout(x, 1.5)


MASKS = {
    "none": None,
    "an example's keys": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])[:, None, None].bool(),
    "each query's keys": torch.ones(3, 1, 5, 5).tril().bool(),
    "one for all": torch.ones(1, 1, 5, 5).tril().bool(),
    "added": torch.zeros(3, 1, 1, 5).masked_fill(torch.tensor([0, 0, 0, 0, 1]).bool(), -torch.inf),
}


def attention_inputs(dtype=torch.float64):
    torch.manual_seed(0)
    # As Hugging Face passes them: views of (B, S, H, d).
    return [torch.randn(3, 5, 2, 4, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def with_seed(function, *args, **options):
    torch.manual_seed(7)
    with FasterOnCPU():
        return function(*args, **options)


@pytest.mark.parametrize("at_once", (1, 800, 1 << 21))
@pytest.mark.parametrize("name", MASKS)
def test_attention(name, at_once, monkeypatch):
    """The dropped probabilities, read off by a value of ones and zeros, are PyTorch's or zero; so are the gradients."""
    monkeypatch.setattr(cpu, "SCORES_AT_ONCE", at_once)
    query, key, value = attention_inputs()
    mask = MASKS[name]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    identity = torch.eye(5, dtype=torch.float64).expand(3, 2, 5, 5)
    dropped = with_seed(F.scaled_dot_product_attention, query, key, identity, mask, 0.3, scale=0.4)
    plain = F.scaled_dot_product_attention(query, key, identity, mask, 0.0, scale=0.4)
    keep = dropped != 0
    assert 0.4 < keep[plain != 0].double().mean() < 0.95
    torch.testing.assert_close(dropped, plain * keep / 0.7)

    output = with_seed(F.scaled_dot_product_attention, query, key, value, mask, 0.3, scale=0.4)
    expected = (plain * keep / 0.7) @ value
    torch.testing.assert_close(output, expected)
    upstream = torch.randn_like(output)
    leaves = query, key, value
    for ours, right in zip(
        torch.autograd.grad(output, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(ours, right)
    assert output.transpose(1, 2).is_contiguous()  # what the next layer makes of it costs no copy


def test_attention_scales_as_pytorch_does_and_takes_other_forms_to_it():
    query, key, value = attention_inputs()
    torch.manual_seed(0)
    outputs = [with_seed(F.scaled_dot_product_attention, query, key, value, None, 1e-9) for _ in range(2)]
    torch.testing.assert_close(outputs[0], F.scaled_dot_product_attention(query, key, value))
    assert torch.equal(*outputs)
    causal = with_seed(F.scaled_dot_product_attention, query, key, value, None, 1e-9, is_causal=True)
    torch.testing.assert_close(causal, F.scaled_dot_product_attention(query, key, value, is_causal=True))
    three = [x[0] for x in (query, key, value)]
    torch.testing.assert_close(
        with_seed(F.scaled_dot_product_attention, *three, None, 1e-9), F.scaled_dot_product_attention(*three)
    )


def test_attention_without_any_key_is_finite():
    query, key, value = attention_inputs()
    mask = torch.zeros(3, 1, 1, 5, dtype=torch.bool)
    mask[0] = True
    for some in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf).double()):
        output = with_seed(F.scaled_dot_product_attention, query, key, value, some, 0.3)
        gradients = torch.autograd.grad(output.sum(), (query, key, value))
        assert all(torch.isfinite(tensor).all() for tensor in (output, *gradients))


FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize("name", MASKS)
def test_attention_over_few_tokens_without_gradients(name):
    """A teacher's, float32; against PyTorch's in float64: sums of at most 5 products."""
    query, key, value = attention_inputs(torch.float32)
    mask, outputs = MASKS[name], []

    def run():
        with torch.no_grad():
            outputs.append(with_seed(F.scaled_dot_product_attention, query, key, value, mask, scale=0.4))

    assert FUSED not in called(run)
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), wide, scale=0.4)
    torch.testing.assert_close(outputs[0], expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("other", ("gradients", "more tokens", "another dtype"))
def test_attention_without_dropout_is_else_pytorchs(other):
    query, key, value = attention_inputs(torch.bfloat16 if other == "another dtype" else torch.float32)
    if other == "more tokens":
        key, value = (x.repeat(1, 1, 7, 1) for x in (key, value))  # 35

    def run():
        with torch.set_grad_enabled(other == "gradients"):
            with_seed(F.scaled_dot_product_attention, query, key, value)

    assert FUSED in called(run)


def test_attention_under_autocast_is_as_close_as_pytorchs():
    inputs = attention_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = with_seed(F.scaled_dot_product_attention, *inputs, None, 1e-9)
    assert ours.dtype == torch.bfloat16
    exact = F.scaled_dot_product_attention(*(x.double() for x in inputs))
    # Inputs, scores and probabilities are each rounded to 8 bits.
    assert (ours.double() - exact).norm() / exact.norm() < 0.02
    ours.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs)


def test_a_model_gives_the_same_results():
    """Without dropout: logits, hidden states and gradients; float32 products in another order."""
    results = []
    for is_ours in (False, True):
        model = classifier(0.0)
        if is_ours:
            logits, states = run_model(model, batch(), output_hidden_states=True)
        else:
            output = model(**batch(), output_hidden_states=True)
            logits, states = output.logits, output.hidden_states[1:]
        (logits.square().sum() + sum(state.sum() for state in states)).backward()
        results.append([logits, *states, *(p.grad for p in model.parameters())])
    assert len(results[0]) > 30
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_model_with_dropout_has_the_same_mean():
    """Over many draws the loss's gradient is PyTorch's, to the error of the mean."""
    model, inputs = classifier(0.1), batch()

    def draws(forward) -> torch.Tensor:
        rows = []
        for _ in range(300):
            model.zero_grad()
            forward().square().sum().backward()
            rows.append(torch.cat([p.grad.flatten() for p in model.bert.encoder.layer.parameters()]))
        return torch.stack(rows)

    theirs, ours = draws(lambda: model(**inputs).logits), draws(lambda: run_model(model, inputs)[0])
    deviation = (theirs.var(dim=0) / len(theirs) + ours.var(dim=0) / len(ours)).sqrt()
    scores = ((theirs.mean(dim=0) - ours.mean(dim=0)) / deviation.clamp(min=1e-9)).abs()
    assert theirs.std(dim=0).mean() > 0
    assert scores.square().mean().sqrt() < 1.3  # 1 for two samples of one distribution
    assert 0.8 < ours.std(dim=0).norm() / theirs.std(dim=0).norm() < 1.25


def test_a_step_really_takes_it(onednn):
    operators = called(lambda: run_model(classifier(0.1), batch())[0].sum().backward())
    assert {"mkldnn::_linear_pointwise", "_Dropout", "_Attention"} <= operators
    assert not operators & {"aten::bernoulli_", "aten::native_dropout", "aten::addmm"}


def test_a_compiled_model_is_left_alone():
    model = classifier(0.0)
    assert isinstance(faster_forward(model), FasterOnCPU)
    model.bert.compile(backend="eager")
    assert not isinstance(faster_forward(model), FasterOnCPU)


def test_checkpointed_gradients_are_those_of_the_forwards_dropout():
    """Each checkpoint runs again in backward, and has to drop what the forward dropped."""
    model = classifier(0.2)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
        assert isinstance(faster_forward(model), FasterOnCPU) is not checkpointed
        model.zero_grad()
        torch.manual_seed(5)
        logits = run_model(model, batch())[0] if checkpointed else model(**batch()).logits
        logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain)


def labelled(*shapes: tuple[int, int]) -> list[dict]:
    """Batches of tokens that come more than once, padding among them, and not the same in each."""
    numbers = torch.Generator().manual_seed(0)
    batches = []
    for size, length in shapes:
        mask = (torch.arange(length) < torch.randint(1, length + 1, (size, 1), generator=numbers)).long()
        ids = torch.randint(4, 50, (size, length), generator=numbers) * mask  # 0 is padding's
        labels = torch.randint(2, (size,), generator=numbers)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


@pytest.mark.parametrize("max_grad_norm", (0.01, 1e6), ids=("clipped", "not clipped"))
@pytest.mark.parametrize("precision", ("float32", "float16"))
def test_steps_with_gradients_by_rows_are_those_with_dense_ones(precision, max_grad_norm, monkeypatch):
    """Over steps that touch other rows each, one of which accumulates two batches."""
    settings = {"learning_rate": 1e-2, "total_steps": 100, "warmup_steps": 0, "max_grad_norm": max_grad_norm}
    first, *rest = labelled((3, 5), (2, 9), (4, 3), (1, 7))
    results = []
    for least in (cpu.LARGE_EMBEDDING, 1):
        monkeypatch.setattr(cpu, "LARGE_EMBEDDING", least)
        model = classifier(0.0)
        step = DistillStep(model, **settings, precision=precision)
        norms = []
        for batches in ([first], rest[:2], rest[2:], [first]):
            step(*batches)
            norms.append(step.grad_norms["student"])
        # A key's bias changes no softmax: its gradient is rounding, which AdamW makes a whole step of.
        weights = {name: p.detach() for name, p in model.named_parameters() if not name.endswith("key.bias")}
        results.append((norms, weights))
        has_rows = [parameter is model.bert.embeddings.word_embeddings.weight for parameter in step.row_gradients._rows]
        assert has_rows.count(True) == (least == 1)
    # Other orders of sums in float32, and AdamW's first step is as large for the smallest gradient as for the largest.
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_gradients_by_rows_are_dense_when_they_are_clipped(monkeypatch):
    """Zero in rows of earlier steps and of padding, also after a step whose gradients were not finite."""
    monkeypatch.setattr(cpu, "LARGE_EMBEDDING", 1)
    model = classifier(0.0)
    rows, weight = cpu.RowGradients(model), model.bert.embeddings.word_embeddings.weight
    for one in labelled((3, 5), (2, 9), (1, 3)):
        with rows.recorded():
            loss = model(**one).loss
        (expected,) = torch.autograd.grad(model(**one).loss, weight)
        (loss * math.nan).backward()
        rows.clip_([weight], 1.0)
        assert weight.grad.isnan().any()
        model.zero_grad()
        with rows.recorded():
            loss = model(**one).loss
        loss.backward()
        assert weight.grad.is_sparse
        norm = rows.clip_([weight], 1e6)
        assert not weight.grad.is_sparse
        torch.testing.assert_close(weight.grad, expected)
        torch.testing.assert_close(norm, expected.norm())
        assert set(weight.grad.any(dim=1).nonzero().flatten().tolist()) == set(one["input_ids"].unique().tolist()) - {0}
        model.zero_grad()


def test_gradients_by_rows_are_for_a_model_that_runs_as_it_is(monkeypatch):
    monkeypatch.setattr(cpu, "LARGE_EMBEDDING", 1)
    model, (one,) = classifier(0.0), labelled((3, 5))
    rows = cpu.RowGradients(model)
    model.bert.encoder.compile(backend="eager")
    with rows.recorded():
        model(**one).loss.backward()
    assert not model.bert.embeddings.word_embeddings.weight.grad.is_sparse
    with pytest.raises(RuntimeError, match="stopped"), rows.recorded():
        raise RuntimeError("stopped")
    assert not any(module.sparse for module in model.modules() if isinstance(module, torch.nn.Embedding))


class Marked(torch.Tensor):
    """A subclass, as quantized and distributed weights are."""


def test_subclasses_are_left_to_pytorch():
    weight, x = torch.randn(3, 4).as_subclass(Marked), torch.randn(2, 4)
    with FasterOnCPU():
        assert type(F.linear(x, weight)) is Marked
        assert type(F.dropout(x.as_subclass(Marked), 0.5)) is Marked


FAULTS = """
import resource, sys, torch
from lad_fast.cpu import keep_freed_memory

def faults(at_once, times, before=3):
    for turn in range(before + times):
        if turn == before:
            start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(10 * 2**20) for _ in range(at_once)]
        del blocks
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start) / (10240 * at_once * times)  # of the pages

returned = faults(1, 12, before=0), faults(28, 2, before=0)
if not keep_freed_memory():
    sys.exit("no mallopt")
print(*returned, faults(1, 12), faults(28, 2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the counter is Linux's")
def test_freed_memory_is_kept():
    """Of blocks of 40 MiB, above the size from which glibc maps each anew; and when all 1.2 GB at the heap's end are
    free.
    """
    run = subprocess.run([sys.executable, "-P", "-c", FAULTS], capture_output=True, text=True)
    if "no mallopt" in run.stderr:
        pytest.skip("not glibc")
    assert not run.returncode, run.stderr
    returned_one, returned_many, kept_one, kept_many = map(float, run.stdout.split())
    assert min(returned_one, returned_many) > 0.95
    assert max(kept_one, kept_many) < 0.5  # the heap grows a few times more before a block finds its place
