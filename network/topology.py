"""Who talks to whom, and with which weights.

Undirected graphs with doubly stochastic mixing matrices, for every method; one-way graphs with column-stochastic ones,
for those that can do with them. Either may change from step to step.
"""

import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.csgraph import breadth_first_order, connected_components, shortest_path

from utils.seeds import generator

TOLERANCE = 1e-6  # of the row and column sums of a mixing matrix


@dataclass(frozen=True, eq=False)
class Topology:
    """A graph over N agents and its mixing matrix.

    connectivity: (N, N) bool, no self loops; `connectivity[i, j]`: agent i hears from j; symmetric unless `directed`.
    pi: (N, N) float64, doubly stochastic (directed: its columns sum to 1), and off the diagonal positive exactly on the
    edges; `pi[i, j]` is the weight of agent j's model in agent i's merge.
    Of a graph that changes from step to step, `connectivity` is the union and `pi` the mean of all steps, and one of
    schedule: (N, N) matrices that take turns, and
    draw: step -> (N, N), the same matrix whenever it is asked for that step,
    gives those of the steps. groups: every one drawn is of groups that average exactly, so that it is its own square.
    note: what a method has made of it, to be said when a run begins.
    """

    name: str
    connectivity: np.ndarray
    pi: np.ndarray
    directed: bool = False
    schedule: tuple[np.ndarray, ...] = ()
    draw: Callable[[int], np.ndarray] | None = None
    groups: bool = False
    note: str = ""

    @property
    def num_agents(self) -> int:
        return len(self.pi)

    def neighbours(self, agent: int) -> list[int]:
        """The agents tied to `agent`, ascending, itself not among them."""
        return np.flatnonzero(self.connectivity[agent]).tolist()

    def weights(self, step: int) -> np.ndarray:
        """(N, N): the mixing matrix of step 0, 1, 2, ..."""
        if self.draw is not None:
            return self.draw(step)
        return self.schedule[step % len(self.schedule)] if self.schedule else self.pi

    @property
    def is_doubly_stochastic(self) -> bool:
        """Whether every row and column of pi and of the schedule's matrices sums to 1; drawn ones are not looked at."""
        sums = [matrix.sum(axis=axis) for matrix in (self.pi, *self.schedule) for axis in (0, 1)]
        return np.allclose(sums, 1, rtol=0, atol=TOLERANCE)

    @functools.cached_property
    def second_eigenvalue(self) -> float:
        """By which factor a step of averaging brings the agents closer together: 0 at once, 1 never; of one agent 0.

        The second-largest absolute eigenvalue of pi; where matrices take turns that of a round's product, as the mean
        of a step; where they are drawn the root of that of the mean of pi'pi (Boyd et al. 2006): for `groups` that mean
        is pi itself, for others it is estimated from 200 steps.
        """
        if self.groups:
            return _second(self.pi) ** 0.5
        if self.draw is not None:
            drawn = [self.draw(step) for step in range(200)]
            return _second(np.mean([pi.T @ pi for pi in drawn], axis=0)) ** 0.5
        product = functools.reduce(lambda earlier, pi: pi @ earlier, self.schedule or (self.pi,))
        return _second(product) ** (1 / max(1, len(self.schedule)))

    @property
    def is_connected(self) -> bool:
        """Whether every agent can be reached from every other, on one-way edges in their direction."""
        return connected_components(self.connectivity, connection="strong", return_labels=False) == 1

    def to_json(self) -> str:
        """The text of a file that `make_topology` reads back to an equal topology; of one that changes, to its mean."""
        return json.dumps(
            {
                "graph_type": self.name,
                "num_agents": self.num_agents,
                "connectivity": self.connectivity.astype(int).tolist(),
                "pi": self.pi.tolist(),
            }
            | ({"directed": True} if self.directed else {})
        )


def _second(matrix: np.ndarray) -> float:
    """The largest absolute eigenvalue but for that of what all agree on."""
    return float(np.abs(np.linalg.eigvals(matrix - matrix.mean(axis=0))).max())


def metropolis_hastings(connectivity: np.ndarray) -> np.ndarray:
    """Symmetric doubly stochastic weights for any undirected graph: (N, N) bool -> (N, N) float64.

    An edge weighs 1 / (1 + the larger of its ends' degrees), an agent itself what is left of 1 (always positive). On a
    regular graph of degree d all weights are exactly 1 / (1 + d): the paper's fully connected and ring matrices.
    The diagonal of `connectivity` is ignored; raises ValueError if it is not square and symmetric.
    Source: Xiao and Boyd 2004, Fast linear iterations for distributed averaging, section 4.
    """
    edges = np.asarray(connectivity, dtype=bool)
    if edges.ndim != 2 or edges.shape[0] != edges.shape[1] or not np.array_equal(edges, edges.T):
        raise ValueError(f"connectivity of shape {edges.shape} is not a square symmetric matrix")
    edges = edges & ~np.eye(len(edges), dtype=bool)
    fair = 1.0 / (1 + edges.sum(axis=1))
    pi = np.where(edges, np.minimum.outer(fair, fair), 0.0)
    # As a sum of differences rather than 1 - sum, so that it is exactly `fair` on a regular graph
    np.fill_diagonal(pi, fair + np.where(edges, fair[:, None] - pi, 0.0).sum(axis=1))
    return pi


Graph = Callable[[int, int], np.ndarray]  # (num_agents, seed) -> connectivity (N, N) bool
Draw = Callable[[int, int, int], np.ndarray]  # (num_agents, seed, step) -> pi (N, N) of that step
TOPOLOGIES: dict[str, Callable[[int, int], Topology]] = {}


def register_topology(
    name: str, weights: Callable[[np.ndarray], np.ndarray] = metropolis_hastings, draw: Draw | None = None,
    groups: bool = False,
) -> Callable[[Graph], Graph]:
    """Decorator that makes a graph available as `name`, mixed with `weights(connectivity)`.

    With `draw`, by what it gives for each step; the graph is the union then and the weights are the mean. `groups`: see
    Topology.
    """

    def register(graph: Graph) -> Graph:
        def make(num_agents: int, seed: int) -> Topology:
            connectivity = graph(num_agents, seed)
            draws = functools.partial(draw, num_agents, seed) if draw else None
            return Topology(name, connectivity, weights(connectivity), draw=draws, groups=groups)

        TOPOLOGIES[name] = make
        return graph

    return register


def _undirected(num_agents: int, edges: list[tuple[int, int]]) -> np.ndarray:
    """(N, N) bool adjacency of the edges, both ways; an edge from an agent to itself is left out."""
    connectivity = np.zeros((num_agents, num_agents), dtype=bool)
    for i, j in edges:
        connectivity[i, j] = connectivity[j, i] = i != j
    return connectivity


@register_topology("fully_connected")
def fully_connected(num_agents: int, seed: int) -> np.ndarray:
    """Everyone with everyone: every weight is 1 / N."""
    return ~np.eye(num_agents, dtype=bool)


@register_topology("ring")
def ring(num_agents: int, seed: int) -> np.ndarray:
    """A circle: weights 1/3, for two agents 1/2."""
    return _undirected(num_agents, [(i, (i + 1) % num_agents) for i in range(num_agents)])


def _bipartite_weights(connectivity: np.ndarray) -> np.ndarray:
    """floor(100 / (N - 1)) / 100 on every edge, as in the paper's files; above 101 agents 1 / (N - 1), unrounded.

    There the paper's rule gives 0: its graph has edges over which nothing flows, and every agent is alone. A file with
    such weights is refused.
    """
    n = len(connectivity)
    edge_weight = (100 // (n - 1) / 100 if n <= 101 else 1 / (n - 1)) if n > 1 else 0.0
    return np.where(connectivity, edge_weight, 0.0) + np.diag(1.0 - connectivity.sum(axis=1) * edge_weight)


@register_topology("bipartite", weights=_bipartite_weights)
def bipartite(num_agents: int, seed: int) -> np.ndarray:
    """All tied to the last two, the hubs, which are not tied to each other: two agents are alone, three a path."""
    hubs = range(max(num_agents - 2, 0), num_agents)
    return _undirected(num_agents, [(spoke, hub) for spoke in range(num_agents - 2) for hub in hubs])


@register_topology("disconnected")
def disconnected(num_agents: int, seed: int) -> np.ndarray:
    """Every agent alone."""
    return np.zeros((num_agents, num_agents), dtype=bool)


@register_topology("exponential")
def exponential(num_agents: int, seed: int) -> np.ndarray:
    """Agents whose distance on the circle is a power of two: about 2 log2(N) neighbours each."""
    hops = [2**k for k in range((num_agents - 1).bit_length())]
    return _undirected(num_agents, [(i, (i + hop) % num_agents) for i in range(num_agents) for hop in hops])


@register_topology("torus")
def torus(num_agents: int, seed: int) -> np.ndarray:
    """The most nearly square full grid of N agents, row by row, wrapped at its borders; for a prime N the ring."""
    rows = next(r for r in range(math.isqrt(num_agents), 0, -1) if num_agents % r == 0)
    grid = np.arange(num_agents).reshape(rows, -1)
    neighbours = [np.roll(grid, -1, axis=axis).ravel().tolist() for axis in (0, 1)]
    return _undirected(num_agents, [edge for ends in neighbours for edge in enumerate(ends)])


@register_topology("star")
def star(num_agents: int, seed: int) -> np.ndarray:
    """Everyone tied to agent 0 only."""
    return _undirected(num_agents, [(0, i) for i in range(num_agents)])


@register_topology("random")
def random(num_agents: int, seed: int) -> np.ndarray:
    """A connected Erdos-Renyi graph, the same for the same seed.

    Edge probability 2 ln(N) / N, twice the threshold of connectedness; drawn again until it is connected.
    """
    probability = 2 * math.log(num_agents) / num_agents
    draws = generator(seed, purpose="topology")
    while True:
        upper = torch.rand(num_agents, num_agents, generator=draws).numpy() < probability
        connectivity = np.triu(upper, k=1)
        connectivity = connectivity | connectivity.T
        if connected_components(connectivity, directed=False, return_labels=False) == 1:
            return connectivity


def _draw_matching(num_agents: int, seed: int, step: int) -> np.ndarray:
    """(N, N): this step's pairs, all equally likely; of an odd number the last one drawn keeps its model."""
    order = torch.randperm(num_agents, generator=generator(seed, 0, step, "matching")).numpy()
    half = num_agents // 2
    partner = np.arange(num_agents)
    partner[order[:half]], partner[order[half : 2 * half]] = order[half : 2 * half], order[:half]
    alone = np.eye(num_agents)
    return (alone + alone[partner]) / 2


def _mean_matching(connectivity: np.ndarray) -> np.ndarray:
    """Half of how likely each pair is: an agent has N - 1 possible partners and, if N is odd, sitting out besides."""
    n = len(connectivity)
    pi = np.where(connectivity, 0.5 / (n - 1 + n % 2), 0.0)
    return pi + np.diag(1.0 - pi.sum(axis=1))


@register_topology("random_matching", weights=_mean_matching, draw=_draw_matching, groups=True)
def random_matching(num_agents: int, seed: int) -> np.ndarray:
    """In every step all agents in pairs drawn anew, each averaging with its partner (an odd one sits out).

    Source: Boyd et al. 2006, Randomized gossip algorithms; theirs has one such pair at a time.
    """
    return fully_connected(num_agents, seed)


# One-way graphs

DIRECTED: dict[str, Callable[[int, int], Topology]] = {}


def push_weights(connectivity: np.ndarray) -> np.ndarray:
    """Column-stochastic weights for any graph: everyone splits what it has equally over itself and its receivers.

    connectivity: (N, N) bool, [i, j]: i hears from j. No agent needs to know more than how many it sends to.
    """
    edges = connectivity | np.eye(len(connectivity), dtype=bool)
    return edges / edges.sum(axis=0)


def register_directed(name: str) -> Callable[[Callable[[int], list[int]]], Callable[[int], list[int]]]:
    """Decorator: as `name`, every agent sends to the one that is `hop` further on the circle, for every hop at once.

    For a name that starts with `one_peer_`, for one hop after the other, step by step.
    """

    def register(hops: Callable[[int], list[int]]) -> Callable[[int], list[int]]:
        def make(num_agents: int, seed: int) -> Topology:
            here = np.eye(num_agents, dtype=bool)
            edges = [np.roll(here, hop, axis=0) & ~here for hop in hops(num_agents)] or [~here & here]
            union = np.logical_or.reduce(edges)
            if not name.startswith("one_peer_"):
                return Topology(name, union, push_weights(union), directed=True)
            schedule = tuple(map(push_weights, edges))
            return Topology(name, union, np.mean(schedule, axis=0), directed=True, schedule=schedule)

        DIRECTED[name] = make
        return hops

    return register


@register_directed("directed_ring")
def directed_ring(num_agents: int) -> list[int]:
    """Everyone sends to the next one on the circle."""
    return [1]


@register_directed("directed_exponential")
@register_directed("one_peer_exponential")
def directed_exponential(num_agents: int) -> list[int]:
    """Hops of 1, 2, 4, ...: log2(N) receivers, or one receiver at a time (Assran et al. 2019, appendix A)."""
    return [2**k for k in range((num_agents - 1).bit_length())]


# What methods make of a graph


def lazy_where_needed(topology: Topology, least: float = -1 / 3) -> Topology:
    """With (pi + I) / 2 for pi, where an eigenvalue of pi (of those that take turns) is not above `least`.

    Drawn matrices are left as they are. Raises ValueError for weights that are not symmetric.
    """
    matrices = topology.schedule or (topology.pi,)
    if not all(np.allclose(pi, pi.T, rtol=0, atol=TOLERANCE) for pi in matrices):
        raise ValueError("the mixing matrix is not symmetric, as the method needs it")
    smallest = min(np.linalg.eigvalsh(pi)[0] for pi in matrices)
    if topology.draw is not None or smallest > least + TOLERANCE:
        return topology
    lazy = [(pi + np.eye(topology.num_agents)) / 2 for pi in (topology.pi, *topology.schedule)]
    return replace(topology, pi=lazy[0], schedule=tuple(lazy[1:]),
                   note=f"agents mix by (pi + I) / 2: pi has the eigenvalue {smallest:.3g}, and the method needs more "
                        f"than {least:.3g}")


def spanning_tree(topology: Topology) -> Topology:
    """The graph's breadth-first tree from its centre, of a graph in parts one for each; Metropolis-Hastings weights.

    Its edges lie on shortest paths from the centre: the agent whose farthest other is nearest, of several the first.
    Raises ValueError for a graph of one-way edges, or one that changes.
    """
    if topology.directed or topology.schedule or topology.draw is not None:
        raise ValueError("the method relays over a spanning tree, which takes two-way edges that stay the same")
    hops = shortest_path(topology.connectivity, method="D", unweighted=True)
    farthest = np.where(np.isfinite(hops), hops, 0).max(axis=1)
    count, part = connected_components(topology.connectivity, directed=False)
    edges = []
    for members in (np.flatnonzero(part == k) for k in range(count)):
        root = members[farthest[members].argmin()]
        order, before = breadth_first_order(topology.connectivity, root, directed=False)
        edges += [(int(i), int(before[i])) for i in order[1:]]
    tree = _undirected(topology.num_agents, edges)
    return Topology(topology.name, tree, metropolis_hastings(tree))


# The numbers that `--exp` takes
EXPS = {1: "fully_connected", 2: "ring", 3: "bipartite", 4: "disconnected"}


def make_topology(name: str | Path, num_agents: int, seed: int = 0) -> Topology:
    """The topology `name`, of `TOPOLOGIES`, `DIRECTED`, a JSON file or a folder of them, over `num_agents` >= 1 agents.

    `seed` is for `random` and `random_matching`. A file holds `num_agents`, `connectivity` ((N, N) of 0 and 1, the
    diagonal is ignored) and as a rule `pi` ((N, N) weights; if absent, Metropolis-Hastings ones) and `graph_type` (a
    name). With `"directed": true` connectivity[i][j] = 1 says that i hears from j, and pi's columns alone must sum to 1
    (if absent, everyone shares out equally). A graph that isn't connected is accepted; `Topology.is_connected` says so.
    The .json files of a folder take turns step by step, sorted by name (2.json after 10.json); a directed one makes the
    whole directed.

    Raises ValueError for an unknown name (choices listed), for fewer than 1 agent, for a file that is not such a
    topology over `num_agents` agents and for a folder without files; FileNotFoundError if there is no such file.
    """
    if num_agents < 1:
        raise ValueError(f"a topology needs at least 1 agent, not {num_agents}")
    known = TOPOLOGIES | DIRECTED
    if str(name) in known:
        return known[str(name)](num_agents, seed)
    if Path(name).is_dir():
        return _load_folder(Path(name), num_agents)
    if Path(name).suffix.lower() == ".json":
        return _load(Path(name), num_agents)
    raise ValueError(f"unknown topology {str(name)!r}; choose one of {', '.join(known)}, a .json file "
                     "or a folder of .json files")


def short_name(name: str | Path) -> str:
    """What a path calls a topology that `make_topology` takes: without the folders it lies in, and without .json."""
    return re.sub(r"\.json$", "", Path(name).name, flags=re.IGNORECASE)


def _load(path: Path, num_agents: int) -> Topology:
    """Reads and checks a topology file; every error names it."""
    if not path.is_file():
        raise FileNotFoundError(f"topology file {path} does not exist")
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")), path.stem, num_agents)
    except (ValueError, RecursionError) as error:  # json's and unicode's errors are ValueErrors too
        raise ValueError(f"topology file {path}: {error}") from error


def _load_folder(path: Path, num_agents: int) -> Topology:
    """The graphs of all files in turn; an error names the file."""
    graphs = [_load(file, num_agents) for file in sorted(path.iterdir()) if file.suffix.lower() == ".json"]
    if not graphs:
        raise ValueError(f"topology folder {path} has no .json files")
    schedule = tuple(graph.pi for graph in graphs)
    union = np.logical_or.reduce([graph.connectivity for graph in graphs])
    return Topology(path.name, union, np.mean(schedule, axis=0), any(graph.directed for graph in graphs), schedule)


def _parse(content: Any, default_name: str, num_agents: int) -> Topology:
    if not isinstance(content, dict) or "connectivity" not in content:
        raise ValueError("there is no 'connectivity' (expected keys: graph_type, num_agents, connectivity, pi)")
    if content.get("num_agents", num_agents) != num_agents:
        raise ValueError(f"num_agents is {content['num_agents']!r}, but there are {num_agents} agents")

    given = _matrix(content["connectivity"], "connectivity", num_agents)
    if not np.isin(given, (0, 1)).all():
        raise ValueError("connectivity has entries other than 0 and 1")
    connectivity = (given == 1) & ~np.eye(num_agents, dtype=bool)
    directed = content.get("directed", False) is True
    if not directed:
        _check(connectivity == connectivity.T, "connectivity is not symmetric: it has the edge ({i}, {j}) one way only")

    if content.get("pi") is None:
        pi = push_weights(connectivity) if directed else metropolis_hastings(connectivity)
    else:
        pi = _matrix(content["pi"], "pi", num_agents)
        _check(pi >= 0, "pi[{i}][{j}] is negative")
        positive = pi > 0
        if not directed:
            _check(positive == positive.T,
                   "pi has no symmetric support: only one of ({i}, {j}) and ({j}, {i}) is positive")
        itself = np.eye(num_agents, dtype=bool)
        _check(connectivity | itself | ~positive, "pi[{i}][{j}] is positive, but connectivity has no such edge")
        _check(positive | ~connectivity, "pi[{i}][{j}] is 0, but connectivity has this edge")
        for what, axis in (("row", 1), ("column", 0))[directed:]:
            sums = pi.sum(axis=axis)
            worst = int(np.abs(sums - 1).argmax())
            if abs(sums[worst] - 1) > TOLERANCE:
                raise ValueError(f"pi's {what} {worst} sums to {sums[worst]:.6g}, not to 1")
    return Topology(str(content.get("graph_type", default_name)), connectivity, pi, directed)


def _matrix(values: Any, what: str, size: int) -> np.ndarray:
    """(size, size) float64 of finite numbers, or a ValueError."""
    try:
        matrix = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{what} is not a matrix of numbers") from None
    if matrix.shape != (size, size):
        raise ValueError(f"{what} has shape {matrix.shape}, but {size} agents need ({size}, {size})")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{what} has entries that are not finite")
    return matrix


def _check(holds: np.ndarray, message: str) -> None:
    """ValueError with `message`, its {i} and {j} the first entry where `holds` is false."""
    if not holds.all():
        i, j = np.argwhere(~holds)[0]
        raise ValueError(message.format(i=i, j=j))
