"""What can be observed of a provider's backbones, registries, detector_postprocess and checkpoints."""

import os
import tempfile
import zlib

import numpy as np
import torch
from observe_structures import raised

FPN_FEATURES = ["res2", "res3", "res4", "res5"]


def backbone_config(provider, depth: int, norm: str, freeze_at: int, options=()):
    cfg = provider.get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    cfg.MODEL.RESNETS.OUT_FEATURES = FPN_FEATURES
    cfg.MODEL.FPN.IN_FEATURES = FPN_FEATURES
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.NORM = norm
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.merge_from_list(list(options))
    return cfg


def fill_by_formula(module: torch.nn.Module) -> None:
    """Give every parameter and buffer values that depend on nothing but its name and shape."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            phase = zlib.crc32(name.encode()) % 1000
            wave = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * 12.9898 + phase)
            if tensor.dim() == 4:
                wave = wave * (2.0 / tensor[0].numel()) ** 0.5 * 1.4
            elif name.endswith(("weight", "running_var")):
                wave = 1.0 + 0.2 * wave
            else:
                wave = 0.1 * wave
            tensor.copy_(wave.reshape(tensor.shape).float())


def seeded_images(height: int = 64, width: int = 96) -> torch.Tensor:
    """(2, 3, height, width) float64, the same on every machine."""
    wave = torch.arange(2 * 3 * height * width, dtype=torch.float64)
    return torch.sin(wave * 0.7).reshape(2, 3, height, width)


def summary(tensor: torch.Tensor) -> dict:
    flat = tensor.detach().double().flatten()
    step = max(flat.numel() // 5, 1)
    return {
        "shape": list(tensor.shape),
        "mean": flat.mean().item(),
        "std": flat.std(unbiased=False).item(),
        "some": flat[::step][:5].tolist(),
    }


def names_and_shapes(module: torch.nn.Module) -> dict:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def observe_parameters(provider, depth: int):
    """Names, order and shapes of an FPN's parameters and buffers, and which are trained."""
    backbone = provider.build_backbone(backbone_config(provider, depth, "FrozenBN", 2))
    trained = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    return {"state": names_and_shapes(backbone), "trained": zlib.crc32(" ".join(trained).encode())}


def observe_outputs(provider, depth: int, norm: str, options=()):
    """Feature maps for weights and images given by a formula, in eval mode and with gradients wanted.

    In float64: norms over nearly equal values turn the rounding of float32, which differs from processor to
    processor, into percents.
    """
    backbone = provider.build_backbone(backbone_config(provider, depth, norm, 0, options))
    fill_by_formula(backbone)
    backbone.double().eval()
    images = seeded_images()
    with torch.no_grad():
        features = backbone(images)
    return {name: summary(feature) for name, feature in features.items()}


def observe_gradients(provider):
    """Gradients of a network with fixed norms, and a training step of one with batch norms, in float64."""
    frozen = provider.build_backbone(backbone_config(provider, 18, "FrozenBN", 0))
    fill_by_formula(frozen)
    frozen.double()
    images = seeded_images(32, 32).requires_grad_()
    frozen(images)["p3"].square().mean().backward()
    normed = provider.build_backbone(backbone_config(provider, 18, "BN", 0))
    fill_by_formula(normed)
    normed.double()
    normed(seeded_images(32, 32))["p2"].square().mean().backward()
    state = normed.state_dict()
    return {
        "image": summary(images.grad),
        "weight": summary(dict(frozen.named_parameters())["bottom_up.stem.conv1.weight"].grad),
        "norm": summary(dict(normed.named_parameters())["bottom_up.res2.0.conv1.norm.weight"].grad),
        "running mean": summary(state["bottom_up.res3.0.conv1.norm.running_mean"]),
        "batches": state["bottom_up.res3.0.conv1.norm.num_batches_tracked"].item(),
    }


def observe_freezing(provider):
    """What FREEZE_AT leaves trainable and turns into fixed norms, by norm."""
    seen = {}
    for norm in ("BN", "GN", "FrozenBN"):
        for freeze_at in (0, 1, 3, 5):
            backbone = provider.build_backbone(backbone_config(provider, 18, norm, freeze_at))
            trained = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
            fixed = [n for n, m in backbone.named_modules() if type(m).__name__ == "FrozenBatchNorm2d"]
            text = " ".join([*trained, "|", *fixed, "|", *backbone.state_dict()])
            seen[f"{norm} {freeze_at}"] = [len(trained), len(fixed), zlib.crc32(text.encode())]
    return seen


def observe_build_backbone(provider):
    cfg = backbone_config(provider, 18, "GN", 0)
    fpn = provider.build_backbone(cfg)
    resnet_cfg = backbone_config(provider, 18, "BN", 0, ["MODEL.BACKBONE.NAME", "build_resnet_backbone"])
    resnet_cfg.MODEL.RESNETS.OUT_FEATURES = ["stem", "res3"]
    shape_spec = type(fpn.output_shape()["p2"])
    resnet = provider.build_backbone(resnet_cfg, shape_spec(channels=1))
    no_norm = provider.build_backbone(backbone_config(provider, 18, "", 0, ["MODEL.FPN.NORM", "GN"]))
    square = {"square_size": 0}
    return {
        "shape": {name: [spec.channels, spec.stride] for name, spec in fpn.output_shape().items()},
        "divisibility": [fpn.size_divisibility, resnet.size_divisibility],
        "padding": [{**square, **fpn.padding_constraints} == square, resnet.padding_constraints],
        "is backbone": isinstance(fpn, provider.Backbone),
        "resnet": names_and_shapes(resnet),
        "resnet shape": {name: [spec.channels, spec.stride] for name, spec in resnet.output_shape().items()},
        "resnet outputs": sorted(resnet(torch.zeros(1, 1, 32, 32))),
        "norms": zlib.crc32(" ".join(no_norm.state_dict()).encode()),
        "unknown": raised(lambda: provider.build_backbone(_renamed(cfg, "build_nothing"))),
    }


def _renamed(cfg, name: str):
    cfg = cfg.clone()
    cfg.MODEL.BACKBONE.NAME = name
    return cfg


def observe_backbone(provider):
    class Tiny(provider.Backbone):
        def __init__(self):
            super().__init__()
            self._out_features = ["a"]
            self._out_feature_channels = {"a": 3}
            self._out_feature_strides = {"a": 2}

        def forward(self, x):
            return {"a": x[..., ::2, ::2]}

    tiny = Tiny()
    spec = tiny.output_shape()["a"]
    return [
        spec.channels,
        spec.stride,
        tiny.size_divisibility,
        tiny.padding_constraints,
        raised(provider.Backbone),
    ]


def observe_build_model(provider):
    class ContractModel(torch.nn.Linear):
        def __init__(self, cfg):
            super().__init__(1, len(cfg.MODEL.PIXEL_MEAN))

    registry = provider.META_ARCH_REGISTRY
    if "ContractModel" not in registry:
        registry.register(ContractModel)
    cfg, unknown = provider.get_cfg(), provider.get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "ContractModel"
    unknown.MODEL.META_ARCHITECTURE = "NoSuchModel"
    return {
        "built": list(provider.build_model(cfg).weight.shape),
        "in": "ContractModel" in registry,
        "twice": raised(lambda: registry.register(ContractModel)),
        "unknown": raised(lambda: provider.build_model(unknown)),
    }


def observe_detector_postprocess(provider):
    def make():
        rows = [[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 5.0, 9.0], [-5.0, 3.0, 70.0, 60.0], [41.0, 1.0, 45.0, 9.0]]
        instances = provider.Instances((30, 40))
        instances.pred_boxes = provider.Boxes(torch.tensor(rows))
        instances.scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
        return instances

    given = make()
    result = provider.detector_postprocess(given, 60, 100)
    without = provider.Instances((30, 40), scores=torch.zeros(1))
    return {
        "boxes": result.pred_boxes.tensor.tolist(),
        "scores": result.scores.tolist(),
        "size": list(result.image_size),
        "given": given.pred_boxes.tensor.tolist(),
        "without boxes": raised(lambda: provider.detector_postprocess(without, 60, 100)),
    }


class _Tiny(torch.nn.Module):
    """A model with a ResNet-like name or two, nested as a detector nests its backbone."""

    def __init__(self):
        super().__init__()
        self.register_buffer("pixel_mean", torch.zeros(3))
        self.backbone = torch.nn.ModuleDict()
        stem = torch.nn.Module()
        stem.conv1 = torch.nn.Conv2d(3, 2, 1, bias=False)
        stem.conv1.norm = torch.nn.BatchNorm2d(2)
        block = torch.nn.Module()
        block.conv1 = torch.nn.Conv2d(2, 2, 1, bias=False)
        block.shortcut = torch.nn.Conv2d(2, 2, 1, bias=False)
        self.backbone["stem"] = stem
        self.backbone["res2"] = torch.nn.Sequential(block)
        self.head = torch.nn.Linear(2, 2)


def _loaded(provider, checkpoint: dict) -> dict:
    model = _Tiny()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    keys = provider.DetectionCheckpointer(model)._load_model(checkpoint)
    return {
        "sums": {name: tensor.double().sum().item() for name, tensor in model.state_dict().items()},
        "missing": sorted(keys.missing_keys),
        "unexpected": sorted(keys.unexpected_keys),
        "shapes": sorted(shape[0] for shape in keys.incorrect_shapes),
    }


def observe_detection_checkpointer(provider):
    ours = {"stem.conv1.weight": np.ones((2, 3, 1, 1), np.float32), "stem.fc.bias": np.ones(1, np.float32)}
    caffe2 = {
        "conv1_w": np.ones((2, 3, 1, 1), np.float32),
        "res_conv1_bn_s": np.full(2, 2.0, np.float32),
        "res_conv1_bn_b": np.full(2, 3.0, np.float32),
        "res2_0_branch2a_w": np.full((2, 2, 1, 1), 4.0, np.float32),
        "res2_0_branch1_w": np.full((2, 2, 1, 1), 5.0, np.float32),
        "res2_0_branch2b_bn_rm": np.ones(2, np.float32),
        "fc1000_w": np.ones((2, 2), np.float32),
    }
    plain = {"head.weight": torch.ones(2, 2), "head.bias": torch.ones(3), "other": torch.ones(1)}
    twice = {"weight": np.ones((2, 2, 1, 1), np.float32)}
    heuristics = {"matching_heuristics": True}
    with tempfile.TemporaryDirectory() as folder:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        writer = provider.DetectionCheckpointer(model, folder, optimizer=optimizer)
        before = writer.has_checkpoint()
        writer.save("model_a", iteration=3, note="x")
        other = torch.nn.Linear(2, 2)
        reader = provider.DetectionCheckpointer(
            other, folder, optimizer=torch.optim.SGD(other.parameters(), lr=0.1)
        )
        extra = reader.resume_or_load("", resume=True)
        rest = {key: value for key, value in extra.items() if key in ("iteration", "note", "optimizer")}
        silent = provider.DetectionCheckpointer(model, folder, save_to_disk=False)
        silent.save("model_b")
        files = sorted(os.listdir(folder))
        round_trip = {
            "has": [before, writer.has_checkpoint()],
            "rest": rest,
            "model": torch.equal(model.weight, other.weight),
            "optimizer": reader.checkpointables["optimizer"].param_groups[0]["lr"],
            "files": files,
            "last": os.path.basename(writer.get_checkpoint_file()),
            "nothing": provider.DetectionCheckpointer(other).load(""),
        }
    return {
        "by suffix": _loaded(provider, {"model": ours, **heuristics}),
        "caffe2": _loaded(provider, {"model": caffe2, "__author__": "Caffe2", **heuristics}),
        "plain": _loaded(provider, {"model": plain}),
        "ambiguous": raised(lambda: _loaded(provider, {"model": twice, **heuristics})),
        "round trip": round_trip,
    }


def observe_seeded_initialisation(provider):
    """Sums of the initial weights after a seed; the streams are torch's own, so no golden value."""
    seen = {}
    for depth in (18, 50):
        torch.manual_seed(depth)
        backbone = provider.build_backbone(backbone_config(provider, depth, "GN", 0))
        seen[depth] = {name: p.detach().double().sum().item() for name, p in backbone.named_parameters()}
    return seen
