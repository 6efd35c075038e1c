"""Activation matching: which unit of one model does the job of which unit of another.

For every permutation group the units of two models are paired so that the summed correlation of their post-activation
features over the matching images is largest, one linear assignment problem per group (DIMAT, section 4; Li et al. 2015;
Git Re-Basin, section 3.1).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from merging.assignment import assign
from merging.averaging import State, wide_dtype
from merging.batch_norm import Batches, device_of, images_of
from merging.divided import Divided, Team
from merging.permutation import FeatureReader, Permutations, PermutationSpec, invert
from merging.progress import say

Edge = tuple[int, int]
Similarity = dict[str, Tensor]
"""Group -> (units, units), the higher the more alike."""

READ_AT = ("last", "all")

# Constant features still vary by a rounding error: a unit whose deviation is below this part of its mean is dead.
DEAD = 1e-6

# Standard errors of the difference of two correlations that count as noise
NOISE = 3.0

# The product of two tall, narrow matrices is also the gradient of a 1x1 convolution's weight. With AVX-512 oneDNN takes
# 0.4 to 0.6 of the time of a CPU's BLAS for it (16 to 512 units, an AMD CPU, where MKL does without AVX-512), with AVX2
# twice as long.
BY_CONVOLUTION = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
IMAGES = 16  # the rows are handed over as so many: with fewer, torch takes another, slower way
LEAST, WIDEST = 2**17, 512  # numbers, units

# On a CPU features are worked through in slices of so many numbers, which stay in its cache: up to three times as fast
# as whole batches (102,400 rows of 16 units, five models).
SLICE = 2**19 if BY_CONVOLUTION else 2**16

# Means of so many standard deviations are taken off before products are summed in float32: else these lose digits.
FAR = 4

# Images that go through a model at once before pairs are taken in blocks: the less, the longer each image takes.
AT_ONCE = 8


def favour_identity(spec: PermutationSpec, similarity: Similarity, images: int, at: str,
                    weight: float = 1.0) -> Similarity:
    """A similarity under which units leave their places only for a gain beyond the noise of the estimate.

    A correlation from n independent samples has a standard error of at most 1 / sqrt(n), the difference of two at most
    sqrt(2 / n); so a unit that stays is given NOISE of these at every place it is read at. Every image counts as one
    sample, because the positions within it are not independent. weight: what `similarity` is a weighted sum over.
    """
    margin = weight * NOISE * math.sqrt(2 / images)
    return {group: value + margin * max(len(spec.reads_at(group, at)), 1) * torch.eye(len(value), dtype=value.dtype)
            for group, value in similarity.items()}


def _as_it_is(spec: PermutationSpec, similarity: Similarity, images: int, at: str, weight: float = 1.0) -> Similarity:
    return similarity


PRIORS = {"none": _as_it_is, "identity": favour_identity}


@dataclass(frozen=True)
class Comparison:
    """How the activations of two models are compared.

    at: "last": features are read at the input of each group's last consumer, as in the paper; "all": correlations are
        summed over all its consumers' inputs.
    memory: the bytes that the pairs' correlation matrices and the models' features may take (None: no limit). Where it
        is too small, batches are cut, and then, which is announced, pairs are taken in blocks, with one pass over the
        images per block. What comes out is the same up to the rounding of sums over the images.

    Raises ValueError for another `at`.
    """

    at: str = "all"
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.at not in READ_AT:
            raise ValueError(f"unknown at={self.at!r}: choose from {', '.join(READ_AT)}")


@dataclass(frozen=True)
class Matching(Comparison):
    """How units are matched by activations: what is read, and a name in PRIORS: what speaks for a permutation besides.

    Raises ValueError for another `at` or `prior`.
    """

    prior: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior not in PRIORS:
            raise ValueError(f"unknown prior={self.prior!r}: choose from {', '.join(PRIORS)}")


USUAL = Matching()


@dataclass(frozen=True, eq=False)
class Pairing:
    """Which units of two models belong together: the permutations that take the second one's units to the first's
    order, and, where activations were compared, group that is read -> mean correlation of the matched units over the
    places it is read at."""

    permutations: Permutations
    correlations: Mapping[str, float] = field(default_factory=dict)


class Correlation:
    """Pearson correlations between the units of several models at one place of the network, batch by batch.

    Only what the edges ask for is kept: two vectors per model and one (units, units) matrix per edge, in float64 (on
    the CPU where the device has none).
    """

    def __init__(self, edges: Iterable[Edge]):
        self.edges = list(edges)
        self.rows = 0
        self.shift: dict[int, Tensor] = {}
        self.near: set[int] = set()  # models whose shift is 0
        self.sums: dict[int, Tensor] = {}
        self.squares: dict[int, Tensor] = {}
        self.products: dict[Edge, Tensor] = {}

    def update(self, features: dict[int, Tensor]) -> None:
        """Adds one batch: model -> (rows, units), the same rows for every model of an edge."""
        first = next(iter(features.values()))
        rows, units = first.shape
        step = rows
        if first.device.type == "cpu":
            slices = max(1, -(-rows * units // SLICE))
            step = max(1, -(-rows // slices))
            step += -step % IMAGES  # so that only the last slice has rows left over
        if not self.shift:
            self._choose_shifts(features, step)
        sums = {agent: torch.zeros_like(shift) for agent, shift in self.shift.items()}
        squares = {agent: torch.zeros_like(shift) for agent, shift in self.shift.items()}
        products = {(i, j): self.shift[i].new_zeros(units, units) for i, j in self.edges}
        for start in range(0, rows, step):
            parts = {agent: x[start : start + step] for agent, x in features.items()}
            centred = {agent: x if agent in self.near else x - self.shift[agent] for agent, x in parts.items()}
            for agent, x in centred.items():
                sums[agent] += x.sum(0)
                squares[agent] += x.square().sum(0)
            for i, j in self.edges:
                _add_product(products[i, j], centred[i], centred[j])
        for totals, of_batch in ((self.sums, sums), (self.squares, squares), (self.products, products)):
            for key, value in of_batch.items():
                _accumulate(totals, key, value)
        self.rows += rows

    def _choose_shifts(self, features: dict[int, Tensor], rows: int) -> None:
        """Taking the first batch's means off keeps float32 products accurate where means are large against deviations;
        the shift cancels in the correlation, so later batches keep it. Where they are small it saves a CPU the time."""
        for agent, x in features.items():
            self.shift[agent] = shift = x.mean(0, dtype=torch.promote_types(x.dtype, torch.float32))
            if x.device.type == "cpu" and x.dtype == shift.dtype:
                some = x[:rows]
                bound = FAR**2 * some.square().mean(0)
                if (some.mean(0).square() * (1 + FAR**2) <= bound).all() and bound.isfinite().all():
                    self.near.add(agent)
                    shift.zero_()

    def add_up(self, team: Team) -> None:
        """Adds what the other processes of a team have of their images."""
        own = torch.stack([shift.cpu().double() for shift in self.shift.values()])
        shifts = team.first(own)  # sums of x - s become sums of x - s' = (x - s) + d
        d = dict(zip(self.shift, (own - shifts).to(next(iter(self.sums.values())).device), strict=True))
        before = {agent: total.clone() for agent, total in self.sums.items()}
        for agent in self.shift:
            self.squares[agent] += d[agent] * (2 * before[agent] + self.rows * d[agent])
            self.sums[agent] += self.rows * d[agent]
        for i, j in self.edges:
            self.products[i, j] += torch.outer(d[i], before[j]) + torch.outer(self.sums[i], d[j])
        self.shift = dict(zip(self.shift, shifts, strict=True))
        totals = [*self.sums.values(), *self.squares.values(), *self.products.values()]
        summed = team.total(torch.cat([*(total.flatten() for total in totals), totals[0].new_tensor([self.rows])]))
        for total, new in zip(totals, summed.split([*(total.numel() for total in totals), 1]), strict=False):
            total.copy_(new.view_as(total))
        self.rows = int(summed[-1])

    def between(self, i: int, j: int) -> Tensor:
        """Correlations of model i's units (rows) with j's (columns), 0 for dead units; (i, j) is one of the edges."""
        covariance = self.products[i, j] / self.rows - torch.outer(self.sums[i], self.sums[j]) / self.rows**2
        # One after the other: of features next to zero (SiLU far below it) the product may overflow.
        return covariance * self._inverse_deviation(i)[:, None] * self._inverse_deviation(j)

    def _inverse_deviation(self, agent: int) -> Tensor:
        """1 / standard deviation per unit, 0 for dead units."""
        mean = self.sums[agent] / self.rows
        variance = (self.squares[agent] / self.rows - mean.square()).clamp(min=0)
        dead = variance <= (DEAD * (mean + self.shift[agent].to(mean))).square().clamp(min=torch.finfo(mean.dtype).tiny)
        return variance.rsqrt().masked_fill(dead, 0)


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """total += x^T y: (rows, units) each."""
    rows, units = x.shape
    if not (BY_CONVOLUTION and x.device.type == "cpu" and x.dtype == torch.float32 and units <= WIDEST
            and rows * units >= LEAST):
        total.addmm_(x.T, y)
        return
    even = rows - rows % IMAGES
    images, gradients = (z[:even].view(IMAGES, -1, 1, units).permute(0, 3, 1, 2) for z in (y, x))
    total += nn.grad.conv2d_weight(images, (units, units, 1, 1), gradients).view(units, units)
    if even < rows:
        total.addmm_(x[even:].T, y[even:])


def _accumulate(totals: dict, key: object, value: Tensor) -> None:
    """totals[key] += value, in float64."""
    if key not in totals:
        device = "cpu" if wide_dtype(value.device) != torch.float64 else value.device
        totals[key] = torch.zeros(value.shape, dtype=torch.float64, device=device)
    totals[key] += value.to(totals[key].device)


def match_activations(
    spec: PermutationSpec,
    model: nn.Module,
    states: Sequence[State],
    edges: Iterable[Edge],
    batches: Batches,
    matching: Matching = USUAL,
) -> dict[Edge, Pairing]:
    """Matches pairs of models by the correlation of their activations on the same images.

    Arguments and errors: see `similarities`.

    Returns:
        For every edge both (i, j), which takes j's units to i's order, and (j, i), the inverse.
    """
    matched = {}
    for (i, j), similarity, images in similarities(spec, model, states, edges, batches, matching):
        taking = assign(spec, PRIORS[matching.prior](spec, similarity, images, matching.at))
        correlations = mean_correlations(spec, similarity, taking, matching.at)
        matched[i, j], matched[j, i] = Pairing(taking, correlations), Pairing(invert(taking), correlations)
    return matched


def similarities(
    spec: PermutationSpec,
    model: nn.Module,
    states: Sequence[State],
    edges: Iterable[Edge],
    batches: Batches,
    comparison: Comparison = USUAL,
    names: Sequence[int] | None = None,
) -> Iterator[tuple[Edge, Similarity, int]]:
    """How alike the units of two models are: for every edge the correlations of their activations on the same images.

    Every model that occurs in an edge goes through the images once (once per block), in evaluation mode, however many
    edges it is in. `model` gives the architecture and is not changed.

    Args:
        spec: the permutation groups of `model`.
        states: one state dict per model.
        edges: pairs (i, j) of models; (i, j) and (j, i) are the same edge, which comes once, as i < j.
        batches: images (B, ...), or tuples that start with them; read once per block of edges. `Divided`: this process
            reads its part, for the edges of all processes.
        comparison: where features are read, and in how much memory.
        names: what errors call the models (None: their numbers).

    Yields (i, j), group -> (units, units), i's units by j's, on the CPU: what `assign` takes, and how many images there
    were. A group that nothing reads is most like itself as it stands; blocks are left out then, judged by what they
    hold.

    Raises:
        ValueError: there are no images, or activations are not finite (the models and the group are named).
    """
    own = {(min(edge), max(edge)) for edge in edges if edge[0] != edge[1]}
    divided = batches if isinstance(batches, Divided) else None
    edges = divided.all_of(own) if divided else sorted(own)
    if not edges:
        return
    device = device_of(states[edges[0][0]])
    images = images_of(batches, device, "matching")
    first = next(images)
    images = itertools.chain([first], images)
    if divided and len(first) < divided.team.size:  # everybody has to have seen some
        edges, divided = sorted(own), None
    reader = FeatureReader(model, spec, comparison.at, device)
    blocks_of_units = set(spec.blocks.values())
    blocks = [(edges, None)] if edges else []
    if edges and comparison.memory is not None:
        per_image = _bytes_per_image(reader(states[edges[0][0]], first[:2])) // len(first[:2])
        per_edge = _bytes_per_edge(spec, comparison.at, torch.get_num_threads() if device.type == "cpu" else 1)
        blocks = _plan(edges, int(min(max(comparison.memory, 0), 2**62)), per_edge, per_image, min(AT_ONCE, len(first)))
    for block, length in blocks:
        of_groups, count = _correlations(reader, states, block, images, length, divided)
        for i, j in (edge for edge in block if edge in own):
            pair = f"{names[i]} and {names[j]}" if names else f"{i} and {j}"
            yield (i, j), {group: _similarity(reads, i, j, group, pair) if reads else torch.eye(spec.sizes[group])
                           for group, reads in of_groups.items() if reads or group not in blocks_of_units}, count
        del of_groups  # before those of the next block are there
        images = images_of(batches, device, "matching")


def mean_correlations(spec: PermutationSpec, similarity: Similarity, taking: Permutations, at: str) -> dict[str, float]:
    """Group that is read -> mean correlation of the units that `taking` pairs, over the places it is read at."""
    return {group: float(value.gather(1, taking[group][:, None]).mean()) / len(spec.reads_at(group, at))
            for group, value in similarity.items() if spec.reads[group]}


def _bytes_per_edge(spec: PermutationSpec, at: str, threads: int) -> int:
    """Of the correlation matrices, and of one batch's products while they are added to, one in each thread."""
    reads = {units: 0 for units in spec.sizes.values()}
    for group, units in spec.sizes.items():
        reads[units] += len(spec.reads_at(group, at))
    return sum(8 * units**2 * count for units, count in reads.items()) + 4 * threads * max(reads, default=0) ** 2


def _bytes_per_image(features: Mapping[str, list[Tensor]]) -> int:
    """Of a model's features, the largest of which is there once more, centred, while it is worked through."""
    sizes = [x.numel() * max(x.itemsize, 4) for reads in features.values() for x in reads]
    return sum(sizes) + max(sizes, default=0)


def _plan(edges: list[Edge], memory: int, per_edge: int, per_image: int,
          at_once: int) -> Iterator[tuple[list[Edge], int]]:
    """The edges in blocks that keep to the memory, each with the number of images that go through a model at once."""
    blocks = list(_blocks(edges, memory, per_edge, per_image * at_once))
    if len(blocks) > 1:
        say(f"matching: the correlations of {len(edges)} edges and the features exceed memory={memory} bytes: "
            f"taking them in {len(blocks)} blocks, one pass over the images each")
    if memory < (least := per_edge + 2 * per_image):
        say(f"matching: it takes {least} bytes all the same, for two models and one image")
    for block in blocks:
        agents = len({agent for edge in block for agent in edge})
        yield block, max(1, (memory - len(block) * per_edge) // max(agents * per_image, 1))


def _blocks(edges: list[Edge], memory: int, per_edge: int = 1, per_agent: int = 0) -> Iterator[list[Edge]]:
    """The edges in blocks that fit, in which few models occur: each of a block's models goes through the images.

    Greedy: the model that comes next has the most edges to those that the block has already.
    """
    left: dict[int, set[int]] = {agent: set() for edge in edges for agent in edge}
    for i, j in edges:
        left[i].add(j)
        left[j].add(i)
    while left:
        block: list[Edge] = []
        inside: set[int] = set()
        ties: Counter[int] = Counter()  # to the models inside
        while left:
            room = (memory - (len(inside) + 1) * per_agent) // max(per_edge, 1) - len(block)
            if room < 1 and block:
                break
            new = max(ties, key=lambda agent: (ties[agent], -agent)) if ties else next(iter(left))
            ties.pop(new, None)
            inside.add(new)
            for other in sorted(left[new] & inside)[: max(room, 1)]:
                block.append((min(new, other), max(new, other)))
                for a, b in ((new, other), (other, new)):
                    left[a].remove(b)
                    if not left[a]:
                        del left[a]
            ties.update(left.get(new, set()) - inside)
        yield sorted(block)


@torch.no_grad()
def _correlations(
    reader: FeatureReader, states: Sequence[State], edges: list[Edge], batches: Iterable[Tensor], length: int | None,
    divided: Divided | None
) -> tuple[dict[str, list[Correlation]], int]:
    """One pass over the images, at most `length` at once: group -> one correlation per place where its features are
    read; how many images they were. divided: each process reads a part of every batch that has enough for all."""
    agents = sorted({agent for edge in edges for agent in edge})
    correlations: dict[str, list[Correlation]] = {}
    images = 0
    with _side_by_side(device_of(states[agents[0]])) as run_all:
        for x in _in_parts(batches, length, divided):
            images += len(x)
            features = {agent: reader(states[agent], x) for agent in agents}
            updates = []
            for group in list(features[agents[0]]):
                of_group = [features[agent].pop(group) for agent in agents]
                if group not in correlations:
                    correlations[group] = [Correlation(edges) for _ in of_group[0]]
                updates += [
                    (correlation.update, dict(zip(agents, reads, strict=True)))
                    for correlation, *reads in zip(correlations[group], *of_group, strict=True)
                ]
            run_all(updates)
            del features, updates  # before those of the next batch are there
    if divided:
        images = int(divided.team.total(torch.tensor([images], dtype=torch.float64)))
        for correlation in itertools.chain.from_iterable(correlations.values()):
            correlation.add_up(divided.team)
    return correlations, images


def _in_parts(batches: Iterable[Tensor], length: int | None, divided: Divided | None) -> Iterator[Tensor]:
    """Of every batch what this process reads, at most `length` images at once."""
    for batch in batches:
        mine = divided.part(batch) if divided else batch
        if len(mine):
            yield from mine.tensor_split(-(-len(mine) // (length or len(mine))))


@contextlib.contextmanager
def _side_by_side(device: torch.device) -> Iterator[Callable[[list[tuple[Callable, object]]], None]]:
    """A function that runs (update, argument) pairs: on a CPU as many at a time as there are threads, one thread each.

    The products are tall and narrow: on two cores, two threads that share each of them take between 1 and 2.5 times as
    long as one thread alone, two that take one each half as long.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        yield lambda updates: [update(argument) for update, argument in updates]
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield lambda updates: list(pool.map(lambda pair: pair[0](pair[1]), updates))
    finally:
        torch.set_num_threads(threads)  # new threads take the number that was set last


def _similarity(reads: list[Correlation], i: int, j: int, group: str, pair: str) -> Tensor:
    """(units, units) on the CPU: the correlations of i's units with j's, summed over the places they are read at."""
    correlation = sum(read.between(i, j) for read in reads)
    if not correlation.isfinite().all():
        raise ValueError(f"matching models {pair}: the activations of group {group!r} are not finite; "
                         "check the images and whether one of the models has diverged")
    return correlation.cpu()
