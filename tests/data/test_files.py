"""Names of files that are written."""

from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from dfm_d2.data.files import paths_by_stem


@given(st.lists(st.sampled_from(["x.jpg", "x.png", "x_2.jpg", "x_2_2.jpg", "z"]), max_size=8))
@example(["a/x.jpg", "b/x.png", "x_2.gif", "y.jpg"])
def test_a_stem_that_is_taken_gets_a_number(files):
    found = paths_by_stem(files, Path("out"), ".html")
    assert len(set(found)) == len(files)
    if "y.jpg" in files:
        assert [path.name for path in found] == ["x.html", "x_2.html", "x_2_2.html", "y.html"]
