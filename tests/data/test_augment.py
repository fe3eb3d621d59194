"""Boxes move with the pixels: a white rectangle is drawn, transformed, and found again."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfm_d2.detection.data.loader import (
    augment,
    clip_and_drop,
    mirror,
    random_crop,
    resize_shortest_edge,
    shortest_edge_size,
)


@st.composite
def images_with_a_box(draw):
    height, width = draw(st.integers(12, 60)), draw(st.integers(12, 60))
    x0, y0 = draw(st.integers(0, width - 8)), draw(st.integers(0, height - 8))
    x1, y1 = draw(st.integers(x0 + 6, width)), draw(st.integers(y0 + 6, height))
    image = np.zeros((height, width, 3), np.uint8)
    image[y0:y1, x0:x1] = 255
    return image, np.array([[x0, y0, x1, y1]], dtype=np.float64)


def recipe(sizes, sampling, flip, **keys):
    """Some keys of INPUT."""
    keys |= {"MIN_SIZE_TRAIN": sizes, "MIN_SIZE_TRAIN_SAMPLING": sampling, "RANDOM_FLIP": flip}
    return SimpleNamespace(MAX_SIZE_TRAIN=60, **keys)


def extent(image):
    rows, columns = np.nonzero(image[:, :, 0] > 127)
    return np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], dtype=np.float64)


@settings(deadline=None)
@given(images_with_a_box(), st.sampled_from(["horizontal", "vertical"]))
def test_mirroring_moves_the_box_and_undoes_itself(sample, direction):
    image, boxes = sample
    mirrored, moved = mirror(image, boxes, direction)
    np.testing.assert_array_equal(extent(mirrored), moved)
    again, back = mirror(mirrored, moved, direction)
    np.testing.assert_array_equal(again, image)
    np.testing.assert_array_equal(back, boxes)


@settings(deadline=None)
@given(images_with_a_box(), st.integers(12, 90), st.integers(40, 120))
def test_resize_moves_the_box(sample, short, longest):
    image, boxes = sample
    resized, moved = resize_shortest_edge(image, boxes, short, longest)
    assert max(resized.shape[:2]) <= max(longest, short)
    assert np.abs(extent(resized) - moved).max() <= 1.0
    assert (moved <= np.array([resized.shape[1], resized.shape[0]] * 2) + 1e-9).all()


@settings(deadline=None)
@given(images_with_a_box(), st.integers(0, 2**32), st.integers(6, 30), st.integers(0, 30))
def test_crop_moves_the_box(sample, seed, low, more):
    image, boxes = sample
    cropped, moved = random_crop(image, boxes, np.random.default_rng(seed), (low, low + more))
    for side, original in zip(cropped.shape[:2], image.shape[:2]):
        assert min(low, original) <= side <= min(low + more, original)
    moved, kept = clip_and_drop(moved, *cropped.shape[:2])
    assert len(kept) == bool(cropped.any())
    if len(kept):
        np.testing.assert_array_equal(extent(cropped), moved)


@settings(max_examples=50, deadline=None)
@given(images_with_a_box(), st.integers(0, 2**32))
def test_augment_is_a_function_of_its_generator_and_boxes_stay_inside(sample, seed):
    image, boxes = sample
    crop = {"DETR_CROP": 0.5, "CROP_RESIZE": (24, 40), "CROP_SIZE": (10, 30)}
    inputs = recipe((20, 30, 40), "choice", "horizontal", **crop)
    runs = [augment(image, boxes, np.random.default_rng(seed), inputs) for _ in range(2)]
    for first, second in zip(*runs):
        np.testing.assert_array_equal(first, second)
    moved, kept = runs[0][1:]
    assert len(moved) == len(kept) <= 1
    assert (moved >= 0).all() and (moved[:, 2:] - moved[:, :2] >= 1).all()


def test_sizes_are_drawn_from_a_choice_or_a_range():
    image, boxes = np.zeros((40, 50, 3), np.uint8), np.zeros((0, 4))
    for sampling, seen in (("choice", {20, 30}), ("range", set(range(20, 31)))):
        rng = np.random.default_rng(0)
        inputs = recipe((20, 30), sampling, "none", DETR_CROP=0)
        runs = [augment(image, boxes, rng, inputs)[0] for _ in range(200)]
        assert {run.shape[0] for run in runs} == seen


@pytest.mark.parametrize(
    "height, width, short, longest, size",
    [(480, 640, 800, 1333, (800, 1067)), (100, 400, 800, 1333, (333, 1333)), (1, 1000, 20, 100, (1, 100))],
)
def test_shortest_edge_rule(height, width, short, longest, size):
    assert shortest_edge_size(height, width, short, longest) == size


def test_boxes_that_a_crop_leaves_nothing_of_are_dropped_with_their_index():
    boxes = np.array([[-9, 0, -2, 5], [2, 2, 8, 8], [9.5, 2, 30, 8]], dtype=np.float64)
    kept_boxes, kept = clip_and_drop(boxes, 10, 10)
    assert kept.tolist() == [1] and kept_boxes.tolist() == [[2, 2, 8, 8]]
