"""The same detections from the detector and from its files, on photographs."""

import pytest
import torch
from small_detector import EVERY_FORMAT, assert_equal_detections, small_cfg, small_detector
from tool_loader import ROOT

from dfm_d2.detection import exportable
from dfm_d2.detection.exportable import ConstantNoise, ExportedDetector, TensorDetector, export_detector
from dfm_d2.detection.postprocess import _kept_by_nms
from dfm_d2.detection.task import DETECTION
from dfm_d2.engine.setup import load_config


@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_three_sizes_one_by_one_and_as_a_batch_and_of_any_noise(detector, runs, photographs, format):
    run = runs(format)
    assert len({item["image"].shape for item in photographs}) == 3
    for item in photographs:
        expected, found = detector([item])[0]["instances"], run([item])[0]["instances"]
        assert found.image_size == expected.image_size == (item["height"], item["width"])
        assert_equal_detections(found, expected)
    if format != "torchscript":  # which pads no image
        for mine, theirs in zip(run(photographs), detector(photographs), strict=True):
            assert_equal_detections(mine["instances"], theirs["instances"])
    # Noise is an input.
    item = photographs[0]
    x_0 = torch.randn(1, 24, 4, generator=torch.Generator().manual_seed(3))
    expected = detector.inference([item], x_0)[0]["instances"]
    assert_equal_detections(run([item], x_0)[0]["instances"], expected)
    with pytest.raises(ValueError, match=r"shape \(1, 23, 4\), this file takes \(1, 24, 4\)"):
        run([item], x_0[:, 1:])
    assert run([]) == []
    other = run([item])[0]["instances"]
    assert len(other) != len(expected) or not torch.equal(other.scores, expected.scores)
    # Of boxes without extent in a corner no score passes, and padding alone comes out.
    far = torch.full((1, 24, 4), -50.0)
    found = run([item], far)[0]["instances"]
    assert len(found) == len(detector.inference([item], far)[0]["instances"])
    assert (found.scores > detector.sampler.settings.score_thresh).all()


@pytest.mark.parametrize("format", ["torchscript", pytest.param("pt2", marks=pytest.mark.slow)])
def test_constant_noise_repeats(detector, cfg, tmp_path, make_input, format):
    image = torch.zeros(3, 96, 96)
    path = export_detector(detector, format, tmp_path, cfg, ["a", "b", "c"], image, constant_noise=True)
    run, item = ExportedDetector(path), make_input("a", size=(100, 140))
    eager = ConstantNoise(exportable.prepared_model(detector))([item])[0]["instances"]
    for image_id in ("a", "b"):
        assert_equal_detections(run([{**item, "image_id": image_id}])[0]["instances"], eager)
    with pytest.raises(ValueError, match="constant noise"):
        run([item], torch.zeros(1, 24, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"SAMPLER__NOISE_PASSES": 2},
        {"SAMPLER__NMS_THRESH": 0.0, "SAMPLER__SCORE_THRESH": 0.6},
        {"NUM_CLASSES": 37, "SAMPLER__NMS_THRESH": 0.2},
        {"NUM_CLASSES": 1, "NUM_PROPOSALS": 3},
    ],
)
@pytest.mark.parametrize("architecture", ["FlowDetector", "CascadeDetector"])
def test_padded_tensors_hold_the_instances(make_model, make_input, architecture, options):
    """The function that ONNX and pt2 files are made of, before any export, on a batch of three sizes."""
    model = make_model(architecture, **options).eval()
    sizes = {"a": (96, 120), "b": (128, 96), "c": (97, 101)}
    items = [make_input(name, size=(h, w)) | {"height": h, "width": w} for name, (h, w) in sizes.items()]
    images, image_sizes = torch.zeros(3, 3, 128, 128), torch.tensor(list(sizes.values())).float()
    for place, item in zip(images, items):
        place[:, : item["image"].shape[1], : item["image"].shape[2]] = item["image"]
    x_0, constant = model.sampler.noise(list(sizes), model.device), ConstantNoise(model)
    with torch.no_grad():
        answers = [
            (TensorDetector(model, constant_noise=False)(images, image_sizes, x_0), model(items)),
            (TensorDetector(model, constant_noise=True)(images, image_sizes), constant(items)),
        ]
    for found, expected_items in answers:
        for boxes, scores, classes, count, expected in zip(*found, expected_items, strict=True):
            expected, n = expected["instances"], int(count)
            assert n == len(expected) and (classes[n:] == -1).all()
            assert not scores[n:].any() and not boxes[n:].any()
            torch.testing.assert_close(boxes[:n], expected.pred_boxes.tensor, rtol=0, atol=1e-3)
            torch.testing.assert_close(scores[:n], expected.scores, rtol=0, atol=1e-5)
            assert torch.equal(classes[:n], expected.pred_classes)


@pytest.mark.slow
@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_a_resnet50_config(photographs, tmp_path, format):
    """configs/voc_flow_r50.yaml at full width, with random weights."""
    words = "MODEL.DEVICE cpu MODEL.DFM.SAMPLER.STEPS 2 MODEL.DFM.SAMPLER.NUM_PROPOSALS 100".split()
    words += ["MODEL.DFM.NUM_CLASSES", "20", "MODEL.WEIGHTS", ""]
    cfg = load_config(DETECTION, str(ROOT / "configs/voc_flow_r50.yaml"), words)
    model = small_detector(cfg)
    names = [str(i) for i in range(20)]
    run = ExportedDetector(export_detector(model, format, tmp_path, cfg, names, torch.zeros(3, 96, 128)))
    for item in photographs:
        assert_equal_detections(run([item])[0]["instances"], model([item])[0]["instances"])


def test_the_graph_of_nms_may_keep_one_box():
    """Of a detector of one class where all boxes lie on one object."""

    class Kept(torch.nn.Module):
        def forward(self, boxes_xyxy, scores):
            return _kept_by_nms(boxes_xyxy, scores, torch.zeros_like(scores, dtype=torch.int64), 1, 0.5)

    apart = torch.tensor([[0.0, 0.0, 8.0, 8.0], [10.0, 0.0, 18.0, 8.0], [0.0, 10.0, 8.0, 18.0]])[None]
    scores = torch.tensor([[0.9, 0.8, 0.7]])
    graph = torch.export.export(Kept(), (apart, scores)).module()
    for boxes, wanted in ((apart, [True] * 3), (apart[:, :1].expand(-1, 3, -1), [True, False, False])):
        assert graph(boxes.contiguous(), scores).tolist() == [wanted]
        assert Kept()(boxes, scores).tolist() == [wanted]


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("FlowDetector", {}),
        ("FlowDetector", {"INTERVALS": 1, "SAMPLER__STEPS": 2}),
        ("CascadeDetector", {}),
    ],
)
@torch.no_grad()
def test_a_detector_and_what_is_before_nms_are_one_graph(architecture, options):
    generator = torch.Generator().manual_seed(0)
    images, sizes = 255 * torch.rand(2, 3, 96, 128, generator=generator), [[90.0, 128.0], [96.0, 100.0]]
    rest = torch.tensor(sizes), torch.randn(2, 24, 4, generator=generator)
    model = small_detector(small_cfg(architecture, **options))
    whole = TensorDetector(model, constant_noise=False)
    for part, pixels, atol in ((whole, images, 1e-3), (model.candidates, images / 100, 1e-5)):
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=part is whole):
            compiled = torch.compile(part, fullgraph=True, backend="eager")
            for found, wanted in zip(compiled(pixels, *rest), part(pixels, *rest), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=atol)
