"""Known mistakes of optimizers and scaling keys, one function per rule.

A rule is `(stack, flat config) -> findings`. A flat config has dotted keys, as its file nests them.
A finding is `(where, what is wrong and why it matters, what to write instead)`. `stack_rules` has
the rules for one stack's own keys, `multiplier_rules` and `schedule_rules` those for multipliers
and schedules, `group_rules` those for param groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

FlatConfig = Mapping[str, Any]
Findings = list[tuple[str, str, str]]

DECOUPLED = ("gpt-neox", "deepspeed", "megatron", "cerebras", "levanter", "nanotron")
"""Stacks whose "Adam" is AdamW: apex's and DeepSpeed's FusedAdam have adam_w_mode on by default
(GPT-NeoX main, DeepSpeed 0.16.5, Megatron-Core 0.19.2)."""


def find_key(config: FlatConfig, name: str) -> tuple[str, Any]:
    """(path, value) of the first key whose last part is `name`, or ("", None).

    Dashes and underscores are equal.
    """
    for path, value in config.items() if name else ():
        if path.rsplit(".", 1)[-1].replace("-", "_") == name:
            return path, value
    return "", None


def find_path(config: FlatConfig, end: str) -> Any:
    """The first value whose path is `end` or ends with it; None if there is none."""
    return next(
        (value for path, value in config.items() if path == end or path.endswith(f".{end}")), None
    )


BASES = {
    "megatron": ("hidden_size", "mup_base_hidden_size"),
    "cerebras": ("hidden_size", "mup_base_hidden_size"),
}
"""Stack -> keys of the width and of the base width, which switches its muP on."""
RATIOS = {"lm-engine": "m_width", "nanogpt-mup": "mup_width_multiplier"}


def has_mup(stack: str, config: FlatConfig) -> bool:
    """Whether the stack's own muP is on, so that it divides the hidden lr by the width ratio."""
    if stack == "megatron":
        recipe = find_key(config, "scaling_recipe")[1]  # the name in later forks
        return bool(find_key(config, "use_mup")[1]) or recipe in ("mup", "depth_mup")
    if stack == "cerebras":
        return bool(find_key(config, "mup_base_hidden_size")[1] or _hidden_factor(config))
    if stack == "lm-engine":
        return find_key(config, "params_group_method")[1] == "mup"
    return stack == "nanogpt-mup" and find_key(config, "mup_enabled")[1] is not False


def _hidden_factor(config: FlatConfig) -> float | None:
    """The factor below 1 on the hidden lr in Cerebras' configs without base widths."""
    value = find_path(config, "adjust_learning_rate.decoder_kernel")
    return float(value) if isinstance(value, int | float) and 0 < value < 1 else None


def width_ratio(stack: str, config: FlatConfig) -> float | None:
    """Width ratio m of the stack's own muP; None if muP is off or the config does not say it."""
    if not has_mup(stack, config):
        return None
    if stack in RATIOS:
        value = find_key(config, RATIOS[stack])[1]
        return float(value) if value else None
    width, base = (find_key(config, name)[1] for name in BASES[stack])
    base = base or find_key(config, "scaling_base_hidden_size")[1]
    if stack == "cerebras" and not base:
        return 1 / (_hidden_factor(config) or 1.0)
    return float(width / base) if width and base else None


def scales_hidden_lr(stack: str, config: FlatConfig) -> bool:
    """Whether the stack's own muP divides the hidden lr; not if its base width is the model's."""
    m = width_ratio(stack, config)
    if stack == "nanogpt-mup":
        return m not in (None, 1.0)
    return has_mup(stack, config) and m != 1.0


def readout_divided_twice(stack: str, config: FlatConfig) -> Findings:
    """Megatron-Core (0.19.2) multiplies the logits by 1 / m, and keeps lr for embedding and head.

    `--decoupled-lr` is the lr of both as it stands, so it must not be divided by m. (The first
    commits with muP also divided the lr of an untied head by m.)
    """
    m = width_ratio(stack, config)
    if stack != "megatron" or m is None or m < 1.5:
        return []
    lr, (path, own) = find_key(config, "lr")[1], find_key(config, "decoupled_lr")
    output_path, output = find_key(config, "mup_output_mult")
    output = 1 / m if output in (None, 1, 1.0) else output
    own = own or lr
    if not lr or not own:
        moves, path = output, output_path
    else:
        moves, path = own / lr * output, path or output_path
    if abs(moves * m**2 - 1) > 0.05 and abs(moves * m**1.5 - 1) > 0.05:
        return []
    return [
        (
            path or "use_mup",
            f"lr and logits multiplier of the head together are {moves:.3g} of the base lr, but"
            f" must be 1/m = {1 / m:.3g}: the readout learns too slowly",
            "set --decoupled-lr to the base lr, and leave --mup-output-mult out",
        )
    ]


def weight_decay_not_scaled(stack: str, config: FlatConfig) -> Findings:
    """Stacks whose own muP divides the hidden lr and does not scale weight decay."""
    # nanoGPT-mup scales weight decay in its depth code only
    scales = stack == "nanogpt-mup" and find_key(config, "depth_alpha_enabled")[1]
    if not scales_hidden_lr(stack, config) or scales:
        return []
    path, decay = find_key(config, "weight_decay")
    if not decay:
        return []
    return [
        (
            path,
            f"hidden matrices get lr / m with the same weight_decay {decay:g}, so they shrink m"
            " times less per step than in the proxy",
            "set it to 0, or use own param groups with weight_decay * m"
            " (nanoGPT-mup: depth_alpha_enabled = True)",
        )
    ]


def _optimizer(config: FlatConfig) -> str:
    """Name of the optimizer or of its class; "" if the config has none."""
    ends = ("type", "class_path", "class", "name", "_target_", "_component_", "class_name")
    owners = ("optimizer", "optim", "optimizer_args", "optimizer_config")
    keys = [f"{owner}.{end}" for owner in owners for end in (*ends, "_class")]
    kinds = (find_path(config, key) for key in [*keys, "optimizer"])
    named = next((kind for kind in kinds if isinstance(kind, str)), "")
    classes = (str(value) for key, value in config.items() if key.endswith("._class"))
    adam = next((name for name in classes if name.rsplit(".", 1)[-1] == "Adam"), "")
    return adam or named


def coupled_l2(stack: str, config: FlatConfig) -> Findings:
    """Adam with L2 in the gradient, which scales unlike the loss gradient.

    A coordinate check does not show it.
    """
    path, decay = find_key(config, "weight_decay")
    decay = decay or config.get("groups.weight_decay")
    if not decay or not isinstance(decay, int | float):
        return []
    if stack == "gpt-neox" and find_key(config, "use_mup")[1]:
        return [
            (
                path,
                f"MuAdam adds weight_decay {decay:g} to the gradient (coupled L2), where Adam"
                " rescales it",
                "set it to 0",
            )
        ]
    kind = _optimizer(config)
    last = kind.rsplit(".", 1)[-1]
    decoupled = stack in DECOUPLED and last == "Adam" and not kind.startswith("torch.")
    if find_key(config, "adam_w_mode")[1] is False and last != "AdamW":
        last, decoupled = "Adam", False
    if stack == "megatron" and find_key(config, "decoupled_weight_decay")[1] is False:
        kind, last, decoupled = "decoupled_weight_decay = False", "Adam", False
    coupled = ("Adam", "MuAdam", "TorchAdam", "cpu_torch_adam")
    if last not in coupled or decoupled:
        return []
    return [
        (
            "optimizer",
            f"{kind or last} adds weight_decay {decay:g} to the gradient (coupled L2), where Adam"
            " rescales it: the decay does not scale with width as the plan assumes",
            "use AdamW",
        )
    ]


def shapes_lost(stack: str, config: FlatConfig) -> Findings:
    """The `mup` package stores width ratios on the parameters, and ZeRO-3 sharding drops them."""
    kind = str(find_path(config, "optimizer.type") or "")
    stage = find_path(config, "zero_optimization.stage") or 0
    if stack != "deepspeed" or not kind.startswith("Mu") or stage < 3:
        return []
    return [
        (
            "zero_optimization.stage",
            f"{kind} reads width ratios from the parameters, but ZeRO-3 shards have none: no lr is"
            " scaled",
            "use AdamW with groups that are built by name before `initialize`",
        )
    ]


def eps_not_scaled(stack: str, config: FlatConfig) -> Findings:
    """Stacks that scale the lr of matrices, but not eps; gradients shrink with width."""
    kind = str(find_path(config, "optimizer.type") or "")
    eps = find_path(config, "optimizer.params.eps")
    eps = 1e-8 if eps is None else eps
    by_mup = stack == "deepspeed" and kind in ("MuAdam", "MuAdamW")
    path = "optimizer.params.eps"
    if stack == "lm-engine" and scales_hidden_lr(stack, config):
        path, eps = find_key(config, "eps")
        kind, by_mup = "params_group_method mup", eps is not None
    if not by_mup or eps < 1e-8:
        return []
    return [
        (
            path,
            f"{kind} keeps eps at {eps:g} while gradients shrink with width: eps dominates in wide"
            " models",
            "set it to base eps / m",
        )
    ]


def hidden_lr_not_scaled(stack: str, config: FlatConfig) -> Findings:
    """The model is scaled by its width, but the hidden learning rates are not."""
    path, m = find_key(config, "m_width")
    method_path, method = find_key(config, "params_group_method")
    own_groups = (method_path and method is None) or find_key(config, "param_groups")[1]
    scaled = m not in (None, 1, 1.0)
    if stack == "lm-engine" and scaled and method != "mup" and not own_groups:
        return [
            (
                path,
                "logits are divided by m_width, but every matrix keeps the base lr",
                "set optimizer_args.params_group_method to 'mup'",
            )
        ]
    disabled = find_key(config, "mup_disable_hidden_lr_scaling")[1]
    if stack != "nanogpt-mup" or not disabled or not scales_hidden_lr(stack, config):
        return []
    return [
        (
            "mup_disable_hidden_lr_scaling",
            "hidden matrices keep the base lr at another width",
            "set it to False",
        )
    ]


def embedding_lr_divided(stack: str, config: FlatConfig) -> Findings:
    """Cerebras: an own factor 1 / m on the embedding's lr, which muP does not scale."""
    m = width_ratio(stack, config)
    path = next(
        (
            key
            for key in config
            if key.endswith("adjust_learning_rate.embedding")
            or ("lr_adjustment_groups" in key and "embedding" in key and key.endswith(".scale"))
        ),
        "",
    )
    if stack != "cerebras" or not path or m is None or abs(config[path] * m - 1) > 0.05:
        return []
    return [
        (
            path,
            f"the embedding's lr is multiplied by {config[path]:g} = 1/m, but muP keeps the base"
            " lr for the embedding with Adam: it learns too slowly",
            "remove the factor",
        )
    ]


RULES: tuple[Callable[[str, FlatConfig], Findings], ...] = (
    readout_divided_twice,
    weight_decay_not_scaled,
    coupled_l2,
    shapes_lost,
    eps_not_scaled,
    hidden_lr_not_scaled,
    embedding_lr_divided,
)
