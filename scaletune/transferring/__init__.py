"""Emitted configs: the predicted optimum put into a target recipe, and that recipe written as training stacks load it.

An emitter is one file with `emit(transfer, folder) -> list of paths`, a name in `FORMATS` and a row in `transfer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scaletune import counting
from scaletune.errors import UserError, nearest
from scaletune.predicting import Prediction
from scaletune.recipe import Recipe, load, with_settings
from scaletune.records import Fit
from scaletune.rules import Planned, Prior, batch_rule, caveats, shift
from scaletune.transferring.formats.unsupported import REFUSED, UNPROVEN


@dataclass(frozen=True)
class Transfer:
    """Everything an emitter needs: the target with its learning rate put in, each tensor's settings, what it all rests on."""

    target: Recipe
    vocab_size: int
    plan: list[Planned]
    multipliers: dict[str, float]
    evidence: dict[str, Any]

    def neutral(self) -> dict[str, Any]:
        """The plan that every emitted file is made from, as plain JSON values."""
        t, p = self.target, self.target.parametrization
        return {
            "schema": "scaletune.plan/1",
            "base": {"width": p.base_width, "depth": p.base_depth or t.model.depth},
            "target": {**t.model.model_dump(), **t.budget.model_dump(), "seq_len": t.data.seq_len, "vocab_size": self.vocab_size},
            "form": p.form, "multipliers": self.multipliers,
            "optimizer": t.optimizer.model_dump() | {"weight_decay_mode": "each step shrinks weights by lr * weight_decay"},
            "schedule": t.schedule.model_dump() | {"multiplies": "each group's own peak lr"},
            "tensors": [asdict(row) for row in self.plan],
            "evidence": self.evidence,
        }  # fmt: skip


def routes(row: Planned) -> bool:
    """Whether it is a router: the one tensor beside hidden matrices whose multiplier no config has a key for."""
    return ".mlp.gate." in row.name


def one_std(transfer: Transfer) -> tuple[list[Planned], dict[str, float]]:
    """The plan and multipliers rewritten so that all matrices share one init std and hidden matrices need no multiplier.

    An exact reparametrization (`scaletune.rules.shift`) for stacks whose config has a single `initializer_range`. A router that is a
    readout has its multiplier written into its weights, and so a std of its own.
    """
    hidden = {row.init_std * row.multiplier for row in transfer.plan if row.role == "hid"}
    if max(hidden) > min(hidden) * (1 + 1e-9):
        raise UserError(
            f"one init std for all matrices must be reachable, but the hidden ones act with {sorted(hidden)}"
        )
    common = min(hidden)
    theta = {row.name: row.init_std / common if row.init_std else 1.0 for row in transfer.plan}
    theta |= {row.name: 1 / row.multiplier for row in transfer.plan if routes(row)}
    rows = [shift(row, theta[row.name], row.family) for row in transfer.plan]
    embedding = theta["model.embed_tokens.weight"]
    head = theta.get("lm_head.weight", embedding)  # tied: the same tensor
    m = transfer.multipliers
    return rows, m | {"embedding": m["embedding"] * embedding, "logits": m["logits"] * head}


TRANSFORMERS = "5.23.0"
FORMATS = {  # format -> the version, or the commit, of its stack that the emitter was written against
    "granite": TRANSFORMERS, "recipe": "1", "hyperclovax": TRANSFORMERS, "llama": TRANSFORMERS, "pytorch": "2.13",
    "granitemoe": TRANSFORMERS, "minicpm3": TRANSFORMERS, "falcon_h1": TRANSFORMERS,
    "torchtitan": "0.3.0", "olmo_core": "3.0.0", "deepspeed": "0.16.5", "nanogpt_mup": "39044043", "megatron": "0044db1f",
    "megatron_bridge": "0.3.1", "cerebras": "18bcbd2d", "lm_engine": "4a791626", "fairseq2": "0.8.1", "llm_foundry": "0.22.0",
}  # fmt: skip
LR_MEANS = (
    "family",
    "decay",
    "momentum",
    "nesterov",
    "shape_factor",
    "rest_ratio",
)  # of an optimizer: what a unit of lr does depends on it
UNSURE = 1e100  # times between an interval's ends: nothing was learned (`laws.surface.exp` is cut, so they are finite)
TOO_FAR = 30  # times outside the fitted range, beyond which a transfer must be forced


def known_formats(to: Iterable[str], force: bool = False) -> list[str]:
    """Names of the formats asked for as NAME or NAME@VERSION; UserError unless each has an emitter for that version of its stack.

    One of an architecture that no proxy can have must be forced.
    """
    asked = [text.partition("@") for text in to]
    for name, _, wanted in asked:
        if reason := REFUSED.get(name):
            raise UserError(f"format `{name}` is refused: {reason}")
        if name not in FORMATS:
            raise UserError(f"unknown format `{name}`{nearest(name, FORMATS)}")
        if wanted and wanted != FORMATS[name]:
            raise UserError(
                f"format `{name}` is written for version {FORMATS[name]} of its stack, but got {wanted!r}"
            )
        if name in UNPROVEN and not force:
            raise UserError(
                f"format `{name}` has {UNPROVEN[name]}, which no proxy had: it must be asked for with --force, or emit 'granite'"
            )
    return [name for name, _, _ in asked]


def _far(fit: Fit, at: Mapping[str, float], force: bool) -> list[str]:
    """A sentence for each variable more than TOO_FAR times outside the fitted range; UserError unless forced."""
    said = []
    for column, (low, high) in fit.ranges.items():
        value = at.get(column)
        factor = max(value / high, low / value) if value else 1.0
        if factor > TOO_FAR * (1 + 1e-9):
            said.append(
                f"{column} {value:.4g} is {factor:.3g} times outside the fitted range [{low:.4g}, {high:.4g}]"
            )
    if said and not force:
        raise UserError(
            f"a transfer over more than {TOO_FAR}x must be asked for with --force, but {said[0]}"
        )
    return [f"forced: {sentence}, more than {TOO_FAR}x" for sentence in said]


def _with_interval(best: Prediction) -> Prediction:
    """The prediction; UserError where it does not say how sure its learning rate is, or says that it is not sure at all."""
    if (
        not (pair := best.interval.get("lr"))
        or not all(map(math.isfinite, pair))
        or pair[1] > UNSURE * pair[0]
    ):
        raise UserError(
            f"a transfer must say how sure it is, but the fit's interval of lr at this target is {pair}"
        )
    return best


def _depth_sentence(target: Recipe, fitted_depths: list[float]) -> list[str]:
    depth, p = target.model.depth, target.parametrization
    if not fitted_depths or (fitted_depths[0] <= depth <= fitted_depths[-1]):
        return []
    rule = (
        f"by residual branches ~ depth**-{p.depth_alpha:g}"
        if p.depth_alpha
        else "with no depth rule"
    )
    return [f"depth {fitted_depths[-1]:g} -> {depth} {rule}: no proxy tested another depth"]


def differences(target: Recipe, setting: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each setting in which the target is unlike the proxies; UserError when it is the parametrization or the optimizer.

    A learning rate at base width means nothing under another form, base or family; another beta2 may move the optimum a little.
    """
    content, said = target.model_dump(), []
    for section, shared in setting.items():
        for key, value in shared.items():
            mine = content[section].get(key, value)
            if (
                mine == value
                or (section, key) == ("data", "source")
                or (mine, key) == (None, "vocab_size")
            ):  # the data's own
                continue
            if section == "parametrization":
                raise UserError(
                    f"a target must be parametrized as the proxies were, but `{section}.{key}` is {mine!r} and theirs {value!r}"
                )
            if section == "optimizer" and key in LR_MEANS:
                raise UserError(
                    f"a target must have the proxies' optimizer, but `{section}.{key}` is {mine!r} and theirs {value!r}"
                )
            said.append(
                f"`{section}.{key}` is {mine!r} and was {value!r} in every proxy: taken not to move the optimum"
            )
    return said


def _unsaid(target: Recipe, setting: Mapping[str, Any]) -> list[str]:
    """A doubt where records that do not say their parametrization are taken for proxies at the target's base width."""
    p, width = target.parametrization, target.model.width
    if setting or p.form == "sp" or p.base_width == width:
        return []
    return [
        f"the records do not say their parametrization, so lr is taken as one at base width {p.base_width} and scaled by form {p.form!r} to"
        f" {width}: if their runs were in standard parametrization, it is the lr of every tensor: set parametrization.base_width to {width}"
    ]


def at_batch(fit: Fit, n_params: float, tokens: float, batch_tokens: float) -> Prediction:
    """The fit's prediction, at this batch size where its law has one."""
    own = {"batch_tokens": float(batch_tokens)} if fit.law in ("lr_ndb", "joint") else {}
    return fit.predict(n_params=n_params, tokens=tokens, **own)


def _predicted(fit: Fit, target: Recipe, n_params: int) -> tuple[Prediction, Prior]:
    """The fit's prediction, and the prior that takes its lr to the target's batch size (1 when the law itself has a batch exponent)."""
    batch = target.budget.batch_tokens
    best = at_batch(fit, n_params, target.budget.tokens, batch)
    if best.lr is None or not math.isfinite(best.lr):
        raise UserError(
            f"a transfer needs a law that gives a learning rate, but `{fit.law}` gives none"
        )
    if best.batch_tokens is None:
        return _with_interval(best), Prior(
            1.0,
            f"batch of {batch:g} tokens: the fitted runs have no one batch size, lr is taken as it is",
        )
    return _with_interval(best), batch_rule(batch, best.batch_tokens, target.optimizer.beta1)


def prepare(
    fit: Fit, target: Recipe, vocab_size: int | None = None, force: bool = False
) -> Transfer:
    """The fit's prediction at the target, put into the target recipe.

    UserError when the target is not parametrized as the proxies were, or lies more than TOO_FAR times outside them and `force` is not set.
    """
    setting = fit.provenance.get("setting") or {}
    vocab_size = (
        vocab_size
        or target.data.vocab_size
        or setting.get("data", {}).get("vocab_size")
        or counting.BYTES_TEXT_VOCAB
    )
    unlike = differences(target, setting)
    doubts = [
        f"of the rules: {caveat}"
        for caveat in caveats(target.parametrization.form, target.optimizer.rule)
    ]
    n = counting.params(target.model, vocab_size)["n_params"]
    best, prior = _predicted(fit, target, n)
    scale = {
        "n_params": n,
        "tokens": target.budget.tokens,
        "batch_tokens": target.budget.batch_tokens,
        "depth": target.model.depth,
    }
    far = _far(fit, scale, force)
    assert best.lr is not None

    def moved(pair: list[float] | None) -> list[float] | None:
        return [value * prior.factor for value in pair] if pair else None

    evidence = {
        "scaletune": version("scaletune"), "fit": fit.digest, "law": fit.law, "n_params": n, "tokens": target.budget.tokens,
        "batch_tokens": target.budget.batch_tokens, "lr": best.lr * prior.factor, "lr_at_fitted_batch": best.lr,
        "interval": best.interval | {"lr": moved(best.interval["lr"])}, "level": fit.level,
        "band": best.band | {"lr": moved(best.band["lr"])}, "loss": best.loss, "status": [*best.warnings, *_unsaid(target, setting)] or ["ok"],
        "assumptions": [*target.evidence.get("architecture", []), *fit.assumptions, prior.sentence, *_depth_sentence(target, fit.ranges.get("depth", [])), *far, *unlike, *doubts],
    }  # fmt: skip
    settings = {"lr": float(f"{best.lr * prior.factor:.4g}")}
    if best.weight_decay is not None:  # the lr is the best at this one
        settings["weight_decay"] = evidence["weight_decay"] = float(f"{best.weight_decay:.4g}")
    chosen = with_settings(target, settings | {"evidence": evidence})
    return Transfer(
        chosen,
        vocab_size,
        counting.planned(chosen, vocab_size),
        counting.multipliers(chosen, vocab_size),
        evidence,
    )


def transfer(
    fit: Fit | str | Path,
    target: Recipe | str | Path,
    to: Iterable[str] = ("granite", "recipe"),
    out: str | Path = "configs/transferred",
    force: bool = False,
) -> dict[str, Any]:
    """Emit the target in each format under `out/FORMAT/`, and the whole answer beside: {"lr", "interval", "files", "answer", ...}."""
    from scaletune.transferring.answer import settings as settings_module
    from scaletune.transferring.answer import text as answer_text

    names = known_formats(to, force)
    emitters = {name: import_module(f"scaletune.transferring.formats.{name}") for name in names}
    fit = fit if isinstance(fit, Fit) else Fit.read(fit)
    prepared = prepare(fit, target if isinstance(target, Recipe) else load(target), force=force)
    answer = settings_module.answer(fit, prepared)
    files = [path for name in names for path in emitters[name].emit(prepared, Path(out) / name)]
    files += answer_text.write(answer, Path(out))
    return prepared.evidence | {"files": [str(path) for path in files], "answer": answer}
