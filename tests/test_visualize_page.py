"""The page of a flow in a real browser: the slider, the toggles, tooltips, and that nothing is fetched."""

import copy
import io

import numpy as np
import pytest
import torch
from browser import open_browser, wait_for
from PIL import Image
from tiny_model import spread, tiny_cfg

from dfm_d2.detection.flow_pictures import record_flow
from dfm_d2.framework import build_model
from dfm_d2.visualize.page import write_page

CLASSES = ("circle", "square", "star")
BOXES = "document.querySelectorAll('svg rect.box').length"
STEP = "+document.getElementById('step').value"
NOW = "document.getElementById('now').textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture(scope="module")
def recorded():
    """Three steps by three predictors."""
    torch.manual_seed(0)
    model = spread(build_model(tiny_cfg())).eval()
    pixels = torch.randint(0, 256, (3, 48, 64), generator=torch.Generator().manual_seed(97))
    return record_flow(model, {"image": pixels, "image_id": "a", "height": 96, "width": 128})


@pytest.fixture
def record(recorded):
    return copy.deepcopy(recorded)


@pytest.fixture
def open_page(browser, tmp_path, record):
    """Shows the page of the record; at the end nothing may have failed or been fetched."""

    def opened(class_names=CLASSES, title="cells.jpg"):
        image = np.full((96, 128, 3), 240, dtype=np.uint8)
        browser.open(write_page(tmp_path / "flow.html", record, image, class_names, title))
        return browser

    browser.errors.clear()
    browser.requests.clear()
    yield opened
    assert not browser.errors
    fetched = [url for url in browser.requests if not url.startswith(("file:", "data:"))]
    assert not fetched, "the page must not use the network"


def set_value(page, name, value):
    event = "dispatchEvent(new Event('input'))"
    page.run(f"Object.assign(document.getElementById('{name}'), {{value: '{value}'}}).{event}")


def count(page, selector):
    return page.run(f"document.querySelectorAll('{selector}').length")


def test_slider_toggles_and_tooltips(open_page):
    page = open_page()
    assert page.run("document.title") == "cells.jpg"
    assert page.run(NOW).startswith("t = 0.0000 \u00b7 step 0 of 3 \u00b7 ") and page.run(BOXES) == 12
    before, first = page.screenshot(), page.run("document.querySelector('rect.box').getAttribute('x')")
    page.click("#step")  # the middle of the slider
    place = page.run(STEP)
    assert place in (1, 2)
    for kind in ("rawKeyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="ArrowRight", windowsVirtualKeyCode=39)
    assert page.run(STEP) == place + 1 and f"step {place + 1} of 3" in page.run(NOW)
    assert page.screenshot() != before
    assert page.run("document.querySelector('rect.box').getAttribute('x')") != first

    set_value(page, "step", 0)
    of_class, scores = page.run("flow.steps[0].classes"), page.run("flow.steps[0].scores")
    # Predictor 0 moves every box of the first step.
    for toggle, left in (("#predictor-0", 0), ("#class-1", sum(label != 1 for label in of_class))):
        page.click(toggle)
        assert page.run(BOXES) == left
        page.click(toggle)
        assert page.run(BOXES) == 12
    set_value(page, "score", sorted(scores)[6])
    page.click("#show-weak")
    least = page.run("+document.getElementById('score').value")
    assert page.run(BOXES) == sum(score >= least for score in scores) not in (0, 12)
    page.click("#show-weak")

    page.click("#show-field")
    assert count(page, "line.arrow") == 2 * 9 * 12
    page.click("#show-field")
    page.click("#show-endpoints")
    assert count(page, "rect[stroke-dasharray]") > 0
    page.click("#show-endpoints")
    set_value(page, "step", 3)
    set_value(page, "score", 0)
    page.click("#show-paths")
    assert count(page, "polyline.path") > 0
    page.click("#show-detections")
    labels = page.run(
        "[...document.querySelectorAll('rect.label')].map(e => "
        "['x', 'y', 'width', 'height'].map(name => +e.getAttribute(name)))"
    )
    assert len(labels) == count(page, "svg text") > 0
    assert all(x >= 0 and x + width <= 128 and y >= 0 and y + height <= 96 for x, y, width, height in labels)
    page.run("[...document.querySelectorAll('rect.box')].pop().id = 'last'")
    page.mouse("#last", "mouseMoved")
    assert page.run("document.getElementById('tip').style.display") == "block"
    assert page.run("document.getElementById('tip').textContent").split("\n")[0]


def test_boxes_stay_in_the_frame_of_the_image(open_page, record):
    record.states[0][:] = torch.tensor([-500.0, -500.0, 700.0, 700.0])
    left, right, *found = open_page().run(
        "(() => { const at = document.getElementById('view').getBoundingClientRect();"
        "const image = document.querySelector('svg image').getBoundingClientRect();"
        "const name = x => document.elementFromPoint(x, at.y + at.height / 2).id || 'box';"
        "return [image.x - at.x, at.right - image.right, name((at.x + image.x) / 2),"
        "name((image.right + at.right) / 2), name(image.x + 5)]; })()"
    )
    assert left > 10 and right > 10, "no margin beside the image: this shows nothing"
    assert found == ["view", "view", "box"]


def test_names_are_text_whatever_they_hold_and_there_may_be_no_detection(open_page, record):
    record.detections = record.detections[:0]
    names = ("<!--<script>", "</script><script>throw 1</script>", '<b>"red cell"</b> & \u2028 \u00e9')
    title = "<img src=x onerror='throw 2'>.jpg"
    page = open_page(names, title)
    assert page.run("document.title") == page.run("document.getElementById('title').textContent") == title
    page.click("#show-detections")
    assert page.run("document.getElementById('show-detections-count').textContent") == "0"
    set_value(page, "score", 0)
    shown = page.run("[0, 1, 2].map(k => document.getElementById(`class-${k}`).parentElement.textContent)")
    assert all(text.startswith(name) for text, name in zip(shown, names))
    assert page.run(BOXES) == 12


def test_it_plays_to_the_end(open_page):
    page = open_page()
    page.click("#play")
    wait_for(lambda: page.run(STEP) == 3)
    assert page.run("document.getElementById('play').textContent") == "Play"
    assert "step 3 of 3" in page.run(NOW)
    pixels = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(int)
    assert (pixels.max(2) - pixels.min(2) > 80).sum() > 500, "no coloured box is to be seen"
