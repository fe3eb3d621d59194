"""What is in the files, and what is refused."""

import io
import json
import sys
import tempfile
import zipfile
from contextlib import nullcontext
from pathlib import Path

import onnx
import pytest
import torch
from tool_loader import ROOT
from torch._inductor import config as inductor_config
from torch._inductor.runtime.cache_dir_utils import cache_dir

from dfm_d2.detection.exportable import prepared_model
from dfm_d2.errors import UserError
from dfm_d2.export import ABOUT
from dfm_d2.export.formats import export_model, write_aoti
from dfm_d2.export.load import load_file


def test_the_onnx_file_has_standard_operators_only(files):
    model = onnx.load(files("onnx"))
    assert {entry.domain for entry in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert "NonMaxSuppression" in {node.op_type for node in model.graph.node}
    about = json.loads({p.key: p.value for p in model.metadata_props}[ABOUT])
    assert about["class_names"] == ["RBC", "WBC", "Platelets"] and about["num_noise_boxes"] == 24
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [bool(d.dim_param) for d in dims] == [True, False, True, True], "batch, height, width are dynamic"


def test_a_pt2_file_holds_no_pickle_and_no_shape_that_data_decides_before_nms(files):
    graph = torch.export.load(files("pt2")).graph
    nodes = [node for node in graph.nodes if node.op == "call_function" and "val" in node.meta]
    names = [str(node.target) for node in nodes]
    place = next(i for i, name in enumerate(names) if "nms" in name)
    assert place > 200, "the sampler comes first"
    assert [node for node in nodes[:place] if _unbacked(node)] == [], "data decides a shape"
    assert _unbacked(nodes[place]), "the check must see NMS itself"
    assert not [n for n in names if n.startswith("dfm")], "ops of ours are left in the graph"
    waiting = ("_local_scalar_dense", "aten.item", "nonzero", "masked_select")
    assert not [n for n in names[:place] if any(word in n for word in waiting)]
    with zipfile.ZipFile(files("pt2")) as archive:
        starts = {archive.read(name)[:2] for name in archive.namelist()}
    assert starts.isdisjoint({b"PK", b"\x80\x02", b"\x80\x04"})


@pytest.mark.parametrize("name", ["torchscript", "onnx", "pt2"])
def test_a_file_holds_no_path_of_the_machine_that_made_it(files, name):
    contents = [files(name).read_bytes()]
    if name != "onnx":
        with zipfile.ZipFile(files(name)) as archive:
            contents = [archive.read(member) for member in archive.namelist()]
    paths = (ROOT, Path(torch.__file__).parents[1], Path(sys.prefix), Path(tempfile.gettempdir()))
    for path in (*map(bytes, paths), b'.py", line ', b'.py\\", line '):
        assert not [content for content in contents if path in content], path


def _unbacked(node) -> bool:
    values = torch.utils._pytree.tree_leaves(node.meta["val"])
    sizes = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    symbols = [s for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols]
    return any(str(symbol).startswith("u") for symbol in symbols)


def test_what_cannot_be_written_or_read(files, tmp_path, make_model):
    with pytest.raises(UserError, match="POOLER_SAMPLING_RATIO 0"):
        prepared_model(make_model(HEAD__POOLER_SAMPLING_RATIO=0))
    with pytest.raises(UserError, match="format is 'caffe2'"):
        export_model(torch.nn.ReLU(), {}, "caffe2", tmp_path, {})
    with pytest.raises(UserError, match="does not exist"):
        load_file(tmp_path / "model.onnx")
    with pytest.raises(UserError, match=r"ends in none of \.aoti\.pt2, \.pt2"):
        load_file(tmp_path / "model.bin")
    for path in (files(name) for name in ("torchscript", "onnx", "pt2")):
        for length in (5000, 0):
            (tmp_path / path.name).write_bytes(path.read_bytes()[:length])
            with pytest.raises(UserError, match=rf"{path.name} is no .* file.* \(.+\): export it again"):
                load_file(tmp_path / path.name)
    for ending, other in ((".aoti.pt2", "pt2"), (".pt2", "onnx")):
        path = tmp_path / f"other{ending}"
        path.write_bytes(files(other).read_bytes())
        with pytest.raises(UserError, match="export it again"):
            load_file(path)
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "other.ts")
    with pytest.raises(UserError, match="not written by tools/export_model.py"):
        load_file(tmp_path / "other.ts")


def test_aoti_without_a_compiler_is_one_error_message(tmp_path):
    without = inductor_config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(UserError, match=r"needs a C\+\+ compiler and found none: install g\+\+"):
        export_model(torch.nn.ReLU(), {"input": torch.zeros(2)}, "aoti", tmp_path, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_aoti_leaves_the_users_cache_alone_and_nothing_behind(tmp_path, monkeypatch, error):
    cache, temporary = tmp_path / "cache", tmp_path / "tmp"
    cache.mkdir()
    temporary.mkdir()
    (cache / "kernel.so").write_text("the user's")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def compilation(program, package_path, inductor_configs):
        ours = Path(cache_dir())
        assert ours.is_relative_to(temporary)
        (ours / "half.cpp").write_text("int")
        with inductor_config.patch(inductor_configs):
            assert not inductor_config.aot_inductor.precompile_headers
            assert not inductor_config.cpp_cache_precompile_headers
        if error:
            raise error

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compilation)
    with pytest.raises(error) if error else nullcontext():
        write_aoti(None, io.BytesIO(), {})
    assert [path.name for path in cache.iterdir()] == ["kernel.so"]
    assert not list(temporary.iterdir())


@pytest.mark.slow
def test_aoti_with_a_compiler_that_fails_is_one_error_message(tmp_path):
    compiler = tmp_path / "fails"
    script = '[ "$1" = --version ] && exec g++ --version\necho error: no space >&2; exit 1\n'
    compiler.write_text(f"#!/bin/sh\n{script}")
    compiler.chmod(0o755)
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    failing = inductor_config.patch({"cpp.cxx": (str(compiler),)})
    with failing, pytest.raises(UserError, match=r"does not take AOTInductor's code \(error: no space\)"):
        write_aoti(program, io.BytesIO(), {})


@pytest.mark.slow
def test_the_package_says_what_the_other_files_say(files, runs, tmp_path):
    about = dict(runs("aoti").about)
    assert about.pop("file_format") == "aoti"
    assert about == {key: value for key, value in runs("pt2").about.items() if key != "file_format"}
    for name, length in (("model.aoti.pt2", 5000), ("model.pt2", -1)):
        (tmp_path / name).write_bytes(files("aoti").read_bytes()[:length])
        with pytest.raises(UserError, match="export it again"):
            load_file(tmp_path / name)
