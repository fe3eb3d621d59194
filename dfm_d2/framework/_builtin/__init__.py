"""The subset of Detectron2 that dfm_d2 calls, under Detectron2's names, for machines without Detectron2.

Written on fvcore, iopath and torchvision. Same config keys, parameter names, checkpoints and numbers:
contract and golden tests (tests/framework) hold it to the real Detectron2.
"""
