"""FlowPredictor: what goes in, what comes out, and every kind of file that is not a plain RGB image."""

import numpy as np
import pytest
import torch
from PIL import Image

from dfm_d2.data.images import ImageError
from dfm_d2.detection.flow_predictor import FlowPredictor
from dfm_d2.errors import UserError


def picture(height=60, width=80, seed=0):
    """Smooth random colours uint8 `(H, W, 3)`, so that a resize changes little."""
    low = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(low).resize((width, height), Image.Resampling.BILINEAR))


def same(found, expected, pixels=0.5, scores=0.02):
    assert found.image_size == expected.image_size and len(found) == len(expected) > 0
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=pixels)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=scores)


def test_a_file_and_its_pixels_are_in_original_coordinates(predictor, tmp_path):
    Image.fromarray(picture(60, 80)).save(tmp_path / "a.png")
    found = predictor(tmp_path / "a.png")
    assert found.image_size == (60, 80) and len(found) > 0
    assert (found.pred_boxes.tensor[:, 2] <= 80).all() and (found.pred_boxes.tensor[:, 3] <= 60).all()
    assert predictor.class_names == ["circle", "square", "star"]
    from_pixels = predictor(picture(60, 80))
    assert from_pixels.image_size == (60, 80) and len(from_pixels) > 0


def test_a_list_is_answered_in_order_and_in_batches(trained, tmp_path):
    files = []
    for number in range(5):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(picture(60, 80, number)).save(files[-1])
    one_by_one = FlowPredictor.from_files(*trained)(files)
    in_batches = FlowPredictor.from_files(*trained, batch_size=2)(files)
    for found, expected in zip(in_batches, one_by_one, strict=True):
        same(found, expected, pixels=0.01, scores=1e-4)
    assert len({tuple(f.scores.tolist()) for f in one_by_one}) == 5
    assert list(FlowPredictor.from_files(*trained).stream([])) == []


def test_the_trajectory_ends_in_the_answer(predictor, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    instances, trajectory, image_size = predictor(tmp_path / "a.png", return_trajectory=True)
    assert len(trajectory.states) == len(trajectory.times) == len(trajectory.steps) + 1 == 4
    same(instances, predictor(tmp_path / "a.png"), 1e-4, 1e-6)
    ends = predictor.model.space.decode(trajectory.last.x_1_hat, image_size)[0]
    scale = torch.tensor([80, 60, 80, 60]) / image_size[0].flip(0).repeat(2)
    nearest = torch.cdist(instances.pred_boxes.tensor, (ends * scale).clamp(min=0)).amin(1)
    inside = (ends * scale >= 0).all(1) & (ends * scale <= torch.tensor([80, 60, 80, 60])).all(1)
    assert inside.any() and (nearest < 1e-2).sum() >= inside.sum() // 2


def test_not_an_image(predictor, tmp_path):
    (tmp_path / "a.jpg").write_text("words")
    (tmp_path / "empty.jpg").touch()
    for name in ("a.jpg", "empty.jpg", "missing.jpg"):
        with pytest.raises(ImageError, match=f"{name} cannot be decoded"):
            predictor(tmp_path / name)
    failures = []
    assert list(predictor.stream([tmp_path / "a.jpg"], on_error=failures.append)) == []
    assert len(failures) == 1


def test_sixteen_bits_are_scaled(predictor, tmp_path):
    gray = picture().mean(2).astype(np.uint16)
    for folder in ("8", "16"):
        (tmp_path / folder).mkdir()
    Image.fromarray(gray * 257).save(tmp_path / "16/a.png")
    Image.fromarray(gray.astype(np.uint8)).save(tmp_path / "8/a.png")
    assert Image.open(tmp_path / "16/a.png").mode == "I;16"
    same(predictor(tmp_path / "16/a.png"), predictor(tmp_path / "8/a.png"), 1e-3, 1e-5)


@pytest.mark.parametrize(("mode", "ending"), [("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg")])
def test_other_modes_are_read_as_rgb(predictor, tmp_path, mode, ending):
    image = Image.fromarray(picture()).convert(mode)
    if mode == "RGBA":
        image.putalpha(77)
    for folder in ("other", "rgb"):
        (tmp_path / folder).mkdir()
    image.save(tmp_path / f"other/a.{ending}", **({"quality": 100} if ending == "jpg" else {}))
    Image.open(tmp_path / f"other/a.{ending}").convert("RGB").save(tmp_path / "rgb/a.png")
    same(predictor(tmp_path / f"other/a.{ending}"), predictor(tmp_path / "rgb/a.png"), 1e-3, 1e-5)


def test_exif_orientation_is_applied(predictor, tmp_path):
    upright = picture(90, 60)
    for folder in ("lying", "upright"):
        (tmp_path / folder).mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(np.rot90(upright)).save(tmp_path / "lying/a.png", exif=exif)
    Image.fromarray(upright).save(tmp_path / "upright/a.png")
    found = predictor(tmp_path / "lying/a.png")
    assert found.image_size == (90, 60)
    same(found, predictor(tmp_path / "upright/a.png"), 1e-3, 1e-5)


def test_one_pixel(trained, tmp_path):
    Image.fromarray(np.full((1, 1, 3), 200, np.uint8)).save(tmp_path / "a.png")
    for size in ("96", "0"):  # with and without a resize
        found = FlowPredictor.from_files(*trained, ["INPUT.MIN_SIZE_TEST", size])(tmp_path / "a.png")
        assert found.image_size == (1, 1)
        boxes = found.pred_boxes.tensor
        assert len(boxes) and (boxes >= 0).all() and (boxes <= 1).all() and found.scores.isfinite().all()


def test_eight_thousand_pixels_a_side(predictor, tmp_path):
    Image.fromarray(picture(80, 80)).resize((8000, 8000), Image.Resampling.NEAREST).save(
        tmp_path / "a.png", compress_level=1
    )
    found = predictor(tmp_path / "a.png")
    assert found.image_size == (8000, 8000) and len(found) > 0
    assert found.pred_boxes.tensor.amax() > 1000


def test_arrays_that_are_no_image(predictor):
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"must be uint8 \(H, W, 3\)"):
            predictor(bad)
    with pytest.raises(ValueError, match="batch_size is 0"):
        FlowPredictor(predictor.cfg, 0)


def test_weights_of_another_model(trained, tmp_path):
    config, weights = trained
    with pytest.raises(UserError, match="use the config that it was trained with"):
        FlowPredictor.from_files(config, weights, ["MODEL.DFM.NUM_PREDICTORS", "2"])
    with pytest.raises(UserError, match="was trained for 3 classes"):
        FlowPredictor.from_files(config, weights, ["MODEL.DFM.NUM_CLASSES", "4"])
    with pytest.raises(UserError, match="was trained with INPUT.FORMAT RGB"):
        FlowPredictor.from_files(config, weights, ["INPUT.FORMAT", "BGR"])
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "linear.pth")
    with pytest.raises(UserError, match="does not say its classes"):
        FlowPredictor.from_files(config, str(tmp_path / "linear.pth"))
    classes = ["DATASETS.CLASSES", "['a','b','c']"]
    with pytest.raises(UserError, match="linear.pth has no"):
        FlowPredictor.from_files(config, str(tmp_path / "linear.pth"), classes)
    (tmp_path / "words.pth").write_text("words")
    with pytest.raises(UserError, match="words.pth"):
        FlowPredictor.from_files(config, str(tmp_path / "words.pth"), classes)
    with pytest.raises(UserError, match="There is no weight file"):
        FlowPredictor.from_files(config, str(tmp_path / "missing.pth"), classes)


@pytest.mark.parametrize(
    "image", [None, 3, torch.zeros(4, 4, 3), b"a.jpg", Image.new("RGB", (4, 4))], ids=type
)
def test_what_is_neither_file_nor_array(predictor, image):
    for images in (image, [image]):
        with pytest.raises(ValueError, match=r"must be a path or a uint8 array \(H, W, 3\).*, got "):
            predictor(images)
