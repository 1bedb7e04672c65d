"""Builds the model of a recipe point and initialises it by its plan.

Each tensor has its own random stream, so its values depend on neither the order of creation nor
the stack.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from scaletune import counting, zoo
from scaletune.models import layers
from scaletune.models.mlp import MLP
from scaletune.models.moe import MoE
from scaletune.models.resnet import ResNet
from scaletune.models.transformer import Transformer
from scaletune.models.vit import ViT
from scaletune.recipe import Recipe
from scaletune.rules import TensorPlan

AnyModel = Transformer | MoE | MLP | ResNet | ViT


def generator(seed: int, name: str) -> torch.Generator:
    """The random stream of a tensor: the same values on any machine, order and sharding."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(key))


@torch.no_grad()
def initialise_model(
    model: nn.Module, plan: Mapping[str, TensorPlan], seeds: Sequence[int]
) -> None:
    """Draws each tensor from N(0, init_std**2), one seed per trial. Gains stay 1, biases 0."""
    for name, parameter in model.named_parameters():
        if plan[name].init_std:
            for row, seed in zip(parameter, seeds, strict=True):
                values = torch.empty(row.shape).normal_(generator=generator(seed, name))
                row.copy_(values * plan[name].init_std)


def build(recipe: Recipe, vocab_size: int, seeds: Sequence[int] = ()) -> AnyModel:
    """Builds and initialises the model of a recipe point.

    Args:
        recipe: A recipe point (a recipe without axes).
        vocab_size: Number of tokens or classes; 1 for a regression.
        seeds: One seed per trial of a stack; empty: one trial with the seed of the recipe.

    Returns:
        A model. `model(inputs)` is the logits [K, ...], `model(inputs, targets)` the loss of each
        trial [K], `model.hidden(inputs)` the activations from the embedding to the input of the
        last layer, and `model.readout` the last layer.
    """
    seeds = seeds or [recipe.seed]
    plan = {row.name: row for row in counting.plan_tensors(recipe, vocab_size)}
    of_tensors = {name: row.multiplier for name, row in plan.items()}
    multipliers = counting.multipliers(recipe, vocab_size) | of_tensors
    model = _build_uninitialised(recipe, vocab_size, multipliers, len(seeds))
    initialise_model(model, plan, seeds)
    return model


def _build_uninitialised(
    recipe: Recipe, vocab_size: int, multipliers: Mapping[str, float], stack: int
) -> AnyModel:
    config, seq_len = recipe.model, recipe.data.seq_len
    if isinstance(config, zoo.MoEConfig):
        return MoE(config, vocab_size, seq_len, multipliers, stack)
    if isinstance(config, zoo.TransformerConfig):
        return Transformer(config, vocab_size, seq_len, multipliers, stack)
    if isinstance(config, zoo.MLPConfig):
        return MLP(config, vocab_size, multipliers, stack)
    if isinstance(config, zoo.ViTConfig):
        return ViT(config, vocab_size, multipliers, stack)
    assert isinstance(config, zoo.ResNetConfig)  # `parametrizing.recipe_model` builds own models
    return ResNet(config, vocab_size, multipliers, stack)


def applied_multipliers(model: nn.Module) -> dict[str, float]:
    """Tensor name -> the multiplier that the model itself applies to it.

    A tied tensor is listed under each of its names.
    """
    multipliers = {
        f"{path}.weight": module.multiplier
        for path, module in model.named_modules()
        if isinstance(module, (layers.Linear, layers.Conv, layers.ExpertLinear))
    }
    if isinstance(model, Transformer):
        factor = model.model.embedding
        tables = ("model.embed_tokens.weight", "model.embed_positions.weight")
        return multipliers | dict.fromkeys(tables, factor) | {"lm_head.weight": model.logits}
    if isinstance(model, ViT):
        factor = model.vit.embeddings.multiplier
        tables = (
            "vit.embeddings.cls_token.weight",
            "vit.embeddings.position_embeddings.weight",
        )
        return multipliers | dict.fromkeys(tables, factor)
    return multipliers


def plain_state(model: nn.Module, trial: int = 0) -> dict[str, Tensor]:
    """The weights of one trial, without the trial axis.

    The names of a Transformer are those of a Hugging Face model of its family.
    """
    return {name: value[trial].detach().clone() for name, value in model.named_parameters()}
