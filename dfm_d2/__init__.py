"""Discriminative flow matching via local generative predictors, a Detectron2 project."""

__version__ = "0.1.0"
