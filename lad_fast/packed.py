"""Packed batches: the examples' real tokens end to end, no padding, through Hugging Face's attention interface.

Everything in such an encoder (:data:`ENCODERS`) but attention treats each token on its own, so a batch of B examples is
one row (1, T) of T tokens. Attention is told where examples end: on a GPU in half precision a flash kernel takes the
bounds themselves, if it takes the heads (:func:`has_flash`); elsewhere queries, keys and values alone are spread out to
(B, S) and back.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["Packing", "can_pack", "enable_packing", "has_flash", "packs_fast", "pooled_logits", "position_ids"]

ATTENTION = "lad_fast_packed"
ENCODERS = frozenset(
    {
        "bert", "camembert", "data2vec-text", "electra", "ernie", "roberta", "roberta-prelayernorm", "roc_bert",
        "xlm-roberta", "xlm-roberta-xl",
    }
)  # fmt: skip
"""Kinds of models (``config.model_type``) that look across tokens in attention alone, and there by Transformers'
interface. A head tells neither: MPNet's biases and MobileBERT's trigrams reach into the next example."""


class Packing(NamedTuple):
    """Where the B examples of a packed batch lie.

    Attributes:
        cu_seqlens: (B + 1,) int32 bounds on the model's device, from 0 to T.
        max_length: tokens of the longest example, S.
        cells: (T,) int64, each token's place in a (B, S) grid laid out in a row.
        real: (B, 1, 1, S) bool, which cells of that grid hold a token.
    """

    cu_seqlens: Tensor
    max_length: int
    cells: Tensor
    real: Tensor

    @classmethod
    def from_lengths(cls, lengths: Tensor, device: torch.device) -> "Packing":
        """From (B,) int64 numbers of tokens on the CPU."""
        width = int(lengths.max())
        real = torch.arange(width) < lengths[:, None]
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        cells = real.flatten().nonzero().flatten()
        move = {"device": device, "non_blocking": True}
        return cls(cu_seqlens.to(**move), width, cells.to(**move), real[:, None, None].to(**move))


def _attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, dropout=0.0, scaling=None, packing=None, **kwargs
) -> tuple[Tensor, None]:
    """Attention (1, heads, T, D / heads) within the examples of ``packing``; without it, Transformers' SDPA."""
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # (T, heads, D / heads)
    if has_flash(query.device, query.dtype, query.shape[-1]):
        output = _flash(query, key, value, packing, dropout, scaling)
    else:
        output = _spread(query, key, value, packing, dropout, scaling)
    return output[None], None


def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether PyTorch's flash kernel takes packed batches there, forward and backward; the heads as they are, since it
    pads none."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    # Properties, which torch.compile can read, and the capability it cannot. Wider heads' backward is for some GPUs.
    return torch.cuda.get_device_properties(device).major >= 8 and head_dim % 8 == 0 and head_dim <= 192


def _flash(query, key, value, packing: Packing, dropout: float, scaling: float | None) -> Tensor:
    # What torch.nn.attention.varlen runs, which itself offers no dropout (nor, before 2.12, a scale).
    bounds, longest = packing.cu_seqlens, packing.max_length
    return torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, dropout, False, False, scale=scaling
    )[0]


def _spread(query, key, value, packing: Packing, dropout: float, scaling: float | None) -> Tensor:
    batch_size, width = packing.real.shape[0], packing.real.shape[-1]

    def grid(states: Tensor) -> Tensor:
        cells = states.new_zeros(batch_size * width, *states.shape[1:]).index_copy(0, packing.cells, states)
        return cells.view(batch_size, width, *states.shape[1:]).transpose(1, 2)

    output = F.scaled_dot_product_attention(
        grid(query), grid(key), grid(value), attn_mask=packing.real, dropout_p=dropout, scale=scaling
    )
    return output.transpose(1, 2).flatten(0, 1).index_select(0, packing.cells)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # for padded batches, with evaluation among them


def can_pack(model: PreTrainedModel) -> bool:
    """Whether the model is one of :data:`ENCODERS` whose head reads nothing but each example's first token, in a way
    known here."""
    return model.config.model_type in ENCODERS and _head(model) is not None


def packs_fast(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed batches save the model more than they cost: their attention needs no padding either."""
    heads = getattr(model.config, "num_attention_heads", 1)
    return can_pack(model) and has_flash(device, dtype, model.config.hidden_size // heads)


def enable_packing(model: PreTrainedModel) -> None:
    """Let a model take packed batches, and padded ones as before. What ``save_pretrained`` writes is unchanged.

    Raises:
        ValueError: a model whose encoder or head is not known here.
    """
    if not can_pack(model):
        raise ValueError(
            f"padding is 'packed'; it takes a BERT-, RoBERTa- or ELECTRA-like classifier, not a {type(model).__name__}"
        )
    model.set_attn_implementation(ATTENTION)


def first_position(model: PreTrainedModel) -> int:
    """The position id of an example's first token: RoBERTa and its kin count from behind the padding id."""
    embeddings = getattr(model.base_model, "embeddings", None)
    return embeddings.padding_idx + 1 if hasattr(embeddings, "create_position_ids_from_input_ids") else 0


def position_ids(model: PreTrainedModel, input_ids: Tensor, places: Tensor) -> Tensor:
    """(1, T) as the model counts them, from tokens' places within their examples: RoBERTa's kin pass over a padding
    token that stands in a text, and give it the padding id."""
    if not (first := first_position(model)):
        return places
    is_counted = input_ids != first - 1
    before = is_counted.cumsum(-1) - is_counted.long()  # in the batch
    starts = torch.arange(input_ids.shape[1], device=input_ids.device) - places
    return torch.where(is_counted, first + before - before.gather(1, starts), first - 1)


def pooled_logits(model: PreTrainedModel, last_hidden_state: Tensor, packing: Packing) -> Tensor:
    """Logits (B, C) from the last hidden state (1, T, D), as the model's own head gives them."""
    first = last_hidden_state[0].index_select(0, packing.cu_seqlens[:-1])[:, None]
    return _head(model)(first)


def _head(model: PreTrainedModel):
    """What comes behind the encoder, as a function of (B, 1, D); None for an unknown one."""
    pooler, classifier = getattr(model.base_model, "pooler", None), getattr(model, "classifier", None)
    # BERT's pooler picks the first token itself; ALBERT's, a bare Linear, has it picked outside.
    if hasattr(pooler, "dense") and isinstance(classifier, torch.nn.Linear) and hasattr(model, "dropout"):
        return lambda first: classifier(model.dropout(pooler(first)))
    if pooler is None and hasattr(classifier, "out_proj"):  # RoBERTa's and ELECTRA's heads take states (B, S, D)
        return classifier
    return None
