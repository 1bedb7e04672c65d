"""Parameters and training FLOPs of the model of a recipe point, before it is trained.

A model of the zoo is counted from its config (`scaletune.counting`). The user's module is built on
the meta device, so that it takes no memory. Its embedding and readout are found by the roles of its
tensors; its FLOPs are those of the matrix products, convolutions and attention of one forward and
backward pass (`torch.utils.flop_counter`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scaletune import counting
from scaletune.counting import ModelCounts
from scaletune.errors import UserError
from scaletune.models import own
from scaletune.models.own import OwnModel
from scaletune.parametrizing import shapes
from scaletune.parametrizing.recipe_model import base_modules, declaration
from scaletune.parametrizing.roles import TensorRole, assign_roles, read_overrides
from scaletune.recipe import Recipe
from scaletune.zoo import OwnConfig

ROWS = 2  # sequences or examples of the counted pass: batch statistics need more than one


def count_model(recipe: Recipe, vocab_size: int, features: tuple[int, ...] = ()) -> ModelCounts:
    """The counts of a recipe point.

    Args:
        recipe: A recipe point.
        vocab_size: Number of tokens or classes; 1 for a regression.
        features: Shape of an example; () for text.

    Raises:
        UserError: The user's module cannot be built, or its counts contradict those of the recipe.
    """
    model = recipe.model
    if not isinstance(model, OwnConfig):
        return counting.zoo_counts(model, vocab_size, recipe.data.seq_len)
    module = own.build_module(recipe, vocab_size, text=not features, meta=True)
    n_params, total = module_params(module, recipe, vocab_size, text=not features)
    per_token = counted_flops(module, recipe, vocab_size, features)
    depth = own.built_size(recipe)[1]
    if per_token is None:
        return ModelCounts(n_params, total, depth, 6.0 * n_params, "6 N D")
    return ModelCounts(n_params, total, depth, per_token)


def module_params(
    module: nn.Module, recipe: Recipe, vocab_size: int, *, text: bool = True
) -> tuple[int, int]:
    """(non-embedding parameters, all parameters) of the user's module.

    `model.n_params` of the recipe, if it is given, replaces the first.

    Raises:
        UserError: The counts contradict those of the recipe.
    """
    model = own.own_config(recipe)
    total = sum(parameter.numel() for parameter in shapes.named_tensors(module).values())
    if model.n_params_total and model.n_params_total != total:
        raise UserError(
            "`model.n_params_total` must be the number of parameters that `model.build` has,"
            f" {total}, but got {model.n_params_total}: remove it, it is counted"
        )
    n_params = model.n_params or total - embedding_and_readout(
        module, recipe, vocab_size, text=text
    )
    if not 0 < n_params <= total:
        raise UserError(
            f"`0 < n_params <= n_params_total` must hold, but got {n_params} and {total}: give"
            " `model.n_params`, the number of parameters besides embedding and readout"
        )
    return n_params, total


def embedding_and_readout(
    module: nn.Module, recipe: Recipe, vocab_size: int, *, text: bool = True
) -> int:
    """Parameters of the modules that hold an embedding or the readout, as the zoo counts them.

    An embedding is an input layer (role "emb"). The readout has role "out" and as many outputs as
    the vocabulary, or more, if it is padded; so a router is none.
    """
    roles = module_roles(module, recipe, vocab_size, text=text)
    counted = {name for name, uses in roles.items() if _is_outside(uses[0], vocab_size)}
    owners = {name.rpartition(".")[0] for name in counted} - {""}
    return sum(
        parameter.numel()
        for name, parameter in shapes.named_tensors(module).items()
        if name in counted or name.rpartition(".")[0] in owners
    )


def _is_outside(role: TensorRole, vocab_size: int) -> bool:
    return role.role == "emb" or (role.role == "out" and role.fans[1] >= vocab_size)


def module_roles(
    module: nn.Module, recipe: Recipe, vocab_size: int, *, text: bool = True
) -> Mapping[str, list[TensorRole]]:
    """The roles of each tensor of the user's module, from its growth over the base model."""
    base, wider = base_modules(recipe, vocab_size, text, meta=True)
    dims = shapes.shape_growth(module, base, wider)
    overrides = read_overrides(declaration(module, recipe).get("overrides") or {}, dims)
    return assign_roles(dims, shapes.tensor_uses(module), overrides)


def counted_flops(
    module: nn.Module, recipe: Recipe, vocab_size: int, features: tuple[int, ...]
) -> float | None:
    """Training FLOPs per token of the products in one pass on the meta device.

    None where the module has other products (recurrent layers), or reads values.
    """
    if any(isinstance(each, (nn.RNNBase, nn.RNNCellBase)) for each in module.modules()):
        return None
    if any(not parameter.is_meta for parameter in module.parameters()):
        return None
    inputs, targets = _meta_batch(recipe, vocab_size, features)
    net = OwnModel(module, vocab_size)
    try:
        with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
            with torch.device("meta"):  # also for tensors that the forward creates
                loss = net(inputs, targets).sum()
            loss.backward()
    except UserError:
        raise
    except Exception:  # whatever the user's code raises on a tensor without values
        return None
    return counter.get_total_flops() / targets.numel() or None


def _meta_batch(
    recipe: Recipe, vocab_size: int, features: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    if not features:
        tokens = torch.zeros(ROWS, recipe.data.seq_len, dtype=torch.long, device="meta")
        return tokens, tokens
    inputs = torch.zeros(ROWS, *features, device="meta")
    if vocab_size == 1:
        return inputs, torch.zeros(ROWS, 1, device="meta")
    return inputs, torch.zeros(ROWS, dtype=torch.long, device="meta")
