"""The embedded default: a small text task made here, a teacher trained on it, and a student distilled three ways.

Nothing is downloaded. The task is to tell whether a sentence speaks well of what it is about. Every judgement may be
turned round by a negation, and every sentence of the development split holds two judgements that contradict each
other, so that neither its words nor its pairs of words tell the label; which judgement counts is told by

- contrast: "the songs are never dull although the book is clumsy" is about its main clause;
- agreement: "the film by the poets that are shallow and that is always clever" is about the film, which is one,
  and not about the poets;
- who did what: "the judge praised the actor and the judge was mocked by the actor" is about the artist.

A third of the training sentences are plain: their two judgements agree.
"""

import copy
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, PreTrainedModel, set_seed

import lad_fast
from lad_fast.data import Batches, TokenizedSplit, tokenize
from lad_fast.glue import Examples, Task
from lad_fast.models import build_student
from lad_fast.report import Measurement, comparison_figure, comparison_table, report
from lad_fast.training import DistillConfig, FinetuneConfig, TrainingResult, distill, evaluate, finetune

TASK = Task("demo", ("sentence",), labels=("unkind", "kind"), test_splits=())

WORKS = ["film", "play", "book", "song", "poem", "dance"]
ARTISTS = ["singer", "actor", "poet", "dancer"]
CRITICS = ["judge", "editor", "reporter", "teacher"]
KIND_WORDS = ["brilliant", "lovely", "clever", "graceful", "vivid", "honest"]
UNKIND_WORDS = ["dreadful", "clumsy", "boring", "shallow", "noisy", "dull"]
KIND_DEEDS = ["praised", "admired", "thanked"]
UNKIND_DEEDS = ["mocked", "insulted", "blamed"]
NEGATIONS = ["never", "hardly", "scarcely"]
EMPHASES = ["really", "always", "clearly"]
# Rare enough that a model first learns the rule without them: at one half, training sits on a plateau for long.
NEGATED_SHARE = 0.3
PASSIVE_SHARE = 0.25
PLAIN_SHARE = 1 / 3

NUM_TRAIN, NUM_DEV = 9600, 1000
BATCH_SIZE, MAX_LENGTH = 32, 32
METHODS = {"none": "student, labels only", "logits": "student, logits", "lad": "student, LAD"}


@dataclass
class DemoConfig:
    """Train a small teacher on a task made here and distil it three ways: no network, about three minutes."""

    output_dir: Path = Path("runs/demo")
    """Folder for results.json, comparison.png, report.html and the runs themselves."""
    teacher_steps: int = 1200
    """Training steps of the teacher, 32 sentences each."""
    student_steps: int = 400
    """Training steps of each student, 32 sentences each."""
    seed: int = 42
    """Of sentences, weights and the order of examples."""
    num_threads: int = 1
    """CPU threads; two are faster on an idle machine, and far slower where other programs share its cores."""
    progress: bool = True
    """Progress bars and one line an evaluation, on stderr."""


def make_sentence(rng: random.Random, plain: bool) -> tuple[str, int]:
    """Draws a sentence and its label, 1 for kind; both labels are equally likely.

    Args:
        rng: Where the choices come from.
        plain: Whether its two judgements agree; otherwise they contradict each other.
    """
    kind = rng.random() < 0.5
    counts_first = rng.random() < 0.5
    second = kind if plain else not kind
    form = rng.choice(("contrast", "agreement", "deeds"))
    if form == "contrast":
        one, other = _clause(rng, kind), _clause(rng, second)
        if plain:
            sentence = f"{one} and {other}"
        elif counts_first:
            sentence = f"{one} although {other}"
        else:
            sentence = rng.choice((f"although {other} {one}", f"{other} but {one}"))
        return sentence, int(kind)
    if form == "agreement":
        start = f"the {rng.choice(WORKS)} by the {rng.choice(ARTISTS)}s "
        one, other = f"that is {_judgement(rng, kind)}", f"that are {_judgement(rng, second)}"
    else:
        start, artist, critic = "", rng.choice(ARTISTS), rng.choice(CRITICS)
        one, other = _deed(rng, kind, critic, artist), _deed(rng, second, artist, critic)
    ordered = (one, other) if counts_first else (other, one)
    return start + " and ".join(ordered), int(kind)


def _judgement(rng: random.Random, kind: bool) -> str:
    negated = rng.random() < NEGATED_SHARE
    word = rng.choice(KIND_WORDS if kind != negated else UNKIND_WORDS)
    return f"{rng.choice(NEGATIONS if negated else EMPHASES)} {word}"


def _clause(rng: random.Random, kind: bool) -> str:
    noun = rng.choice(WORKS + ARTISTS + CRITICS)
    subject = rng.choice((f"the {noun} is", f"the {noun}s are"))
    return f"{subject} {_judgement(rng, kind)}"


def _deed(rng: random.Random, kind: bool, doer: str, done_to: str) -> str:
    negated = rng.random() < NEGATED_SHARE
    adverb = rng.choice(NEGATIONS if negated else EMPHASES)
    deed = rng.choice(KIND_DEEDS if kind != negated else UNKIND_DEEDS)
    active, passive = f"the {doer} {adverb} {deed} the {done_to}", f"the {done_to} was {adverb} {deed} by the {doer}"
    return passive if rng.random() < PASSIVE_SHARE else active


def make_splits(seed: int, num_train: int = NUM_TRAIN, num_dev: int = NUM_DEV) -> dict[str, Examples]:
    """Draws the splits "train" and "validation"; no sentence comes twice in them.

    A third of the training sentences are plain, none of the development sentences.
    """
    rng = random.Random(seed)
    seen: set[str] = set()

    def draw(split: str, num: int, plain_share: float) -> Examples:
        texts, labels = [], []
        while len(texts) < num:
            sentence, label = make_sentence(rng, plain=rng.random() < plain_share)
            if sentence not in seen:
                seen.add(sentence)
                texts.append(sentence)
                labels.append(label)
        return Examples(TASK, split, texts, None, np.array(labels), np.arange(num))

    return {"validation": draw("validation", num_dev, 0.0), "train": draw("train", num_train, PLAIN_SHARE)}


def build_tokenizer(texts: list[str]) -> BertTokenizer:
    """A lower-casing BERT tokenizer that has every word of the texts for a piece, in alphabetical order.

    A trainer of tokenizers would break ties by hash maps seeded anew in each process: no run could be repeated.
    """
    words = sorted({word for text in texts for word in text.lower().split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    return BertTokenizer({word: i for i, word in enumerate(vocabulary)}, model_max_length=MAX_LENGTH)


def build_teacher(tokenizer: BertTokenizer, seed: int) -> BertForSequenceClassification:
    """A BERT of 6 layers, 128 wide, with random weights.

    Weights are drawn wider than BERT's 0.02, which is made for a width of 768: at 128 the first token would hardly
    hear the others. Dropout would only slow so short a training.
    """
    set_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.06,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(TASK.labels)),
        label2id={label: i for i, label in enumerate(TASK.labels)},
    )
    return BertForSequenceClassification(config)


def demo(config: DemoConfig) -> list[Measurement]:
    """Makes the task, trains a teacher, distils it three ways from one start, and compares the four models.

    Prints a table; writes results.json, a run's folder for each model and, where matplotlib is installed,
    comparison.png and report.html about the students into ``config.output_dir``.

    Args:
        config: Where to write, and how long to train.

    Returns:
        What was measured: the teacher, then the students by no distillation, logits only, and LAD.

    Raises:
        ValueError: If a field of config is out of range.
    """
    start = time.perf_counter()
    for name in ("teacher_steps", "student_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it takes at least 1")
    examples = make_splits(config.seed)
    tokenizer = build_tokenizer(examples["train"].texts)
    splits = {name: tokenize(split, tokenizer, MAX_LENGTH) for name, split in examples.items()}
    print(f"{len(splits['train']):,} training and {len(splits['validation']):,} development sentences, such as")
    for text, label in zip(examples["validation"].texts[:3], examples["validation"].labels, strict=False):
        print(f"  {TASK.labels[label]:7} {text}")

    data = {
        "task": TASK,
        "train": splits["train"],
        "evaluation": {"validation": splits["validation"]},
        "tokenizer": tokenizer,
    }

    def settings(name: str, steps: int, learning_rate: float) -> dict:
        return {
            "task": TASK.name,
            "output_dir": config.output_dir / name,
            "epochs": -(-steps * BATCH_SIZE // NUM_TRAIN),
            "max_steps": steps,
            "batch_size": BATCH_SIZE,
            "max_length": MAX_LENGTH,
            "learning_rate": learning_rate,
            "seed": config.seed,
            "num_threads": config.num_threads,
            "progress": config.progress,
            "resume": "never",  # a demonstration shows it all again
        }

    def measure(name: str, result: TrainingResult) -> Measurement:
        score = result.last_metrics["validation"]["accuracy"]
        speed = _sentences_per_second(result.model, splits["validation"], tokenizer.pad_token_id)
        return Measurement(name, score, result.num_parameters, result.seconds, speed)

    print(f"\nTraining a teacher of 6 layers for {config.teacher_steps} steps", flush=True)
    teaching = FinetuneConfig(model="made by the demo", **settings("teacher", config.teacher_steps, 3e-4))
    taught = finetune(teaching, **data, model=build_teacher(tokenizer, config.seed))
    measurements = [measure("teacher", taught)]

    # With the teacher's layers to start from, this task would be learned by any method in a few dozen steps.
    set_seed(config.seed)
    student = build_student(taught.model, 3, init="random")
    for method, name in METHODS.items():
        print(f"Training a {name}: 3 layers, {config.student_steps} steps", flush=True)
        distilling = DistillConfig(
            teacher="made by the demo",
            student_layers=3,
            student_init="random",
            method=method,
            **settings(f"student-{method}", config.student_steps, 5e-4),
        )
        distilled = distill(distilling, **data, teacher=taught.model, student=copy.deepcopy(student))
        measurements.append(measure(name, distilled))

    print(f"\n{comparison_table(measurements)}\n")
    _write(config, measurements, time.perf_counter() - start)
    return measurements


def _sentences_per_second(model: PreTrainedModel, split: TokenizedSplit, pad_token_id: int) -> float:
    """The speed of evaluation, the better of two passes."""
    batches = Batches(split, 64, pad_token_id, shuffle=False)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        evaluate(model, batches, TASK)
        seconds.append(time.perf_counter() - start)
    return len(split) / min(seconds)


def _write(config: DemoConfig, measurements: list[Measurement], seconds: float) -> None:
    path = config.output_dir / "results.json"
    content = {
        "lad_fast": lad_fast.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "config": {**asdict(config), "output_dir": str(config.output_dir)},
        "seconds": round(seconds, 1),
        "models": [asdict(measurement) for measurement in measurements],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    written = [path]
    try:
        written.append(comparison_figure(measurements, config.output_dir / "comparison.png"))
        runs = [config.output_dir / f"student-{method}" for method in METHODS]
        written.append(report(runs, config.output_dir / "report.html"))
    except ImportError as error:
        print(f"no figure: {error}")
    print(f"{seconds:.0f} s in all; written: {', '.join(map(str, written))}")
