"""Published functional forms without coefficients: shapes to fit to your own data."""

from __future__ import annotations

from scaletune.laws.entry import Input, Law

X = Input("x", "scale", "parameters, tokens or FLOPs, all in the same unit")


def broken(
    x: float, *, a: float, b: float, c0: float, c1: float, d1: float, f1: float
) -> dict[str, float]:
    """a + b x^-c0 (1 + (x/d1)^(1/f1))^(-c1 f1), one break    arXiv:2210.14891."""
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
    """M1 to M4    arXiv:2209.06640.

    b x^c; einf + b x^c; b (1/x + g)^-c3; and (y - einf) / (e0 - y)^alpha = b x^c.
    """
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
        name="Broken neural scaling law with one break",
        summary="Describes a power law with one smooth break.",
        kind="form",
        formula="value = a + b * x**-c0 * (1 + (x / d1)**(1 / f1))**(-c1 * f1)",
        function=broken,
        inputs=(X,),
        gives=("value",),
        unknown={
            "a": "asymptotic minimum",
            "b": "prefactor",
            "c0": "exponent before the break",
            "c1": "change of the exponent at the break",
            "d1": "position of the break",
            "f1": "width of the break, in log x",
        },
        setup="Each further break adds one more such factor.",
        shown_at={"x": 1, "a": 0.1, "b": 1, "c0": 0.3, "c1": 0.4, "d1": 1, "f1": 0.5},
        source="Caballero et al. 2022, arXiv:2210.14891",
    ),
    Law(
        id="alabdulmohsin_m4",
        name="Four estimators M1 to M4 of a learning curve",
        summary="Gives four functional forms for extrapolating a learning curve.",
        kind="form",
        formula=(
            "power = b * x**c; saturating_power = einf + power; shifted_power = b * (1 / x "
            "+ g)**-c3; sigmoid_left = (y - einf) / (e0 - y)**alpha; sigmoid_right = power"
        ),
        function=four_estimators,
        inputs=(X, Input("y", "error", "error at x")),
        gives=("power", "saturating_power", "shifted_power", "sigmoid_left", "sigmoid_right"),
        unknown={
            "b": "prefactor",
            "c": "exponent, below 0",
            "einf": "error with infinite data",
            "g": "shift of 1 / x in M3",
            "c3": "exponent of M3, below 0",
            "e0": "error of a random guess",
            "alpha": "sharpness of M4's transition; with 0, M4 equals M2",
        },
        setup=(
            "M4 holds where its left and right sides are equal. The estimator with the "
            "smallest extrapolation error is chosen. On a toy curve the exponent changes "
            "from -0.09 with M1 to -0.57 with M4."
        ),
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
