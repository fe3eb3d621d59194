"""Evaluation: COCO AP by pycocotools and VOC AP, from memory, per class."""
