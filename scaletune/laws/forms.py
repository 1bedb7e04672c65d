"""Published forms without coefficients: shapes to fit, not numbers to believe."""

from __future__ import annotations

from scaletune.laws.entry import Input, Law

X = Input("x", "scale", "parameters, tokens or FLOPs, in one unit")


def broken(
    x: float, *, a: float, b: float, c0: float, c1: float, d1: float, f1: float
) -> dict[str, float]:
    """a + b x^-c0 (1 + (x/d1)^(1/f1))^(-c1 f1)    arXiv:2210.14891, one break."""
    return {"value": a + b * x**-c0 * (1 + (x / d1) ** (1 / f1)) ** (-c1 * f1)}


def four_estimators(
    x: float,
    y: float,
    *,
    b: float,
    c: float,
    einf: float,
    g: float,
    c3: float,
    e0: float,
    alpha: float,
) -> dict[str, float]:
    """b x^c; einf + b x^c; b (1/x + g)^-c3; and (y - einf) / (e0 - y)^alpha = b x^c    arXiv:2209.06640."""
    power = b * x**c
    return {
        "power": power,
        "saturating_power": einf + power,
        "shifted_power": b * (1 / x + g) ** -c3,
        "sigmoid_left": (y - einf) / (e0 - y) ** alpha,
        "sigmoid_right": power,
    }


LAWS = (
    Law(
        id="bnsl",
        name="Broken power law, one break",
        kind="form",
        formula="value = a + b * x**-c0 * (1 + (x / d1)**(1 / f1))**(-c1 * f1)",
        function=broken,
        inputs=(X,),
        gives=("value",),
        unknown={
            "a": "the floor",
            "b": "the prefactor",
            "c0": "the exponent before the break",
            "c1": "what the break adds to the exponent",
            "d1": "where the break is",
            "f1": "how wide it is, in log x",
        },
        setup="for more breaks, one such factor each",
        shown_at={"x": 1, "a": 0.1, "b": 1, "c0": 0.3, "c1": 0.4, "d1": 1, "f1": 0.5},
        source="Caballero et al. 2022, arXiv:2210.14891",
    ),
    Law(
        id="alabdulmohsin_m4",
        name="Four estimators M1 to M4 of a learning curve",
        kind="form",
        formula="power = b * x**c; saturating_power = einf + power; shifted_power = b * (1 / x + g)**-c3; "
        "sigmoid_left = (y - einf) / (e0 - y)**alpha; sigmoid_right = power",
        function=four_estimators,
        inputs=(X, Input("y", "error", "the error at x")),
        gives=("power", "saturating_power", "shifted_power", "sigmoid_left", "sigmoid_right"),
        unknown={
            "b": "the prefactor",
            "c": "the exponent, below 0",
            "einf": "the error of endless data",
            "g": "the shift of 1 / x in M3",
            "c3": "the exponent of M3, below 0",
            "e0": "the error of a random guess",
            "alpha": "how sharp M4's knee is; at 0 it is M2",
        },
        setup="M4 holds where left equals right; the estimator is chosen by its error in extrapolation. On a toy curve the exponent goes from "
        "-0.09 with M1 to -0.57 with M4",
        shown_at={
            "x": 4,
            "y": 0.6,
            "b": 1,
            "c": -0.5,
            "einf": 0.1,
            "g": 0,
            "c3": -0.5,
            "e0": 0.9,
            "alpha": 0,
        },
        source="Alabdulmohsin et al. 2022, arXiv:2209.06640",
    ),
)
