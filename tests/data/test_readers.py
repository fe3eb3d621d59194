"""Readers of boxes: their convention, and that everything broken is reported and nothing crashes."""

import logging
import math
from xml.sax.saxutils import escape

import pytest
from data_helpers import make_cfg, shared_data, voc_xml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dfm_d2.data.problems import SHOWN, DataProblemError, Problem, ProblemReport
from dfm_d2.detection.data.readers import parse_voc_xml, read_voc_split
from dfm_d2.detection.data.registration import register_datasets
from dfm_d2.framework import DatasetCatalog, MetadataCatalog

GOOD = voc_xml([("cat", 1, 2, 40.5, 30, 1)]).encode()
BOMB = b"""<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bbbbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;&b;">
<!ENTITY d "&c;&c;&c;&c;&c;&c;">]><annotation><object><name>&d;</name></object></annotation>"""
EXTERNAL = b'<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/hostname">]><annotation>&e;</annotation>'


def read(voc, decode_up_to=100):
    report = ProblemReport("x")
    entries = read_voc_split(voc.root, "train", report, decode_up_to)
    return {entry["image_id"]: entry for entry in entries}, report


def files(report, kind):
    return [problem.file for problem in report.problems if problem.kind == kind]


def boxes(entry):
    return [tuple(target["bbox"]) for target in entry["annotations"]]


def test_boxes_count_from_zero_and_are_half_open_and_entities_are_refused_by_name():
    report = ProblemReport("x")
    size, (target,) = parse_voc_xml(GOOD, "a.xml", report)
    assert size == (40, 30) and not report.problems
    expected = {"category": "cat", "difficult": 1, "iscrowd": 0, "bbox": (0.0, 1.0, 40.5, 30.0)}
    assert target.items() >= expected.items()
    for data in (BOMB, EXTERNAL):
        with pytest.raises(Problem, match="bomb.xml is refused"):
            parse_voc_xml(data, "bomb.xml", report)


@st.composite
def mutated_annotations(draw):
    mutated = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(mutated) - 1))
        mutated[at : at + draw(st.integers(0, 5))] = draw(st.binary(max_size=4))
    return bytes(mutated)


CORNERS = st.tuples(*[st.one_of(st.floats(), st.text(max_size=4), st.none()).map(str).map(escape)] * 4)
WITH_ANY_CORNER = CORNERS.map(lambda at: voc_xml([("cat", *at)]).encode("utf-8", "surrogatepass"))


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.binary(max_size=200), mutated_annotations(), WITH_ANY_CORNER))
def test_whatever_is_in_an_annotation_is_a_box_or_a_problem(data):
    try:
        _, targets = parse_voc_xml(data, "a.xml", ProblemReport("x"))
    except Problem as problem:
        assert problem.kind == "broken_xml"
        return
    for target in targets:
        x0, y0, x1, y1 = target["bbox"]
        assert target["category"] and x0 < x1 and y0 < y1 and all(map(math.isfinite, target["bbox"]))


def test_every_kind_of_problem_is_reported_and_the_rest_is_read(voc):
    objects = {
        "good": ["cat", ("dog", 1, 1, 40, 30, 1)],
        "zero": [("cat", 5, 5, 5, 9), "cat"],
        "outside": [("cat", 100, 5, 130, 9), ("cat", 10, 10, 60, 50)],
        "nan": [("cat", "nan", 5, 30, 9), ("cat", "x", 5, 30, 9), ("cat", "inf", 5, 30, 9)],
        "nameless": [""],
        **dict.fromkeys(["broken", "bomb", "size", "no_image", "no_xml", "torn", "text"], ["cat"]),
    }
    voc.split("train", objects)
    voc.split("train", [*objects, "good"])
    voc.xml("broken").write_text("<annotation><object>")
    voc.xml("bomb").write_bytes(BOMB)
    voc.xml("size").write_text("<annotation><size><width>4</width><height>3</height></size></annotation>")
    voc.image("no_image").unlink()
    voc.xml("no_xml").unlink()
    voc.truncate("torn")
    voc.image("text").write_text("not an image")
    entries, report = read(voc)
    assert [target["difficult"] for target in entries["good"]["annotations"]] == [0, 1]
    usual, outside = (2, 3, 20, 25), [(9, 9, 40, 30)]
    found = {"good": [usual, (0, 0, 40, 30)], "zero": [usual], "outside": outside, "nan": [], "nameless": []}
    assert [*map(boxes, entries.values())] == [*found.values()] and list(entries) == list(found)
    once = "missing_image missing_annotation zero_area box_outside box_clipped unknown_class size_mismatch"
    often = {"bad_coordinates": 3, "broken_xml": 2, "broken_image": 2, "duplicate": 1}
    assert report.counts() == {**often, **dict.fromkeys(once.split(), 1)}
    assert files(report, "broken_image") == ["torn.jpg", "text.jpg"]
    assert files(report, "zero_area") == ["zero.xml"]


def test_a_header_tells_the_size_after_orientation_and_no_more(voc):
    """Without decoding, a cut file keeps a good header: it is the loader's to report."""
    voc.split("train", {"torn": ["cat"], "empty": ["cat"]})
    voc.add("turned", size=(30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(voc.image("turned"), exif=exif)
    voc.split("train", ["torn", "empty", "turned"])
    voc.truncate("torn")
    voc.image("empty").write_bytes(b"")
    entries, report = read(voc, decode_up_to=0)
    assert list(entries) == ["torn", "turned"] and files(report, "broken_image") == ["empty.jpg"]
    assert (entries["turned"]["width"], entries["turned"]["height"]) == (30, 40)
    decoded, report = read(voc)
    assert decoded == {"turned": entries["turned"]} and len(report.problems) == 2


def test_problems_are_logged_once_with_counts_or_fatal(voc, caplog):
    voc.split("train", {f"z{i:02d}": [("cat", 5, 5, 5, 9), "cat"] for i in range(SHOWN + 3)})
    with caplog.at_level(logging.WARNING):
        register_datasets(make_cfg(voc.root))
    (text,) = [record.getMessage() for record in caplog.records]
    assert "13 problems (13 zero_area)" in text and "z00.xml" in text and "z12.xml" not in text
    assert "and 3 more" in text
    with pytest.raises(DataProblemError, match="13 problems: z00.xml.*zero area"):
        register_datasets(make_cfg(voc.root, ON_ERROR="fatal"))


@pytest.mark.parametrize(
    "name, splits, images, boxes, difficult, classes, broken",
    [
        ("bccd", ("train", "val", "test"), [205, 87, 72], 4886, 0, 3, ["00338", "00343"]),
        ("voc2012_subset", ("train", "val"), [252, 235], 1844, 219, 19, []),
    ],
)
def test_real_sets(name, splits, images, boxes, difficult, classes, broken):
    names = tuple(f"voc_root_{split}" for split in splits)
    reports = register_datasets(make_cfg(shared_data(name), names))
    assert [len(DatasetCatalog.get(name)) for name in names] == images
    targets = [t for name in names for entry in DatasetCatalog.get(name) for t in entry["annotations"]]
    assert (len(targets), sum(t["difficult"] for t in targets)) == (boxes, difficult)
    assert len(MetadataCatalog.get(names[0]).thing_classes) == classes
    problems = [(p.file, p.kind) for report in reports.values() for p in report.problems]
    assert sorted(problems) == [(f"BloodImage_{number}.xml", "zero_area") for number in broken]
