"""Ways to distil: LAD's baselines as objectives, and the registry of all that ``--method`` takes (:data:`STRATEGIES`).

All compare hidden states as LAD does, so that they differ in a student layer's target alone: every student layer, every
real token, mean squared errors, weighted and masked by the same settings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lad_fast.functional import LogitsLoss, check_flag, check_layers, fused_distill_loss, fused_hidden_loss
from lad_fast.gates import GateStack
from lad_fast.objective import HiddenObjective, LADObjective, every_skipth_layer

__all__ = ["STRATEGIES", "AttentionObjective", "LayerMapObjective", "Strategy"]

LAYER_MAPS = {
    "skip": every_skipth_layer,
    "last": lambda num_layers, num_student_layers: tuple(range(num_layers - num_student_layers, num_layers)),
}


class _UngatedObjective(HiddenObjective):
    """Targets straight from the teacher's layers: nothing but the student (and projections) is trained."""

    def __init__(self, num_layers: int, hidden_size: int, num_student_layers: int, **options) -> None:
        super().__init__(None, num_layers, hidden_size, num_student_layers, **options)
        self.num_layers, self.hidden_size = num_layers, hidden_size

    def _losses(self, student, teacher, logits: LogitsLoss, attention_mask, cu_seqlens, backend) -> Sequence[Tensor]:
        student, teacher, cu_seqlens = check_layers(
            student, teacher, self.num_layers, self.hidden_size, attention_mask, cu_seqlens
        )
        student, targets = self._pairs(student, teacher, attention_mask, cu_seqlens)
        hidden_losses = fused_hidden_loss(
            student, targets, attention_mask, self.hidden_weight, reduction="none", backend=backend
        )
        hidden_loss, logits_loss = hidden_losses.sum(), fused_distill_loss(*logits, backend=backend)
        return hidden_loss + logits_loss, hidden_loss, logits_loss, hidden_losses

    def _pairs(self, student, teacher, attention_mask, cu_seqlens) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The K student states and the K targets to compare."""
        raise NotImplementedError


class LayerMapObjective(_UngatedObjective):
    """Each student layer learns from one teacher layer, as in PKD (Sun et al. 2019, arXiv 1908.09355, section 3.2).

    ``hard * CE + soft * T^2 * KL + mu / K * sum_k mean((h_k - H_{t_k})^2)``. PKD compares the first token's states
    alone, for all student layers but the last; here all real tokens and all K layers count, as in LAD.

    Args:
        num_layers, hidden_size: L and D of the teacher.
        num_student_layers: K, from 1 to L.
        layer_map: "skip": ``t_k = k * (L // K)``, counted from 1; "last": the teacher's last K layers.
        normalize_states: divide each token's state, on both sides, by its L2 norm, as PKD's equation 7 does. Its
            squared distance is D times the mean taken here: ``hidden_weight`` has to be larger.
        **options: ``temperature``, ``soft_weight``, ``hard_weight``, ``hidden_weight``, ``regression``,
            ``student_hidden_size`` and ``backend`` of :class:`~lad_fast.LADObjective`.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        num_student_layers: int,
        layer_map: str = "skip",
        normalize_states: bool = False,
        **options,
    ) -> None:
        super().__init__(num_layers, hidden_size, num_student_layers, **options)
        if layer_map not in LAYER_MAPS:
            raise ValueError(f"layer_map is {layer_map!r}; it takes one of {', '.join(LAYER_MAPS)}")
        check_flag("normalize_states", normalize_states)
        self.layers = LAYER_MAPS[layer_map](num_layers, num_student_layers)
        self.normalize_states = normalize_states

    def extra_repr(self) -> str:
        return f"layers={self.layers!r}, normalize_states={self.normalize_states!r}, {super().extra_repr()}"

    def _pairs(self, student, teacher, attention_mask, cu_seqlens) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        targets = [teacher[layer] for layer in self.layers]
        if self.normalize_states:
            student, targets = (
                [F.normalize(_without_padding(_wide(h), attention_mask), dim=-1) for h in side]
                for side in (student, targets)
            )
        return student, targets


class AttentionObjective(_UngatedObjective):
    """Each student layer learns from a mixture of all teacher layers (ALP-KD: Passban et al. 2021, arXiv 2012.14022).

    ``hard * CE + soft * T^2 * KL + mu / K * sum_k mean((h_k - sum_j a_kj H_j)^2)`` where, of each example,
    ``a_kj = softmax_j(h_k[CLS] . H_j[CLS])`` over the L teacher layers: dot products of the first real token's states,
    unscaled, without parameters, as in ALP-KD. There the mixture is of those states alone and the loss compares them
    alone; here an example's weights mix all its tokens and the loss takes all real ones, as LAD's. Gradients run
    through the weights into the student, as there. Weights and mixtures are float32.

    Args:
        num_layers, hidden_size: L and D of the teacher.
        num_student_layers: K, from 1 to L.
        **options: as :class:`LayerMapObjective`.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """

    def _pairs(self, student, teacher, attention_mask, cu_seqlens) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        device = "cpu" if student[0].is_meta else student[0].device.type  # the meta device knows no autocast
        with torch.autocast(device, enabled=False):
            # (B, K, D) and (B, L, D)
            queries, keys = (_first_tokens(side, attention_mask, cu_seqlens) for side in (student, teacher))
            weights = torch.softmax(torch.einsum("bkd,bld->bkl", queries, keys.to(queries.dtype)), dim=-1)
            if cu_seqlens is not None:  # each token's example
                tokens = torch.arange(len(student[0]), device=cu_seqlens.device)
                weights = weights[torch.bucketize(tokens, cu_seqlens[1:-1], right=True)]
            states = torch.stack([_without_padding(_wide(h), attention_mask) for h in teacher], dim=1)
            return student, torch.einsum("bkl,bl...->kb...", weights.to(states.dtype), states).unbind()


def _wide(states: Tensor) -> Tensor:
    return states if states.dtype == torch.float64 else states.float()


def _without_padding(states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Zeros there: what padding holds, which need not be finite, must not reach a gradient."""
    return states if attention_mask is None else states.masked_fill((attention_mask == 0)[..., None], 0)


def _first_tokens(states: Sequence[Tensor], attention_mask, cu_seqlens) -> Tensor:
    """(B, layers, D) states of each example's first real token."""
    if cu_seqlens is not None:
        rows = cu_seqlens[:-1].clamp(max=len(states[0]) - 1)  # an empty example at the end has none
        return _wide(torch.stack([h[rows] for h in states], dim=1))
    if attention_mask is None:
        return _wide(torch.stack([h[:, 0] for h in states], dim=1))
    examples = torch.arange(len(attention_mask), device=attention_mask.device)
    columns = (attention_mask != 0).int().argmax(dim=1)
    found = _wide(torch.stack([h[examples, columns] for h in states], dim=1))
    return found.masked_fill((attention_mask == 0).all(dim=1)[:, None, None], 0)  # of padding alone: see above


@dataclass(frozen=True)
class Strategy:
    """A way to distil."""

    summary: str
    """What the student learns from, as ``--help`` says it."""
    make: Callable | None = None
    """Makes the objective of (settings, teacher's and student's Hugging Face configuration, options of every
    objective); None where no teacher takes part. ``settings`` is a :class:`~lad_fast.training.DistillConfig`."""
    uses_hidden_states: bool = True

    @property
    def uses_teacher(self) -> bool:
        return self.make is not None


def _sizes(teacher, student) -> dict[str, int]:
    return {
        "num_layers": teacher.num_hidden_layers,
        "hidden_size": teacher.hidden_size,
        "num_student_layers": student.num_hidden_layers,
        "student_hidden_size": student.hidden_size,
    }


def _make_lad(settings, teacher, student, **options) -> LADObjective:
    sizes = _sizes(teacher, student)
    gates = GateStack(
        sizes.pop("num_layers"), sizes.pop("hidden_size"), settings.max_length, settings.norm, settings.reverse
    )
    return LADObjective(gates, **sizes, hidden_weight=settings.hidden_weight, **options)


def _make_layer_map(layer_map: str, settings, teacher, student, **options) -> LayerMapObjective:
    return LayerMapObjective(
        **_sizes(teacher, student), layer_map=layer_map, normalize_states=settings.normalize_states,
        hidden_weight=settings.hidden_weight, **options,
    )  # fmt: skip


def _make_attention(settings, teacher, student, **options) -> AttentionObjective:
    return AttentionObjective(**_sizes(teacher, student), hidden_weight=settings.hidden_weight, **options)


def _make_logits(settings, teacher, student, **options) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return partial(fused_distill_loss, **options)


STRATEGIES = {
    "lad": Strategy("the logits, and all L hidden layers aggregated by gates (LAD)", _make_lad),
    "skip": Strategy("the logits and every (L // K)-th hidden layer (PKD)", partial(_make_layer_map, "skip")),
    "last": Strategy("the logits and the last K hidden layers (PKD)", partial(_make_layer_map, "last")),
    "attention": Strategy("the logits, and all L hidden layers mixed by attention (ALP-KD)", _make_attention),
    "logits": Strategy("the logits", _make_logits, uses_hidden_states=False),
    "none": Strategy("the labels alone", uses_hidden_states=False),
}
