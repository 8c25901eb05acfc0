"""Attention-map distillation without the maps: a fused loss between the attention maps of two models."""

from idrm_kernels.api import (
    MapLoss,
    attention_map_distance,
    attention_map_loss,
    attention_map_rows,
    available_implementations,
)
from idrm_kernels.inputs import DisentangledBias, PackedAttention, StoredMaps
from idrm_kernels.layout import MapLayout

__all__ = [
    "DisentangledBias",
    "MapLayout",
    "MapLoss",
    "PackedAttention",
    "StoredMaps",
    "attention_map_distance",
    "attention_map_loss",
    "attention_map_rows",
    "available_implementations",
]
