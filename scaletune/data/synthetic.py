"""A synthetic regression with known scaling exponents.

Features are Gaussian with a power-law spectrum; the target is linear in them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scaletune.data import hashing
from scaletune.data.corpus import Examples, Table
from scaletune.recipe import Data, PowerLaw


def power_law(data: Data) -> Examples:
    """x_k ~ N(0, k**-b), y = sum_k w_k x_k + noise, with w_k**2 k**-b ~ k**-a.

    The variance of y without noise is 1. Features are not normalised, because their scale is part
    of the task. The examples are a pure function of the settings.
    """
    law = data.power_law
    stream = np.random.Generator(np.random.Philox(key=law.seed))
    scales = np.sqrt(eigenvalues(law)).astype(np.float32)
    inputs = stream.standard_normal((law.examples, law.inputs), np.float32) * scales
    noise = law.noise * stream.standard_normal(law.examples)
    targets = (inputs @ teacher(law) + noise).astype(np.float32)[:, None]
    train, held_out = Table(((inputs, targets),)).split_tails(data.held_out)
    return Examples(
        train=train,
        held_out=held_out,
        vocab_size=1,
        digest=hashing.digest(inputs, targets),
        features=(law.inputs,),
        mean=np.zeros(()),
        std=np.ones(()),
    )


def eigenvalues(law: PowerLaw) -> NDArray[np.float64]:
    """The eigenvalues k**-b of the covariance of the features."""
    return np.arange(1, law.inputs + 1, dtype=np.float64) ** -law.spectrum


def teacher(law: PowerLaw) -> NDArray[np.float64]:
    """The weights w, all positive: signs have no effect for independent Gaussian features."""
    parts = np.arange(1, law.inputs + 1, dtype=np.float64) ** -law.task
    return np.sqrt(parts / parts.sum() / eigenvalues(law))


def exponents(law: PowerLaw) -> dict[str, float]:
    """Exponents of the mean squared error above the noise, in width, examples and time.

    For linear models on random projections of the features under gradient flow (arXiv:2402.01092,
    bottleneck scalings): min(a - 1, 2 b) in width and in examples, (a - 1) / b in time, while
    `inputs` is far above the number of learned features. With a = b all weights of the target are
    equal, and the first two exponents are b - 1, which is alpha of arXiv:2102.06701, whose
    eigenvalues are k**-(1 + alpha).
    """
    a, b = law.task, law.spectrum
    return {"width": min(a - 1, 2 * b), "examples": min(a - 1, 2 * b), "time": (a - 1) / b}
