"""A regression whose scaling exponents are known: Gaussian features with a power-law spectrum and a linear target."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scaletune.data import hashing
from scaletune.data.corpus import Examples, Table
from scaletune.recipe import Data, PowerLaw


def power_law(data: Data) -> Examples:
    """x_k ~ N(0, k**-b), y = sum_k w_k x_k + noise with w_k**2 k**-b ~ k**-a and a variance of 1 before the noise.

    Features keep their scale: it is the task. The examples are a pure function of the settings.
    """
    law = data.power_law
    stream = np.random.Generator(np.random.Philox(key=law.seed))
    inputs = stream.standard_normal((law.examples, law.inputs), np.float32) * np.sqrt(
        eigenvalues(law)
    ).astype(np.float32)
    noise = law.noise * stream.standard_normal(law.examples)
    targets = (inputs @ teacher(law) + noise).astype(np.float32)[:, None]
    train, held_out = Table(((inputs, targets),)).tails(data.held_out)
    return Examples(
        train=train, held_out=held_out, vocab_size=1, digest=hashing.digest(inputs, targets), features=(law.inputs,),
        mean=np.zeros(()), std=np.ones(()),
    )  # fmt: skip


def eigenvalues(law: PowerLaw) -> NDArray[np.float64]:
    """Of the features' covariance: k**-b."""
    return np.arange(1, law.inputs + 1, dtype=np.float64) ** -law.spectrum


def teacher(law: PowerLaw) -> NDArray[np.float64]:
    """w, all of one sign: with independent Gaussian features signs change nothing."""
    parts = np.arange(1, law.inputs + 1, dtype=np.float64) ** -law.task
    return np.sqrt(parts / parts.sum() / eigenvalues(law))


def exponents(law: PowerLaw) -> dict[str, float]:
    """Of the mean squared error over the noise, for linear models on random projections of the features, under gradient flow.

    In width and in examples min(a - 1, 2 b), in time (a - 1) / b, while `inputs` is far above what is learned
    (arXiv:2402.01092, bottleneck scalings). With a = b the target's weights are alike, and both first ones are b - 1,
    which is alpha of arXiv:2102.06701, whose eigenvalues are k**-(1 + alpha).
    """
    a, b = law.task, law.spectrum
    return {"width": min(a - 1, 2 * b), "examples": min(a - 1, 2 * b), "time": (a - 1) / b}
