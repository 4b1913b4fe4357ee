"""Grids, process groups, rank roles and lanes. No tensors."""

from megatron_mimo.topology.dispatch import assign_balanced, balanced, dispatch_domains
from megatron_mimo.topology.layout import Domain, Edge, Layout, StageId, assign_items
from megatron_mimo.topology.sequence import SequenceCut, SequenceSharding
from megatron_mimo.topology.spec import AXES, EXPERT_AXES, GridCoordinates, ModuleGridSpec

__all__ = [
    "AXES",
    "EXPERT_AXES",
    "Domain",
    "Edge",
    "GridCoordinates",
    "Layout",
    "ModuleGridSpec",
    "SequenceCut",
    "SequenceSharding",
    "StageId",
    "assign_balanced",
    "assign_items",
    "balanced",
    "dispatch_domains",
]
