"""Interaction of queries with their grids by matrices that each query makes (Sparse R-CNN)."""

from dfm_kernels.dynamic_interaction.op import dynamic_interaction

__all__ = ["dynamic_interaction"]
