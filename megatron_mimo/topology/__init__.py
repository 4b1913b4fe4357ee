"""Grids, process groups, rank roles and lanes. No tensors."""

from megatron_mimo.topology.layout import Edge, Layout, StageId, assign_items
from megatron_mimo.topology.sequence import SequenceSharding
from megatron_mimo.topology.spec import AXES, EXPERT_AXES, GridCoordinates, ModuleGridSpec

__all__ = [
    "AXES",
    "EXPERT_AXES",
    "Edge",
    "GridCoordinates",
    "Layout",
    "ModuleGridSpec",
    "SequenceSharding",
    "StageId",
    "assign_items",
]
