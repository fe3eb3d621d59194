"""FlowPredictor: what goes in, what comes out, and every kind of file that is not a plain RGB image."""

import numpy as np
import pytest
import torch
from PIL import Image

from dfm_d2.data.images import ImageError
from dfm_d2.detection import FlowPredictor
from dfm_d2.errors import UserError


def picture(height=60, width=80, seed=0):
    """Smooth random colours uint8 `(H, W, 3)`, so that a resize changes little."""
    low = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(low).resize((width, height), Image.Resampling.BILINEAR))


def save(path, image, **options):
    path.parent.mkdir(exist_ok=True)
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


def same(found, expected, pixels=1e-3, scores=1e-5):
    assert found.image_size == expected.image_size and len(found) == len(expected) > 0
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=pixels)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=scores)


def test_a_list_is_answered_in_order_and_in_batches_and_in_original_coordinates(trained, predictor, tmp_path):
    files = [save(tmp_path / f"{number}.png", picture(60, 80, number)) for number in range(5)]
    one_by_one = predictor(files)
    in_batches = FlowPredictor.from_files(*trained, batch_size=2)(files)
    for found, expected in zip(in_batches, one_by_one, strict=True):
        same(found, expected, pixels=0.01, scores=1e-4)
    assert len({tuple(f.scores.tolist()) for f in one_by_one}) == 5
    for found in (*one_by_one, predictor(picture(60, 80))):
        assert found.image_size == (60, 80) and len(found) > 0
        assert (found.pred_boxes.tensor[:, 2:] <= torch.tensor([80, 60])).all()
    assert predictor.class_names == ["circle", "square", "star"] and not list(predictor.stream([]))


def test_a_threshold_leaves_the_best_detections(trained, predictor):
    every = predictor(picture())
    least = float(every.scores[len(every) // 2])
    found = FlowPredictor.from_files(*trained, threshold=least)(picture())
    assert torch.equal(found.scores, every.scores[every.scores > least])


def test_the_trajectory_ends_in_the_answer(predictor, tmp_path):
    path = save(tmp_path / "a.png", picture())
    instances, trajectory, image_size = predictor(path, return_trajectory=True)
    assert len(trajectory.states) == len(trajectory.times) == len(trajectory.steps) + 1 == 4
    same(instances, predictor(path), 1e-4, 1e-6)
    whole = torch.tensor([80, 60, 80, 60])
    ends = predictor.model.space.decode(trajectory.last.x_1_hat, image_size)[0]
    ends = ends * whole / image_size[0].flip(0).repeat(2)
    nearest = torch.cdist(instances.pred_boxes.tensor, ends.clamp(min=0)).amin(1)
    inside = (ends >= 0).all(1) & (ends <= whole).all(1)
    assert inside.any() and (nearest < 1e-2).sum() >= inside.sum() // 2


def test_what_is_neither_file_nor_image(trained, tmp_path):
    predictor = FlowPredictor.from_files(*trained, batch_size=2)
    (tmp_path / "a.jpg").write_text("words")
    (tmp_path / "empty.jpg").touch()
    for name in ("a.jpg", "empty.jpg", "missing.jpg"):
        with pytest.raises(ImageError, match=f"{name} cannot be decoded"):
            predictor(tmp_path / name)
    good = save(tmp_path / "b.png", picture())
    answers = list(predictor.stream([good, tmp_path / "a.jpg", good], return_errors=True))
    assert [isinstance(answer, ImageError) for answer in answers] == [False, True, False]
    same(answers[0], answers[2])
    arrays = np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)
    for image in (*arrays, None, 3, torch.zeros(4, 4, 3), b"a.jpg", Image.new("RGB", (4, 4))):
        for images in (image, [image]):
            with pytest.raises(ValueError, match=r"must be a path or a uint8 array \(H, W, 3\).*, got "):
                predictor(images)


@pytest.mark.parametrize(("mode", "ending"), [("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg")])
def test_other_modes_are_read_as_rgb(predictor, tmp_path, mode, ending):
    image = Image.fromarray(picture()).convert(mode)
    if mode == "RGBA":
        image.putalpha(77)
    other = save(tmp_path / f"other/a.{ending}", image)
    same(predictor(other), predictor(save(tmp_path / "rgb/a.png", Image.open(other).convert("RGB"))))


def test_one_pixel_and_eight_thousand_a_side(trained, predictor, tmp_path):
    path = save(tmp_path / "a.png", np.full((1, 1, 3), 200, np.uint8))
    for size in ("96", "0"):  # with and without a resize
        found = FlowPredictor.from_files(*trained, ["INPUT.MIN_SIZE_TEST", size])(path)
        boxes = found.pred_boxes.tensor
        assert found.image_size == (1, 1) and len(boxes) and found.scores.isfinite().all()
        assert (boxes >= 0).all() and (boxes <= 1).all()
    image = Image.fromarray(picture(80, 80)).convert("L").resize((8000, 8000), Image.Resampling.NEAREST)
    found = predictor(save(tmp_path / "large.png", image, compress_level=1))
    assert found.image_size == (8000, 8000) and found.pred_boxes.tensor.amax() > 1000


def test_weights_of_another_model(trained, tmp_path):
    config, weights = trained
    linear, words = tmp_path / "linear.pth", tmp_path / "words.pth"
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, linear)
    words.write_text("words")
    classes = ["DATASETS.CLASSES", "['a','b','c']"]
    for file, opts, said in (
        (weights, ["MODEL.DFM.NUM_PREDICTORS", "2"], "use the config that it was trained with"),
        (weights, ["MODEL.DFM.NUM_CLASSES", "4"], "was trained for 3 classes"),
        (weights, ["INPUT.FORMAT", "BGR"], "was trained with INPUT.FORMAT RGB"),
        (linear, [], "does not say its classes"),
        (linear, classes, "linear.pth has no"),
        (words, classes, "words.pth"),
        (tmp_path / "missing.pth", classes, "There is no weight file"),
    ):
        with pytest.raises(UserError, match=said):
            FlowPredictor.from_files(config, str(file), opts)
    with pytest.raises(UserError, match="no score threshold"):
        FlowPredictor.from_files(config, weights, threshold="auto")
    with pytest.raises(UserError, match="batch_size is 0"):
        FlowPredictor.from_files(config, weights, batch_size=0)
