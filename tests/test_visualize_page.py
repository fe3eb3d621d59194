"""The page of a flow in a real browser: the slider, the toggles, tooltips, and that nothing is fetched."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dfm_d2.detection.flow_pictures import record_flow
from dfm_d2.visualize.page import write_page

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --disable-background-networking --disable-sync "
    "--disable-component-update --window-size=1280,900 --virtual-time-budget=20000 --dump-dom"
).split()
# The answer of a test's script becomes an attribute of the document, which the browser prints.
BEFORE_THE_PAGE = """<script>
const errors = [];
for (const kind of ["error", "unhandledrejection"])
  addEventListener(kind, event => errors.push(String(event.message ?? event.reason ?? event.target)), true);
</script>"""
AFTER_THE_PAGE = """<script>
const all = selector => [...document.querySelectorAll(selector)], text = id => $(id).textContent;
const boxes = () => all("svg rect.box").length;
function under(selector) {  // what a mouse meets in the middle of an element
  document.querySelector(selector).scrollIntoView({block: "center"});
  const {x, y, width, height} = document.querySelector(selector).getBoundingClientRect();
  return document.elementFromPoint(x + width / 2, y + height / 2);
}
function slide(id, move) {
  const slider = under(`#${id}:enabled`);
  move(slider);
  slider.dispatchEvent(new Event("input"));
}
function toggled(selector, seen) {  // what is seen after a click; another one undoes it
  under(selector).click();
  const found = seen();
  under(selector).click();
  return found;
}
addEventListener("load", async () => {
  const answer = await (async () => {SCRIPT})().catch(error => { errors.push(String(error)); });
  const fetched = performance.getEntriesByType("resource").map(entry => entry.name);
  document.documentElement.dataset.answer = JSON.stringify({answer, errors, fetched});
});
</script>"""


@pytest.fixture
def recorded(make_model, make_input):
    """Three steps by three predictors."""
    return record_flow(make_model().eval(), make_input())


@pytest.fixture
def ask(tmp_path, recorded):
    """What a script finds on the page of the record; nothing may fail or be fetched."""
    programs = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    if (program := next(filter(None, programs), None)) is None:
        pytest.skip("needs a Chromium (Debian: apt-get install chromium)")
    profile, picture = f"--user-data-dir={tmp_path}/profile", f"--screenshot={tmp_path}/page.png"

    def asked(script, class_names=("circle", "square", "star"), title="cells.jpg", **changes):
        image = np.full((96, 128, 3), 240, dtype=np.uint8)
        path = write_page(tmp_path / "flow.html", replace(recorded, **changes), image, class_names, title)
        page = path.read_text(encoding="utf-8").replace("<head>", "<head>" + BEFORE_THE_PAGE)
        path.write_text(page + AFTER_THE_PAGE.replace("SCRIPT", script), encoding="utf-8")
        command = [program, *FLAGS, profile, picture, path.as_uri()]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
        said = re.search('data-answer="([^"]*)"', done.stdout)
        assert said, done.stdout + done.stderr
        found = json.loads(html.unescape(said[1]))
        assert not found["errors"]
        assert all(url.startswith("data:") for url in found["fetched"]), "the page must not use the network"
        return found["answer"]

    return asked


def test_slider_toggles_and_tooltips(ask):
    found = ask("""
        const start = [document.title, text("now"), boxes()];
        const first = () => all("rect.box")[0].getAttribute("x"), moved = [first()];
        slide("step", slider => slider.stepUp());
        moved.push(first());
        slide("step", slider => { slider.value = 99; });
        const end = text("now");
        slide("step", slider => { slider.value = 0; });
        const toggles = ["#predictor-0", "#class-1"].map(selector => toggled(selector, boxes));
        toggles.push(boxes(), toggled("#show-field", () => all("line.arrow").length));
        toggles.push(toggled("#show-endpoints", () => all("rect[stroke-dasharray]").length));
        const {classes, scores} = flow.steps[0];
        slide("score", slider => { slider.value = [...scores].sort((a, b) => a - b)[6]; });
        const strong = scores.filter(score => score >= +$("score").value).length;
        const without_weak = toggled("#show-weak", boxes);
        slide("step", slider => { slider.value = 3; });
        slide("score", slider => { slider.value = 0; });
        const paths = toggled("#show-paths", () => all("polyline.path").length);
        under("#show-detections").click();
        const labels = all("rect.label").map(label =>
          ["x", "y", "width", "height"].map(name => +label.getAttribute(name)));
        all("rect.box").at(-1).id = "last";
        under("#last").dispatchEvent(new MouseEvent("mousemove"));
        const tip = [$("tip").style.display, text("tip")];
        const texts = all("svg text").length;
        return {start, moved, end, toggles, classes, strong, without_weak, paths, labels, texts, tip};
    """)
    title, now, boxes = found["start"]
    assert title == "cells.jpg" and boxes == 12 and now.startswith("t = 0.0000 \u00b7 step 0 of 3 \u00b7 ")
    assert len(set(found["moved"])) == 2 and "step 3 of 3" in found["end"]
    *toggles, arrows, endpoints = found["toggles"]
    # Predictor 0 moves every box of the first step.
    assert toggles == [0, sum(label != 1 for label in found["classes"]), 12]
    assert arrows == 2 * 9 * 12 and endpoints > 0 and found["paths"] > 0
    assert found["without_weak"] == found["strong"] not in (0, 12)
    labels = found["labels"]
    assert len(labels) == found["texts"] > 0
    assert all(x >= 0 and x + width <= 128 and y >= 0 and y + height <= 96 for x, y, width, height in labels)
    assert found["tip"][0] == "block" and found["tip"][1].startswith("detection\n")


def test_boxes_stay_in_the_frame_of_the_image(ask, recorded):
    wide = torch.tensor([-500.0, -500.0, 700.0, 700.0]).expand(12, 4)
    script = """
        const at = $("view").getBoundingClientRect(), image = all("svg image")[0].getBoundingClientRect();
        const name = x => document.elementFromPoint(x, at.y + at.height / 2).id || "box";
        return [image.x - at.x, at.right - image.right, name((at.x + image.x) / 2),
                name((image.right + at.right) / 2), name(image.x + 5)];
    """
    left, right, *found = ask(script, states=[wide, *recorded.states[1:]])
    assert left > 10 and right > 10, "no margin beside the image: this shows nothing"
    assert found == ["view", "view", "box"]


def test_names_are_text_whatever_they_hold_and_there_may_be_no_detection(ask, recorded):
    names = ("<!--<script>", "</script><script>throw 1</script>", '<b>"red cell"</b> & \u2028 \u00e9')
    title = "<img src=x onerror='throw 2'>.jpg"
    script = """
        under("#show-detections").click();
        slide("score", slider => { slider.value = 0; });
        const names = [0, 1, 2].map(k => $(`class-${k}`).parentElement.textContent);
        return [[document.title, text("title")], text("show-detections-count"), boxes(), names];
    """
    titles, detections, boxes, shown = ask(script, names, title, detections=recorded.detections[:0])
    assert titles == [title] * 2 and detections == "0" and boxes == 12
    assert all(text.startswith(name) for text, name in zip(shown, names))


def test_it_plays_to_the_end(ask, tmp_path):
    found = ask("""
        under("#play").click();
        const playing = text("play");
        await new Promise(done => setTimeout(done, 5000));
        return [playing, text("play"), +$("step").value, text("now")];
    """)
    assert found[:3] == ["Stop", "Play", 3] and "step 3 of 3" in found[3]
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert (pixels.max(2) - pixels.min(2) > 80).sum() > 500, "no coloured box is to be seen"
