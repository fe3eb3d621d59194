"""The VOC reader: the box convention, and that everything broken is reported and nothing crashes."""

import logging
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dfm_d2.data.problems import SHOWN, DataProblemError, ProblemReport
from dfm_d2.detection.data.registration import register_datasets
from dfm_d2.detection.data.voc import AnnotationError, BoxRecord, parse_voc_xml, read_voc_split
from dfm_d2.framework import DatasetCatalog, MetadataCatalog

GOOD = (
    b"<annotation><size><width>40</width><height>30</height></size><object><name>cat</name>"
    b"<difficult>1</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>40.5</xmax><ymax>30</ymax></bndbox>"
    b"</object></annotation>"
)
BOMB = b"""<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bbbbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;&b;">
<!ENTITY d "&c;&c;&c;&c;&c;&c;">]><annotation><object><name>&d;</name></object></annotation>"""


def kinds(report):
    return [problem.kind for problem in report.problems]


def test_boxes_count_from_zero_and_are_half_open():
    report = ProblemReport("x")
    size, objects = parse_voc_xml(GOOD, "a.xml", report)
    assert size == (40, 30) and len(report) == 0
    assert objects == [BoxRecord("cat", (0.0, 1.0, 40.5, 30.0), difficult=True)]


def test_entity_bomb_is_refused_by_name():
    with pytest.raises(AnnotationError, match="bomb.xml is refused"):
        parse_voc_xml(BOMB, "bomb.xml", ProblemReport("x"))


def test_external_entity_is_refused():
    data = b'<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/hostname">]><annotation>&e;</annotation>'
    with pytest.raises(AnnotationError):
        parse_voc_xml(data, "a.xml", ProblemReport("x"))


def parse_only_raises_our_error(data):
    report = ProblemReport("x")
    try:
        _, objects = parse_voc_xml(data, "a.xml", report)
    except AnnotationError:
        return
    for item in objects:
        x0, y0, x1, y1 = item.box_xyxy
        assert item.name and x0 < x1 and y0 < y1 and all(map(math.isfinite, item.box_xyxy))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_garbage_raises_only_our_error(data):
    parse_only_raises_our_error(data)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_annotations_raise_only_our_error(data):
    mutated = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        end = at + data.draw(st.integers(0, 5))
        mutated[at:end] = data.draw(st.binary(max_size=4))
    parse_only_raises_our_error(bytes(mutated))


@settings(max_examples=200, deadline=None)
@given(*[st.one_of(st.floats(), st.text(max_size=4), st.none())] * 4)
def test_any_coordinate_is_a_box_or_a_problem(xmin, ymin, xmax, ymax):
    escaped = [str(v).replace("&", "&amp;").replace("<", "&lt;") for v in (xmin, ymin, xmax, ymax)]
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), escaped))
    text = f"<annotation><object><name>cat</name><bndbox>{corners}</bndbox></object></annotation>"
    parse_only_raises_our_error(text.encode("utf-8", "surrogatepass"))


def test_every_kind_of_problem_is_reported_and_the_rest_is_read(voc):
    voc.add("good", [("cat", 3, 4, 20, 25), ("dog", 1, 1, 40, 30, 1)])
    voc.add("broken", xml="<annotation><object>")
    voc.add("bomb", xml=BOMB.decode())
    voc.add("no_image")
    voc.image("no_image").unlink()
    voc.add("no_xml")
    voc.xml("no_xml").unlink()
    voc.add("zero", [("cat", 5, 5, 5, 9), ("cat", 3, 4, 20, 25)])
    voc.add("outside", [("cat", 100, 5, 130, 9), ("cat", 10, 10, 60, 20)])
    voc.add("nan", [("cat", "nan", 5, 30, 9), ("cat", "x", 5, 30, 9), ("cat", "inf", 5, 30, 9)])
    voc.add("nameless", [("", 3, 4, 20, 25)])
    voc.add("torn")
    voc.truncate("torn")
    voc.add("text")
    voc.image("text").write_text("not an image")
    voc.add(
        "other_size",
        size=(40, 30),
        xml="<annotation><size><width>4</width><height>3</height></size></annotation>",
    )
    names = "good broken bomb no_image no_xml zero outside nan nameless torn text other_size good".split()
    voc.split("train", names)
    report = ProblemReport("x")
    records = {r.image_id: r for r in read_voc_split(voc.root, "train", report, decode_up_to=100)}
    assert sorted(records) == ["good", "nameless", "nan", "outside", "zero"]
    assert [o.box_xyxy for o in records["good"].objects] == [(2, 3, 20, 25), (0, 0, 40, 30)]
    assert [o.difficult for o in records["good"].objects] == [False, True]
    assert [o.box_xyxy for o in records["outside"].objects] == [(9, 9, 40, 20)]
    assert len(records["zero"].objects) == 1 and not records["nan"].objects
    assert report.counts() == {
        "bad_coordinates": 3,
        "broken_xml": 2,
        "broken_image": 2,
        "missing_image": 1,
        "missing_annotation": 1,
        "zero_area": 1,
        "box_outside": 1,
        "box_clipped": 1,
        "unknown_class": 1,
        "size_mismatch": 1,
        "duplicate": 1,
    }
    assert report.files("broken_image") == ["torn.jpg", "text.jpg"]
    assert report.files("zero_area") == ["zero.xml"]


def test_header_check_finds_what_it_can(voc):
    """Without decoding, a cut file keeps a good header: it is the loader's to report."""
    voc.add("torn")
    voc.truncate("torn")
    voc.add("empty")
    voc.image("empty").write_bytes(b"")
    voc.split("train", ["torn", "empty"])
    report = ProblemReport("x")
    records = read_voc_split(voc.root, "train", report, decode_up_to=0)
    assert [r.image_id for r in records] == ["torn"] and report.files() == ["empty.jpg"]


def test_split_lines_with_flags_and_names_with_spaces(voc):
    voc.add("my cat")
    voc.add("b")
    voc.split("train", ["my cat", "", "b  -1"])
    records = read_voc_split(voc.root, "train", ProblemReport("x"), 0)
    assert [r.image_id for r in records] == ["my cat", "b"]


def test_orientation_of_the_header_is_applied(voc):
    voc.add("a", size=(30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(voc.image("a"), exif=exif)
    voc.split("train", ["a"])
    for decode_up_to in (0, 9):
        (record,) = read_voc_split(voc.root, "train", ProblemReport("x"), decode_up_to)
        assert (record.width, record.height) == (30, 40)


def test_summary_is_logged_once_with_counts(voc, make_cfg, caplog):
    names = [f"z{i:02d}" for i in range(SHOWN + 3)]
    for name in names:
        voc.add(name, [("cat", 5, 5, 5, 9), ("cat", 3, 4, 20, 25)])
    voc.split("train", names)
    with caplog.at_level(logging.WARNING, logger="dfm_d2.detection.data.registration"):
        register_datasets(make_cfg(voc.root))
    (record,) = [r for r in caplog.records if r.name == "dfm_d2.detection.data.registration"]
    text = record.getMessage()
    assert "13 problems (13 zero_area)" in text and "z00.xml" in text and "z12.xml" not in text
    assert "and 3 more" in text


def test_fatal_names_the_file(voc, make_cfg):
    voc.add("bad", [("cat", 5, 5, 5, 9)])
    voc.split("train", ["bad"])
    with pytest.raises(DataProblemError, match="bad.xml.*zero area"):
        register_datasets(make_cfg(voc.root, ON_ERROR="fatal"))


def test_bccd_zero_area_boxes_are_reported_by_name(shared_data, make_cfg):
    names = tuple(f"voc_root_{split}" for split in ("train", "val", "test"))
    reports = register_datasets(make_cfg(shared_data("bccd"), names))
    found = [file for name in names for file in reports[name].files("zero_area")]
    assert sorted(found) == ["BloodImage_00338.xml", "BloodImage_00343.xml"]
    assert sum(len(report) for report in reports.values()) == 2
    assert [len(DatasetCatalog.get(name)) for name in names] == [205, 87, 72]
    assert sum(len(e["annotations"]) for name in names for e in DatasetCatalog.get(name)) == 4888 - 2
    assert MetadataCatalog.get(names[0]).thing_classes == ["Platelets", "RBC", "WBC"]


def test_voc2012_subset_has_its_difficult_objects(shared_data, make_cfg):
    names = ("voc_root_train", "voc_root_val")
    reports = register_datasets(make_cfg(shared_data("voc2012_subset"), names))
    targets = [t for name in names for e in DatasetCatalog.get(name) for t in e["annotations"]]
    assert not any(map(len, reports.values()))
    assert len(targets) == 1844 and sum(t["difficult"] for t in targets) == 219
