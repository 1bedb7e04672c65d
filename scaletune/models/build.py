"""A recipe's point as a model, initialised by its plan: every tensor from its own random stream, whatever the order or the stack."""

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
from scaletune.rules import Planned

AnyModel = Transformer | MoE | MLP | ResNet | ViT


def generator(seed: int, name: str) -> torch.Generator:
    """A tensor's own random stream: the same values on any machine, in any order, with any sharding."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(key))


@torch.no_grad()
def initialise(model: nn.Module, plan: Mapping[str, Planned], seeds: Sequence[int]) -> None:
    """Fill every planned parameter, one seed a trial: N(0, init_std**2) from its own stream; gains stay one, biases zero."""
    for name, parameter in model.named_parameters():
        if plan[name].init_std:
            for row, seed in zip(parameter, seeds, strict=True):
                values = torch.empty(row.shape).normal_(generator=generator(seed, name))
                row.copy_(values * plan[name].init_std)


def build(recipe: Recipe, vocab_size: int, seeds: Sequence[int] = ()) -> AnyModel:
    """The recipe's model, initialised by its plan: one trial from the recipe's seed, or a stack with one trial a seed.

    `model(inputs)` gives logits [K, ...], `model(inputs, targets)` the loss of each trial [K]; `model.hidden(inputs)` the activations from
    the embedding's to what is read out, `model.readout` is the last layer.
    """
    seeds = seeds or [recipe.seed]
    plan = {row.name: row for row in counting.planned(recipe, vocab_size)}
    own = {name: row.multiplier for name, row in plan.items()}
    model = _bare(recipe, vocab_size, counting.multipliers(recipe, vocab_size) | own, len(seeds))
    initialise(model, plan, seeds)
    return model


def _bare(
    recipe: Recipe, vocab_size: int, multipliers: Mapping[str, float], stack: int
) -> AnyModel:
    model = recipe.model
    if isinstance(model, zoo.MoE):
        return MoE(model, vocab_size, recipe.data.seq_len, multipliers, stack)
    if isinstance(model, zoo.Transformer):
        return Transformer(model, vocab_size, recipe.data.seq_len, multipliers, stack)
    if isinstance(model, zoo.MLP):
        return MLP(model, vocab_size, multipliers, stack)
    return (
        ViT(model, vocab_size, multipliers, stack)
        if isinstance(model, zoo.ViT)
        else ResNet(model, vocab_size, multipliers, stack)
    )


def acting(model: nn.Module) -> dict[str, float]:
    """Tensor -> the factor that the model itself puts on it, under each name that a tied one has."""
    own = {
        f"{where}.weight": module.multiplier
        for where, module in model.named_modules()
        if isinstance(module, (layers.Linear, layers.Conv, layers.ExpertLinear))
    }
    if isinstance(model, Transformer):
        tables = {
            f"model.{name}.weight": model.model.embedding
            for name in ("embed_tokens", "embed_positions")
        }
        return own | tables | {"lm_head.weight": model.logits}
    if isinstance(model, ViT):
        factor = model.vit.embeddings.multiplier
        return own | {
            f"vit.embeddings.{name}.weight": factor for name in ("cls_token", "position_embeddings")
        }
    return own


def plain_state(model: nn.Module, trial: int = 0) -> dict[str, Tensor]:
    """One trial's weights without the trial axis; of a Transformer, under the names a Hugging Face model of this family uses."""
    return {name: value[trial].detach().clone() for name, value in model.named_parameters()}
