"""Classifiers: whose gradients go where, what inference depends on, embeddings and backbones."""

import pytest
import torch
from tiny_classifier import TIMM_CNN, VIT, class_inputs, classifier_cfg, make_classifier

from dfm_d2.classification.flow_classifier import EndpointLoss
from dfm_d2.framework import build_model
from dfm_d2.local_update import HandOver, check_blocks, sum_losses

COLOUR = ["MODEL.PIXEL_MEAN", "[120.0,120.0,120.0]", "MODEL.PIXEL_STD", "[60.0,60.0,60.0]"]
BACKBONES = {
    "cnn": ([], 8, 1),
    "vit": (VIT, 8, 1),
    "vit pooled": ([*VIT, "MODEL.CLASSIFIER.POOL", "2"], 8, 1),
    "timm cnn": ([*TIMM_CNN, *COLOUR], 32, 3),
}


def stage_losses(model, inputs, iteration=7):
    items = model.block_losses(model.prepare(inputs, iteration), HandOver())
    return {item.blocks[0]: item.losses for item in items}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_block_s_loss_has_gradients_in_its_own_block_only(name):
    opts, size, channels = BACKBONES[name]
    model = make_classifier(*opts).train()
    inputs = class_inputs(4, size, channels)
    check_blocks(model.blocks(), [(n, p) for n, p in model.named_parameters() if p.requires_grad])
    for index in range(model.num_blocks):
        model.zero_grad(set_to_none=True)
        losses = stage_losses(model, inputs)
        assert list(losses) == [f"block{d}" for d in range(model.num_blocks)]
        sum_losses(losses[f"block{index}"]).backward()
        for block, named in model.blocks().items():
            touched = {n: p.grad is not None for n, p in named}
            if block == f"block{index}":
                # The output of a ViT's class token is not pooled, its parameters are.
                assert all(touched.values()), [n for n, t in touched.items() if not t]
            else:
                assert not any(touched.values()), (block, [n for n, t in touched.items() if t])


@pytest.mark.parametrize("name", BACKBONES)
def test_the_blocks_in_a_row_are_the_backbone(name):
    opts, size, channels = BACKBONES[name]
    model = make_classifier(*opts, method="backprop").eval()
    x = images = model.normalised(class_inputs(2, size, channels))
    for index in range(model.num_blocks):
        x = model.backbone.forward_block(index, x)
        assert model.backbone.pooled(x).shape == (2, model.backbone.channels[index])
    if name.startswith("vit"):
        torch.testing.assert_close(x, model.backbone.model.forward_features(images))
    assert list(model.blocks()) == ["shared"]


def test_noise_depends_on_seed_iteration_image_and_block_only():
    model, inputs = make_classifier(), class_inputs(3)
    whole, part = model.prepare(inputs, 7), model.prepare(inputs[1:2], 7)
    points = model.noise_samples
    for d in range(model.num_blocks):
        assert torch.equal(whole.samples[d].x_0[points : 2 * points], part.samples[d].x_0)
        assert torch.equal(whole.samples[d].t[points : 2 * points], part.samples[d].t)
    assert not torch.equal(whole.samples[0].x_0, whole.samples[1].x_0)
    assert not torch.equal(whole.samples[0].x_0, model.prepare(inputs, 8).samples[0].x_0)


def test_a_time_power_draws_the_same_numbers_nearer_to_the_noise():
    inputs = class_inputs(64)
    usual = make_classifier("MODEL.CLASSIFIER.TIME_POWER", "1.0").prepare(inputs, 7)
    early = make_classifier("MODEL.CLASSIFIER.TIME_POWER", "3.0").prepare(inputs, 7)
    for a, b in zip(usual.samples, early.samples):
        assert torch.equal(a.x_0, b.x_0)
        torch.testing.assert_close(b.t, a.t**3)
        assert float(b.t.mean()) == pytest.approx(0.25, abs=0.06)  # the mean of u^3
        torch.testing.assert_close(b.x_t, (1 - b.t)[:, None] * b.x_0 + b.t[:, None] * b.x_1)


def test_blocks_that_answer_count_from_the_last_too():
    def probs(blocks):
        model = make_classifier("MODEL.CLASSIFIER.SAMPLER.BLOCKS", blocks).eval()
        return model(class_inputs(1))[0]["probs"]

    assert torch.equal(probs("[-1]"), probs("[2]"))
    assert torch.equal(probs("[-3,-1]"), probs("[0,2]"))
    assert not torch.equal(probs("[-1]"), probs("[0]"))


@pytest.mark.parametrize("aggregation", ["velocity", "probability"])
def test_a_batch_of_two_is_two_batches_of_one_and_the_seed_decides(aggregation):
    opts = ["MODEL.CLASSIFIER.SAMPLER.SAMPLES", "3", "MODEL.CLASSIFIER.SAMPLER.AGGREGATION", aggregation]
    model, inputs = make_classifier(*opts).double().eval(), class_inputs(2)
    together = [x["probs"] for x in model(inputs)]
    alone = [model([x])[0]["probs"] for x in inputs]
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert abs(float(a.sum()) - 1) < 1e-10
    assert all(torch.equal(a, x["probs"]) for a, x in zip(together, model(inputs)))
    other = make_classifier(*opts, "MODEL.CLASSIFIER.SAMPLER.SEED", "1").double().eval()
    assert not torch.equal(other(inputs)[0]["probs"], together[0])


def test_one_euler_step_answers_the_weighted_mean_endpoint():
    opts = ["MODEL.CLASSIFIER.SAMPLER.STEPS", "1", "MODEL.CLASSIFIER.SAMPLER.WEIGHTS", "uniform"]
    model, inputs = make_classifier(*opts).eval(), class_inputs(2)
    x_0 = model.sampler.noise(["0", "1"], model.label_space)
    with torch.no_grad():
        x, ends = model.normalised(inputs), []
        for d in range(model.num_blocks):
            x = model.backbone.forward_block(d, x)
            ends.append(model._endpoint(d, model.backbone.pooled(x), x_0, torch.zeros(2, 4)))
    expected = model.label_space.logits(torch.stack(ends).mean(0))
    torch.testing.assert_close(model.logits_of(inputs), expected)


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
    plain, control = (make_classifier("MODEL.CLASSIFIER.SHUFFLE_X0", str(s)).train() for s in (False, True))
    inputs = class_inputs(4)
    a, b = (stage_losses(m, inputs)["block0"]["loss_flow/block0"] for m in (plain, control))
    assert b > a
    one = class_inputs(1)  # alone, the other image is itself
    a, b = (stage_losses(m, one)["block0"]["loss_flow/block0"] for m in (plain, control))
    torch.testing.assert_close(a, b)


def test_learned_embeddings_learn_by_the_read_out_term_alone():
    model = make_classifier("MODEL.CLASSIFIER.EMBEDDING", "learned").train()
    losses = stage_losses(model, class_inputs())
    assert [n for n, _ in model.blocks()["shared"]] == ["label_space.weight"]
    losses["block1"]["loss_flow/block1"].backward(retain_graph=True)
    assert model.label_space.weight.grad is None
    losses["block1"]["loss_readout/block1"].backward()
    assert model.label_space.weight.grad.norm() > 0


def test_the_temperature_is_that_of_greatest_likelihood():
    model = make_classifier()
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 1, 3, generator=generator)
    labels = torch.multinomial((logits[:, 0] / 2.5).softmax(-1), 1, generator=generator)[:, 0]
    assert model.fit_temperature(logits, labels) == pytest.approx(2.5, rel=0.1)
    assert "temperature" in model.state_dict()


WRONG = {
    "blocks": (["MODEL.CLASSIFIER.BLOCKS", "9"], "BLOCKS is 9, but the backbone has 3 stages"),
    "no such model": ([*TIMM_CNN[:3], "vit_tinny"], "'vit_tinny' is no model of timm"),
    "option form": ([*VIT[:-1], '["depth"]'], "OPTIONS has 'depth': write name=value"),
    "option": ([*VIT[:-1], '["depht=2"]'], "timm cannot build vit_tiny_patch16_224"),
    "no stages": ([*TIMM_CNN[:3], "test_efficientnet"], "has no row of stages"),
    "channels last": (
        [*TIMM_CNN[:3], "swin_tiny_patch4_window7_224"],
        "has no row of stages with maps",
    ),
    "option's value": ([*VIT[:-1], '["img_size=["]'], "has 'img_size=\\['"),
    "no weights": ([*VIT, "MODEL.CLASSIFIER.TIMM.WEIGHTS", "/nowhere.pth"], "/nowhere.pth is missing"),
    "dimension": (["MODEL.CLASSIFIER.EMBED_DIM", "2"], "EMBED_DIM is 2, but 3 orthonormal classes need"),
    "sampler block": (["MODEL.CLASSIFIER.SAMPLER.BLOCKS", "[4]"], "names \\[4\\], there are 3 blocks"),
    "sampler block from the last": (["MODEL.CLASSIFIER.SAMPLER.BLOCKS", "[-4]"], "names \\[-4\\], there are"),
    "sampler block twice": (["MODEL.CLASSIFIER.SAMPLER.BLOCKS", "[0,-3]"], "names a block of 3 twice"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_built_is_one_sentence(name):
    opts, said = WRONG[name]
    with pytest.raises(ValueError, match=said):
        make_classifier(*opts).eval()(class_inputs(1))


def test_inputs_that_do_not_fit_are_named():
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


@pytest.mark.parametrize("what", ["another model", "fewer layers", "empty", "damaged"])
def test_weights_of_timm_that_would_leave_layers_random_are_refused(tmp_path, what):
    import timm

    path = tmp_path / "weights.pth"
    if what == "another model":
        torch.save(timm.create_model("test_convnext2", num_classes=3).state_dict(), path)
    elif what == "fewer layers":
        shape = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
        torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=5, **shape).state_dict(), path)
    else:
        path.write_bytes(b"" if what == "empty" else b"junk" * 100)
    found = {
        "another model": "weights.pth has no cls_token, and",
        "fewer layers": "weights.pth has no blocks.2.norm1.weight",
    }
    with pytest.raises(ValueError, match=found.get(what, "weights.pth is no state dict of timm")):
        make_classifier(*VIT, "MODEL.CLASSIFIER.TIMM.WEIGHTS", str(path))


def test_images_that_a_vit_does_not_take_are_a_sentence():
    model = make_classifier(*VIT)
    with pytest.raises(ValueError, match="wants 8 x 8: set INPUT.IMAGE_SIZE 8, or img_size=16"):
        model.prepare(class_inputs(2, 16), 0)


def test_pretrained_weights_of_timm_are_loaded_from_a_file(tmp_path):
    import timm

    torch.manual_seed(3)
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "in_chans": 1}
    trained = timm.create_model("vit_tiny_patch16_224", num_classes=5, **shape)
    torch.save(trained.state_dict(), tmp_path / "vit.pth")
    model = make_classifier(*VIT, "MODEL.CLASSIFIER.TIMM.WEIGHTS", str(tmp_path / "vit.pth")).eval()
    x = model.normalised(class_inputs(2))
    for index in range(model.num_blocks):
        last = x = model.backbone.forward_block(index, x)
    expected = trained.eval().forward_features(model.normalised(class_inputs(2)))
    torch.testing.assert_close(last, expected)


def test_the_config_is_refused_without_classes():
    cfg = classifier_cfg("MODEL.DFM.NUM_CLASSES", "0")
    with pytest.raises(ValueError, match="NUM_CLASSES must be at least 2"):
        build_model(cfg)


@pytest.mark.parametrize(("named", "said"), [("[3]", "there are 3 blocks"), ("[0,-3]", "twice")])
def test_blocks_that_answer_are_there_and_named_once(named, said):
    with pytest.raises(ValueError, match=said):
        make_classifier("MODEL.CLASSIFIER.SAMPLER.BLOCKS", named)
