"""The config of a classifier small enough for tests, and its inputs."""

import torch

import dfm_d2.registry  # noqa: F401  (registers the meta-architectures)
from dfm_d2.classification.config import choose_method
from dfm_d2.config import add_dfm_config
from dfm_d2.framework import build_model, get_cfg, merge_config_opts

VIT = (
    "MODEL.CLASSIFIER.BACKBONE timm MODEL.CLASSIFIER.BLOCKS 2 MODEL.TIMM.OPTIONS "
    '["img_size=8","patch_size=4","embed_dim=16","depth=3","num_heads=2"]'
).split()
_SHAPE = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}  # that of VIT
TIMM_CNN = "MODEL.CLASSIFIER.BACKBONE timm MODEL.TIMM.NAME test_convnext2".split()


def make_classifier(*opts: str, method: str = "flow", seed: int = 0):
    """Three residual pairs of 8 channels on grey images; opts: KEY VALUE overrides."""
    cfg = get_cfg()
    add_dfm_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [120.0], [60.0]
    cfg.MODEL.DFM.NUM_CLASSES = 3
    c = cfg.MODEL.CLASSIFIER
    c.CNN.CHANNELS, c.CNN.NORM, c.HIDDEN_DIM, c.EMBED_DIM = (8, 8, 8), "GN", 16, 6
    merge_config_opts(cfg, ["UPDATE.METHOD", method, *opts])
    choose_method(cfg)
    torch.manual_seed(seed)
    return build_model(cfg)


def save_timm_vit(path, **changes) -> torch.nn.Module:
    """The backbone of VIT for grey images, and a file of its weights."""
    import timm

    model = timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=5, **_SHAPE | changes)
    torch.save(model.state_dict(), path)
    return model


def class_inputs(number: int = 4, size: int = 8, channels: int = 1) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (number, channels, size, size), generator=generator, dtype=torch.uint8)
    return [
        {"file_name": f"{i}.png", "image_id": str(i), "label": i % 3, "image": image}
        for i, image in enumerate(images)
    ]
