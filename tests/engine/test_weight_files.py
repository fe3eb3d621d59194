"""Weight files of others: numpy pickles, torchvision and MSRA ResNets, and the pixels that they want."""

import os
import pickle
import pickletools
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from test_checkpoints import Made
from tiny_model import tiny_cfg
from torch import nn

from dfm_d2.engine import weights
from dfm_d2.engine.checkpoint import SafeCheckpointer
from dfm_d2.engine.weights import MSRA, TORCHVISION
from dfm_d2.errors import CheckpointError, UnsafeFileError, UserError
from dfm_d2.framework import build_backbone

WANTED = {
    TORCHVISION: "INPUT.FORMAT RGB MODEL.PIXEL_MEAN [123.675,116.28,103.53] MODEL.PIXEL_STD "
    "[58.395,57.12,57.375] MODEL.RESNETS.STRIDE_IN_1X1 False",
    MSRA: "INPUT.FORMAT BGR MODEL.PIXEL_MEAN [103.53,116.28,123.675] MODEL.PIXEL_STD [1.0,1.0,1.0] "
    "MODEL.RESNETS.STRIDE_IN_1X1 True",
}


def config_for(source: str, depth: int = 50, norm: str = "BN"):
    """The config that weights of a source want."""
    cfg, resnets = tiny_cfg(), {"STEM_OUT_CHANNELS": 64, "WIDTH_PER_GROUP": 64, "DEPTH": depth, "NORM": norm}
    resnets["RES2_OUT_CHANNELS"] = 256 if depth >= 50 else 64
    cfg.merge_from_list(WANTED[source].split())
    cfg.MODEL.RESNETS.update(resnets)
    return cfg


EVIL = [b"cos\nsystem\n(S'true'\ntR.", b"cbuiltins\neval\n(S'1'\ntR.", b"cnumpy\nload\n(S'x'\ntR."]
EVIL += [b"c_codecs\nencode\n(S'x'\nS'zlib'\ntR.", b"ctorch\nload\n."]
DAMAGED = [b"", b"hello", pickle.dumps({"a": np.zeros(100)})[:60]]


@pytest.mark.parametrize("content", EVIL + DAMAGED)
def test_a_pickle_that_names_anything_else_or_is_damaged_is_refused(tmp_path, content):
    (tmp_path / "bad.pkl").write_bytes(content)
    with pytest.raises(CheckpointError, match="bad.pkl is") as caught:
        weights.load_numpy_pickle(str(tmp_path / "bad.pkl"))
    assert isinstance(caught.value, UnsafeFileError) == ("not a plain file of numpy" in str(caught.value))
    assert isinstance(caught.value, UnsafeFileError) or content in DAMAGED


@pytest.mark.parametrize(("depth", "prefix"), [(18, ""), (50, "module.backbone.")])
def test_a_torchvision_file_gives_the_same_features(tmp_path, depth, prefix):
    torch.manual_seed(0)
    resnet = getattr(torchvision.models, f"resnet{depth}")().eval()
    for value in resnet.state_dict().values():
        if value.dim() == 1:  # what norms have, lest one is another's
            value.uniform_(0.5, 1.5)
    state = {prefix + name: value for name, value in resnet.state_dict().items()}
    torch.save(state, tmp_path / "resnet.pth")
    cfg = config_for(TORCHVISION, depth, "FrozenBN")
    detector = nn.ModuleDict({"backbone": build_backbone(cfg)}).eval()  # named as in a detector
    SafeCheckpointer(detector, cfg=cfg).load(str(tmp_path / "resnet.pth"), [])
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours = detector["backbone"].bottom_up(images)["res5"]
        theirs = nn.Sequential(*list(resnet.children())[:-2])(images)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    assert not weights.convert_torchvision_resnet({"conv1.weight": torch.zeros(1)})


def caffe2_names() -> dict[str, np.ndarray]:
    """A file as MSRA's, with random numbers: the first names of a ResNet."""
    rng = np.random.default_rng(0)
    shapes = {"conv1_w": (64, 3, 7, 7), "res_conv1_bn_s": (64,), "res_conv1_bn_b": (64,)}
    shapes |= {"res2_0_branch2a_w": (64, 64, 1, 1), "res2_0_branch1_w": (256, 64, 1, 1)}
    shapes |= {"res2_0_branch2a_bn_s": (64,), "conv1_w_momentum": (1,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_a_caffe2_file_is_matched_by_name(tmp_path):
    content = caffe2_names()
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": content}, protocol=2))
    detector = nn.ModuleDict({"backbone": build_backbone(config_for(MSRA))})
    detector.requires_grad_(True)  # the file has a few layers only, and what is frozen must be in it
    SafeCheckpointer(detector, cfg=config_for(MSRA)).load(str(tmp_path / "R-50.pkl"), [])
    bottom_up = detector["backbone"].bottom_up
    found = {"conv1_w": bottom_up.stem.conv1.weight, "res_conv1_bn_s": bottom_up.stem.conv1.norm.weight}
    found["res2_0_branch1_w"] = bottom_up.res2[0].shortcut.weight
    found["res2_0_branch2a_w"] = bottom_up.res2[0].conv1.weight
    for key, value in found.items():
        assert torch.equal(value, torch.from_numpy(content[key])), key


def test_the_wrong_pixels_are_an_error(tmp_path):
    torchvisions, msras = config_for(TORCHVISION), config_for(MSRA)
    weights.check_pixels(torchvisions, TORCHVISION, "file")
    weights.check_pixels(msras, MSRA, "file")
    with pytest.raises(UserError, match="torchvision weights.* INPUT.FORMAT RGB.*STRIDE_IN_1X1 False"):
        weights.check_pixels(msras, TORCHVISION, "file")
    with pytest.raises(UserError, match=r"msra weights.* INPUT.FORMAT BGR.*PIXEL_STD \[1.0"):
        weights.check_pixels(torchvisions, MSRA, "file")
    torchvisions.MODEL.RESNETS.NUM_GROUPS = 32
    weights.check_pixels(torchvisions, MSRA, "file")  # ResNeXt of the same zoo: other pixels for each model
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(caffe2_names(), protocol=2))
    for name, cfg in (("resnet18.pth", msras), ("R-50.pkl", config_for(TORCHVISION))):
        with pytest.raises(UserError, match=f"{name} holds (torchvision|msra) weights"):
            SafeCheckpointer(nn.Linear(1, 1), cfg=cfg).load(str(tmp_path / name), [])


MAKE, EMPTY = np.empty(0).__reduce__()[:2]
SCALAR, BUFFER = np.float32(0).__reduce__()[0], np.empty(1).__reduce_ex__(5)[0]
FLOAT, OBJECT, POINTER = np.dtype("f8"), np.dtype("O"), b"A" * 8
HOSTILE = {
    "a call of ndarray": Made(np.ndarray, ((1,), OBJECT, POINTER)),
    "a float's state": Made(SCALAR, (Made(np.dtype, ("f8",), (3, "<", None, None, None, 8, 1, 63)), POINTER)),
    "a wrong order": Made(SCALAR, (Made(np.dtype, ("f8",), (3, "x", None, None, None, -1, -1, 0)), POINTER)),
    "a type as text": Made(SCALAR, ("O", POINTER)),
    "a scalar of no bytes": Made(SCALAR, (FLOAT, b"")),
    "a list as data": Made(MAKE, EMPTY, (1, (1,), FLOAT, False, [POINTER])),
    "too few bytes": Made(MAKE, EMPTY, (1, (2**20,), FLOAT, False, POINTER)),
    "a shape that overflows": Made(MAKE, EMPTY, (1, (2**32, 2**32), FLOAT, False, b"")),
}
KINDS = {name: np.dtype(name) for name in ("O", "V8", "S8", "U2", "M8[s]", "f4,O")}
# Objects that do not say so: raw bytes become their addresses.
KINDS["record"] = Made(np.dtype, ("V8", False, True), (3, "|", None, ("a",), {"a": (OBJECT, 0)}, 8, 1, 0))
KINDS["subarray"] = Made(np.dtype, ("V8", False, True), (3, "|", (OBJECT, (1,)), None, None, 8, 1, 0))
KINDS["no flags"] = Made(np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0))
for name, kind in KINDS.items():
    HOSTILE[f"an array of {name}"] = Made(MAKE, EMPTY, (1, (1,), kind, False, POINTER))
    HOSTILE[f"a scalar of {name}"] = Made(SCALAR, (kind, POINTER))
    HOSTILE[f"a buffer of {name}"] = Made(BUFFER, (POINTER, kind, (1,), "C"))


@pytest.mark.parametrize("name", HOSTILE)
def test_bytes_never_become_pointers(tmp_path, name):
    for protocol in (2, 5):
        (tmp_path / "bad.pkl").write_bytes(pickle.dumps(HOSTILE[name], protocol=protocol))
        child = os.fork()  # a crash ends the child and not the run
        if not child:
            try:
                repr(weights.load_numpy_pickle(str(tmp_path / "bad.pkl")))
            except CheckpointError:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("package", [b"numpy.core.", b"numpy._core."])
@pytest.mark.parametrize("protocol", range(6))
def test_a_file_as_the_model_zoos_of_either_numpy(tmp_path, protocol, package):
    rng = np.random.default_rng(0)
    model = {kind: rng.uniform(0, 100, (2, 3)).astype(kind) for kind in ("<f4", ">f8", "f2", "i8", "u1", "?")}
    model |= {"scalar": np.float32(1.5), "empty": np.zeros((0, 3)), "no dimension": np.array(1.5)}
    model["fortran"], rest = np.asfortranarray(model["<f4"]), [np.float64(2.0), "text", b"bytes", (1, None)]
    content = {"__author__": "Detectron2 Model Zoo", "matching_heuristics": True, "rest": rest}
    content["model"] = OrderedDict(model)
    data = pickle.dumps(content, protocol=protocol)
    for module in (b"multiarray", b"numeric"):
        new = package + module
        for old in (b"numpy.core." + module, b"numpy._core." + module):
            data = data.replace(b"c" + old + b"\n", b"c" + new + b"\n")
            data = data.replace(b"\x8c" + bytes([len(old)]) + old, b"\x8c" + bytes([len(new)]) + new)
    assert package in data
    (tmp_path / "zoo.pkl").write_bytes(pickletools.optimize(data))  # which mends the length of the frame
    found, source = weights.read_weights(str(tmp_path / "zoo.pkl"))
    assert source == MSRA and found["rest"] == rest
    assert found["matching_heuristics"] and found["model"].keys() == model.keys()
    for key, value in model.items():
        assert found["model"][key].dtype.str[1:] == value.dtype.str[1:], key
        assert np.array_equal(found["model"][key], value), key
    assert torch.equal(torch.from_numpy(found["model"]["<f4"]), torch.from_numpy(model["<f4"]))
