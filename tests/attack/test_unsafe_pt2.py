"""Files that would run code when they are loaded: neither dfm_d2 nor the example runs it."""

import io
import json
import os
import pickle
import runpy
import zipfile

import numpy as np
import pytest
import torch
from tool_loader import ROOT

from dfm_d2.errors import UnsafeFileError, UserError
from dfm_d2.export.formats import export_model
from dfm_d2.export.load import load_file

GRAPH, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
RUN = "__import__('os').mkdir('ran')"


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x):
        return torch.nn.functional.gelu(self.linear(x) * torch.tensor([1.0, 2.0])), x.new_zeros(
            x.shape[0] * 3
        )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{member: content} of a file of export_model."""
    torch.manual_seed(0)
    folder, shapes = tmp_path_factory.mktemp("written"), {"x": {0: torch.export.Dim("n", min=2, max=64)}}
    path = export_model(Scaled().eval(), {"x": torch.ones(3, 2)}, "pt2", folder, {"about": 1}, shapes)
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def saved(value) -> bytes:
    torch.save(value, file := io.BytesIO())
    return file.getvalue()


SAMPLE = saved(((), {"x": torch.ones(3, 2)}))


def changed(members, change):
    """The members with another graph."""
    program = json.loads(members[GRAPH])
    change(program, program["graph_module"]["graph"])
    return members | {GRAPH: json.dumps(program).encode()}


def with_object(members, config, member, content=None):
    """With an object in place of the first tensor of a config."""
    payloads = json.loads(members[config])
    next(iter(payloads["config"].values())).update(path_name=member.rpartition("/")[2], use_pickle=True)
    return members | {config: json.dumps(payloads).encode(), member: content or saved(Payload())}


def with_call(target):
    arguments = [{"name": "filename", "arg": {"as_string": "ran"}, "kind": 1}]
    node = {"target": target, "inputs": arguments, "outputs": [{"as_none": True}], "metadata": {}}
    return lambda members: changed(members, lambda program, graph: graph["nodes"].insert(0, node))


def expression(program, graph):
    sizes = [size for meta in graph["tensor_values"].values() for size in meta["sizes"]]
    next(size for size in sizes if "as_expr" in size)["as_expr"]["expr_str"] = RUN


def tree(program, graph):
    hook = json.dumps({"__enum__": True, "fqn": "payload:A", "name": "b"})  # imports payload.py
    spec = json.dumps([1, {"type": "builtins.tuple", "context": hook, "children_spec": []}])
    program["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = spec


# What the members of a good file become.
HOSTILE = {
    "weight": lambda m: with_object(m, WEIGHTS, "data/weights/weight_9"),
    "constant": lambda m: with_object(m, CONSTANTS, "data/constants/tensor_9"),
    "script": lambda m: with_object(m, CONSTANTS, "data/constants/custom_obj_0"),
    "opaque": lambda m: with_object(m, CONSTANTS, "data/constants/opaque_obj_0", pickle.dumps(Payload())),
    "weights of torch 2.8": lambda m: m | {"data/weights/model.pt": saved(Payload())},
    "constants of torch 2.8": lambda m: m | {"data/constants/model.pt": saved(Payload())},
    "compiled code": lambda m: m | {"data/aotinductor/model/a.so": b"\x7fELF"},
    "expression": lambda m: changed(m, expression),
    "name": lambda m: m | {GRAPH: m[GRAPH].replace(b'"x"', json.dumps(f"x={RUN}").encode())},
    "tree": lambda m: changed(m, tree),
    "function": with_call("torch.serialization.os.mkdir"),
    "attribute": with_call("torch.ops.aten.__dict__.get"),
    "file": with_call("torch.ops.aten.from_file.default"),
    "two graphs": lambda m: m | {"/" + GRAPH: changed(m, expression)[GRAPH]},
    # These two load, without what they hold.
    "samples": lambda m: m | {SAMPLES: saved(Payload())},
    "guards": lambda m: changed(
        m | {SAMPLES: SAMPLE}, lambda p, graph: p.update(guards_code=[f"{RUN} or 1"])
    ),
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where payloads make a folder
    (tmp_path / "payload.py").write_text(f"{RUN}\nA = {{'b': 1}}\n")
    monkeypatch.syspath_prepend(tmp_path)

    def write(members):
        with zipfile.ZipFile("model.pt2", "w") as archive:
            for name, content in members.items():
                archive.writestr(f"model/{name.removeprefix('/')}", content)
        return "model.pt2"

    return write


def load_with_the_example(path):
    run, about = runpy.run_path(str(ROOT / "examples" / "run_exported.py"))["load_with_torch"](path)
    return lambda inputs: run({name: value.numpy() for name, value in inputs.items()}), json.loads(about)


LOADERS = pytest.mark.parametrize("load", [load_file, load_with_the_example])


@LOADERS
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_no_file_runs_code(name, load, written, write):
    path = write(HOSTILE[name](written))
    if name in ("samples", "guards"):
        assert load(path)[1] == {"about": 1}
    else:
        refusals = (UnsafeFileError, SystemExit, pickle.UnpicklingError)
        with pytest.raises(refusals, match="not loaded|not a plain file|Weights only"):
            load(path)
    assert not os.path.exists("ran")


@LOADERS
def test_a_file_with_sample_inputs_answers_what_the_model_does(load, written, write):
    torch.manual_seed(0)
    model, inputs = Scaled(), torch.linspace(-1, 1, 10).view(5, 2)
    assert written[SAMPLES] == b""
    for samples in (b"", SAMPLE):
        run, about = load(write(written | {SAMPLES: samples}))
        np.testing.assert_allclose(run({"x": inputs})[0], model(inputs)[0].detach(), atol=1e-6)


def test_a_damaged_graph_is_one_error_message(written, write):
    for cut in (lambda p, g: g.pop("nodes"), lambda p, g: g["nodes"].pop(0), lambda p, g: p.clear()):
        with pytest.raises(UserError, match="export it again"):
            load_file(write(changed(written, cut)))
