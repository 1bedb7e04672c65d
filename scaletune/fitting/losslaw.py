"""L = E + A / n_params**alpha + B / tokens**beta, nats/token (arXiv:2203.15556, eq. 2), fitted robustly and resampled.

The loss of the fit is the SUM of Huber(1e-3) over residuals of ln L (arXiv:2404.10102: averaging it instead stops the
solver early and moved the published constants). Solved in (ln E, ln A', ln B', alpha, beta) with A', B' the terms at the
centre of the runs, where they are nearly uncorrelated with their exponents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMES = ("E", "A", "B", "alpha", "beta")
DELTA = 1e-3  # Huber's, of ln L
BOX = (0.02, 2.0)  # of both exponents
N_DRAWS = 200
PAIRS_FROM = 20  # rows from which rows are resampled in pairs; below it resamples lose whole scales, and noise is resampled instead
PUBLISHED = (0.35, 0.37)  # exponents assumed when the runs cannot give them: arXiv:2404.10102
ASSUMED = (0.15, 0.6)  # and the range of them that intervals then allow for
TIED = 0.1  # how far alpha and beta may differ in the intervals of a fit that ties them

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """Which parameters are free: theta = base + free @ phi, theta = (ln E, ln A', ln B', alpha, beta)."""

    base: Array
    free: Array
    said: tuple[str, ...]


OFF = -60.0  # ln of a term that is not there


def choose_shape(n_params: Array, tokens: Array) -> Shape:
    """The richest form these scales identify; what is tied, fixed or left out is said."""
    sizes, horizons = _levels(n_params), _levels(tokens)
    both = sizes > 1 and horizons > 1 and not _collinear(n_params, tokens)
    rows = len(n_params)
    if both and min(sizes, horizons) >= 3 and rows >= 6:
        return _shape([0, 1, 2, 3, 4])
    if both and max(sizes, horizons) >= 3 and rows >= 5:
        said = f"{sizes} sizes and {horizons} token counts cannot tell alpha from beta: the loss law has them equal"
        return _shape([0, 1, 2, 3], said, tie=True)
    fixed = f"loss-law exponents are not identified by {rows} cells ({sizes} sizes, {horizons} token counts): fixed at published values"
    if both and rows >= 3:
        return _shape([0, 1, 2], f"{fixed}, alpha {PUBLISHED[0]}, beta {PUBLISHED[1]}")
    term, levels = (2, horizons) if sizes == 1 else (1, sizes)
    other = "n_params" if term == 2 else "tokens"
    if levels == 1:
        return _shape([0], "one scale only: the loss law is a constant")
    alone = f"the loss law has no term in `{other}`, which these cells do not vary on its own"
    if levels >= 4:
        return _shape([0, term, term + 2], alone)
    return _shape([0, term], f"{fixed}; {alone}")


def _shape(free: list[int], *said: str, tie: bool = False) -> Shape:
    base = np.array([OFF, OFF, OFF, *PUBLISHED])
    columns = np.eye(5)[:, free]
    if tie:
        columns[4, 3], base[4] = 1.0, 0.0
    base[[i for i in free if i > 2]] = 0.0
    base[[i for i in free if i < 3]] = 0.0
    return Shape(base, columns, said)


def _levels(values: Array) -> int:
    ordered = np.sort(values)
    return 1 + int((ordered[1:] > 1.01 * ordered[:-1]).sum())


def _collinear(n_params: Array, tokens: Array) -> bool:
    x, y = np.log(n_params) - np.log(n_params).mean(), np.log(tokens) - np.log(tokens).mean()
    return bool(1 - (x @ y) ** 2 / ((x @ x) * (y @ y)) < 1e-4)


@dataclass(frozen=True)
class Problem:
    """K fits to the same R scales, solved side by side: centred ln n_params and ln tokens (R), ln loss and row counts (K, R)."""

    ln_n: Array
    ln_d: Array
    ln_loss: Array
    count: Array

    def model(self, theta: Array) -> tuple[Array, Array]:
        """ln L (K, R) and its derivative to theta (K, R, 5), for theta (K, 5)."""
        t = theta[..., None]
        e = np.exp(t[:, 0]) * np.ones_like(self.ln_n)
        a, b = np.exp(t[:, 1] - t[:, 3] * self.ln_n), np.exp(t[:, 2] - t[:, 4] * self.ln_d)
        total = e + a + b
        return np.log(total), np.stack([e, a, b, -self.ln_n * a, -self.ln_d * b], axis=-1) / total[..., None]

    def objective(self, theta: Array) -> Array:
        """Sum of Huber(DELTA) over the residuals of ln L: (K,)."""
        r = np.abs(self.ln_loss - self.model(theta)[0])
        return (self.count * np.where(r <= DELTA, r * r / 2, DELTA * (r - DELTA / 2))).sum(-1)


def descend(problem: Problem, base: Array, free: Array, start: Array, rounds: int = 400) -> tuple[Array, Array]:
    """phi (K, P) and objective (K,) by Levenberg-Marquardt on reweighted squares, inside the box.

    Stops when no fit's objective falls by more than 1e-12 of itself in a step: a criterion free of the loss's scale.
    """
    low, high = bounds(problem, free)
    here = np.clip(start, low, high)
    value, damping = problem.objective(base + here @ free.T), np.full(len(here), 1e-3)
    for _ in range(rounds):
        there = np.clip(here + _step(problem, base, free, here, damping, low, high), low, high)
        new = problem.objective(base + there @ free.T)
        better = new <= value
        settled = np.where(better, value - new <= 1e-12 * value, damping > 1e12)
        here, value = np.where(better[:, None], there, here), np.where(better, new, value)
        damping = np.where(better, np.maximum(damping / 5, 1e-12), damping * 4)
        if settled.all():
            break
    return here, value


def _step(problem: Problem, base: Array, free: Array, here: Array, damping: Array, low: Array, high: Array) -> Array:
    """The damped step; a coordinate that the slope pushes against its bound stays."""
    ln_model, jacobian = problem.model(base + here @ free.T)
    jacobian = jacobian @ free
    r = problem.ln_loss - ln_model
    weight = problem.count * np.minimum(1.0, DELTA / np.maximum(np.abs(r), 1e-300))
    slope = np.einsum("krp,kr->kp", jacobian, weight * r)
    stuck = ((here <= low) & (slope < 0)) | ((here >= high) & (slope > 0))
    jacobian = jacobian * ~stuck[:, None, :]
    hessian = np.einsum("krp,kr,krq->kpq", jacobian, weight, jacobian)
    diagonal = np.einsum("kpp->kp", hessian)
    hessian = hessian + np.eye(here.shape[1]) * (diagonal * damping[:, None] + stuck + 1e-14)[:, None, :]
    return np.linalg.solve(hessian, np.where(stuck, 0.0, slope)[..., None])[..., 0]


def bounds(problem: Problem, free: Array) -> tuple[Array, Array]:
    """The box of phi: every term between a millionth of the lowest loss and ten times the highest, exponents in BOX."""
    low = np.array([*[problem.ln_loss.min() - 14.0] * 3, BOX[0], BOX[0]])
    high = np.array([*[problem.ln_loss.max() + 2.3] * 3, BOX[1], BOX[1]])
    rows = free.argmax(0)
    return low[rows], high[rows]


def starts(problem: Problem, shape: Shape, n: int = 4) -> Array:
    """For exponents on a grid the law is linear in E, A', B': non-negative least squares; the best n, as phi (n, P)."""
    from scipy.optimize import nnls

    grid, rows = np.geomspace(0.05, 1.2, 9), shape.free.argmax(0)
    terms_used = [i for i in (0, 1, 2) if i in rows]
    found = []
    for alpha in grid if 3 in rows else shape.base[3:4]:
        for beta in grid if 4 in rows else [alpha if shape.free[4].any() else shape.base[4]]:
            terms = np.column_stack([np.ones_like(problem.ln_n), np.exp(-alpha * problem.ln_n), np.exp(-beta * problem.ln_d)])
            solution = nnls(terms[:, terms_used] / np.exp(problem.ln_loss[0])[:, None], np.ones_like(problem.ln_n))[0]
            theta = np.array([OFF, OFF, OFF, alpha, beta])
            theta[terms_used] = np.log(np.maximum(solution, 1e-300))
            found.append(theta[rows])
    phi = np.clip(np.array(found), *bounds(problem, shape.free))
    return phi[np.argsort(problem.objective(shape.base + phi @ shape.free.T), kind="stable")[:n]]


def fit_loss_law(
    n_params: Array, tokens: Array, loss: Array, se: Array | None = None, *, level: float = 0.95, n_draws: int = N_DRAWS
) -> dict[str, Any]:
    """`params`, `solution`, `objective` and status `said` of the law through losses (or floors with standard error `se`), in nats/token."""
    centre = (float(np.log(n_params).mean()), float(np.log(tokens).mean()))
    problem = Problem(np.log(n_params) - centre[0], np.log(tokens) - centre[1], np.log(loss)[None], np.ones((1, len(loss))))
    shape = choose_shape(n_params, tokens)
    phi, values = descend(problem, shape.base, shape.free, starts(problem, shape))
    best = int(np.argmin(values))
    theta = shape.base + shape.free @ phi[best]
    sd, dof = _noise(problem, theta, shape.free.shape[1], None if se is None else se / loss)
    draws = _draws(problem, shape, phi[best], (sd, dof), n_draws)
    vector, table = _natural(theta[None], centre)[0], _natural(draws, centre)
    params, said = _params(vector, table, shape, level, float(loss.min()))
    solution = {
        "names": list(NAMES),
        "vector": [float(v) for v in vector],
        "draws": [" ".join(f"{v:.8g}" for v in row) for row in table],  # one line a resample: a fit file is read by people too
        "scatter": sd,  # sd of ln L about the law
    }
    return {"params": params, "solution": solution, "objective": float(values[best]), "said": [*shape.said, *said]}


def _natural(theta: Array, centre: tuple[float, float]) -> Array:
    """(E, A, B, alpha, beta) at one parameter and one token, from centred logs (K, 5); a term that is off is 0."""
    logs = theta[:, :3] + np.column_stack([np.zeros(len(theta)), theta[:, 3] * centre[0], theta[:, 4] * centre[1]])
    return np.column_stack([np.where(theta[:, :3] <= OFF, 0.0, np.exp(logs)), theta[:, 3:]])


def _noise(problem: Problem, theta: Array, size: int, se: Array | None) -> tuple[float, int]:
    """sd of ln L about the law, at least what the floors' own errors are, and its degrees of freedom."""
    dof = len(problem.ln_n) - size
    own = float(np.sqrt(np.mean(se**2))) if se is not None else 0.0
    if dof < 1:
        return max(own, 2e-3), 0
    r = (problem.ln_loss - problem.model(theta[None])[0])[0]
    return max(float(np.sqrt(r @ r / dof)), own), dof


def _draws(problem: Problem, shape: Shape, phi: Array, noise: tuple[float, int], n: int) -> Array:
    """theta (n, 5) of refits: to resampled rows when there are many, else to resampled noise; assumed exponents drawn from their range."""
    rng = np.random.default_rng([2203, 15556])
    rows, (sd, dof) = len(problem.ln_n), noise
    base = np.tile(shape.base, (n, 1))
    if rows >= PAIRS_FROM:
        count = rng.multinomial(rows, np.full(rows, 1 / rows), size=n).astype(float)
        ln_loss = np.repeat(problem.ln_loss, n, axis=0)
    else:
        wide = sd * np.sqrt(dof / rng.chisquare(dof, size=(n, 1))) if dof else sd  # the noise is itself only estimated
        ln_loss = problem.model((shape.base + shape.free @ phi)[None])[0] + wide * rng.standard_normal((n, rows))
        count = np.ones((n, rows))
    for exponent in (3, 4):
        if not shape.free[exponent].any():
            base[:, exponent] = rng.uniform(*ASSUMED, size=n)
    if shape.free[3] @ shape.free[4]:
        base[:, 4] = rng.uniform(-TIED, TIED, size=n)
    # Few rows may sit on a bound or have several minima: every refit then starts from several places, the lowest counts.
    places = [phi] if rows >= PAIRS_FROM else [phi, *starts(problem, shape)]
    k = len(places)
    drawn = Problem(problem.ln_n, problem.ln_d, np.tile(ln_loss, (k, 1)), np.tile(count, (k, 1)))
    ends, values = descend(drawn, np.tile(base, (k, 1)), shape.free, np.repeat(places, n, axis=0), rounds=100)
    best = ends.reshape(k, n, -1)[values.reshape(k, n).argmin(0), np.arange(n)]
    return base + best @ shape.free.T


def _params(vector: Array, draws: Array, shape: Shape, level: float, lowest: float) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Values with percentile intervals; those whose interval covers most of what is possible are said to be unidentified."""
    params: dict[str, dict[str, Any]] = {}
    said = []
    ends = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    for i, name in enumerate(NAMES):
        if not shape.free[i].any():
            params[name] = {"value": float(vector[i]) if i > 2 else 0.0, "interval": None, "fixed": True}
            continue
        low, high = float(min(ends[0, i], vector[i])), float(max(ends[1, i], vector[i]))
        params[name] = {"value": float(vector[i]), "interval": [low, high]}
        if i == 0 and len(shape.free[0]) > 1 and high - low > 0.8 * lowest:
            said.append(
                f"the data do not identify the irreducible loss E: its interval is [{low:.2g}, {high:.2g}], the lowest loss {lowest:.3g}"
            )
        if i > 2 and (high - low > 0.8 * (BOX[1] - BOX[0]) or low <= BOX[0] * 1.001 or high >= BOX[1] * 0.999):
            said.append(
                f"the data do not identify the loss-law exponent {name}: its interval is [{low:.2g}, {high:.2g}] in the box {list(BOX)}"
            )
    return params, said
