"""Tokenised splits, cached on disk, and batches of them as padded tensors."""

import hashlib
import json
import logging
import os
import uuid
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from lad_fast.glue import DataError, Examples, Task, brief, checked_ids, checked_labels

__all__ = ["Batches", "TokenizedSplit", "tokenize"]

_LOG = logging.getLogger(__name__)
_CACHE_FORMAT = 1  # to be raised when other tokens would come from the same texts, or the arrays change
_CHUNK = 10_000  # examples tokenised at once: bounds the memory of Python lists
_MOST_NAMED = 20  # classes that a summary counts
_MEGA_BATCH = 50  # batches among which examples are grouped by length


@dataclass(eq=False)
class TokenizedSplit:
    """N tokenised examples of one split, T tokens end to end without padding.

    Example n is tokens ``offsets[n]`` to ``offsets[n + 1]``.

    Attributes:
        task: the task.
        split: name of the split.
        input_ids: (T,) int32, special tokens included.
        token_type_ids: (T,) int32, or None for a tokenizer without them.
        offsets: (N+1,) int64, from 0 to T.
        labels: (N,) int64 class ids or float32 scores; None for a test split.
        ids: (N,) int64 numbers of the examples.

    Raises:
        DataError: arrays that do not belong together, an example without tokens, a label outside the task's, or a
            number twice; "labels[2]" counts from 0.
    """

    task: Task
    split: str
    input_ids: np.ndarray
    token_type_ids: np.ndarray | None
    offsets: np.ndarray
    labels: np.ndarray | None
    ids: np.ndarray

    def __post_init__(self) -> None:
        where = f"split {self.split!r} of {self.task.name}"
        _check_tokens(where, self.input_ids, self.token_type_ids, self.offsets)
        if self.labels is not None:
            self.labels = checked_labels(self.task, f"{where}: labels", self.labels, len(self), "the split")
        self.ids = checked_ids(f"{where}: ids", self.ids, len(self), "the split")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64 tokens of each example."""
        return np.diff(self.offsets)

    def summary(self, max_length: int) -> str:
        """A line on what there is: examples, their tokens, those that ``max_length`` cut, their labels."""
        told = f"{self.task.name} {self.split}: {len(self):,} examples"
        if len(self):
            told += f" of {self.lengths.min()} to {self.lengths.max()} tokens"
        if full := int((self.lengths >= max_length).sum()):
            told += f", {full:,} cut there or just as long"
        if self.labels is None or not len(self):
            return told
        if self.task.is_regression:
            return f"{told}; scores from {self.labels.min():g} to {self.labels.max():g}"
        counts = np.bincount(self.labels, minlength=self.task.num_labels)
        named = [f"{brief(name)} {count:,}" for name, count in zip(self.task.labels, counts, strict=True)]
        return f"{told}; {', '.join(named[:_MOST_NAMED])}" + ", ..." * (len(named) > _MOST_NAMED)


def _check_tokens(where: str, input_ids, token_type_ids, offsets) -> None:
    for name, values in (("input_ids", input_ids), ("token_type_ids", token_type_ids), ("offsets", offsets)):
        if values is not None and (values.ndim != 1 or values.dtype.kind not in "iu"):
            raise DataError(f"{where}: {name} is {values.dtype} of shape {values.shape}; it takes a row of integers")
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(input_ids):
        raise DataError(f"{where}: offsets is {offsets}; it takes N + 1 from 0 to T = {len(input_ids)}")
    if not (rises := offsets[1:] > offsets[:-1]).all():
        bad = int(np.argmin(rises)) + 1
        raise DataError(f"{where}: offsets[{bad}] is {offsets[bad]}; it takes at least one token an example")
    if (input_ids < 0).any():
        bad = int(np.argmax(input_ids < 0))
        raise DataError(f"{where}: input_ids[{bad}] is {input_ids[bad]}; it takes a token, at least 0")
    if token_type_ids is not None and len(token_type_ids) != len(input_ids):
        raise DataError(f"{where}: token_type_ids has {len(token_type_ids)} entries; input_ids has {len(input_ids)}")


def tokenize(
    examples: Examples, tokenizer, max_length: int = 128, cache_dir: str | Path | None = None
) -> TokenizedSplit:
    """Tokenise a split once, cut to ``max_length`` tokens an example (the longer text of a pair first).

    Args:
        examples: what to tokenise.
        tokenizer: a Hugging Face tokenizer.
        max_length: most tokens of an example, special tokens included.
        cache_dir: folder that keeps the result, made if absent; None keeps nothing. A file's name holds a
            digest of the texts, the tokenizer, ``max_length`` and the version of the tokenizers library, so a
            change of any makes another file; a damaged file is made again. The tokens of tokenizers written
            in Python, which have no serialised form, are not kept.

    Raises:
        ValueError: ``max_length`` leaves no room beside the special tokens or exceeds what the tokenizer's
            model takes; the tokenizer knows no word; ``cache_dir`` cannot be written.
        DataError: an example without any token (the tokenizer adds no special tokens).
    """
    num_special = tokenizer.num_special_tokens_to_add(pair=examples.text_pairs is not None)
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length <= num_special:
        raise ValueError(
            f"max_length is {max_length!r}; it takes an integer above {num_special}, the special tokens alone"
        )
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_length is {max_length}; the tokenizer takes at most {tokenizer.model_max_length}"
        )

    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # as Transformers makes it without a folder's files
        raise ValueError(
            f"tokenizer of {tokenizer.name_or_path!r} has special tokens alone, so that every word is unknown to it; "
            "its folder lacks tokenizer.json or vocab.txt"
        )

    path = None
    if cache_dir is not None and getattr(tokenizer, "backend_tokenizer", None) is not None:
        key = _cache_key(examples, tokenizer, max_length)
        path = Path(cache_dir) / f"{examples.task.name}-{examples.split}-{max_length}-{key}.npz"
    arrays = None
    if path is not None and path.exists():
        arrays = _read_cache(path, len(examples), len(tokenizer))
    if arrays is None:
        arrays = _tokenize(examples, tokenizer, max_length)
        if path is not None:
            _write_cache(path, arrays)
    return TokenizedSplit(
        task=examples.task,
        split=examples.split,
        input_ids=arrays["input_ids"],
        token_type_ids=arrays.get("token_type_ids"),
        offsets=arrays["offsets"],
        labels=examples.labels,
        ids=examples.ids,
    )


def _tokenize(examples: Examples, tokenizer, max_length: int) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {"input_ids": [], "token_type_ids": []}
    lengths: list[int] = []
    for start in range(0, len(examples), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        encoding = tokenizer(
            examples.texts[chunk],
            None if examples.text_pairs is None else examples.text_pairs[chunk],
            truncation="longest_first",
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
        )
        lengths.extend(map(len, encoding["input_ids"]))
        for name, flat in parts.items():
            if name in encoding:
                flat.append(np.fromiter(chain.from_iterable(encoding[name]), dtype=np.int32))
    if 0 in lengths:
        raise DataError(
            f"split {examples.split!r} of {examples.task.name}: example {lengths.index(0)} has no tokens; the"
            " tokenizer must add special tokens such as [CLS] and [SEP]"
        )
    arrays = {name: np.concatenate(flat) for name, flat in parts.items() if flat}
    arrays["offsets"] = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return arrays


def _cache_key(examples: Examples, tokenizer, max_length: int) -> str:
    import tokenizers

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # A call leaves its own truncation and padding in the back end: the key must not depend on earlier calls.
    backend.pop("truncation", None)
    backend.pop("padding", None)
    parts = (
        [_CACHE_FORMAT, tokenizers.__version__, max_length],
        [tokenizer.truncation_side, tokenizer.model_input_names],
        backend,
        examples.texts,
        examples.text_pairs,
    )
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part).encode() + b"\n")
    return digest.hexdigest()[:32]


def _read_cache(path: Path, num_examples: int, num_tokens: int) -> dict[str, np.ndarray] | None:
    """The cached arrays, or None where the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:  # a zip archive: reading checks a CRC of every array
            arrays = {name: file[name] for name in file.files}
        _check_tokens(str(path), arrays["input_ids"], arrays.get("token_type_ids"), arrays["offsets"])
        if len(arrays["offsets"]) != num_examples + 1:
            raise ValueError(f"{len(arrays['offsets'])} offsets, {num_examples} examples")
        if (most := arrays["input_ids"].max()) >= num_tokens:
            raise ValueError(f"token {most}; the tokenizer has {num_tokens}")
    except Exception as error:  # whatever is wrong with it, the remedy is the same: make it again
        _LOG.warning("%s is damaged (%s: %s); making it again", path, type(error).__name__, error)
        return None
    return arrays


def _write_cache(path: Path, arrays: dict[str, np.ndarray]) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                np.savez(file, **arrays)
            os.replace(partial, path)  # at no time is there a half-written file under the final name
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cache_dir is {path.parent}; it takes a folder to write to ({error})") from error


class Batches:
    """Batches of a split as padded tensors; each example comes exactly once an epoch.

    With ``shuffle`` the order depends on ``seed`` and the epoch alone. Grouped by length, examples are
    shuffled, sorted by length within runs of 50 batches and cut into batches, whose order is shuffled again:
    random batches with little padding. Without ``shuffle`` grouping puts the longest first, and ``ids`` tells
    which is which. ``DataLoader(batches, batch_size=None, num_workers=n)`` gives the same batches, in forked and in
    spawned processes, also in ``persistent_workers``; pin them there, by its ``pin_memory``.

    A batch is a dict of CPU tensors: ``input_ids``, ``attention_mask`` (1 for real tokens) and, if the
    tokenizer has them, ``token_type_ids``, each (B, S) int64; ``labels`` (B,) int64 class ids or float32
    scores, if known; ``ids`` (B,) int64, the examples' numbers; ``index`` (B,) int64, their places in the split.
    Packed, the B examples' T tokens stand end to end: ``input_ids``, ``position_ids`` (from 0 in each example)
    and ``token_type_ids`` are (1, T) int64, and ``lengths`` (B,) int64 takes the mask's place.
    Of several ``parts`` each process takes its own: every so manyth of a batch's examples, padded as wide as the whole
    batch would be, with ``counts`` (2, 2) int64: examples and real tokens of the part, then of the whole batch. A
    batch of fewer examples than parts leaves parts without; there its first one stands in, and counts 0 examples.

    Args:
        split: a tokenised split.
        batch_size: examples B of a batch, all parts together; the last of an epoch's cuts may have fewer.
        pad_token_id: the tokenizer's.
        shuffle: a new order each epoch.
        seed: of the order, at least 0.
        padding: "longest" pads to the longest of the batch, rounded up to a multiple of
            ``pad_to_multiple_of`` tokens but not above ``max_length``; "packed" takes the same examples without
            padding; "max_length" pads every batch to ``max_length`` and does not group by length, as published.
        max_length: tokens; needed by "max_length", else an upper bound of the padded length.
        pad_to_multiple_of: tokens.
        group_by_length: batch examples of like length together.
        drop_last: leave out the examples (other ones each epoch if shuffled) that fill no whole batch.
        pin_memory: put tensors in page-locked memory, from which copies to a GPU run asynchronously; without a GPU it
            warns and does nothing, as PyTorch's ``DataLoader``.
        part, parts: of every batch give this part (from 0) of so many; B is then the part's examples.

    Attributes:
        num_examples: examples of an epoch, of all parts.
        num_tokens: real (not padding) tokens of the current epoch, of all parts.

    Raises:
        ValueError: an argument outside what it takes, a split shorter than one batch with ``drop_last``, or
            an example longer than ``max_length``.
    """

    def __init__(
        self,
        split: TokenizedSplit,
        batch_size: int,
        pad_token_id: int,
        *,
        shuffle: bool,
        seed: int = 0,
        padding: str = "longest",
        max_length: int | None = None,
        pad_to_multiple_of: int = 8,
        group_by_length: bool = True,
        drop_last: bool = False,
        pin_memory: bool = False,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        integers = {
            "batch_size": (batch_size, 1),
            "pad_token_id": (pad_token_id, 0),
            "seed": (seed, 0),
            "pad_to_multiple_of": (pad_to_multiple_of, 1),
            "part": (part, 0),
            "parts": (parts, part + 1),
        }
        if padding not in ("longest", "packed", "max_length"):
            raise ValueError(f"padding is {padding!r}; it takes 'longest', 'packed' or 'max_length'")
        if max_length is not None or padding == "max_length":
            integers["max_length"] = (max_length, 1)
        for name, (value, least) in integers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it takes an integer of at least {least}")
        self._lengths = split.lengths
        if max_length is not None and self._lengths.max() > max_length:
            raise ValueError(f"max_length is {max_length}; an example has {self._lengths.max()} tokens")
        self.num_examples = len(split) // batch_size * batch_size if drop_last else len(split)
        if not self.num_examples:
            raise ValueError(
                f"batch_size is {batch_size} with drop_last; the split has {len(split)} examples"
            )
        self.split = split
        self.batch_size = batch_size
        self._pad_token_id = pad_token_id
        self._shuffle, self._seed = shuffle, seed
        self._padding, self._max_length, self._multiple = padding, max_length, pad_to_multiple_of
        self._group = group_by_length and padding != "max_length"
        if pin_memory and not torch.cuda.is_available():
            warnings.warn("pin_memory is True and there is no GPU: batches are not pinned", stacklevel=2)
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._part, self._parts = part, parts
        # In memory that worker processes share, which may live through several epochs; where the system has any.
        self._epoch = torch.zeros((), dtype=torch.int64)
        with suppress(RuntimeError, OSError):
            self._epoch.share_memory_()
        self._planned: tuple[int, list[np.ndarray]] | None = None

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-self.num_examples // self.batch_size)

    @property
    def num_tokens(self) -> int:
        return sum(int(self._lengths[rows].sum()) for rows in self._plan)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order that the next iteration takes; iterating again repeats it.

        Args:
            epoch: number of the epoch, at least 0.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch is {epoch!r}; it takes an integer of at least 0")
        self._epoch.fill_(epoch)

    @property
    def _plan(self) -> list[np.ndarray]:
        """The epoch's batches, as places in the split."""
        epoch = int(self._epoch)
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._make_plan(epoch)
        return self._planned[1]

    def _make_plan(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self._seed, epoch))
        order = rng.permutation(len(self.split)) if self._shuffle else np.arange(len(self.split))
        order = order[: self.num_examples]
        if self._group:
            run = _MEGA_BATCH * self.batch_size if self._shuffle else len(order)
            runs = [order[i : i + run] for i in range(0, len(order), run)]
            order = np.concatenate([rows[np.argsort(-self._lengths[rows], kind="stable")] for rows in runs])
        plan = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self._group and self._shuffle:
            plan = [plan[i] for i in rng.permutation(len(plan))]
        return plan

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for rows in self._plan:
            batch = self._batch(rows)
            yield {name: tensor.pin_memory() for name, tensor in batch.items()} if self._pin_memory else batch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Batch of that number of the epoch, in memory that is not pinned: for a ``DataLoader``'s workers."""
        return self._batch(self._plan[index])

    def first(self) -> dict[str, torch.Tensor]:
        """The epoch's first batch, all parts of it, in memory that is not pinned."""
        return self.take(self._plan[0])

    def take(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """The batch of those examples, (B,) places in the split: all of it, whatever part this process takes."""
        return self._batch(rows, rows)

    def _batch(self, whole: np.ndarray, own: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        if own is None:
            own = whole[self._part :: self._parts]  # where examples stand by length, equal work for every part
        rows = own if len(own) else whole[:1]
        lengths = self._lengths[rows]
        if self._padding == "max_length":
            width = self._max_length
        else:
            width = -(-int(self._lengths[whole].max()) // self._multiple) * self._multiple
            width = min(width, self._max_length or width)
        columns = np.arange(width)
        real = columns < lengths[:, None]
        tokens = (self.split.offsets[rows][:, None] + columns)[real]
        is_packed = self._padding == "packed"

        def laid_out(flat: np.ndarray, fill: int) -> torch.Tensor:
            if is_packed:
                return torch.from_numpy(flat[tokens].astype(np.int64)[None])
            values = np.full(real.shape, fill, dtype=np.int64)
            values[real] = flat[tokens]
            return torch.from_numpy(values)

        batch = {"input_ids": laid_out(self.split.input_ids, self._pad_token_id)}
        if self.split.token_type_ids is not None:
            batch["token_type_ids"] = laid_out(self.split.token_type_ids, 0)
        if is_packed:
            batch["position_ids"] = torch.from_numpy(np.broadcast_to(columns, real.shape)[real][None])
            batch["lengths"] = torch.from_numpy(lengths)
        else:
            batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
        if self.split.labels is not None:
            batch["labels"] = torch.from_numpy(self.split.labels[rows])
        batch["ids"] = torch.from_numpy(self.split.ids[rows])
        batch["index"] = torch.from_numpy(rows.copy())  # the plan is not for others to change
        if self._parts > 1:
            counts = [[len(part), self._lengths[part].sum()] for part in (own, whole)]
            batch["counts"] = torch.tensor(counts, dtype=torch.int64)
        return batch


def check_vocabulary(split: TokenizedSplit, model) -> None:
    """Raises a DataError that names the first example with a token, or a token type, that a model does not embed.

    On a GPU the embedding itself would end the process's use of it, by an assertion that names nothing.
    """
    embeddings = model.get_input_embeddings().num_embeddings
    sizes = {"input_ids": embeddings, "token_type_ids": getattr(model.config, "type_vocab_size", None)}
    for name, size in sizes.items():
        values = getattr(split, name)
        if values is None or not size or (known := values < size).all():
            continue
        place = int(np.argmin(known))
        example = int(np.searchsorted(split.offsets, place, side="right")) - 1
        raise DataError(
            f"split {split.split!r} of {split.task.name}: {name} of the example with id {split.ids[example]} hold "
            f"{values[place]}; this {type(model).__name__} takes 0 to {size - 1}: is the tokenizer another model's?"
        )


def num_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Real tokens of a batch."""
    if "lengths" not in batch and "attention_mask" not in batch:
        return batch["input_ids"].numel()
    return int(batch["lengths" if "lengths" in batch else "attention_mask"].sum())
