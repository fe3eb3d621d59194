"""What can be observed of a provider's backbones and pooler, in functions and in the tables below."""

import itertools
import zlib
from functools import partial

import torch
from observe_structures import raised
from providers import BUILTIN


def backbone_config(provider, depth: int, norm: str, freeze_at: int, options=()):
    cfg = provider.get_cfg()
    backbone, resnets = cfg.MODEL.BACKBONE, cfg.MODEL.RESNETS
    backbone.NAME, backbone.FREEZE_AT = "build_resnet_fpn_backbone", freeze_at
    resnets.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    resnets.DEPTH, resnets.NORM, resnets.RES2_OUT_CHANNELS = depth, norm, 64 if depth < 50 else 256
    cfg.merge_from_list(list(options))
    return cfg


def _filled_backbone(provider, depth: int, norm: str, options=()):
    """With weights by formula, in float64: norms over nearly equal values turn the rounding of float32, which
    differs from processor to processor, into percents."""
    backbone = provider.build_backbone(backbone_config(provider, depth, norm, 0, options))
    fill_by_formula(backbone)
    return backbone.double()


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
            else:
                wave = 1.0 + 0.2 * wave if name.endswith(("weight", "running_var")) else 0.1 * wave
            tensor.copy_(wave.reshape(tensor.shape).float())


def seeded_images(height: int = 64, width: int = 96) -> torch.Tensor:
    """(2, 3, height, width) float64, the same on every machine."""
    wave = torch.arange(2 * 3 * height * width, dtype=torch.float64)
    return torch.sin(wave * 0.7).reshape(2, 3, height, width)


def summary(tensor: torch.Tensor) -> dict:
    flat = tensor.detach().double().flatten()
    some, std = flat[:: max(flat.numel() // 5, 1)][:5], flat.std(unbiased=False)
    return {"shape": tensor.shape, "mean": flat.mean(), "std": std, "some": some}


def names_and_shapes(module: torch.nn.Module) -> dict:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _checksum(words) -> int:
    return zlib.crc32(" ".join(words).encode())


def _trained(module: torch.nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def parameters(provider, depth: int):
    """Names, order and shapes of an FPN's parameters and buffers, and which are trained."""
    backbone = provider.build_backbone(backbone_config(provider, depth, "FrozenBN", 2))
    return {"state": names_and_shapes(backbone), "trained": _checksum(_trained(backbone))}


def outputs(provider, depth: int, norm: str, options=()):
    """Feature maps for weights and images given by a formula, in eval mode and with gradients wanted."""
    with torch.no_grad():
        features = _filled_backbone(provider, depth, norm, options).eval()(seeded_images())
    return {name: summary(feature) for name, feature in features.items()}


def gradients(provider):
    """Gradients of a network with fixed norms, and a training step of one with batch norms, in float64."""
    frozen, normed = (_filled_backbone(provider, 18, norm) for norm in ("FrozenBN", "BN"))
    images = seeded_images(32, 32).requires_grad_()
    frozen(images)["p3"].square().mean().backward()
    normed(seeded_images(32, 32))["p2"].square().mean().backward()
    weight = frozen.get_parameter("bottom_up.stem.conv1.weight")
    scale = normed.get_parameter("bottom_up.res2.0.conv1.norm.weight")
    seen = {"image": summary(images.grad), "weight": summary(weight.grad), "norm": summary(scale.grad)}
    norm = normed.get_submodule("bottom_up.res3.0.conv1.norm")
    return {**seen, "running mean": summary(norm.running_mean), "batches": norm.num_batches_tracked}


def freezing(provider):
    """What FREEZE_AT leaves trainable and turns into fixed norms, by norm."""
    seen = {}
    for norm, freeze_at in itertools.product(("BN", "GN", "FrozenBN"), (0, 1, 3, 5)):
        backbone = provider.build_backbone(backbone_config(provider, 18, norm, freeze_at))
        trained = _trained(backbone)
        fixed = [n for n, m in backbone.named_modules() if type(m).__name__ == "FrozenBatchNorm2d"]
        names = _checksum([*trained, "|", *fixed, "|", *backbone.state_dict()])
        seen[f"{norm} {freeze_at}"] = [len(trained), len(fixed), names]
    return seen


def seeded_initialisation(provider):
    """Sums of the initial weights after a seed; the streams are torch's own, so no golden value."""
    seen = {}
    for depth in (18, 50):
        torch.manual_seed(depth)
        backbone = provider.build_backbone(backbone_config(provider, depth, "GN", 0))
        seen[depth] = {name: p.double().sum() for name, p in backbone.named_parameters()}
    return seen


def observe_build_backbone(provider):
    make, config = provider.build_backbone, partial(backbone_config, provider, 18)
    fpn = make(config("GN", 0))
    resnet_cfg = config("BN", 0, ["MODEL.BACKBONE.NAME", "build_resnet_backbone"])
    resnet_cfg.MODEL.RESNETS.OUT_FEATURES = ["stem", "res3"]
    shape_spec = type(fpn.output_shape()["p2"])
    resnet = make(resnet_cfg, shape_spec(channels=1))
    no_norm = make(config("", 0, ["MODEL.FPN.NORM", "GN"]))
    square = {"square_size": 0}
    features = [backbone.output_shape().items() for backbone in (fpn, resnet)]
    shape, resnet_shape = ({name: [spec.channels, spec.stride] for name, spec in maps} for maps in features)
    seen = {"shape": shape, "divisibility": [fpn.size_divisibility, resnet.size_divisibility]}
    seen |= {"padding": [{**square, **fpn.padding_constraints} == square, resnet.padding_constraints]}
    seen |= {"is backbone": isinstance(fpn, provider.Backbone), "resnet": names_and_shapes(resnet)}
    seen |= {"resnet shape": resnet_shape, "resnet outputs": sorted(resnet(torch.zeros(1, 1, 32, 32)))}
    unknown = raised(lambda: make(config("GN", 0, ["MODEL.BACKBONE.NAME", "build_nothing"])))
    return {**seen, "norms": _checksum(no_norm.state_dict()), "unknown": unknown}


def observe_FPN(provider):
    """On maps of 2 and 3 channels: names, strides, and the outputs for weights by formula."""

    class Tiny(provider.Backbone):
        def forward(self, x):
            return {"a": x[:, :2, ::2, ::2], "b": x[..., ::4, ::4]}

        def output_shape(self):
            return {"a": provider.ShapeSpec(2, stride=2), "b": provider.ShapeSpec(3, stride=4)}

    fpn = provider.FPN(Tiny(), ["a", "b"], 4, "BN", fuse_type="avg")
    fill_by_formula(fpn)
    maps = fpn.double().eval()(seeded_images(16, 24))
    seen = {name: [spec.channels, spec.stride] for name, spec in fpn.output_shape().items()}
    seen = {"shape": seen, "divisibility": fpn.size_divisibility, "state": names_and_shapes(fpn)}
    return {**seen, "maps": {name: summary(feature) for name, feature in maps.items()}}


def observe_ShapeSpec(provider):
    specs = [provider.ShapeSpec(channels=3), provider.ShapeSpec(4, stride=8), provider.ShapeSpec()]
    return [[spec.channels, spec.stride] for spec in specs]


def observe_BACKBONE_REGISTRY(provider):
    """What is registered can be built by name, with the channels of MODEL.PIXEL_MEAN; names are unique."""
    registry, cfg = provider.BACKBONE_REGISTRY, provider.get_cfg()
    name = f"dfm_contract_{len(list(registry))}"
    registry.register(type(name, (), {"__init__": lambda self, cfg, shape: setattr(self, "shape", shape)}))
    twice = raised(lambda: registry.register(type(name, (), {})))
    cfg.MODEL.BACKBONE.NAME, known = name, [name in registry, "build_resnet_fpn_backbone" in registry]
    # Detectron2 wants a Backbone of its builders.
    built = registry.get(name)(cfg, provider.ShapeSpec(channels=3)).shape.channels
    return {"known": known, "built": built, "twice": twice, "unknown": raised(lambda: registry.get("other"))}


def observe_Backbone(provider):
    class Tiny(provider.Backbone):
        def __init__(self):
            super().__init__()
            self._out_features = ["a"]
            self._out_feature_channels, self._out_feature_strides = {"a": 3}, {"a": 2}

        def forward(self, x):
            return {"a": x[..., ::2, ::2]}

    tiny = Tiny()
    shape, wishes = tiny.output_shape()["a"], [tiny.size_divisibility, tiny.padding_constraints]
    return [shape.channels, shape.stride, *wishes, raised(provider.Backbone)]


def pooler(provider, output_size: int, sampling_ratio: int):
    """Of Detectron2's ROIPooler (ROIAlignV2), or our reference beside the builtin: mean and deviation of each
    box's values (16, 3, P, P), and a few of the values. Ratio 0 is adaptive."""
    # Maps of two images of 256 x 320 pixels. Boxes on each level, on the borders between levels, partly and
    # wholly outside, thin and tiny.
    maps = []
    for level, side in enumerate((64, 32, 16, 8)):
        wave = torch.arange(2 * 3 * side * (side * 5 // 4), dtype=torch.float64)
        maps.append(torch.sin(wave * 0.37 + level).reshape(2, 3, side, side * 5 // 4).float())
    rows = "10 20 60 90, 0 0 112 112, 3.5 7.25 227.5 231.25, -30 -20 100 80, 300 200 400 300, 50 60 51 61.5, "
    rows += "20 100 310 104, 0 0 320 256"
    first = [[float(number) for number in row.split()] for row in rows.split(", ")]
    second = [[x0 + 1.7, y0 - 2.3, x1 + 11.1, y1 + 5.9] for x0, y0, x1, y1 in first[:-1]]
    boxes_xyxy = torch.tensor([first, [*second, [-400.0, -400.0, 700.0, 700.0]]])
    scales = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
    if provider is BUILTIN:
        from dfm_kernels.multilevel_roi_align import multilevel_roi_align

        pooled = multilevel_roi_align(maps, boxes_xyxy, scales, output_size, sampling_ratio)
    else:
        from detectron2.modeling.poolers import ROIPooler

        pool = ROIPooler(output_size, scales, sampling_ratio, "ROIAlignV2")
        pooled = pool(maps, [provider.Boxes(boxes) for boxes in boxes_xyxy])
    pooled = pooled.double()
    mean, std = pooled.mean(dim=(1, 2, 3)), pooled.std(dim=(1, 2, 3), unbiased=False)
    corners = pooled[:, :, [0, -1], [0, -1]].flatten()
    return {"shape": pooled.shape, "mean": mean, "std": std, "corners": corners}


# More about the backbones: too much for one observation.
_GN_OPTIONS = ("MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.FPN.FUSE_TYPE", "avg", "MODEL.FPN.NORM", "GN")
_GROUPS = ("MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 4)
BACKBONES = {f"parameters R{depth}": partial(parameters, depth=depth) for depth in (18, 50)}
BACKBONES |= {
    "outputs R18 BN": partial(outputs, depth=18, norm="BN"),
    "outputs R18 no norm": partial(outputs, depth=18, norm=""),
    "outputs R50 FrozenBN": partial(outputs, depth=50, norm="FrozenBN"),
    "outputs R50 GN, stride in 3x3, mean": partial(outputs, depth=50, norm="GN", options=_GN_OPTIONS),
    "outputs R50 in groups": partial(outputs, depth=50, norm="FrozenBN", options=_GROUPS),
    "gradients": gradients,
    "freezing": freezing,
}
_GRIDS = [("7x7 ratio 2", 7, 2), ("3x3 ratio 1", 3, 1), ("2x2 adaptive", 2, 0)]
POOLER = {name: partial(pooler, output_size=size, sampling_ratio=ratio) for name, size, ratio in _GRIDS}
# Too large, or too much torch's own, for golden values: compared only where both providers are present.
LIVE_ONLY = {f"parameters R{depth}": partial(parameters, depth=depth) for depth in (34, 101)}
LIVE_ONLY["seeded initialisation"] = seeded_initialisation
