"""Generated images, and processes that need not import everything anew."""

import multiprocessing
import runpy
from pathlib import Path

import pytest
import torch.multiprocessing

from dfm_d2.detection.data.shapes import write_shapes

# What a training imports, some of it late: a module that is not there is left out without a word.
PRELOADED = (
    "dfm_d2.registry dfm_d2.engine.launch dfm_d2.detection.data.loader dfm_d2.detection.evaluation.evaluator "
    "torch._dynamo torch.utils.tensorboard torchvision scipy.optimize pycocotools.cocoeval"
).split()


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder, num_train=12, num_val=3, size=64, seed=0)
    return folder


@pytest.fixture
def inputs(make_input):
    """A batch, one image of which has no object."""
    return [make_input("a"), make_input("b", boxes=((1.0, 1.0, 9.0, 30.0),)), make_input("c", boxes=())]


@pytest.fixture
def detectron2():
    return runpy.run_path(str(Path(__file__).parents[1] / "framework/providers.py"))["detectron2_provider"]()


@pytest.fixture(params=["builtin", pytest.param("detectron2", marks=pytest.mark.d2)])
def provider(request):
    if request.param == "detectron2":
        request.getfixturevalue("detectron2")
    return request.param


@pytest.fixture
def server(monkeypatch):
    """The context of a server that imports once and forks the processes of all tests, also those that dfm_d2
    starts: it would spawn them, each with ten seconds of imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    start = torch.multiprocessing.start_processes

    def forked(*arguments, start_method, **options):
        return start(*arguments, start_method="forkserver", **options)

    monkeypatch.setattr(torch.multiprocessing, "start_processes", forked)
    return context
