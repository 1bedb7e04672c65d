"""ViT and ResNet equal those of Hugging Face; the MLP equals plain torch modules."""

from itertools import pairwise

import pytest
import torch
from test_models import moved
from torch import nn
from torch.nn import functional as F
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from scaletune import models

CLASSES = 7
VIT = {"family": "vit", "width": 32, "depth": 2, "head_dim": 16, "image_size": 8, "patch": 4}
RESNET = {"family": "resnet", "width": 8, "depth": 2, "image_size": 8, "groups": 4}
MLP = {"family": "mlp", "width": 16, "depth": 3, "inputs": 5}


def image_recipe(tiny, model, **settings):
    return tiny(
        {
            "model": model,
            "seq_len": 1,
            "parametrization.base_width": model["width"],
            "parametrization.init_std": 0.2,
        }
        | settings
    )


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(got, expected, atol=1e-5):
    assert expected.std() > 0.1  # the outputs are not all near zero
    assert torch.allclose(got, expected, rtol=0, atol=atol)


def as_vit(state):
    named = {
        "cls_token.weight": "cls_token",
        "position_embeddings.weight": "position_embeddings",
        "input_layernorm": "layernorm_before",
        "post_attention_layernorm": "layernorm_after",
        "self_attn": "attention",
        "up_proj": "fc1",
        "down_proj": "fc2",
    }
    renamed = {}
    for name, value in state.items():
        for ours, theirs in named.items():
            name = name.replace(ours, theirs)
        renamed[name] = (
            value[None] if name.endswith(("cls_token", "position_embeddings")) else value
        )
    return renamed


def test_logits_are_vits(tiny):
    recipe = image_recipe(tiny, VIT)
    m, ours = recipe.model, moved(recipe, CLASSES)
    config = ViTConfig(
        hidden_size=m.width,
        num_hidden_layers=m.depth,
        num_attention_heads=m.heads,
        intermediate_size=m.ffn_width,
        image_size=m.image_size,
        patch_size=m.patch,
        num_channels=m.channels,
        layer_norm_eps=m.norm_eps,
        num_labels=CLASSES,
    )
    theirs = ViTForImageClassification(config).eval()
    theirs.load_state_dict(as_vit(models.plain_state(ours)))
    images = drawn(5, 3, 8, 8)
    with torch.no_grad():
        assert_same(ours(images)[0], theirs(images).logits)


def test_a_vit_that_pools_reads_the_mean_of_all_patches(tiny):
    recipe = image_recipe(tiny, VIT | {"pool": "mean"})
    ours, images = moved(recipe, CLASSES), drawn(5, 3, 8, 8)
    with torch.no_grad():
        last = ours.hidden(images)[-1][0].view(5, recipe.model.patches, -1)
        head = ours.classifier
        assert_same(ours(images)[0], F.linear(last.mean(1), head.weight[0], head.bias[0]))


def replace_batch_norms(module, groups, eps):
    """Replaces each BatchNorm in `module` by a GroupNorm."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(groups, child.num_features, eps))
        else:
            replace_batch_norms(child, groups, eps)


def hugging_face_resnet(m, width):
    """The basic-block ResNet of Hugging Face with a stem for small images and GroupNorm."""
    sizes = [width * 2**stage for stage in range(m.stages)]
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=width,
            hidden_sizes=sizes,
            depths=[m.depth] * m.stages,
            layer_type="basic",
            num_labels=CLASSES,
        )
    )
    stem = model.resnet.embedder
    stem.embedder.convolution, stem.pooler = (
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.Identity(),
    )
    replace_batch_norms(model, m.groups, m.norm_eps)
    return model


def as_resnet(name):
    """Our name of a tensor as theirs."""
    first, rest = name.split(".", 1)
    return {
        "embedder": "resnet.embedder.embedder",
        "stages": "resnet.encoder.stages",
        "classifier": "classifier.1",
    }[first] + f".{rest}"


@pytest.mark.parametrize("readout", ["linear", "conv"])
@pytest.mark.parametrize("residual", [1.0, 0.5])
def test_logits_are_resnets(tiny, readout, residual):
    """Hugging Face has no residual multiplier: it is folded into the last norm of a branch."""
    recipe = image_recipe(
        tiny, RESNET | {"readout": readout}, **{"parametrization.residual_multiplier": residual}
    )
    m, ours = recipe.model, moved(recipe, CLASSES)
    theirs = hugging_face_resnet(m, m.width)
    state = {}
    for name, value in models.plain_state(ours).items():
        value = value.flatten(1) if name == "classifier.weight" else value
        state[as_resnet(name)] = value * residual if ".layer.1.normalization" in name else value
    theirs.load_state_dict(state)
    images = drawn(5, 3, 8, 8)
    with torch.no_grad():
        assert_same(ours(images)[0], theirs.eval()(images).logits)


@pytest.mark.parametrize(
    ("name", "activation"), [("relu", nn.ReLU), ("gelu", nn.GELU), ("tanh", nn.Tanh)]
)
@pytest.mark.parametrize("biases", [False, True])
def test_outputs_are_those_of_plain_layers(tiny, name, activation, biases):
    recipe = image_recipe(
        tiny, MLP | {"activation": name, "biases": biases}, **{"parametrization.init_gain": 2.0}
    )
    ours = moved(recipe, CLASSES)
    sizes = [5, 16, 16, 16, 16, CLASSES]
    linears = [nn.Linear(fan_in, fan_out, bias=biases) for fan_in, fan_out in pairwise(sizes)]
    theirs = nn.Sequential(*(part for linear in linears for part in (linear, activation())))[:-1]
    parameters = models.plain_state(ours).values()
    for mine, other in zip(parameters, theirs.parameters(), strict=True):
        other.data.copy_(mine)
    features = drawn(9, 5)
    with torch.no_grad():
        assert_same(ours(features)[0], theirs(features), atol=1e-6)


def test_losses_are_torchs(tiny):
    """Cross-entropy in nats for classes, mean squared error over all outputs for values.

    One value per example may have the shape [B] or [B, 1].
    """
    features, classes = drawn(9, 5), torch.arange(9) % CLASSES
    ours = moved(image_recipe(tiny, MLP), CLASSES)
    assert ours(features, classes).tolist() == pytest.approx(
        [F.cross_entropy(ours(features)[0], classes).item()]
    )
    for outputs in (1, 3):
        squared, values = (
            moved(image_recipe(tiny, MLP | {"loss": "mse"}), outputs),
            drawn(9, outputs, seed=1),
        )
        expected = F.mse_loss(squared(features)[0], values).item()
        assert squared(features, values).tolist() == pytest.approx([expected])
        assert squared(features, values.squeeze(1)).tolist() == pytest.approx([expected])
