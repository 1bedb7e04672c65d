"""Forms of one class train identically in float64 under every optimizer.

They differ when a setting that the conversion changes is not converted.
"""

import math

import numpy as np
import pytest
import torch

from scaletune.rules import scale

M, WIDTH, INPUTS, CLASSES = 4, 16, 6, 3
ROLES = {"emb": "emb", "bias": "vec", "hid": "hid", "out": "out"}
CLASS_II = ("mup_t3", "mup_t9", "mean_field")


class Lion(torch.optim.Optimizer):
    """Lion: the sign of a momentum with decoupled weight decay (arXiv:2302.06675)."""

    def __init__(self, groups):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                direction = (0.9 * m + 0.1 * p.grad).sign()
                m.mul_(0.99).add_(p.grad, alpha=0.01)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])


class Atan2(torch.optim.Optimizer):
    """Adam-atan2 without bias correction: no eps (arXiv:2407.05872)."""

    def __init__(self, groups):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m, v = self.state[p].setdefault("mv", (torch.zeros_like(p), torch.zeros_like(p)))
                m.mul_(0.9).add_(p.grad, alpha=0.1)
                v.mul_(0.95).add_(p.grad**2, alpha=0.05)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(
                    torch.atan2(m, v.sqrt()), alpha=group["lr"]
                )


class LambOrLars(torch.optim.Optimizer):
    """LAMB (arXiv:1904.00962) or, on raw gradients, LARS (arXiv:1708.03888), without momentum.

    The trust ratio includes the weight decay.
    """

    def __init__(self, groups, normalised):
        self.normalised = normalised
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                v = self.state[p].setdefault("v", torch.zeros_like(p))
                v.mul_(0.95).add_(p.grad**2, alpha=0.05)
                update = p.grad / (v.sqrt() + group["eps"]) if self.normalised else p.grad.clone()
                update += group["weight_decay"] * p
                p.sub_(update, alpha=float(group["lr"] * p.norm() / update.norm()))


class MuonAndAdamW:
    """Muon for the hidden matrix, with eps above its gradient's norm; AdamW for the rest."""

    def __init__(self, groups, adjust):
        hidden = [g for g in groups if g["name"] == "hid"]
        rest = [g | {"eps": 1e-3 * g["eps"]} for g in groups if g["name"] != "hid"]
        self.parts = [torch.optim.Muon(hidden, adjust_lr_fn=adjust), torch.optim.AdamW(rest)]

    def step(self):
        for part in self.parts:
            part.step()


def adafactor(groups):
    return torch.optim.Adafactor(
        [{key: value for key, value in group.items() if key != "eps"} for group in groups]
    )


# family -> optimizer over groups, base (lr, weight decay, eps)
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, (0.02, 0.1, 1e-3)),
    "sgd": (lambda groups: torch.optim.SGD(groups, momentum=0.9), (0.02, 0.01, 0.0)),
    "lion": (Lion, (0.005, 0.1, 0.0)),
    "adam_atan2": (Atan2, (0.02, 0.1, 0.0)),
    "adafactor": (adafactor, (0.05, 0.1, 0.0)),
    "lamb": (lambda groups: LambOrLars(groups, True), (0.05, 0.1, 1e-3)),
    "lars": (lambda groups: LambOrLars(groups, False), (0.05, 0.1, 0.0)),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = (lambda groups: MuonAndAdamW(groups, "original"), (0.02, 0.1, 1.0))
    OPTIMIZERS["muon_match_rms"] = (
        lambda groups: MuonAndAdamW(groups, "match_rms_adamw"),
        (0.02, 0.1, 1.0),
    )


def scales_by_tensor(form, family):
    return {name: scale(form, role, M, M, family=family) for name, role in ROLES.items()}


def initial_weights(form, family):
    """Initial weights that give the same function in every form."""
    shapes = {
        "emb": (WIDTH, INPUTS),
        "bias": (WIDTH,),
        "hid": (WIDTH, WIDTH),
        "out": (CLASSES, WIDTH),
    }
    std = {"emb": 1.0, "bias": 0.5, "hid": WIDTH**-0.5, "out": 0.5}
    rng, reference = np.random.default_rng(0), scales_by_tensor("mup_t8", family)
    here = scales_by_tensor(form, family)
    drawn = {name: std[name] * rng.standard_normal(shape) for name, shape in shapes.items()}
    return {
        name: w / (here[name].multiplier / reference[name].multiplier) for name, w in drawn.items()
    }


def losses(form, family, **unconverted):
    """Training losses; settings in `unconverted` keep the values of `mup_t8`."""
    make, (lr, decay, eps) = OPTIMIZERS[family]
    scaled = scales_by_tensor(form, family)
    reference = scales_by_tensor("mup_t8", family)
    settings = {
        name: {
            field: base
            * getattr(reference[name] if unconverted.get(field) else scaled[name], field)
            for field, base in (("lr", lr), ("weight_decay", decay), ("eps", eps))
        }
        for name in ROLES
    }
    params = {
        name: torch.nn.Parameter(torch.from_numpy(w))
        for name, w in initial_weights(form, family).items()
    }
    optimizer = make(
        [{"name": name, "params": [p], **settings[name]} for name, p in params.items()]
    )
    return run(params, {name: scaled[name].multiplier for name in ROLES}, optimizer)


def data():
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.standard_normal((32, INPUTS))), torch.from_numpy(
        rng.integers(0, CLASSES, 32)
    )


def run(params, multipliers, optimizer):
    x, y = data()
    history = []
    for _ in range(6):
        for p in params.values():
            p.grad = None
        h = torch.relu(multipliers["emb"] * x @ params["emb"].T + params["bias"])
        h = torch.relu(multipliers["hid"] * h @ params["hid"].T)
        loss = torch.nn.functional.cross_entropy(multipliers["out"] * h @ params["out"].T, y)
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return np.array(history)


@pytest.mark.parametrize("family", OPTIMIZERS)
@pytest.mark.parametrize("form", CLASS_II)
def test_forms_of_mup_train_identically(form, family):
    """At m = 4 every factor is a power of two, so it is exact even in Muon's bfloat16."""
    reference = losses("mup_t8", family)
    assert losses(form, family) == pytest.approx(reference, rel=1e-12)
    assert reference[-1] < 0.99 * reference[0]  # the loss falls


# Settings that must be converted for a hidden matrix with another multiplier than Table 8's.
CONVERTED_SETTINGS = {
    "adamw": ("lr", "weight_decay", "eps"),
    "sgd": ("lr", "weight_decay"),
    "lion": ("lr", "weight_decay"),
    "adam_atan2": ("lr", "weight_decay"),
    "adafactor": (),
    "lamb": ("weight_decay", "eps"),
    "lars": ("weight_decay",),
    "muon": ("lr", "weight_decay", "eps"),
    "muon_match_rms": ("lr", "weight_decay", "eps"),
}


@pytest.mark.parametrize(
    ("family", "setting"),
    [(family, setting) for family in OPTIMIZERS for setting in CONVERTED_SETTINGS[family]],
)
def test_they_differ_when_a_setting_is_not_converted(family, setting):
    off = np.abs(losses("mean_field", family, **{setting: True}) / losses("mup_t8", family) - 1)
    assert off[0] < 1e-12 and off.max() > 1e-6


@pytest.mark.skipif("muon" not in OPTIMIZERS, reason="torch before 2.9 has no Muon")
def test_muons_two_factors_are_one_rule():
    """Both shape factors give the same step at width 64, where m = 4.

    The ratio of the learning rates is 4**-0.5.
    """
    ratio = (
        scale("mup", "hid", 4.0, 4.0, family="muon_match_rms").lr
        / scale("mup", "hid", 4.0, 4.0, family="muon").lr
    )
    gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))

    def step_of(adjust, lr):
        weight = torch.nn.Parameter(torch.zeros(64, 64))
        weight.grad = gradient.clone()
        torch.optim.Muon([weight], lr=lr, weight_decay=0.0, adjust_lr_fn=adjust).step()
        return weight.detach()

    at_base = 1 / (0.2 * math.sqrt(16))
    assert torch.allclose(
        step_of("match_rms_adamw", at_base * ratio), step_of("original", 1.0), rtol=1e-5
    )


def matrix_power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def preconditioned_weights(form, family, damped_as=None):
    """Hidden matrix times multiplier after one step from the same function.

    The step is that of K-FAC (arXiv:1503.05671) or Shampoo (arXiv:1802.09568).
    """
    scaled = scales_by_tensor(form, family)
    w = {name: torch.from_numpy(w) for name, w in initial_weights(form, family).items()}
    d_in, d_out = (1e-3 * d for d in scales_by_tensor(damped_as or form, family)["hid"].damping)
    (x, y), eye = data(), torch.eye(WIDTH, dtype=torch.float64)
    h = torch.relu(scaled["emb"].multiplier * x @ w["emb"].T + w["bias"])
    z = (h @ w["hid"].T).requires_grad_()
    logits = scaled["out"].multiplier * torch.relu(scaled["hid"].multiplier * z) @ w["out"].T
    (back,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y, reduction="sum"), z)
    gradient = back.T @ h
    if family == "kfac":
        left_factor, right_factor, exponent = back.T @ back, h.T @ h, -1
    else:
        left_factor, right_factor, exponent = (
            gradient @ gradient.T,
            gradient.T @ gradient,
            -0.25 if family == "shampoo" else -0.5,
        )
    step = (
        matrix_power(left_factor + d_out * eye, exponent)
        @ gradient
        @ matrix_power(right_factor + d_in * eye, exponent)
    )
    return scaled["hid"].multiplier * (w["hid"] - 0.1 * scaled["hid"].lr * step)


@pytest.mark.parametrize("family", ["kfac", "shampoo", "shampoo_half"])
def test_preconditioned_steps_are_one_in_every_form_if_their_damping_is_converted(family):
    reference = preconditioned_weights("mup_t8", family)
    for form in CLASS_II:
        assert torch.allclose(
            preconditioned_weights(form, family), reference, rtol=1e-9, atol=1e-12
        )
    assert not torch.allclose(
        preconditioned_weights("mean_field", family, damped_as="mup_t8"), reference, rtol=1e-4
    )
