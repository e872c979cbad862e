"""Fast Layer-wise Adaptive Distillation (LAD) of BERT students."""

from lad_fast import reference
from lad_fast.functional import fused_aggregate, fused_distill_loss, fused_hidden_loss
from lad_fast.gates import GateStack
from lad_fast.objective import LADObjective, LADOutput
from lad_fast.strategies import AttentionObjective, LayerMapObjective

__version__ = "0.1.0"

__all__ = [
    "AttentionObjective",
    "GateStack",
    "LADObjective",
    "LADOutput",
    "LayerMapObjective",
    "fused_aggregate",
    "fused_distill_loss",
    "fused_hidden_loss",
    "reference",
]
