"""Classifiers: whose gradients go where, what inference depends on, backbones, Forward-Forward."""

import pytest
import torch
from tiny_classifier import TIMM_CNN, VIT, class_inputs, make_classifier, save_timm_vit
from toy_model import moved, train_steps

from dfm_d2.classification.baselines import unit_square
from dfm_d2.classification.flow_classifier import EndpointLoss
from dfm_d2.local_update import HandOver, SavedActivations, check_blocks, sum_losses

COLOUR = ["MODEL.PIXEL_MEAN", "[120.0,120.0,120.0]", "MODEL.PIXEL_STD", "[60.0,60.0,60.0]"]
LEARNED = ["MODEL.CLASSIFIER.EMBEDDING", "learned"]
BACKBONES = {
    "cnn": ([], 8, 1),
    "vit": (VIT, 8, 1),
    "vit pooled": ([*VIT, "MODEL.CLASSIFIER.POOL", "2"], 8, 1),
    "timm cnn": ([*TIMM_CNN, *COLOUR], 32, 3),
}


def stage_losses(model, inputs):
    return {item.blocks[0]: item.losses for item in model.block_losses(model.prepare(inputs, 7), HandOver())}


@pytest.mark.parametrize("method", ["flow", "forward_forward"])
@pytest.mark.parametrize("opts, size, channels", BACKBONES.values(), ids=BACKBONES)
def test_a_block_s_loss_has_gradients_in_its_own_block_only(method, opts, size, channels):
    model = make_classifier(*opts, method=method).train()
    inputs = class_inputs(4, size, channels)
    check_blocks(model.blocks(), [(n, p) for n, p in model.named_parameters() if p.requires_grad])
    for index in range(model.num_blocks):
        model.zero_grad(set_to_none=True)
        losses = stage_losses(model, inputs)
        assert list(losses) == [f"block{d}" for d in range(model.num_blocks)]
        sum_losses(losses[f"block{index}"]).backward()
        for block, named in model.blocks().items():
            # The output of a ViT's class token is not pooled, its parameters are touched.
            expected = [n for n, _ in named] if block == f"block{index}" else []
            assert [n for n, p in named if p.grad is not None] == expected, block


@pytest.mark.parametrize("opts, size, channels", BACKBONES.values(), ids=BACKBONES)
def test_the_blocks_in_a_row_are_the_backbone(opts, size, channels):
    model = make_classifier(*opts, method="backprop").eval()
    x = images = model.normalised(class_inputs(2, size, channels))
    for index in range(model.num_blocks):
        x = model.backbone.forward_block(index, x)
        pooled = model.backbone.pooled(x)
        assert pooled.shape == (2, model.backbone.channels[index])
        assert torch.equal(model.backbone(images)[index], pooled)
    assert len(model.backbone(images)) == model.num_blocks
    if opts[: len(VIT)] == VIT:
        torch.testing.assert_close(x, model.backbone.model.forward_features(images))
    assert list(model.blocks()) == ["shared"]


def test_noise_depends_on_seed_iteration_image_and_block_only_and_not_on_the_time_power():
    model, inputs = make_classifier(), class_inputs(3)
    whole, part = model.prepare(inputs, 7), model.prepare(inputs[1:2], 7)
    points = model.noise_samples
    for a, b in zip(whole.samples, part.samples, strict=True):
        assert torch.equal(a.x_0[points : 2 * points], b.x_0) and torch.equal(a.t[points : 2 * points], b.t)
    assert not torch.equal(whole.samples[0].x_0, whole.samples[1].x_0)
    assert not torch.equal(whole.samples[0].x_0, model.prepare(inputs, 8).samples[0].x_0)
    # A time power draws the same numbers nearer to the noise.
    models = [make_classifier("MODEL.CLASSIFIER.TIME_POWER", power) for power in ("1.0", "3.0")]
    for a, b in zip(*(model.prepare(class_inputs(64), 7).samples for model in models)):
        assert torch.equal(a.x_0, b.x_0)
        torch.testing.assert_close(b.t, a.t**3)
        assert float(b.t.mean()) == pytest.approx(0.25, abs=0.06)  # the mean of u^3
        torch.testing.assert_close(b.x_t, (1 - b.t)[:, None] * b.x_0 + b.t[:, None] * b.x_1)


def test_blocks_that_answer_count_from_the_last_too():
    named = ("[-1]", "[2]", "[-3,-1]", "[0,2]")
    models = [make_classifier("MODEL.CLASSIFIER.SAMPLER.BLOCKS", blocks).eval() for blocks in named]
    last, third, two, same_two = (model(class_inputs(1))[0]["probs"] for model in models)
    assert torch.equal(last, third) and torch.equal(two, same_two) and not torch.equal(last, two)


@pytest.mark.parametrize("method", ["flow", "forward_forward"])
def test_a_batch_of_two_is_two_batches_of_one_and_the_seed_decides(method):
    opts = ["MODEL.CLASSIFIER.SAMPLER.SAMPLES", "3"]
    model, inputs = make_classifier(*opts, method=method).double().eval(), class_inputs(2)
    together = [x["probs"] for x in model(inputs)]
    for a, x in zip(together, inputs):
        torch.testing.assert_close(a, model([x])[0]["probs"], rtol=1e-9, atol=1e-12)
        assert abs(float(a.sum()) - 1) < 1e-10
    assert all(torch.equal(a, x["probs"]) for a, x in zip(together, model(inputs)))
    other = make_classifier(*opts, "MODEL.CLASSIFIER.SAMPLER.SEED", "1", method=method).double().eval()
    assert torch.equal(other(inputs)[0]["probs"], together[0]) == (method == "forward_forward")


@pytest.mark.parametrize("weights", ["uniform", "confidence"])
def test_inference_answers_the_weighted_mean_endpoint_at_the_noise(weights):
    model = make_classifier("MODEL.CLASSIFIER.SAMPLER.WEIGHTS", weights).eval()
    inputs, temperature = class_inputs(2), model.criterion.temperature
    x_0 = model.sampler.noise(["0", "1"], model.label_space)
    images, t = model.normalised(inputs), torch.zeros(2, 4)
    with torch.no_grad():
        pooled = enumerate(model.backbone(images))
        ends = torch.stack([model._endpoint(d, features, x_0, t) for d, features in pooled])
        found = model.class_logits(images, ["0", "1"])
    w = (model.label_space.logits(ends) / temperature).softmax(-1).amax(-1, keepdim=True)
    w = torch.ones_like(w) if weights == "uniform" else w
    torch.testing.assert_close(found, model.label_space.logits((w * ends).sum(0) / w.sum(0)))
    probs = (found / temperature).softmax(-1).mean(1)
    torch.testing.assert_close(torch.stack([x["probs"] for x in model(inputs)]), probs)


def test_the_loss_is_the_squared_error_and_the_cross_entropy_of_the_read_out():
    x_1_hat, x_1 = torch.randn(2, 2, 5, 4).double()
    labels, embeddings = torch.tensor([0, 2]), torch.eye(4).double()
    found = EndpointLoss(readout_weight=0.5, temperature=0.2)(x_1_hat, x_1, embeddings, labels)
    torch.testing.assert_close(found["flow"], ((x_1_hat - x_1) ** 2).sum(-1).mean())
    right = (x_1_hat / 0.2).log_softmax(-1)[[0, 1], :, [0, 2]]
    torch.testing.assert_close(found["readout"], -0.5 * right.mean())
    assert list(EndpointLoss(readout_weight=0.0)(x_1_hat, x_1, embeddings, labels)) == ["flow"]


def test_shuffled_noise_has_the_velocity_of_another_image():
    """The target x_t + (1 - t)(x_1 - x_0') is x_1 only where x_0' = x_0."""
    models = [make_classifier("MODEL.CLASSIFIER.SHUFFLE_X0", str(s)).train() for s in (False, True)]
    for number in (4, 1):  # alone, the other image is itself
        a, b = (stage_losses(m, class_inputs(number))["block0"]["loss_flow/block0"] for m in models)
        assert b > a if number > 1 else torch.allclose(a, b)


def test_learned_embeddings_learn_by_the_read_out_term_alone():
    model = make_classifier(*LEARNED).train()
    losses = stage_losses(model, class_inputs())["block1"]
    assert [n for n, _ in model.blocks()["shared"]] == ["label_space.weight"]
    losses["loss_flow/block1"].backward(retain_graph=True)
    assert model.label_space.weight.grad is None
    losses["loss_readout/block1"].backward()
    assert model.label_space.weight.grad.norm() > 0


WRONG = {
    "blocks": (["MODEL.CLASSIFIER.BLOCKS", "9"], "BLOCKS is 9, but the backbone has 3 stages"),
    "no such model": ([*TIMM_CNN[:3], "vit_tinny"], "'vit_tinny' is no model of timm; such are \\w+, "),
    "nothing like it": ([*TIMM_CNN[:3], "nope"], "'nope' is no model of timm\\.$"),
    "option form": ([*VIT[:-1], '["depth"]'], "OPTIONS has 'depth': write name=value"),
    "option": ([*VIT[:-1], '["depht=2"]'], "timm cannot build vit_tiny_patch16_224"),
    "no stages": ([*TIMM_CNN[:3], "xcit_nano_12_p16_224"], "has no row of stages"),
    "channels last": ([*TIMM_CNN[:3], "swin_tiny_patch4_window7_224"], "has no row of stages with maps"),
    "option's value": ([*VIT[:-1], '["img_size=["]'], "has 'img_size=\\['"),
    "no weights": ([*VIT, "MODEL.TIMM.WEIGHTS", "/nowhere.pth"], "/nowhere.pth is missing"),
    "dimension": (["MODEL.CLASSIFIER.EMBED_DIM", "2"], "EMBED_DIM is 2, but 3 orthonormal classes need"),
    "sampler block": (["MODEL.CLASSIFIER.SAMPLER.BLOCKS", "[3]"], "names \\[3\\], there are 3 blocks"),
    "sampler block from the last": (["MODEL.CLASSIFIER.SAMPLER.BLOCKS", "[-4]"], "names \\[-4\\], there are"),
    "sampler block twice": (["MODEL.CLASSIFIER.SAMPLER.BLOCKS", "[0,-3]"], "names a block of 3 twice"),
    "classes": (["MODEL.DFM.NUM_CLASSES", "0"], "NUM_CLASSES must be at least 2"),
}


@pytest.mark.parametrize("opts, said", WRONG.values(), ids=WRONG)
def test_what_cannot_be_built_is_one_error_message(opts, said):
    with pytest.raises(ValueError, match=said):
        make_classifier(*opts)


def test_inputs_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="wants 8 x 8: set INPUT.IMAGE_SIZE 8, or img_size=16"):
        make_classifier(*VIT).prepare(class_inputs(2, 16), 0)
    model, inputs = make_classifier(), class_inputs(2)
    with pytest.raises(RuntimeError, match="train through dfm_d2.engine"):
        model.train()(inputs)
    with pytest.raises(ValueError, match="'1.png' has the label 7"):
        model.prepare([inputs[0], inputs[1] | {"label": 7}], 0)
    small = inputs[1] | {"image": inputs[1]["image"][:, :4]}
    with pytest.raises(ValueError, match="1.png has the shape .* set INPUT.IMAGE_SIZE"):
        model.eval()([inputs[0], small])
    with pytest.raises(ValueError, match="images have 3 channels"):
        model.eval()(class_inputs(1, channels=3))


def test_pretrained_weights_of_timm_are_loaded_from_a_file_that_has_all(tmp_path):
    """Those that would leave layers random are refused."""
    torch.manual_seed(3)
    path = tmp_path / "vit.pth"
    trained, weights = save_timm_vit(path), ["MODEL.TIMM.WEIGHTS", str(path)]
    model = make_classifier(*VIT, *weights).eval()
    images = model.normalised(class_inputs(2))
    found = model.backbone.model.forward_features(images)
    torch.testing.assert_close(found, trained.eval().forward_features(images))
    writes = {
        "vit.pth has no cls_token, and": lambda: torch.save({"stem.weight": torch.ones(3)}, path),
        "vit.pth has no blocks.2.norm1.weight": lambda: save_timm_vit(path, depth=2),
        "vit.pth is damaged or not of torch.save": lambda: path.write_bytes(b""),
        "vit.pth is no.? .*plain file|vit.pth is damaged": lambda: path.write_bytes(b"junk" * 100),
    }
    for said, write in writes.items():
        write()
        with pytest.raises(ValueError, match=said):
            make_classifier(*VIT, *weights)


def test_labels_are_seen_in_the_image_and_the_negative_one_is_wrong():
    model, inputs = make_classifier(method="forward_forward"), class_inputs(6)
    images = model.normalised(inputs)
    waves = torch.stack([model.labelled(images[:1], torch.tensor([k]))[0] - images[0] for k in range(3)])
    assert float((torch.corrcoef(waves.flatten(1)) - torch.eye(3)).abs().max()) < 0.5
    pair, labels, _ = model.prepare(inputs, 0)
    torch.testing.assert_close(pair[:6], model.labelled(images, labels))
    for index, item in enumerate(inputs):
        drawn = [k for k in range(3) if torch.allclose(pair[6 + index], images[index] + waves[k], atol=1e-5)]
        assert len(drawn) == 1 and drawn != [item["label"]]
    assert torch.equal(model.prepare(inputs[2:3], 0).images[1], pair[8])


def test_goodness_is_compared_with_the_threshold_not_handed_on_and_that_of_the_first_block_has_no_vote():
    """Hinton leaves the first layer out: the label in the image alone decides about it."""
    model = make_classifier("MODEL.CLASSIFIER.FF.SHARPNESS", "2.0", method="forward_forward").eval()
    found = model._losses(0, torch.tensor([1.5, 0.5, 1.0, 2.0]))
    own, wrong = torch.tensor([[0.5, -0.5], [0.0, 1.0]]).mul(2).sigmoid()
    expected = -(own.log().mean() + (1 - wrong).log().mean())
    torch.testing.assert_close(found["loss_goodness/block0"], expected)
    assert float(found["right/block0"]) == 0.5
    x = torch.rand(3, 4, 5, 5) * torch.tensor([1.0, 10.0, 100.0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(unit_square(x).square().flatten(1).mean(1), torch.ones(3))
    images = model.normalised(class_inputs(2))
    found = model.class_logits(images, ["0", "1"])
    with torch.no_grad():
        goodness = list(model._goodness(model.labelled(images, torch.tensor([1, 1]))))
    torch.testing.assert_close(found[:, 0, 1], model.sharpness * (goodness[1] + goodness[2]))


@pytest.mark.parametrize("update", ["sequential", "in backward", "parallel"])
@pytest.mark.parametrize("opts", [[], VIT, LEARNED, ["UPDATE.METHOD", "forward_forward"]])
def test_the_update_modes_agree_in_float64_after_adamw_steps(opts, update):
    models = [make_classifier(*opts).double().train() for _ in range(2)]
    _, joint = train_steps(models[0], "joint", class_inputs(), steps=3)
    _, local = train_steps(models[1], update, class_inputs(), steps=3)
    assert joint.keys() == local.keys()
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict(), rtol=1e-6, atol=1e-6)


def test_sequential_holds_the_activations_of_one_block_at_a_time():
    """Of equal blocks, the peak with four is that with two; with one backward it is about twice as much."""

    def peak(update: str, depth: int) -> int:
        options = f'["img_size=16","patch_size=4","embed_dim=32","depth={depth}","num_heads=2"]'
        model = make_classifier(*VIT[:2], "MODEL.TIMM.OPTIONS", options).train()
        with SavedActivations(exclude=model.parameters()) as saved:
            train_steps(model, update, class_inputs(8, size=16))
        return saved.peak

    assert peak("sequential", 4) < 1.05 * peak("sequential", 2)
    assert peak("joint", 4) > 1.7 * peak("joint", 2)


@pytest.mark.parametrize("method, heads", [("backprop", [2]), ("deep_supervision", [0, 1, 2])])
def test_backprop_trains_everything_jointly(method, heads):
    model = make_classifier(method=method).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, metrics = train_steps(model, "joint", class_inputs(), steps=3)
    said = {f"{key}/block{index}" for key in ("loss_readout", "right") for index in heads}
    assert said | {"grad_norm/shared"} == metrics.keys()
    assert dict(model.named_parameters()).keys() <= moved(model, before)
