"""Init std and maximal learning rate of graphs of ReLU layers (arXiv:2402.17440).

Both depend on depth, kernel size and connectivity. A graph is `{(source, target): layers}`: 1 for a
linear or convolutional layer with its ReLU, 0 for a skip connection. Vertices are any hashable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from graphlib import CycleError, TopologicalSorter

from scaletune.errors import UserError
from scaletune.rules.priors import TransferPrior

Graph = Mapping[tuple[Hashable, Hashable], int]

CAVEATS = (
    "derived for one step of gradient descent on MSE, ReLU layers of one width and a readout with"
    " std ~ 1 / width; tested with SGD",
    "in two dimensions the kernel size is its side, as in the authors' code; the derivation has one"
    " dimension",
    "the in-degree of a layer is that of its target, as in the derivation (eq. 12); eq. 4 prints"
    " that of its source",
)


def chain(layers: int) -> dict[tuple[Hashable, Hashable], int]:
    """The graph of a plain MLP or conv net."""
    return {(i, i + 1): 1 for i in range(layers)}


def path_depths(graph: Graph) -> Counter[int]:
    """Number of layers -> number of paths from input to output (arXiv:2402.17440, section 3.3)."""
    first, last = _ends(graph)
    paths: dict[Hashable, Counter[int]] = {first: Counter({0: 1})}
    for vertex in _order(graph):
        here = paths.setdefault(vertex, Counter())
        for (source, target), layers in graph.items():
            if target == vertex:
                for above, count in paths[source].items():
                    here[above + layers] += count
    return paths[last]


def _order(graph: Graph) -> list[Hashable]:
    """The vertices in topological order."""
    sorter: TopologicalSorter[Hashable] = TopologicalSorter()
    for source, target in graph:
        sorter.add(target, source)
    try:
        return list(sorter.static_order())
    except CycleError as error:
        raise UserError(
            f"a graph of layers must have no cycle, but one goes through {error.args[1][0]!r}"
        ) from None


def _ends(graph: Graph) -> tuple[Hashable, Hashable]:
    """The input vertex (no edge into it) and the output vertex (no edge out of it)."""
    sources, targets = {source for source, _ in graph}, {target for _, target in graph}
    first, last = sources - targets, targets - sources
    if len(first) != 1 or len(last) != 1:
        raise UserError(
            "a graph of layers must have one input and one output, but got"
            f" {len(first)} and {len(last)}"
        )
    return first.pop(), last.pop()


def in_degree(graph: Graph, vertex: Hashable) -> int:
    """Number of edges into `vertex`, skip connections included."""
    return sum(target == vertex for _, target in graph)


def init_std(fan_in: int, in_degree: int = 1, readout: bool = False) -> float:
    """std**2 = 2 / (in_degree * fan_in); readout: 2 / (in_degree * fan_in**2).

    arXiv:2402.17440, eq. 2 and 12. `fan_in` of a convolution counts the entries of its kernel (the
    paper's patches).
    """
    return (2 / (in_degree * fan_in ** (2 if readout else 1))) ** 0.5


def maximal_lr(graph: Graph, base: Graph, kernel: int = 1, base_kernel: int = 1) -> TransferPrior:
    """lr ~ (sum of L**3 over paths of L layers)**(-1/2) / kernel (arXiv:2402.17440, eq. 8, 9)."""
    factor = (_cubes(graph) / _cubes(base)) ** -0.5 * base_kernel / kernel
    return TransferPrior(
        factor,
        f"lr times {factor:.4g} for the paths and kernels of the graph (arXiv:2402.17440)",
        "architecture",
        caveats=CAVEATS,
    )


def _cubes(graph: Graph) -> int:
    cubes = sum(count * layers**3 for layers, count in path_depths(graph).items())
    if not cubes:
        raise UserError(
            "a graph must have a layer on a path from input to output, but it has only skips"
        )
    return cubes
