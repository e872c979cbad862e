"""The gate blocks of LAD as one module with stacked parameters."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lad_fast import reference

__all__ = ["GateStack"]

_FILE_NAME = "gates.safetensors"


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
        self.num_layers, self.hidden_size, self.seq_len = num_layers, hidden_size, seq_len
        self.norm, self.reverse = norm, bool(reverse)
        num_gates = num_layers - 1
        affine = (num_gates, seq_len, hidden_size) if norm == "sequence" else (num_gates, hidden_size)
        self.weight = nn.Parameter(torch.empty(num_gates, hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_gates, hidden_size))
        self.norm_weight = nn.Parameter(torch.empty(affine))
        self.norm_bias = nn.Parameter(torch.empty(affine))
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
    def contributions(self, hidden_states: Sequence[Tensor] | Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Mean share of teacher layer j in aggregate l, before the norms (paper section 5, layer contributions).

        Args:
            hidden_states: L tensors (B, S, D), or one (L, B, S, D).
            attention_mask: (B, S), 1 for real tokens; the mean takes real tokens only.

        Returns:
            (L, L) float32; row l belongs to aggregate l, column j to teacher layer j; each row sums to 1.
        """
        chain = [h.float() for h in hidden_states]
        aggregates = reference.aggregate(chain, self, None, attention_mask)
        if self.reverse:
            chain, aggregates = chain[::-1], aggregates[::-1]
        real = torch.ones(chain[0].shape[:-1]) if attention_mask is None else attention_mask
        real = real.to(chain[0])[..., None]
        shares = [torch.ones_like(chain[0])]  # of chain element j in the current aggregate, element by element
        result = chain[0].new_zeros(self.num_layers, self.num_layers)
        result[0, 0] = 1
        for i in range(self.num_layers - 1):
            gate = torch.sigmoid(aggregates[i] @ self.weight[i].float().T + self.bias[i].float())
            shares = [share * (1 - gate) for share in shares] + [gate]
            means = [(share * real).sum() / (real.sum() * self.hidden_size) for share in shares]
            result[i + 1, : i + 2] = torch.stack(means)
        return result.flip(0, 1) if self.reverse else result

    @classmethod
    def from_highway_gates(cls, gates: Sequence[nn.Module], reverse: bool = False) -> "GateStack":
        """Take over gate modules in the published form: ``linear`` (D, D) and ``layernorm`` over (S, D) or (D,).

        Args:
            gates: L modules in chain order. The published code makes one a layer and never uses the first.
            reverse: whether they were trained along the reversed chain.
        """
        return cls._from_state_dicts([gate.state_dict() for gate in gates], reverse)

    @classmethod
    def from_official_checkpoint(cls, directory: str | Path, step: int, reverse: bool = False) -> "GateStack":
        """Read the ``gate-{i}-{step}.pt`` files which the published training loop writes.

        Raises:
            FileNotFoundError: no gate of that step in the directory, or a gap in their numbers.
        """
        directory, states = Path(directory), []
        while (path := directory / f"gate-{len(states)}-{step}.pt").is_file():
            states.append(torch.load(path, map_location="cpu", weights_only=True))
        found = len(list(directory.glob(f"gate-*-{step}.pt")))
        if not states or found != len(states):
            raise FileNotFoundError(f"directory {directory} has {found} files gate-*-{step}.pt; missing {path.name}")
        return cls._from_state_dicts(states, reverse)

    @classmethod
    def _from_state_dicts(cls, states: list[dict], reverse: bool) -> "GateStack":
        names = ("linear.weight", "linear.bias", "layernorm.weight", "layernorm.bias")
        if len(states) < 2:
            raise ValueError(f"gates holds {len(states)} gates; it takes one a teacher layer, at least 2")
        for i, state in enumerate(states):
            if set(state) != set(names):
                raise ValueError(f"gates[{i}] holds {sorted(state)}; a published gate holds {list(names)}")
        affine = states[1]["layernorm.weight"]
        stack = cls(
            num_layers=len(states),
            hidden_size=affine.shape[-1],
            seq_len=affine.shape[0] if affine.dim() == 2 else 1,
            norm="sequence" if affine.dim() == 2 else "token",
            reverse=reverse,
        )
        with torch.no_grad():
            parameters = (stack.weight, stack.bias, stack.norm_weight, stack.norm_bias)
            for name, parameter in zip(names, parameters, strict=True):
                parameter.copy_(torch.stack([state[name] for state in states[1:]]))
        return stack

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``gates.safetensors`` with the configuration in its metadata."""
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(state, Path(folder) / _FILE_NAME, metadata={"config": json.dumps(self.config)})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "GateStack":
        """Read what :meth:`save_pretrained` wrote."""
        from safetensors import safe_open

        path = Path(folder) / _FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(f"folder {folder} has no {_FILE_NAME}")
        with safe_open(path, framework="pt") as file:
            stack = cls(**json.loads(file.metadata()["config"]))
            stack.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return stack
