"""Teachers and students: loading classifiers, building a shallower student, feeding and saving models."""

import copy
import json
import math
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from lad_fast.checkpoint import sync
from lad_fast.cpu import faster_forward
from lad_fast.gates import check_inside
from lad_fast.glue import Task, brief
from lad_fast.packed import ATTENTION, ENCODERS, Packing, first_position, pooled_logits, position_ids

__all__ = ["build_student", "load_classifier", "model_inputs", "put_back", "quiet", "run_model", "save_checkpoint"]


def load_classifier(
    name_or_path: str | Path, task: Task | None, fine_tuned: bool = False, **config
) -> tuple[PreTrainedModel, object]:
    """Load a BERT-like sequence classifier for a task, in float32.

    Args:
        name_or_path: a ``save_pretrained`` folder, which is read without the network, or a name on the hub.
        task: gives the classifier its width, label names and problem type; None leaves those of the checkpoint.
        fine_tuned: the checkpoint must be a finished classifier for the task. Otherwise its encoder must be
            there, and a classification head that is missing or of another width is drawn at random.
        **config: configuration entries to override, such as ``hidden_dropout_prob=0.0``.

    Returns:
        The model, in eval mode, and its tokenizer.

    Raises:
        ValueError: nothing loadable there, encoder weights missing, more tokens than embeddings, an unknown
            configuration entry; with ``fine_tuned``, a missing head or labels that are not the task's. Also a
            folder that names or links to files outside itself, that needs code of its own, or whose configuration
            is absurd or claims more than its weights bear out; no code is run, nor memory taken, for those.
    """
    source = _find_source(name_or_path)
    # Folders are barred from the network; code from the hub is never run, nor a pickle's.
    options = {"local_files_only": Path(source).is_dir(), "trust_remote_code": False}
    if options["local_files_only"]:
        _check_folder(name_or_path, Path(source))
    try:
        settings = AutoConfig.from_pretrained(source, **options)
        settings.return_dict = True  # outputs are read by name
        if options["local_files_only"]:
            _check_claimed_size(name_or_path, settings, Path(source))
        if task is not None:
            if fine_tuned:
                _check_labels(name_or_path, settings, task)
            set_labels(settings, task)
        for name, value in config.items():
            if not hasattr(settings, name):
                raise ValueError(f"it has no configuration entry {name!r}")
            setattr(settings, name, value)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        with quiet():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                source, config=settings, dtype=torch.float32, ignore_mismatched_sizes=True,
                output_loading_info=True, weights_only=True, **options,
            )  # fmt: skip
        num_tokens = len(tokenizer)
    except (_LabelError, _ClaimError):
        raise
    except Exception as error:  # a broken checkpoint raises anything from OSError to SafetensorError
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's own text would say how to run what it refused
            error = pickle.UnpicklingError("its weights hold more than tensors; nothing in them was run")
        first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]
        where = "" if options["local_files_only"] else " is no folder here and"
        raise ValueError(
            f"model {name_or_path}{where} could not be loaded: {type(error).__name__}: {first_line}"
        ) from error
    random = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    inner = [name for name in random if re.search(r"\.layer\.|embeddings\.", name)]
    if inner:
        raise ValueError(f"model {name_or_path} lacks {len(inner)} of its encoder's weights, such as {inner[0]}")
    if fine_tuned and random:
        raise ValueError(f"model {name_or_path} is no finished classifier: it lacks {', '.join(random)}")
    if num_tokens > model.config.vocab_size:
        raise ValueError(
            f"model {name_or_path} has a tokenizer of {num_tokens} tokens; its embeddings hold "
            f"{model.config.vocab_size}"
        )
    return model.eval(), tokenizer


def load_tokenizer(name_or_path: str | Path):
    """A tokenizer alone: of a ``save_pretrained`` folder, which is read without the network, or a name on the hub.

    Raises:
        ValueError: none loadable there; also a folder as :func:`load_classifier` refuses it.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        _check_folder(name_or_path, folder)
    source = str(folder if folder.is_dir() else name_or_path)
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=folder.is_dir(), trust_remote_code=False)
    except Exception as error:  # a broken folder raises anything from OSError to a Rust panic's
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
        raise ValueError(f"tokenizer {name_or_path} could not be loaded: {reason}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without Transformers' bars and load reports: what they tell is checked here or expected."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class _LabelError(ValueError):
    """Labels that are not the task's; the message is complete."""


class _ClaimError(ValueError):
    """A configuration that claims more than the weights bear out; the message is complete."""


_INT, _NUMBER = (int,), (int, float)
# Entries of config.json: pattern of the name, types, least and most. The counts are of modules and of label names,
# which are made one by one, before weights are looked at; other sizes are held against those.
_ENTRIES = (
    (r"num_hidden_layers|num_attention_heads|n_(layers|heads)", _INT, 1, 1000),
    (r"num_.*(layers|heads|groups)|inner_group_num", _INT, 0, 1000),
    (r"num_labels", _INT, 1, 100_000),
    (r"type_vocab_size", _INT, 0, 10**8),
    (r"(vocab|hidden|embedding|intermediate)_size|max_position_embeddings|dim|hidden_dim", _INT, 1, 10**8),
    (r"classifier_dropout|.*dropout(_prob)?", _NUMBER, 0, 1),
    (r"layer_norm_eps", _NUMBER, 1e-30, 1),
    (r"initializer_range", _NUMBER, 0, 100),
)


def _check_folder(name_or_path, folder: Path) -> None:
    """Raises a ValueError for what a folder from a stranger must not ask of Transformers."""
    for path in sorted((*folder.iterdir(), *folder.glob("additional_chat_templates/*"))):
        if not path.is_dir() and not path.is_file():
            raise ValueError(f"model {name_or_path}: {path.name} is no regular file")
        try:
            check_inside(folder, path)
        except ValueError as error:
            raise ValueError(f"model {name_or_path}: {str(error).removeprefix(f'{folder}/')}") from error
    if (folder / "adapter_config.json").exists():  # where peft is installed, it names another model to load
        raise ValueError(
            f"model {name_or_path} has an adapter_config.json; it takes a whole model, as PEFT's merge_and_unload makes"
        )
    config = folder / "config.json"  # a folder may be a tokenizer's alone
    for name, value in _entries(name_or_path, config) if os.path.lexists(config) else ():
        where, key = f"model {name_or_path}: config.json: {name}", name.rpartition(".")[2]
        for pattern, kinds, least, most in _ENTRIES:
            if value is None or name.startswith("label2id.") or not re.fullmatch(pattern, key):
                continue
            if type(value) not in kinds or not least <= value <= most:
                what = "an integer" if kinds is _INT else "a number"
                raise ValueError(f"{where} is {brief(value)}; it takes {what} from {least:g} to {most:g}")
        if "implementation" in name and isinstance(value, str) and "/" in value:
            raise ValueError(f"{where} is {brief(value)}; it takes no kernel of the hub, whose code would be run")
        if key == "transformers_weights":
            _check_names(where, value)
    if (path := folder / "tokenizer_config.json").exists():
        for name, value in _entries(name_or_path, path):
            where = f"model {name_or_path}: tokenizer_config.json: {name}"
            # Transformers of old noted where a tokenizer was read from: an absent file of another machine does no harm.
            is_leftover = isinstance(value, str) and Path(value).is_absolute() and not os.path.lexists(value)
            if re.match(r"\w+_files?\b|init_inputs\b", name) and not is_leftover:
                _check_names(where, value)
            if re.fullmatch(r"chat_template\.\d+\.name", name):  # a file's, when the tokenizer is saved
                _check_names(where, value)
            if name == "model_max_length" and value is not None and (type(value) not in _NUMBER or value < 1):
                raise ValueError(f"{where} is {brief(value)}; it takes a number of tokens")
    for path in folder.glob("*.index.json"):
        for name, value in _entries(name_or_path, path):
            if name.startswith("weight_map"):
                _check_names(f"model {name_or_path}: {path.name}: weight_map", value)


def _entries(name_or_path, path: Path) -> Iterator[tuple[str, object]]:
    """Every entry of a JSON object: its name, with those around it, and what it holds, lists' items apart."""
    where = f"model {name_or_path}: {path.name}"

    def refuse(constant: str):
        raise ValueError(f"holds {constant}, which is no number")

    def walk(name: str, value) -> Iterator[tuple[str, object]]:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where} holds Infinity at {name}; it takes finite numbers")
        if name:
            yield name, value
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in inner:
            yield from walk(f"{name}.{key}" if name else str(key), item)

    try:
        content = json.loads(path.read_text("utf-8"), parse_constant=refuse)
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {str(error).splitlines()[0][:200]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds a {type(content).__name__}; it takes an object")
    yield from walk("", content)


def _check_names(where: str, value) -> None:
    if isinstance(value, str) and (Path(value).name != value or value in ("", "..")):
        raise ValueError(f"{where} is {brief(value)}; it takes the plain name of a file in the folder")


def _check_claimed_size(name_or_path, config, folder: Path) -> None:
    """Raises a _ClaimError before Transformers draws weights that are missing or of another size, in any size claimed.

    It takes four times the files' bytes, as float32 has of weights in 8 bits, and 64 MiB for a head and a pooler.
    """
    stored = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    try:
        with torch.device("meta"), quiet():
            skeleton = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except RuntimeError as error:  # products of sizes beyond 64 bits
        raise _ClaimError(f"model {name_or_path}: config.json claims sizes that no model has: {error}"[:400]) from error
    claimed = 4 * sum(parameter.numel() for parameter in skeleton.parameters())
    if claimed > 4 * stored + 2**26:
        raise _ClaimError(
            f"model {name_or_path}: config.json claims a model of {claimed >> 20} MB; its weights are {stored >> 20} MB"
        )


def _find_source(name_or_path: str | Path) -> str:
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if (path / "best/config.json").is_file():
            raise ValueError(f"model {name_or_path} is a run's folder; its best model is {path / 'best'}")
        if not (path / "config.json").is_file():
            raise ValueError(f"model {name_or_path} is a folder without config.json; it takes a save_pretrained folder")
        return str(path)
    name = str(name_or_path)
    is_hub_name = isinstance(name_or_path, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
    if path.exists() or not is_hub_name:
        raise ValueError(f"model {name_or_path} is not a folder; it takes a save_pretrained folder or a hub name")
    return name


def _check_labels(name_or_path, config, task: Task) -> None:
    """A finished classifier has the task's classes, and in the task's order where it names them."""

    def plain(names: Sequence) -> list[str]:
        """Without what spellings differ in, where names still differ then, as "c" and "c++" do not."""
        names = [str(name) for name in names]
        short = [re.sub(r"[\W_]", "", name.lower()) for name in names]
        return short if len(set(short)) == len(short) and all(short) else names

    if config.num_labels != task.num_labels:
        raise _LabelError(
            f"model {name_or_path} has num_labels = {config.num_labels}; task {task.name} takes {task.num_labels}"
        )
    names, labels = plain(config.id2label[i] for i in range(config.num_labels)), plain(task.labels)
    numbers = [str(i) for i in range(config.num_labels)]
    # Where the task's own are numbers, as of stars, a model's numbers are names too.
    unnamed = names == [f"label{i}" for i in numbers] or (
        names == numbers and not all(label.isdecimal() for label in labels)
    )
    if not task.is_regression and not unnamed and names != labels:
        raise _LabelError(
            f"model {name_or_path} has the labels {list(config.id2label.values())}; "
            f"task {task.name} takes {list(task.labels)}, in this order"
        )


def class_names(model: PreTrainedModel) -> tuple[str, ...]:
    """A classifier's classes in order; none for regression."""
    if model.config.problem_type == "regression" or model.config.num_labels == 1:
        return ()
    return tuple(str(model.config.id2label[i]) for i in range(model.config.num_labels))


def has_labels(config, task: Task) -> bool:
    """Whether a configuration's classes are the task's, in its order: unnamed, or by names that differ in spelling."""
    try:
        _check_labels("", config, task)
    except _LabelError:
        return False
    return True


def set_labels(config, task: Task) -> None:
    config.id2label = dict(enumerate(task.labels or ("score",)))
    config.label2id = {name: i for i, name in config.id2label.items()}
    config.problem_type = "regression" if task.is_regression else "single_label_classification"


def encoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The encoder's layers and their module name inside ``model.base_model``.

    Raises:
        ValueError: no list of ``num_hidden_layers`` modules in the model, as where layers share weights; or several
            beside each other, as where each has a part of every layer.
    """
    num_layers = getattr(model.config, "num_hidden_layers", None)
    found = {
        name: module
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    }
    first = next(iter(found), "")
    beside = sum(name.rpartition(".")[0] == first.rpartition(".")[0] for name in found)
    if beside != 1:
        raise ValueError(
            f"{type(model).__name__} has {'several lists' if beside else 'no list'} of {num_layers} encoder layers; it "
            "takes a BERT-like model"
        )
    return first, found[first]


def build_student(
    teacher: PreTrainedModel,
    num_layers: int,
    init: str = "teacher",
    layer_map: Sequence[int] | None = None,
    pretrained: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """A student like the teacher with K of its L layers.

    Args:
        teacher: a sequence classifier: BERT, RoBERTa, ELECTRA, DistilBERT or alike.
        num_layers: K, from 1 to L.
        init: "teacher": embeddings, mapped layers, pooler and classifier are the teacher's. "published":
            mapped layers and pooler are those of ``pretrained``; embeddings and classifier stay random.
            "random": all random (normal with the configuration's ``initializer_range``).
        layer_map: 0-based source layer of each student layer; default ``range(skip - 1, L, skip)`` with
            ``skip = L // K``.
        pretrained: the model before fine-tuning, with or without a head; for "published" only.

    Returns:
        A float32 model of the teacher's class, on the teacher's device; it shares no memory with its sources.

    Raises:
        ValueError: an argument that does not fit, or a model whose layers cannot be told apart.
    """
    teacher = getattr(teacher, "_orig_mod", teacher)  # of what torch.compile returned
    if hasattr(teacher, "merge_and_unload"):
        raise ValueError("teacher is under PEFT's adapters; it takes what their merge_and_unload returns")
    prefix, teacher_layers = encoder_layers(teacher)
    total = len(teacher_layers)
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or not 1 <= num_layers <= total:
        raise ValueError(f"num_layers is {num_layers!r}; the teacher's {total} layers take 1 to {total}")
    if init not in ("teacher", "published", "random"):
        raise ValueError(f"init is {init!r}; it takes 'teacher', 'published' or 'random'")
    skip = total // num_layers
    layer_map = list(range(skip - 1, total, skip)[:num_layers] if layer_map is None else layer_map)
    if len(layer_map) != num_layers or not all(layer in range(total) for layer in layer_map):
        raise ValueError(f"layer_map is {layer_map}; it takes num_layers = {num_layers} layers from 0 to {total - 1}")
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = num_layers
    for name in ("layer_types", "attention_window"):  # ModernBERT's and Longformer's, of each layer its own
        if isinstance(value := getattr(config, name, None), list) and len(value) == total:
            setattr(config, name, [value[layer] for layer in layer_map])
    try:
        student = type(teacher)(config)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{type(teacher).__name__} takes no {num_layers} of its {total} layers: {error}") from error
    _, student_layers = encoder_layers(student)
    if init == "teacher":
        outside = f"{teacher.base_model_prefix}.{prefix}."
        kept = {name: value for name, value in teacher.state_dict().items() if not name.startswith(outside)}
        _load("teacher outside its layers", student, {**student.state_dict(), **kept})
        source_layers = teacher_layers
    elif init == "published":
        if pretrained is None:
            raise ValueError("pretrained is None; init 'published' takes the model before fine-tuning")
        _, source_layers = encoder_layers(pretrained)
        if len(source_layers) != total:
            raise ValueError(f"pretrained has {len(source_layers)} layers; the teacher has {total}")
        pooler, source_pooler = (getattr(model.base_model, "pooler", None) for model in (student, pretrained))
        if pooler is not None and source_pooler is not None:
            _load("pretrained's pooler", pooler, source_pooler.state_dict())
    if init != "random":
        for target, source in zip(student_layers, layer_map, strict=True):
            name = f"{'teacher' if init == 'teacher' else 'pretrained'}'s layer {source}"
            _load(name, target, source_layers[source].state_dict())
    return student.to(teacher.device)


def _load(name: str, target: nn.Module, weights: dict[str, Tensor]) -> None:
    try:
        target.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{name} does not fit the student's: {reason}") from error


def most_tokens(model: PreTrainedModel) -> float:
    """Of an example: as many as the model has positions; infinity where its configuration does not tell."""
    return getattr(model.config, "max_position_embeddings", math.inf) - first_position(model)


def check_max_length(model: PreTrainedModel, max_length: int) -> None:
    """Raises a ValueError for examples of more tokens than the model takes."""
    if max_length > (most := most_tokens(model)):
        raise ValueError(f"max_length is {max_length}; this model takes at most {most} tokens")


def check_unshared(student: nn.Module, teacher: nn.Module) -> None:
    """Raises a ValueError for models that share a parameter's memory: the teacher would train, or the student stay."""

    def places(model: nn.Module) -> dict[tuple, str]:
        named = ((name, p) for name, p in model.named_parameters() if p.numel() and not p.is_meta)
        return {(p.device, p.untyped_storage().data_ptr()): name for name, p in named}

    theirs = places(teacher)
    for place, name in places(student).items():
        if place in theirs:
            raise ValueError(
                f"student's {name} is the teacher's {theirs[place]}; the student takes parameters of its own: "
                "copy.deepcopy the modules it takes over"
            )


def model_inputs(
    model: PreTrainedModel, batch: dict[str, Tensor], teacher: PreTrainedModel | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Forward arguments for a batch on the model's device; batches on the CPU are moved without a wait.

    Args:
        model: a sequence classifier.
        teacher: another one that is to take the arguments, too.
        batch: input_ids, attention_mask (without it every token is real) and, where the model takes them,
            token_type_ids; each (B, S). Or a packed batch of :class:`~lad_fast.data.Batches`.

    Returns:
        Arguments for :func:`run_model`, and the attention mask (B, S) or None where every token is real.

    Raises:
        ValueError: a batch on the CPU with a token that the model does not embed.
    """
    _check_tokens(model, batch)
    move = {"device": model.device, "non_blocking": True}
    names = ("input_ids", "token_type_ids", "position_ids")
    inputs = {name: batch[name].to(**move) for name in names if name in batch}
    if "lengths" in batch:
        return inputs | {"packing": Packing.from_lengths(batch["lengths"], model.device)}, None
    if "attention_mask" not in batch or batch["attention_mask"].all():
        return inputs, None
    mask = batch["attention_mask"].to(**move)
    # Transformers asks a (B, S) mask whether it is all ones, which waits for the device; not so a 4-D one.
    takes_scores = _takes_mask_of_scores(model) and (teacher is None or _takes_mask_of_scores(teacher))
    inputs["attention_mask"] = mask.bool()[:, None, None, :] if takes_scores else mask
    return inputs, mask


def _takes_mask_of_scores(model: PreTrainedModel) -> bool:
    """Whether a (B, 1, 1, S) bool mask means to a model what a (B, S) one does.

    Others make more of a mask: ModernBERT cuts windows from it, a pooling weighs by it, eager attention adds it.
    """
    is_known = model.config.model_type in ENCODERS | {"albert", "distilbert"}
    return is_known and model.config._attn_implementation in ("sdpa", ATTENTION)


def _check_tokens(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    tokens, size = batch["input_ids"], model.get_input_embeddings().num_embeddings
    if tokens.is_cpu and not 0 <= (most := int(tokens.max())) < size:
        row, column = (int(i) for i in (tokens == most).nonzero()[0])
        if "lengths" in batch:
            row = int((batch["lengths"].cumsum(0) <= column).sum())
        example = f"of the example with id {batch['ids'][row]}" if "ids" in batch else f"[{row}]"
        raise ValueError(f"input_ids {example} hold {most}; this {type(model).__name__} takes 0 to {size - 1}")


def hidden_states_by_name(model: PreTrainedModel, output_hidden_states: bool = True) -> dict[str, bool]:
    """Options of a model's forward for an output with names; all forwards know the first, and few need the second."""
    options = {"output_hidden_states": output_hidden_states}
    return options if getattr(model.config, "return_dict", True) else options | {"return_dict": True}


def run_model(
    model: PreTrainedModel, inputs: dict, output_hidden_states: bool = False
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Logits (B, C) and, if asked for, the hidden states behind each layer: (B, S, D) each, packed (T, D).

    Args:
        model: a sequence classifier; for packed inputs one with :func:`~lad_fast.packed.enable_packing`.
        inputs: what :func:`model_inputs` gives.

    Raises:
        ValueError: a model without one hidden state a layer beside the embeddings'.
    """
    packing = inputs.get("packing")
    with faster_forward(model):
        if packing is None:
            output = model(**inputs, **hidden_states_by_name(model, output_hidden_states))
            logits = output.logits
        else:
            positions = position_ids(model, inputs["input_ids"], inputs["position_ids"])
            inputs = inputs | {"position_ids": positions}
            output = model.base_model(**inputs, **hidden_states_by_name(model, output_hidden_states))
            logits = pooled_logits(model, output.last_hidden_state, packing)
    if not output_hidden_states:
        return logits, None
    states, num_layers = output.hidden_states, model.config.num_hidden_layers
    if states is None or len(states) != num_layers + 1:
        found = "no hidden states" if states is None else f"{len(states)} hidden states"
        raise ValueError(
            f"{type(model).__name__} of {num_layers} layers gives {found}; LAD takes {num_layers + 1}: "
            "the embeddings' and one a layer"
        )
    return logits, states[1:] if packing is None else tuple(state[0] for state in states[1:])


@contextmanager
def new_folder(output_dir: Path) -> Iterator[Path]:
    """A context with a folder to fill, whose files come to ``output_dir`` when it ends without an exception.

    A new ``output_dir`` appears in one move. An empty one may be where the process stands, or a mount, and nothing
    replaces those: it gets the files one by one.

    Raises:
        ValueError: something is in the way.
    """
    output_dir = output_dir.absolute()  # of "." it knows name and parent
    is_there = output_dir.exists()
    if is_there and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"output_dir is {output_dir}, which is there; it takes a new or an empty folder")
    where = output_dir if is_there else output_dir.parent
    where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}.", dir=where) as partial:
        folder = Path(partial) / "new"
        folder.mkdir()
        yield folder
        if is_there:
            for path in folder.iterdir():
                path.replace(output_dir / path.name)
        else:
            folder.replace(output_dir)


def _replaced(folder: Path) -> Path:
    """The name of what is being replaced by :func:`save_checkpoint`."""
    return folder.with_name(f".{folder.name}.old")


def put_back(folder: Path) -> None:
    """Undo what :func:`save_checkpoint` had done when it was killed between its two renames."""
    if _replaced(folder).exists() and not folder.exists():
        _replaced(folder).rename(folder)


def save_checkpoint(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer=None,
    gates=None,
    state: dict | None = None,
    card: str | None = None,
) -> None:
    """Write or replace a ``save_pretrained`` folder in one move: a reader never finds half of it.

    Args:
        folder: where to; its parents are made.
        model, tokenizer: saved by ``save_pretrained``; no tokenizer, no tokenizer files.
        gates: a :class:`lad_fast.GateStack`, written as gates.safetensors.
        state: written as training.json.
        card: written as README.md; see :func:`lad_fast.card.model_card`.

    Raises:
        OSError: no room, or another failure to write; what was there is left as it was.
    """
    folder = Path(folder)
    put_back(folder)
    partial, old = folder.with_name(f".{folder.name}.partial"), _replaced(folder)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with quiet():
            model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if gates is not None:
            gates.save_pretrained(partial)
        if state is not None:
            (partial / "training.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            sync(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder} could not be written ({error})") from error
    except Exception:  # of a model or tokenizer whose own saving fails
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
