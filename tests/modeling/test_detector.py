"""FlowDetector and its backprop twin: shapes, locality, determinism, edge cases."""

import dataclasses
import itertools

import pytest
import torch

from dfm_d2.detection import from_config, training
from dfm_d2.detection.head import HeadAnswer
from dfm_d2.detection.postprocess import detections, padded_detections
from dfm_d2.detection.rollout import State, Told
from dfm_d2.detection.sampler import BoxSampler, Candidates, SamplerSettings
from dfm_d2.detection.training import disagreement, member_iou
from dfm_d2.errors import UserError
from dfm_d2.flow import BoxSpace, keyed_normal, stream_key
from dfm_d2.framework import EventStorage
from dfm_d2.local_update import HandOver, Leaves, attached_losses


def _losses(model, inputs, iteration=0):
    return attached_losses(model, model.prepare(inputs, iteration))


def _inputs_of_predictors(model, prepared):
    """x_t that each predictor sees in a step of training, after whatever finds it."""
    seen = []
    for head in model.predictors:
        head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2].clone()))
    attached_losses(model, prepared)
    return seen[-model.num_predictors :]


def _detections(model, inputs, **settings):
    model.eval()
    model.sampler.settings = dataclasses.replace(model.sampler.settings, **settings)
    return [out["instances"] for out in model(inputs)]


@pytest.mark.parametrize("intervals, rollout", [(3, 0), (3, 1), (1, 0), (1, 3)])
@pytest.mark.parametrize("assignment", ["dynamic_k", "path"])
def test_no_gradient_crosses_between_blocks(make_model, make_input, intervals, rollout, assignment):
    options = {"INTERVALS": intervals, "ROLLOUT": rollout, "ASSIGNMENT": assignment}
    model = make_model(**options, LOSS__VELOCITY_WEIGHT=1.0)
    named = [name for parameters in model.blocks().values() for name, _ in parameters]
    assert sorted(named) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert set(model.blocks()) == {"shared", "predictor0", "predictor1", "predictor2"}
    items = model.block_losses(model.prepare([make_input("a"), make_input("b")], 0), Leaves())
    for i in range(model.num_predictors):
        model.zero_grad(set_to_none=True)
        (name,), losses, _ = next(items)
        metrics = {f"member_iou/{name}"} if intervals == 1 and i else set()
        if metrics and assignment == "dynamic_k":
            metrics.add(f"disagreement/{name}")
        assert name == f"predictor{i}"
        assert set(losses) == {f"loss_{t}/{name}" for t in ("cls", "l1", "giou", "velocity")} | metrics
        sum(losses.values()).backward()
        for block, parameters in model.blocks().items():
            reached = {p.grad is not None for _, p in parameters}
            assert reached == {block == name}, f"the loss of {name} in {block}"
    (name,), losses, carried = next(items)
    assert name == "shared" and not losses
    carried.backward()
    assert all(p.grad is not None for n, p in model.blocks()["shared"] if "fpn_output" in n)
    assert next(items, None) is None


def test_on_policy_inputs_are_where_a_solver_step_leads(make_model, make_input):
    model = make_model(SEED=3)
    prepared = model.prepare([make_input("a"), make_input("b")], 5)
    path = [state.x_t.clone() for state in prepared.path]
    seen = _inputs_of_predictors(model, prepared)
    assert all(torch.equal(state.x_t, before) for state, before in zip(prepared.path, path))
    features = model._features(prepared.images)
    # The same step by the sampler's own arithmetic.
    u = prepared.path[0].u
    t, t_next = (model.predictors.t(state.u) for state in prepared.path[:2])
    boxes = model.space.proposals(path[0], prepared.image_sizes)
    answer = model.predictors[0](features, boxes, path[0], u)
    raw = answer.boxes[None], answer.class_logits[None]
    step = model.solver_step(path[0], *raw, t, t_next, prepared.image_sizes)
    torch.testing.assert_close(seen[0], path[0], rtol=0, atol=0)
    torch.testing.assert_close(seen[1], step.x_next)
    assert not seen[1].requires_grad and (seen[1] - path[1]).abs().max() > 1e-3


def test_a_rollout_is_the_solver_s_with_as_many_steps(make_model, make_input):
    """Each image trains at one of the R states of an interval that the averaged answers lead to."""
    model = make_model(INTERVALS=1, ROLLOUT=4).eval()
    for head in model.predictors:  # else they ignore the time
        torch.nn.init.normal_(head.time_modulation[1].weight, std=0.2)
    inputs = [make_input(f"{i}") for i in range(12)]
    prepared = model.prepare(inputs, 5)
    assert set(prepared.stop[:, 0].tolist()) == {0, 1, 2, 3}
    seen = _inputs_of_predictors(model, prepared)[0]
    step_function = model._step_function(model._features(prepared.images), prepared.image_sizes)
    for i, stop in enumerate(prepared.stop[:, 0].tolist()):
        x_t, times = prepared.path[0].x_t, model.predictors.t(prepared.u[i, 0]).tolist()
        for t, t_next in itertools.pairwise(times[: stop + 1]):
            x_t = step_function(x_t, t, t_next).x_next
        torch.testing.assert_close(seen[i], x_t[i], rtol=1e-4, atol=1e-4)


def _queries_of_predictors(model, run):
    """Those that each predictor is given in a run, and those that it makes."""
    given, made = ([[] for _ in model.predictors] for _ in range(2))
    for head, own_given, own_made in zip(model.predictors, given, made):

        def hook(_, arguments, answer, own_given=own_given, own_made=own_made):
            own_given.append(arguments[4])
            own_made.append(answer.queries)

        head.register_forward_hook(hook)
    run()
    return given, made


@pytest.mark.parametrize("members", [(), (1,)])
def test_queries_cross_once_an_interval_to_the_member_of_the_same_place(make_model, make_input, members):
    model = make_model(NUM_PREDICTORS=4, INTERVALS=2, SAMPLER__STEPS=4, SAMPLER__MEMBERS=list(members))
    given, made = _queries_of_predictors(model, lambda: _detections(model, [make_input()]))
    for place in members or (0, 1):
        assert given[place] == [None, None] and len(given[2 + place]) == 2
        assert all(torch.equal(queries, made[place][1]) for queries in given[2 + place])
    assert bool(members) == (not made[0])


@pytest.mark.parametrize("run", [_losses, _detections])
@pytest.mark.parametrize("rollout", [0, 1])
def test_in_training_queries_cross_as_they_do_at_inference(make_model, make_input, rollout, run):
    """To the member of the same place; where predictors train on the path to nobody."""
    model = make_model(NUM_PREDICTORS=4, INTERVALS=2, ROLLOUT=rollout)
    given, made = _queries_of_predictors(model, lambda: run(model, [make_input()]))
    assert given[:2] == [[None], [None]]
    for place in (0, 1):
        (crossed,) = given[2 + place]
        assert (
            (torch.equal(crossed, made[place][0]) and not crossed.requires_grad)
            if rollout
            else crossed is None
        )


def test_members_have_the_assignment_of_the_first(make_model, make_input):
    model = make_model(INTERVALS=1)
    prepared = model.prepare([make_input("a"), make_input("empty", boxes=())], 0)
    x_t, logits = prepared.path[0].x_t, torch.zeros(2, 12, 3)
    answer = HeadAnswer(logits, torch.zeros(2, 12, 4), torch.zeros(2, 12, 16))
    arguments = answer, State(x_t, torch.zeros(2), [None] * 3), prepared
    _, own = model._losses("predictor0", *arguments)
    for common, share in ((own, 0.0), (torch.full_like(own, -1), 1.0)):
        first = Told(*answer, common)
        terms, gt_index = model._losses("predictor1", *arguments, first)
        assert float(terms["disagreement/predictor1"]) == share and torch.equal(gt_index, common)
        assert float(terms["member_iou/predictor1"]) == pytest.approx(1 - share)
    some = torch.tensor([[0, 1, -1, -1]]), torch.tensor([[0, 2, 0, -1]])
    assert float(disagreement(*some)) == pytest.approx(2 / 3)
    boxes = torch.tensor([[[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 9.0, 9.0]]])
    assert float(member_iou(boxes, boxes + 1, torch.tensor([[0, 0, -1]]))) == pytest.approx(1 / 7)


def test_the_cascade_lets_gradients_cross_and_is_one_item(make_model, make_input):
    model = make_model("CascadeDetector")
    items = list(model.block_losses(model.prepare([make_input()], 0), HandOver()))
    assert [item.blocks for item in items] == [("predictor0", "predictor1", "predictor2")]
    sum(v for k, v in items[0].losses.items() if k.endswith("/predictor2")).backward()
    assert all(p.grad is not None for name, p in model.blocks()["predictor0"] if "interaction" in name)
    assert not model.is_local
    shapes = [{n: p.shape for n, p in m.state_dict().items()} for m in (make_model(), model)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("meta_architecture", ["FlowDetector", "CascadeDetector"])
@pytest.mark.parametrize(
    "options",
    [
        {"COUPLING": "independent", "LOSS__VELOCITY_WEIGHT": 0.5, "NUM_PROPOSALS": 1},
        {"INTERVALS": 1, "HEAD__INTERACTION": "grid_linear"},
        {"NUM_PREDICTORS": 1},
    ],
    ids=lambda o: ",".join(o),
)
def test_every_option_trains_and_detects(make_model, make_input, meta_architecture, options):
    model = make_model(meta_architecture, **options)
    inputs = [make_input("a"), make_input("b", boxes=())]
    losses = _losses(model, inputs)
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    for found in _detections(model, inputs):
        assert torch.isfinite(found.pred_boxes.tensor).all() and torch.isfinite(found.scores).all()


@pytest.mark.parametrize(("number", "num_classes"), [(0, 3), (1, 1), (1, 3), (30, 3)])
def test_any_number_of_boxes_and_one_class(make_model, make_input, number, num_classes):
    model, item = make_model(NUM_CLASSES=num_classes), make_input(boxes=((3.0, 3.0, 20.0, 20.0),) * number)
    losses = _losses(model, [item])
    assert all(torch.isfinite(v) for v in losses.values())
    if number == 0:
        assert all(v == 0 for k, v in losses.items() if "cls" not in k)
    assert (_detections(model, [item])[0].pred_classes < num_classes).all()


def test_noise_depends_on_iteration_and_image_not_on_batch(make_model, make_input):
    model = make_model(TIME_RATE=0.0)
    a, b = make_input("a"), make_input("b")
    together, alone = model.prepare([a, b], 3), model.prepare([b], 3)
    for d in range(3):
        torch.testing.assert_close(together.path[d].x_t[1:], alone.path[d].x_t, rtol=0, atol=0)
        assert d / 3 <= together.path[d].u.min() and together.path[d].u.max() < (d + 1) / 3
    assert not torch.equal(model.prepare([b], 4).path[0].x_t, alone.path[0].x_t)


@pytest.mark.parametrize("meta_architecture", ["FlowDetector", "CascadeDetector"])
@pytest.mark.parametrize("settings", [{}, {"steps": 5}])
def test_a_batch_of_two_is_two_batches_of_one(make_model, make_input, meta_architecture, settings):
    model = make_model(meta_architecture)
    a, b = make_input("a"), make_input("b")
    both = _detections(model, [a, b], **settings)
    for item, found in zip((a, b), both):
        alone = _detections(model, [item])[0]
        assert len(found) == len(alone) > 0
        torch.testing.assert_close(found.pred_boxes.tensor, alone.pred_boxes.tensor, rtol=0, atol=0.01)
        torch.testing.assert_close(found.scores, alone.scores, rtol=0, atol=1e-5)


def test_two_evaluations_agree_and_the_seed_matters(make_model, make_input):
    model = make_model()
    first, _, again = (_detections(model, [make_input()])[0] for _ in range(3))
    assert len(model.sampler.graphs) == 0  # a CPU captures nothing
    assert torch.equal(first.pred_boxes.tensor, again.pred_boxes.tensor)
    other = _detections(model, [make_input()], seed=1)[0]
    assert len(other) != len(first) or not torch.equal(first.pred_boxes.tensor, other.pred_boxes.tensor)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_proposals": 1, "noise_passes": 3},
        {"num_proposals": 300, "steps": 8},
        {"steps": 1, "nms_thresh": 0.0},
        {"score_thresh": 2.0},
    ],
    ids=str,
)
def test_the_sampler_changes_without_retraining(make_model, make_input, settings):
    found = _detections(make_model(), [make_input()], **settings)[0]
    assert found.image_size == (96, 128)  # the original image's
    assert len(found) <= (0 if "score_thresh" in settings else 100) and (found.scores.diff() <= 0).all()


def test_members_are_chosen_at_inference(make_model, make_input):
    ensemble = make_model(INTERVALS=1)
    assert len(_detections(ensemble, [make_input()], members=(1,))[0]) > 0
    for model in (ensemble, make_model()):
        with pytest.raises(ValueError, match=r"MEMBERS names \[3\]"):
            _detections(model, [make_input()], members=(3,))


def test_the_trajectory_ends_where_the_detections_are(make_model, make_input):
    model = make_model(TIME_RATE=0.0).eval()
    trajectory, sizes, _ = model.trajectory([make_input()])
    assert trajectory.times == (0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0)
    assert len(trajectory.states) == 4 and sizes.tolist() == [[48, 64]]
    assert torch.equal(trajectory.states[-1], trajectory.last.x_1_hat)


def test_the_default_grid_asks_each_predictor_at_the_beginning_of_its_interval(make_model, make_input):
    settings = SamplerSettings(num_proposals=1, steps=4)
    for name in ("num_proposals", "steps", "noise_passes", "detections_per_image"):
        with pytest.raises(ValueError, match=f"must be at least 1, got .*{name}=0"):
            dataclasses.replace(settings, **{name: 0})
    model = make_model(TIME_RATE=2.0).eval()
    grid = model.time_grid
    assert grid == (0.0, pytest.approx(0.5627, abs=1e-4), pytest.approx(0.8516, abs=1e-4), 1.0)
    assert [model.predictors.answering(t) for t in grid[:-1]] == [[0], [1], [2]]
    t = [model.predictors.t(state.u) for state in model.prepare([make_input()], 0).path]
    assert all(grid[d] <= t[d] <= grid[d + 1] for d in range(3))
    # The twin's time is not warped.
    assert make_model("CascadeDetector", TIME_RATE=2.0, SAMPLER__STEPS=4).time_grid == (0, 0.25, 0.5, 0.75, 1)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AssertionError("Must set MODEL.RESNETS.NUM_GROUPS = 1"), "Must set MODEL.RESNETS.NUM_GROUPS = 1"),
        (AssertionError(), "check MODEL.RESNETS and MODEL.FPN."),
        (KeyError("XN"), "'XN' is not known"),
    ],
)
def test_a_backbone_that_cannot_be_built_is_an_error_message(make_model, monkeypatch, error, said):
    """Detectron2 asserts, now and then without a word."""

    def build(cfg):
        raise error

    monkeypatch.setattr(from_config, "build_backbone", build)
    with pytest.raises(UserError, match=f"no backbone can be built: {said}"):
        make_model()


def test_bad_input_and_bad_config_are_named(make_model, make_input):
    model, item = make_model(), make_input()
    item["instances"].gt_classes = torch.tensor([1, 2])  # an image needs no object of class 0
    assert model.prepare([item], 0).ground_truth.classes.tolist() == [[1, 2]]
    for classes in ([3, 1], [1, -1]):
        item["instances"].gt_classes = torch.tensor(classes)
        with pytest.raises(UserError, match=r"'a.jpg' has a class outside \[0, 3\)"):
            model.prepare([item], 0)
    del item["instances"]
    with pytest.raises(UserError, match="no 'instances'"):
        model.prepare([item], 0)
    wrong = (("HEAD__IN_FEATURES", ["p9"], "IN_FEATURES names"), ("HEAD__HIDDEN_DIM", 32, "HIDDEN_DIM is 32"))
    for key, value, message in (*wrong, ("NUM_CLASSES", 0, "NUM_CLASSES must be at least 1")):
        with pytest.raises(ValueError, match=message):
            make_model(**{key: value})


def test_in_training_mode_a_call_answers_the_losses_of_the_joint_update(make_model, make_input):
    """As Detectron2's trainers want it; the iteration is that of the event storage, or counted."""
    model, inputs = make_model().train(), [make_input("a"), make_input("b", boxes=())]
    for iteration in (0, 1):
        torch.testing.assert_close(model(inputs), _losses(model, inputs, iteration), rtol=0, atol=0)
    with EventStorage(7):
        torch.testing.assert_close(model(inputs), _losses(model, inputs, 7), rtol=0, atol=0)
    ensemble = make_model(INTERVALS=1).train()
    assert all(key.startswith("loss") for key in ensemble(inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_boxes_in_float32(make_model, make_input, dtype):
    model = make_model()
    with torch.autocast("cpu", dtype):
        losses = _losses(model, [make_input()])
        found = _detections(model, [make_input()])[0]
    assert all(v.dtype == torch.float32 and torch.isfinite(v) for v in losses.values())
    assert found.pred_boxes.tensor.dtype == torch.float32


def _found(boxes, scores, size, **settings):
    """The detections of boxes of one class, and the same as padded tensors."""
    space, sizes = BoxSpace(2.0), torch.tensor([size])
    candidates = Candidates(space.encode(boxes, sizes), torch.tensor(scores)[None, :, None])
    arguments = candidates, space, sizes
    settings = SamplerSettings(num_proposals=3, steps=1, **settings)
    return detections(*arguments, [{}], settings)[0]["instances"], padded_detections(*arguments, settings)


def test_images_of_a_process_are_padded_to_the_largest_of_all(monkeypatch):
    monkeypatch.setattr(training, "world_size", lambda: 2)
    monkeypatch.setattr(training, "max_over_processes", lambda size: torch.tensor([50, 70]))
    images = torch.ones(1, 3, 48, 64)
    padded = training.of_common_size(images)
    assert padded.shape == (1, 3, 50, 70) and padded.sum() == images.sum() == padded[..., :48, :64].sum()
    monkeypatch.setattr(training, "max_over_processes", lambda size: size)
    assert training.of_common_size(images) is images


def test_scores_that_are_no_numbers_and_boxes_without_area_are_no_detections():
    boxes = torch.tensor([[[0.0, 0.0, 9.0, 9.0], [20.0, 0.0, 29.0, 9.0], [40.0, 0.0, 49.0, 9.0]]])
    found, _ = _found(boxes, [0.9, float("nan"), 0.5], (50, 50))
    assert found.scores.tolist() == pytest.approx([0.9, 0.5])
    torch.testing.assert_close(found.pred_boxes.tensor, boxes[0, ::2], rtol=0, atol=1e-3)
    # A box without area takes the place of another detection.
    boxes = torch.tensor([[[5.0, 5.0, 5.0, 20.0], [10.0, 10.0, 30.0, 30.0], [40.0, 5.0, 55.0, 15.0]]])
    found, padded = _found(boxes, [0.9, 0.8, 0.7], (40, 60), detections_per_image=2)
    assert found.image_size == (40, 60)  # without "height" and "width" that of what the network saw
    torch.testing.assert_close(found.pred_boxes.tensor, boxes[0, 1:2], rtol=0, atol=1e-3)
    assert padded.count.tolist() == [1] and padded.classes.tolist() == [[0, -1]]
    torch.testing.assert_close(padded.boxes_xyxy[0, :1], boxes[0, 1:2], rtol=0, atol=1e-3)


@torch.no_grad()
def test_passes_are_runs_of_their_own_and_their_noise_lies_one_after_the_other(make_model, make_input):
    settings = SamplerSettings(num_proposals=5, steps=1, seed=7, noise_passes=3)
    one, three = (BoxSampler(dataclasses.replace(settings, noise_passes=n)).noise(["a", "b"]) for n in (1, 3))
    assert three.shape == (2, 15, 4) and torch.equal(three[:, :5], one)
    assert torch.equal(three[1, 10:], keyed_normal([stream_key("sampler", 7, "b", 2)], 5)[0])
    model = make_model().eval()
    pixels, sizes = model._images([make_input("a"), make_input("b")])
    two = dataclasses.replace(model.sampler.settings, noise_passes=2)
    x_0 = BoxSampler(two).noise(["a", "b"])
    alone = [model.candidates(pixels, sizes, noise) for noise in x_0.chunk(2, dim=1)]
    model.sampler.settings = two
    for together, parts in zip(model.candidates(pixels, sizes, x_0), zip(*alone), strict=True):
        torch.testing.assert_close(together, torch.cat(parts, dim=1))
