"""FCOS, RetinaNet and Faster R-CNN of torchvision on this project's backbones, and the task that trains them.

Loader, optimizer, precision, checkpoints and evaluator are those of the other detectors. Heads, anchors,
assignment, losses and NMS are torchvision's with their defaults, which are meant for images of 800 pixels:
RetinaNet and the region proposals match an object that fits no anchor to its best one. What is changed:

- torchvision neither resizes nor normalises: images come as the loader of all methods makes them.
- FCOS and RetinaNet have p3 to p5 of the backbone and P6, P7 of torchvision, Faster R-CNN p2 to p5 and their
  maximum; what heads answer is float32, as its box coders round anchors to the precision of the answer.
- Scores above MODEL.DFM.SAMPLER.SCORE_THRESH count, and TEST.DETECTIONS_PER_IMAGE of them, as for all.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from dfm_d2.detection.task import DETECTION
from dfm_d2.flow import at_least_float32
from dfm_d2.framework import META_ARCH_REGISTRY, Boxes, Instances, build_backbone, detector_postprocess
from dfm_d2.local_update import SHARED_BLOCK, BlockLosses, HandOver

Prepared = tuple[list[Tensor], list[dict[str, Tensor]]]


class Pyramid(nn.Module):
    """A Detectron2 backbone with torchvision's further levels, as torchvision's detectors take it."""

    def __init__(self, fpn: nn.Module, levels: Sequence[str], extra: nn.Module):
        super().__init__()
        self.fpn, self.levels, self.extra = fpn, list(levels), extra
        self.out_channels = fpn.output_shape()[levels[0]].channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Float32 maps, by number, of images `(B, 3, H, W)`."""
        found = self.fpn(images)
        chosen = [found[name] for name in self.levels]
        maps, _ = self.extra(list(chosen), chosen, list(self.levels))
        return OrderedDict((str(k), at_least_float32(x)) for k, x in enumerate(maps))


class Peer(nn.Module):
    """A detector of torchvision, of one block: what the engine asks of a model, see LocallyTrainable."""

    backbone_prefix = "detector.backbone.fpn.bottom_up"
    maker: type[nn.Module]
    levels: Sequence[str] = ("p3", "p4", "p5")
    background = 0  # how many labels it has before the first class

    def __init__(self, cfg):
        super().__init__()
        fpn, channels = build_backbone(cfg), cfg.MODEL.FPN.OUT_CHANNELS
        is_retina_like = self.maker is not FasterRCNN
        extra = LastLevelP6P7(channels, channels) if is_retina_like else LastLevelMaxPool()
        pixels = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        backbone = Pyramid(fpn, self.levels, extra)
        self.detector = self.maker(backbone, cfg.MODEL.DFM.NUM_CLASSES + self.background, **pixels)
        self.detector.transform.resize = lambda image, target: (image, target)
        ends = self.detector if is_retina_like else self.detector.roi_heads
        ends.score_thresh = cfg.MODEL.DFM.SAMPLER.SCORE_THRESH
        ends.detections_per_img = cfg.TEST.DETECTIONS_PER_IMAGE
        for head in [ends.head] if is_retina_like else [self.detector.rpn.head, ends.box_predictor]:
            head.register_forward_hook(lambda module, inputs, answer: tree_map(at_least_float32, answer))
        self.register_buffer("pixel_mean", torch.tensor(cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(cfg.MODEL.PIXEL_STD).view(-1, 1, 1), False)
        self.to(cfg.MODEL.DEVICE)

    def blocks(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """All parameters as the shared block."""
        return {SHARED_BLOCK: [(name, p) for name, p in self.named_parameters() if p.requires_grad]}

    def prepare(self, batched_inputs: Sequence[dict], iteration: int) -> Prepared:
        """Normalised images, and their targets where they have any."""
        device, found = self.pixel_mean.device, [x["instances"] for x in batched_inputs if "instances" in x]
        images = [(x["image"].to(device).float() - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        boxes = [one.gt_boxes.tensor.to(device) for one in found]
        labels = [one.gt_classes.to(device) + self.background for one in found]
        return images, [{"boxes": b, "labels": k} for b, k in zip(boxes, labels)]

    def block_losses(self, prepared: Prepared, hand_over: HandOver) -> Iterator[BlockLosses]:
        """One item: `loss_classification/shared`, ..."""
        losses = self.detector(*prepared).items()
        named = {f"loss_{key.removeprefix('loss_')}/{SHARED_BLOCK}": value for key, value in losses}
        yield BlockLosses((SHARED_BLOCK,), named)

    @torch.no_grad()
    def forward(self, batched_inputs: Sequence[dict]) -> list[dict]:
        """Detections `[{"instances": Instances}]`, in original image coordinates; in evaluation mode only."""
        images, _ = self.prepare(batched_inputs, 0)
        results = []
        for item, image, found in zip(batched_inputs, images, self.detector(images)):
            fields = {"pred_boxes": Boxes(found["boxes"]), "scores": found["scores"]}
            instances = Instances(image.shape[1:], **fields, pred_classes=found["labels"] - self.background)
            results.append({"instances": detector_postprocess(instances, item["height"], item["width"])})
        return results


@META_ARCH_REGISTRY.register()
class TorchvisionFCOS(Peer):
    maker = FCOS


@META_ARCH_REGISTRY.register()
class TorchvisionRetinaNet(Peer):
    maker = RetinaNet


@META_ARCH_REGISTRY.register()
class TorchvisionFasterRCNN(Peer):
    maker = FasterRCNN
    levels = ("p2", "p3", "p4", "p5")
    background = 1


def nothing(*unused) -> None:
    """Peers have no temperature, on which AP does not depend, and no flow to draw."""


_NAMES = [peer.__name__ for peer in Peer.__subclasses__()]
_KEYS = [
    dataclasses.replace(key, choices=(*key.choices, *_NAMES))
    if key.name == "MODEL.META_ARCHITECTURE"
    else key
    for key in DETECTION.keys
]
_MODELS = (*DETECTION.models, __name__)
_NONE = {"calibrate": nothing, "after_training": nothing}
PEERS = dataclasses.replace(DETECTION, keys=_KEYS, models=_MODELS, **_NONE)
