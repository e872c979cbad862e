"""Packed batches give what padded ones give, for each family whose head is known."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from lad_fast.models import model_inputs, run_model
from lad_fast.packed import ENCODERS, Packing, _flash, _spread, can_pack, enable_packing, has_flash, packs_fast

LENGTHS = (5, 9, 1, 9)


def classifier(family: str, dropout: float = 0.0):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
    if family == "distilbert":
        sizes = {"dim": 32, "n_heads": 4, "hidden_dim": 64, "n_layers": 2}
    config = AutoConfig.for_model(
        family, vocab_size=60, max_position_embeddings=40, num_labels=3, initializer_range=0.2, pad_token_id=1,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **sizes,
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config)


def both_ways(device: str = "cpu"):
    """The same examples as a padded and as a packed batch."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor(LENGTHS)
    mask = torch.arange(12) < lengths[:, None]  # wider than the longest
    input_ids = torch.randint(4, 60, mask.shape, generator=generator).masked_fill(~mask, 1)
    positions = torch.arange(12).expand_as(mask)[mask][None]
    padded = {"input_ids": input_ids, "attention_mask": mask.long()}
    return padded, {"input_ids": input_ids[mask][None], "position_ids": positions, "lengths": lengths}, mask


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_padding_token_within_a_text_has_the_position_that_a_padded_batch_gives_it(family):
    model, (padded, packed, mask) = classifier(family).eval(), both_ways()
    padded["input_ids"][1, 3:5] = padded["input_ids"][3, 0] = 1
    packed["input_ids"] = padded["input_ids"][mask][None]
    right = model(**padded).logits
    enable_packing(model)
    torch.testing.assert_close(run_model(model, model_inputs(model, packed)[0])[0], right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_logits_states_and_gradients_are_those_of_padded_batches(family):
    model = classifier(family)
    padded, packed, mask = both_ways()
    results = []
    for batch in (padded, packed):
        if batch is packed:
            enable_packing(model)
        model.zero_grad()
        logits, states = run_model(model, model_inputs(model, batch)[0], output_hidden_states=True)
        weights = torch.arange(1.0, 1 + logits.numel()).view_as(logits)
        (logits * weights).sum().backward()
        rows = [state if state.dim() == 2 else state[mask] for state in states]
        results.append([logits, *rows, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 20
    for right, ours in zip(*results, strict=True):
        assert right.abs().sum() > 0
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


def test_padded_batches_still_run_and_checkpoints_do_not_change(tmp_path):
    model = classifier("bert").eval()
    padded = both_ways()[0]
    before = model(**padded).logits
    enable_packing(model)
    torch.testing.assert_close(model(**padded).logits, before)  # Transformers' own call, 2-D mask and all
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    torch.testing.assert_close(loaded(**padded).logits, before)


@pytest.mark.parametrize("family", ("distilbert", "albert", "mpnet", "mobilebert", "esm"))
def test_other_heads_and_encoders_are_refused(family):
    """Of heads like BERT's: MPNet's attention is its own, MobileBERT and ESM mix neighbouring tokens before it."""
    model = classifier(family)
    assert not can_pack(model)
    with pytest.raises(ValueError, match=f"padding is 'packed'; it takes a BERT-.* not a {type(model).__name__}"):
        enable_packing(model)


def test_examples_do_not_see_each_other():
    """A change of one example's tokens changes that example alone."""
    model = classifier("bert").eval()
    enable_packing(model)
    _, packed, _ = both_ways()
    with torch.no_grad():
        before, _ = run_model(model, model_inputs(model, packed)[0])
        packed["input_ids"][0, LENGTHS[0] : LENGTHS[0] + LENGTHS[1]] = 7
        after, _ = run_model(model, model_inputs(model, packed)[0])
    changed = (before != after).any(dim=1)
    assert changed.tolist() == [False, True, False, False]


def test_attention_dropout_acts():
    model = classifier("bert", dropout=0.5).train()
    enable_packing(model)
    inputs, _ = model_inputs(model, both_ways()[1])
    torch.manual_seed(0)
    first, second = (run_model(model, inputs)[0] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("head_dim", "major", "dtype", "has"),
    [
        (64, 9, torch.bfloat16, True), (64, 8, torch.float16, True), (192, 10, torch.bfloat16, True),
        (26, 9, torch.bfloat16, False), (200, 9, torch.bfloat16, False),  # TinyBERT's 312 / 12; too wide
        (64, 7, torch.float16, False),  # T4 and V100
        (64, 9, torch.float32, False),
    ],
)  # fmt: skip
def test_where_flash_takes_packed_batches(monkeypatch, head_dim, major, dtype, has):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    device = torch.device("cuda", 0)
    assert has_flash(device, dtype, head_dim) == has
    assert not has_flash(torch.device("cpu"), dtype, head_dim)
    model = classifier("bert")
    model.config.hidden_size, model.config.num_attention_heads = 2 * head_dim, 2
    assert packs_fast(model, device, dtype) == has
    model.classifier = torch.nn.Sequential(model.classifier)  # a head that is not known
    assert not packs_fast(model, device, dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("hidden_size", (128, 52))
def test_packed_on_a_gpu_is_as_padded(hidden_size):
    """With heads of 64, by flash, and of 26, which it does not take."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=hidden_size, num_attention_heads=2, intermediate_size=64, num_hidden_layers=2
    )
    model = BertForSequenceClassification(config).cuda().eval()
    enable_packing(model)
    results = []
    for batch in both_ways()[:2]:
        with torch.autocast("cuda", torch.bfloat16):
            logits = run_model(model, model_inputs(model, batch)[0])[0].float()
        model.zero_grad()
        logits.square().sum().backward()
        results.append([logits, *(p.grad.clone() for p in model.parameters())])
    for padded, packed in zip(*results, strict=True):
        assert (padded - packed).norm() <= 3e-2 * padded.norm() + 1e-6


@pytest.mark.cuda
def test_the_flash_kernel_gives_what_spreading_gives():
    torch.manual_seed(0)
    packing = Packing.from_lengths(torch.tensor(LENGTHS), torch.device("cuda"))
    states = [torch.randn(sum(LENGTHS), 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    upstream = torch.randn_like(states[0])
    results = []
    for attend in (_flash, _spread):
        leaves = [state.clone().requires_grad_() for state in states]
        output = attend(*leaves, packing, 0.0, 0.125)
        output.backward(upstream)
        results.append([output, *(leaf.grad for leaf in leaves)])
    for ours, right in zip(*results, strict=True):
        # two bfloat16 computations, each a rounding of 2^-9 from the truth at every stored intermediate
        assert (ours.float() - right.float()).norm() <= 2e-2 * right.float().norm()


