"""The gate blocks of LAD as one module with stacked parameters."""

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lad_fast import reference

__all__ = ["GateStack"]

_FILE_NAME = "gates.safetensors"
_EDGE, _SATURATED, _COLLAPSED = 0.01, 0.95, 0.01  # see GateStack.condition
_PUBLISHED_NAMES = ("linear.weight", "linear.bias", "layernorm.weight", "layernorm.bias")


def check_inside(folder: Path, path: Path) -> None:
    """Raises a ValueError where a link leads out of the folder; in the hub's cache links lead to its blobs."""
    root = Path(os.path.realpath(folder))
    roots = (root, root.parents[1] / "blobs") if root.parent.name == "snapshots" else (root,)
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(allowed) for allowed in roots):
        raise ValueError(f"{path} leads out of the folder, to {target}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


def load_tensors(path: Path) -> dict:
    """What torch.save wrote to a file; only tensors are read, and none larger than the file.

    Raises:
        ValueError: anything else; nothing in it is run.
    """
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\3\4"  # a zip file's end alone would do for zipfile, not for PyTorch
    if not is_zip or not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no zip file, which torch.save writes and the published loop used")
    with zipfile.ZipFile(path) as file:
        claimed = sum(member.file_size for member in file.infolist())
    if claimed > path.stat().st_size:
        raise ValueError(f"{path} claims {claimed} bytes in {path.stat().st_size}; torch.save does not compress")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch's own text would say how to run what it refused
        reason = f"cannot be read as tensors alone ({type(error).__name__}); nothing in it was run"
        raise ValueError(f"{path} {reason}") from error


def _shapes(num_layers: int, hidden_size: int, seq_len: int, norm: str) -> dict[str, tuple[int, ...]]:
    gates = num_layers - 1
    affine = (gates, seq_len, hidden_size) if norm == "sequence" else (gates, hidden_size)
    weight = (gates, hidden_size, hidden_size)
    return {"weight": weight, "bias": (gates, hidden_size), "norm_weight": affine, "norm_bias": affine}


class GateStack(nn.Module):
    """The L - 1 gates that aggregate a teacher's L layers one after another (paper section 3.2).

    Gate i combines chain element i + 1 with the aggregate before it; chain element 0 passes through. With
    ``reverse`` the chain runs from the last teacher layer down to the first, and gates are numbered along it.

    Args:
        num_layers: teacher layers L, at least 2.
        hidden_size: hidden size D of the teacher.
        seq_len: longest sequence S of the "sequence" norm's affine, in tokens; unused by the "token" norm.
        norm: "sequence" (published: LayerNorm over the (S, D) of an example) or "token" (over D).
        reverse: run the chain from layer L down to 1.

    Attributes:
        weight: (L-1, D, D) float32, Xavier-uniform; row-major as in ``nn.Linear``.
        bias: (L-1, D) float32, as ``nn.Linear`` initialises it.
        norm_weight, norm_bias: (L-1, S, D) or (L-1, D) float32, ones and zeros.

    Raises:
        ValueError: a size below its minimum or an unknown norm.
    """

    def __init__(
        self, num_layers: int, hidden_size: int, seq_len: int = 128, norm: str = "sequence", reverse: bool = False
    ) -> None:
        super().__init__()
        sizes = (("num_layers", num_layers, 2), ("hidden_size", hidden_size, 1), ("seq_len", seq_len, 1))
        for name, value, least in sizes:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it takes an integer of at least {least}")
        if norm not in ("sequence", "token"):
            raise ValueError(f"norm is {norm!r}; it takes 'sequence' or 'token'")
        if not isinstance(reverse, bool):
            raise ValueError(f"reverse is {reverse!r}; it takes True or False")
        self.num_layers, self.hidden_size, self.seq_len = num_layers, hidden_size, seq_len
        self.norm, self.reverse = norm, reverse
        shapes = _shapes(num_layers, hidden_size, seq_len, norm)
        self.weight = nn.Parameter(torch.empty(shapes["weight"]))
        self.bias = nn.Parameter(torch.empty(shapes["bias"]))
        self.norm_weight = nn.Parameter(torch.empty(shapes["norm_weight"]))
        self.norm_bias = nn.Parameter(torch.empty(shapes["norm_bias"]))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the published start: Xavier-uniform weights, ``nn.Linear`` biases, affine 1 and 0."""
        bound = self.hidden_size**-0.5
        for weight, bias in zip(self.weight, self.bias, strict=True):
            nn.init.uniform_(bias, -bound, bound)
            nn.init.xavier_uniform_(weight)
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    @property
    def config(self) -> dict:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in ("num_layers", "hidden_size", "seq_len", "norm", "reverse")}

    def forward(self, hidden_states, layers=None, attention_mask=None, cu_seqlens=None, backend=None):
        """:func:`lad_fast.fused_aggregate` with these gates."""
        from lad_fast.functional import fused_aggregate

        return fused_aggregate(hidden_states, self, layers, attention_mask, cu_seqlens, backend=backend)

    @torch.no_grad()
    def contributions(
        self,
        hidden_states: Sequence[Tensor] | Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mean share of teacher layer j in aggregate l, before the norms (paper section 5, layer contributions).

        Args:
            hidden_states: L tensors (B, S, D), or one (L, B, S, D); packed, L tensors (tokens, D).
            attention_mask: (B, S), nonzero for real tokens; the mean takes real tokens only.
            cu_seqlens: (B + 1,) bounds of packed hidden states.

        Returns:
            (L, L) float32; row l belongs to aggregate l, column j to teacher layer j; each row sums to 1.

        Raises:
            TypeError, ValueError: as :func:`lad_fast.fused_aggregate`; also a mask without a real token.
        """
        from lad_fast.functional import check_looked_at

        check_looked_at(hidden_states, self, attention_mask, cu_seqlens)
        first = hidden_states[0].float()
        real = torch.ones(first.shape[:-1]) if attention_mask is None else attention_mask != 0
        real = real.to(first)[..., None]
        shares = [torch.ones_like(first)]  # of chain element j in the current aggregate, element by element
        result = first.new_zeros(self.num_layers, self.num_layers)
        result[0, 0] = 1
        for i, gate in enumerate(self._values(hidden_states, attention_mask, cu_seqlens)):
            shares = [share * (1 - gate) for share in shares] + [gate]
            means = [(share * real).sum() / (real.sum() * self.hidden_size) for share in shares]
            result[i + 1, : i + 2] = torch.stack(means)
        return result.flip(0, 1) if self.reverse else result

    @torch.no_grad()
    def condition(
        self,
        hidden_states: Sequence[Tensor] | Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> list[dict]:
        """How each gate fares on a batch: to be looked at now and then, since it waits for the device.

        A gate is saturated where 95 % of its values are within 0.01 of 0 or 1: there the sigmoid's slope is less than
        a twenty-fifth of its largest, so the gate hardly learns, and one side of the blend weighs under a hundredth:
        the layer is left out, or what came before it forgotten. It has collapsed where its values, feature by
        feature, vary by less than 0.01 from token to token (fresh gates: 0.1 to 0.2): it ignores its input, and the
        blend is the same everywhere.

        Args:
            hidden_states: L tensors (B, S, D), or one (L, B, S, D); packed, L tensors (tokens, D).
            attention_mask: (B, S), nonzero for real tokens, which alone are looked at.
            cu_seqlens: (B + 1,) bounds of packed hidden states.

        Returns:
            For each gate along the chain: "openness", the mean of its values; "closed" and "open", the shares of them
            below 0.01 and above 0.99; "variation", the standard deviation over tokens, its root mean square over
            features; "state", "saturated", "collapsed" or None.

        Raises:
            TypeError, ValueError: as :meth:`contributions`.
        """
        from lad_fast.functional import check_looked_at

        check_looked_at(hidden_states, self, attention_mask, cu_seqlens)
        found = []
        for gate in self._values(hidden_states, attention_mask, cu_seqlens):
            gate = gate.flatten(0, -2) if attention_mask is None else gate[attention_mask != 0]
            variation = gate.var(dim=0, correction=0).mean().sqrt()
            parts = (gate.mean(), (gate < _EDGE).float().mean(), (gate > 1 - _EDGE).float().mean(), variation)
            numbers = dict(zip(("openness", "closed", "open", "variation"), torch.stack(parts).tolist(), strict=True))
            state = None
            if numbers["closed"] + numbers["open"] >= _SATURATED:
                state = "saturated"
            elif numbers["variation"] < _COLLAPSED and len(gate) > 1:
                state = "collapsed"
            found.append(numbers | {"state": state})
        return found

    def _values(self, hidden_states: Sequence[Tensor] | Tensor, attention_mask, cu_seqlens) -> list[Tensor]:
        """The gates' values, like hidden states, along the chain, in float32."""
        aggregates = reference.aggregate([h.float() for h in hidden_states], self, None, attention_mask, cu_seqlens)
        if self.reverse:
            aggregates = aggregates[::-1]
        pairs = zip(aggregates, self.weight.float(), self.bias.float(), strict=False)  # the last aggregate has no gate
        return [torch.sigmoid(aggregate @ weight.T + bias) for aggregate, weight, bias in pairs]

    @classmethod
    def from_highway_gates(cls, gates: Sequence[nn.Module], reverse: bool = False) -> "GateStack":
        """Take over gate modules in the published form: ``linear`` (D, D) and ``layernorm`` over (S, D) or (D,).

        Args:
            gates: L modules in chain order. The published code makes one a layer and never uses the first.
            reverse: whether they were trained along the reversed chain.
        """
        states = [gate.state_dict() for gate in gates]
        return cls._from_state_dicts(states, [f"gates[{i}]" for i in range(len(states))], reverse)

    @classmethod
    def from_official_checkpoint(cls, directory: str | Path, step: int, reverse: bool = False) -> "GateStack":
        """Read the ``gate-{i}-{step}.pt`` files which the published training loop writes.

        Raises:
            FileNotFoundError: no gate of that step in the directory, or a gap in their numbers.
            ValueError: a file that holds anything but a gate's tensors (nothing in it is run), that leads out of the
                directory, or whose tensors do not fit the others'.
        """
        directory, states, paths = Path(directory), [], []
        while (path := directory / f"gate-{len(states)}-{step}.pt").is_file():
            check_inside(directory, path)
            states.append(load_tensors(path))
            paths.append(str(path))
        found = len(list(directory.glob(f"gate-*-{step}.pt")))
        if not states or found != len(states):
            raise FileNotFoundError(f"directory {directory} has {found} files gate-*-{step}.pt; missing {path.name}")
        return cls._from_state_dicts(states, paths, reverse)

    @classmethod
    def _from_state_dicts(cls, states: list[dict], names: list[str], reverse: bool) -> "GateStack":
        """A stack of the published gates in ``states``; ``names`` says in messages where each comes from."""
        if len(states) < 2:
            raise ValueError(f"gates holds {len(states)} gates; it takes one a teacher layer, at least 2")
        for name, state in zip(names, states, strict=True):
            if not isinstance(state, dict):
                raise ValueError(f"{name} holds a {type(state).__name__}; a published gate holds a dictionary")
            if set(state) != set(_PUBLISHED_NAMES):
                found = str(sorted(map(str, state)))[:200]
                raise ValueError(f"{name} holds {found}; a published gate holds {list(_PUBLISHED_NAMES)}")
            for key, value in state.items():
                check_tensor(f"{name}: {key}", value)
        affine = states[1]["layernorm.weight"]
        hidden_size = affine.shape[-1] if affine.dim() else 0
        shapes = [(hidden_size, hidden_size), (hidden_size,), (affine.shape[-2:]), (affine.shape[-2:])]
        for name, state in zip(names[1:], states[1:], strict=True):
            for key, shape in zip(_PUBLISHED_NAMES, shapes, strict=True):
                if (found := tuple(state[key].shape)) != tuple(shape) or not found:
                    raise ValueError(f"{name}: {key} is of shape {found}; it takes {tuple(shape)}")
        stack = cls(
            num_layers=len(states),
            hidden_size=affine.shape[-1],
            seq_len=affine.shape[0] if affine.dim() == 2 else 1,
            norm="sequence" if affine.dim() == 2 else "token",
            reverse=reverse,
        )
        with torch.no_grad():
            parameters = (stack.weight, stack.bias, stack.norm_weight, stack.norm_bias)
            for key, parameter in zip(_PUBLISHED_NAMES, parameters, strict=True):
                parameter.copy_(torch.stack([state[key] for state in states[1:]]))
        return stack

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``gates.safetensors`` with the configuration in its metadata."""
        from safetensors.torch import save_file

        if self.weight.is_meta:
            raise ValueError("gates are on the meta device and hold no numbers; move them by to_empty() and load some")
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(state, Path(folder) / _FILE_NAME, metadata={"config": json.dumps(self.config)})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "GateStack":
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            FileNotFoundError: no gates.safetensors in the folder.
            ValueError: a damaged file, one that leads out of the folder, or whose metadata is not what its tensors
                bear out; no memory is taken for a size that is only claimed.
        """
        from safetensors import safe_open

        path = Path(folder) / _FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(f"folder {folder} has no {_FILE_NAME}")
        check_inside(Path(folder), path)
        try:
            with safe_open(path, framework="pt") as file:
                config = _checked_config(file)
                with torch.random.fork_rng(devices=()):  # what is drawn here is replaced: nobody's next draw changes
                    stack = cls(**config)
                stack.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except Exception as error:  # a damaged file raises anything from SafetensorError to RecursionError
            raise ValueError(f"{path} cannot be read as gates: {_first_line(error)}") from error
        return stack


def check_tensor(name: str, value) -> None:
    """A strided float tensor that has the memory its size claims: an expanded one of a few bytes may claim any."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; it takes a tensor")
    is_dense = value.layout == torch.strided and not value.is_meta and value.is_floating_point()
    if not is_dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        kind = f"{value.dtype}, {value.layout}, on {value.device}, of shape {tuple(value.shape)}"
        raise ValueError(f"{name} is {kind}; it takes floats in memory of that size")
    if not value.isfinite().all():
        raise ValueError(f"{name} has values that are not finite; it takes finite ones")


def _checked_config(file) -> dict:
    """The configuration in a file's metadata, held against the shapes of its tensors, which safetensors checks."""
    metadata = file.metadata() or {}
    if "config" not in metadata:
        raise ValueError(f"it takes metadata with 'config'; it has {str(sorted(metadata))[:100]}")
    config = json.loads(metadata["config"])
    names = {"num_layers", "hidden_size", "seq_len", "norm", "reverse"}
    if not isinstance(config, dict) or set(config) != names or type(config["reverse"]) is not bool:
        raise ValueError(f"config is {str(config)[:200]}; it takes {sorted(names)}")
    for name in ("num_layers", "hidden_size", "seq_len"):
        if type(config[name]) is not int:
            raise ValueError(f"{name} is {str(config[name])[:100]}; it takes an integer")
    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    claimed = _shapes(*(config[name] for name in ("num_layers", "hidden_size", "seq_len", "norm")))
    if found != claimed:
        raise ValueError(f"config claims tensors of {claimed}; it holds {str(found)[:200]}")
    kinds = {file.get_slice(name).get_dtype() for name in found}
    if not kinds <= {"F64", "F32", "F16", "BF16"}:
        raise ValueError(f"its tensors are {sorted(kinds)}; it takes floats")
    return config
