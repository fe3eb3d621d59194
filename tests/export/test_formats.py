"""What is in the files, and what is refused."""

import io
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path

import onnx
import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.runtime.cache_dir_utils import cache_dir

from dfm_d2.detection.tensor_detector import ConstantNoise
from dfm_d2.export import ExportSettings, aoti, export_model, load_artefact
from dfm_d2.export.aoti import write_package
from dfm_d2.export.formats import ABOUT, exported_program, prepared_model


def test_the_onnx_file_has_standard_operators_only(files):
    model = onnx.load(files["onnx"])
    assert {entry.domain for entry in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert "NonMaxSuppression" in {node.op_type for node in model.graph.node}
    about = json.loads({p.key: p.value for p in model.metadata_props}[ABOUT])
    assert about["class_names"] == ["RBC", "WBC", "Platelets"] and about["num_noise_boxes"] == 24


def test_batch_height_and_width_are_dynamic(files):
    dims = onnx.load(files["onnx"]).graph.input[0].type.tensor_type.shape.dim
    assert [bool(d.dim_param) for d in dims] == [True, False, True, True]


def test_no_shape_depends_on_data_before_nms(detector):
    program = exported_program(prepared_model(detector, ExportSettings(steps=1)), ExportSettings(steps=1))
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    names = [str(node.target) for node in nodes]
    place = next(i for i, name in enumerate(names) if "nms" in name)
    assert place > 200, "the sampler comes first"
    for node in nodes[:place]:
        assert not _unbacked(node), f"{node} has a shape that data decides"
    assert _unbacked(nodes[place]), "the check must see NMS itself"
    assert not [n for n in names if n.startswith("dfm")], "ops of ours are left in the graph"
    waiting = ("_local_scalar_dense", "aten.item", "nonzero", "masked_select")
    assert not [n for n in names[:place] if any(word in n for word in waiting)]


def _unbacked(node) -> bool:
    values = node.meta["val"] if isinstance(node.meta["val"], (list, tuple)) else [node.meta["val"]]
    sizes = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    symbols = {
        str(s) for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols
    }
    return any(symbol.startswith("u") for symbol in symbols)


@pytest.mark.parametrize("format", ["torchscript", "pt2"])
def test_constant_noise_repeats(detector, preparation, tmp_path, make_input, format):
    settings = ExportSettings(steps=1, proposals=7, noise="constant")
    sample = torch.zeros(3, 96, 96)
    run = load_artefact(export_model(detector, format, tmp_path, preparation, settings, sample))
    item = make_input("a", size=(100, 140))
    eager = ConstantNoise(prepared_model(detector, settings))([item])[0]["instances"]
    for image_id in ("a", "b"):
        found = run([{**item, "image_id": image_id}])[0]["instances"]
        torch.testing.assert_close(found.scores, eager.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.pred_boxes.tensor, eager.pred_boxes.tensor, rtol=0, atol=0.1)
    with pytest.raises(ValueError, match="constant noise"):
        run([item], torch.zeros(1, 7, 4))


def test_predictors_are_chosen(make_model):
    model = make_model(TIME="shared", SAMPLER__STEPS=1)
    chosen = prepared_model(model, ExportSettings(predictors=(1,)))
    assert chosen.sampler.settings.predictors == (1,) and model.sampler.settings.predictors == ()
    with pytest.raises(ValueError, match=r"names \[7\]"):
        prepared_model(model, ExportSettings(predictors=(7,)))
    with pytest.raises(ValueError, match="partitioned"):
        prepared_model(make_model(), ExportSettings(predictors=(1,)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"SAMPLER__RENEWAL_THRESH": 0.5}, "RENEWAL_THRESH"),
        ({"HEAD__POOLER_SAMPLING_RATIO": 0}, "POOLER_SAMPLING_RATIO 0"),
    ],
)
def test_what_is_no_fixed_graph_is_refused(make_model, options, said):
    with pytest.raises(ValueError, match=said):
        prepared_model(make_model(**options), ExportSettings())


def test_bad_words_are_named(detector, preparation, tmp_path):
    with pytest.raises(ValueError, match="noise is 'none'"):
        ExportSettings(noise="none")
    with pytest.raises(ValueError, match="format is 'caffe2'"):
        export_model(detector, "caffe2", tmp_path, preparation, ExportSettings(), torch.zeros(3, 96, 96))


def test_files_that_are_none_of_ours(files, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_artefact(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"ends in none of \.aoti\.pt2, \.pt2"):
        load_artefact(tmp_path / "model.bin")
    for path in (files[name] for name in ("torchscript", "onnx", "pt2")):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:5000])
        with pytest.raises(ValueError, match="export it again"):
            load_artefact(tmp_path / path.name)
    for ending, other in ((".aoti.pt2", "pt2"), (".pt2", "onnx")):
        path = tmp_path / f"other{ending}"
        path.write_bytes(files[other].read_bytes())
        with pytest.raises(ValueError, match="export it again"):
            load_artefact(path)
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "other.ts")
    with pytest.raises(ValueError, match="not written by tools/export_model.py"):
        load_artefact(tmp_path / "other.ts")


@pytest.mark.parametrize("name", ["a.ts", "a.pt2", "a.onnx"])
def test_an_empty_file_is_one_sentence(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"{name} is no .* file.*: export it again"):
        load_artefact(tmp_path / name)


def test_aoti_without_a_compiler_is_one_sentence(detector, preparation, tmp_path):
    without = inductor_config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(ValueError, match=r"needs a C\+\+ compiler and found none: install g\+\+"):
        export_model(detector, "aoti", tmp_path, preparation, ExportSettings(), torch.zeros(3, 96, 96))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_aoti_leaves_the_users_cache_alone_and_nothing_behind(tmp_path, monkeypatch, error):
    cache, temporary = tmp_path / "cache", tmp_path / "tmp"
    cache.mkdir()
    temporary.mkdir()
    (cache / "kernel.so").write_text("the user's")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    # No second search, which would run the compiler.
    monkeypatch.setattr(aoti, "require_compiler", lambda: "g++")

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
        write_package(None, io.BytesIO(), {})
    assert [path.name for path in cache.iterdir()] == ["kernel.so"]
    assert not list(temporary.iterdir())


@pytest.mark.slow
def test_aoti_with_a_compiler_that_fails_is_one_sentence(tmp_path):
    compiler = tmp_path / "fails"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\necho error: no room >&2; exit 1\n'
    )
    compiler.chmod(0o755)
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    failing = inductor_config.patch({"cpp.cxx": (str(compiler),)})
    with (
        failing,
        pytest.raises(ValueError, match=r"fails does not compile AOTInductor's code \(error: no room\)"),
    ):
        write_package(program, io.BytesIO(), {})


@pytest.mark.slow
def test_the_package_says_what_the_other_files_say(files, runs, tmp_path):
    about = dict(runs["aoti"].about)
    assert about.pop("file_format") == "aoti"
    assert about == {key: value for key, value in runs["pt2"].about.items() if key != "file_format"}
    (tmp_path / "model.aoti.pt2").write_bytes(files["aoti"].read_bytes()[:5000])
    with pytest.raises(ValueError, match="export it again"):
        load_artefact(tmp_path / "model.aoti.pt2")
    (tmp_path / "model.pt2").write_bytes(files["aoti"].read_bytes())
    with pytest.raises(ValueError, match="export it again"):
        load_artefact(tmp_path / "model.pt2")
