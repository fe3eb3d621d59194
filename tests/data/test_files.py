"""Names of files that are written."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from dfm_d2.data.files import paths_by_stem


def test_a_stem_that_is_taken_gets_a_number():
    found = paths_by_stem(["a/x.jpg", "b/x.png", "x_2.gif", "y.jpg"], Path("out"), ".html")
    assert [path.name for path in found] == ["x.html", "x_2.html", "x_2_2.html", "y.html"]


@given(st.lists(st.sampled_from(["x.jpg", "x.png", "x_2.jpg", "x_2_2.jpg", "z"]), max_size=8))
def test_no_two_files_share_a_path(files):
    found = paths_by_stem(files, Path("out"), ".png")
    assert len(set(found)) == len(files)
