"""Who gets which images: pure functions from labels to one sorted index list per agent.

Every partition is disjoint and deterministic, and splits the test set in the proportions of the training set. One that
takes an option asks for it by name, and gives it a default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np

from data.datasets import rank_in_class
from data.matrix import read_matrix
from utils.seeds import generator

Parts = list[np.ndarray]
PARTITIONS: dict[str, Callable[..., tuple[Parts, Parts]]] = {}


def register_partition(name: str) -> Callable:
    """Enter a function (train_labels, test_labels, num_agents, *, what it asks for, **_) in `PARTITIONS`."""

    def enter(function: Callable[..., tuple[Parts, Parts]]) -> Callable:
        PARTITIONS[name] = function
        return function

    return enter


def asks_for(name: str) -> frozenset[str]:
    """The options that a partition asks for: num_classes, seed, phase, alpha, ..."""
    return _keywords(PARTITIONS[name])


@cache
def _keywords(function: Callable) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    return frozenset(one.name for one in parameters if one.kind is one.KEYWORD_ONLY)


def make_partition(
    name: str,
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    num_agents: int,
    *,
    num_classes: int,
    alpha: float = 0.5,
    seed: int = 0,
    phase: str = "pretrain",
    **options: Any,
) -> tuple[Parts, Parts]:
    """Split a training and a test set, given by their labels (n,), over the agents.

    alpha: concentration of Dirichlet distributions; phase: `pretrain` or `finetune`, for `non-iid-PF`; seed: for all
    but `non-iid`; options: what else a partition asks for.
    Returns the sorted training and test indices of every agent. Raises ValueError for an unknown name or phase, values
    out of range, and when an agent would get no training or no test image.
    """
    if name not in PARTITIONS:
        raise ValueError(f"unknown data distribution {name!r}: choose from {', '.join(sorted(PARTITIONS))}")
    if num_agents < 1:
        raise ValueError(f"{num_agents} agents: at least one is needed")
    if phase not in ("pretrain", "finetune"):
        raise ValueError(f"unknown phase {phase!r}: choose from pretrain, finetune")
    if not 1e-300 <= alpha <= 1e300:  # beyond, the shares underflow or overflow
        raise ValueError(f"alpha is {alpha}: it must be between 1e-300 and 1e300")
    labels = {"training": np.asarray(train_labels), "test": np.asarray(test_labels)}
    for what, values in labels.items():
        if len(values) < num_agents:
            raise ValueError(f"{num_agents} agents cannot share {len(values)} {what} images: use fewer agents")
        if values.min() < 0 or values.max() >= num_classes:
            raise ValueError(f"{what} labels go from {values.min()} to {values.max()}: expected 0 to {num_classes - 1}")
    parts = PARTITIONS[name](
        *labels.values(), num_agents, num_classes=num_classes, alpha=alpha, seed=seed, phase=phase, **options
    )
    for what, lists in zip(labels, parts, strict=True):
        for agent, indices in enumerate(lists):
            if len(indices) == 0:
                raise ValueError(
                    f"{name}: agent {agent} of {num_agents} would get no {what} image: use fewer agents or more images"
                )
    return parts


@register_partition("iid")
def iid(train_labels: np.ndarray, test_labels: np.ndarray, num_agents: int, *, seed: int, **_) -> tuple[Parts, Parts]:
    """Every agent gets the same share of every class, to within one image, drawn by the seed."""
    return (
        _deal(train_labels, num_agents, _random(seed, "iid train")),
        _deal(test_labels, num_agents, _random(seed, "iid test")),
    )


@register_partition("non-iid")
def non_iid(
    train_labels: np.ndarray, test_labels: np.ndarray, num_agents: int, *, num_classes: int, **_
) -> tuple[Parts, Parts]:
    """Class c goes to agent c mod N; with more agents than classes, agents c, c + classes, ... share class c."""
    return _by_class(train_labels, num_agents, num_classes), _by_class(test_labels, num_agents, num_classes)


@register_partition("non-iid-PF")
def non_iid_pf(
    train_labels: np.ndarray, test_labels: np.ndarray, num_agents: int, *, num_classes: int, phase: str, seed: int, **_
) -> tuple[Parts, Parts]:
    """Pre-train on the first half of every class dealt IID, fine-tune on the second half dealt by classes.

    The test set is not halved: the phases are tested on all of it, dealt in the same way as their training images.
    """
    first = rank_in_class(train_labels) < np.bincount(train_labels, minlength=num_classes)[train_labels] // 2
    half = np.flatnonzero(first if phase == "pretrain" else ~first)
    options = {"num_classes": num_classes, "seed": seed}
    train, test = (iid if phase == "pretrain" else non_iid)(train_labels[half], test_labels, num_agents, **options)
    return [half[indices] for indices in train], test


@register_partition("dirichlet")
def dirichlet(
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    num_agents: int,
    *,
    num_classes: int,
    alpha: float,
    seed: int,
    min_images: int = 1,
    **_,
) -> tuple[Parts, Parts]:
    """Every class is split over the agents in proportions drawn from a symmetric Dirichlet distribution.

    An agent left without an image gets one of the class that it has the largest share in (Hsu et al., arXiv 1909.06335,
    draw per agent; per class as here: Yurochkin et al., arXiv 1905.12022).
    min_images: the shares are drawn anew until each agent has so many training images (Li et al., arXiv 2102.02079).
    """
    random = _random(seed, "dirichlet shares")
    draws = (random.dirichlet(np.full(num_agents, alpha), size=num_classes) for _ in range(TRIES))
    shares, train_counts = _first_with(min_images, draws, train_labels, f"--data_dist=dirichlet --alpha={alpha:g}")
    # A test image is of a class that the agent trains on.
    test_counts = _at_least_one(_apportion(shares, test_labels), train_counts)
    return (
        _split(train_labels, train_counts, _random(seed, "dirichlet train")),
        _split(test_labels, test_counts, _random(seed, "dirichlet test")),
    )


@register_partition("dirichlet-balanced")
def dirichlet_balanced(train_labels: np.ndarray, test_labels: np.ndarray, num_agents: int, *, num_classes: int,
                       alpha: float, seed: int, **_) -> tuple[Parts, Parts]:
    """All agents have equally many images, to within one, and each a mixture of classes of its own.

    An agent's proportions of the classes are drawn from a Dirichlet distribution around the data's. Then the agents
    take an image each in turn, of a class drawn from these; one that is used up is drawn no more (after Hsu et al.,
    arXiv 1909.06335, where one agent draws after the other).
    """
    random = _random(seed, "dirichlet-balanced")
    left = np.bincount(train_labels, minlength=num_classes)
    there = np.flatnonzero(left)
    wishes = np.zeros((num_agents, num_classes))
    wishes[:, there] = random.dirichlet(np.maximum(alpha * len(there) * left[there] / left.sum(), TINY), num_agents)
    counts = np.zeros((num_classes, num_agents), np.int64)
    for agents in np.split(np.arange(left.sum()) % num_agents, np.arange(num_agents, left.sum(), num_agents)):
        for agent in random.permutation(agents):
            # Who wants nothing of what is left takes what there is most of.
            chances = np.cumsum(np.where(left > 0, wishes[agent], 0))
            wanted = min(random.random() * chances[-1], np.nextafter(chances[-1], 0))
            label = np.searchsorted(chances, wanted, side="right") if chances[-1] > 0 else left.argmax()
            left[label] -= 1
            counts[label, agent] += 1
    return _by_counts(train_labels, test_labels, counts, seed, "dirichlet-balanced")


@register_partition("classes")
def classes(train_labels: np.ndarray, test_labels: np.ndarray, num_agents: int, *, num_classes: int, seed: int,
            classes_per_agent: int = 2, **_) -> tuple[Parts, Parts]:
    """Every agent has as many classes, drawn by the seed; those who share one have equally many of its images.

    All classes are held by equally many agents, to within one (as #C=k of Li et al., arXiv 2102.02079).
    """
    if not 1 <= classes_per_agent <= num_classes:
        raise ValueError(f"--classes_per_agent {classes_per_agent}: there are {num_classes} classes")
    if num_agents * classes_per_agent < num_classes:
        raise ValueError(f"{num_agents} agents with {classes_per_agent} classes each can't hold all {num_classes}: use "
                         f"--classes_per_agent={-(-num_classes // num_agents)} or more, or more agents")
    random = _random(seed, "classes")
    held = np.zeros((num_classes, num_agents))
    for agent in random.permutation(num_agents):
        rarest = np.lexsort((random.random(num_classes), held.sum(axis=1)))[:classes_per_agent]
        held[rarest, agent] = 1
    counts = _apportion(held / held.sum(axis=1, keepdims=True), train_labels)
    return _by_counts(train_labels, test_labels, counts, seed, "classes")


@register_partition("shards")
def shards(train_labels: np.ndarray, test_labels: np.ndarray, num_agents: int, *, num_classes: int, seed: int,
           classes_per_agent: int = 2, **_) -> tuple[Parts, Parts]:
    """The images, sorted by class, are cut into equal shards, and every agent gets as many, drawn by the seed.

    Most agents have `classes_per_agent` classes, some more or fewer (McMahan et al., arXiv 1602.05629).
    """
    pieces = num_agents * classes_per_agent
    if classes_per_agent < 1 or len(train_labels) < pieces:
        raise ValueError(f"{len(train_labels)} training images can't be cut into {num_agents} x {classes_per_agent} "
                         "shards: use fewer agents or a smaller --classes_per_agent")
    random = _random(seed, "shards")
    parts = np.array_split(_shuffled_by_class(train_labels, random), pieces)
    mine = random.permutation(pieces).reshape(num_agents, classes_per_agent)
    train = [np.sort(np.concatenate([parts[shard] for shard in own])) for own in mine]
    counts = np.stack([np.bincount(train_labels[own], minlength=num_classes) for own in train], axis=1)
    return train, _test_parts(test_labels, counts, seed, "shards")


@register_partition("quantity")
def quantity(train_labels: np.ndarray, test_labels: np.ndarray, num_agents: int, *, alpha: float, seed: int,
             min_images: int = 1, **_) -> tuple[Parts, Parts]:
    """The same classes for all, but not equally many images: the shares are drawn from a Dirichlet distribution.

    Li et al., arXiv 2102.02079. min_images: as for `dirichlet`.
    """
    random = _random(seed, "quantity shares")
    draws = (random.dirichlet(np.full(num_agents, alpha), size=1) for _ in range(TRIES))
    shares, _ = _first_with(min_images, draws, np.zeros_like(train_labels), f"--data_dist=quantity --alpha={alpha:g}")
    return (_cut(train_labels, shares, _random(seed, "quantity train")),
            _cut(test_labels, shares, _random(seed, "quantity test")))


@register_partition("exponential")
def exponential(train_labels: np.ndarray, test_labels: np.ndarray, num_agents: int, *, seed: int,
                size_ratio: float = 10.0, **_) -> tuple[Parts, Parts]:
    """The same classes for all; each agent has fewer images than the one before, by the same factor.

    size_ratio: how many times as many the first has as the last.
    """
    if not 1 <= size_ratio < np.inf:
        raise ValueError(f"--size_ratio {size_ratio:g}: it must be a number of at least 1")
    sizes = size_ratio ** -np.linspace(0, 1, num_agents)
    shares = sizes[None] / sizes.sum()
    return (_cut(train_labels, shares, _random(seed, "exponential train")),
            _cut(test_labels, shares, _random(seed, "exponential test")))


@register_partition("file")
def from_file(train_labels: np.ndarray, test_labels: np.ndarray, num_agents: int, *, num_classes: int, seed: int,
              partition_file: str | None = None, **_) -> tuple[Parts, Parts]:
    """Who has how much of what is in a file: a row for each agent, a column for each class; see `read_matrix`."""
    if partition_file is None:
        raise ValueError("--data_dist=file needs --partition_file")
    matrix = read_matrix(partition_file, num_agents, num_classes)
    images = np.bincount(train_labels, minlength=num_classes)
    if matrix.max() > 1:
        counts = matrix.astype(np.int64).T
        for label in np.flatnonzero(counts.sum(axis=1) > images):
            raise ValueError(f"--partition_file {partition_file}: class {label} has {images[label]} training images, "
                             f"the column asks for {counts[label].sum()}")
    else:
        nobody = (1 - matrix.sum(axis=0, keepdims=True)).clip(0)
        counts = _apportion(np.concatenate([matrix, nobody]).T, train_labels)[:, :-1]
    return _by_counts(train_labels, test_labels, counts, seed, "file")


# What partitions are made of

TRIES = 1000
TINY = 1e-300  # a concentration of 0 is no distribution


def _first_with(min_images: int, draws: Iterable[np.ndarray], labels: np.ndarray, name: str,
                ) -> tuple[np.ndarray, np.ndarray]:
    """The first shares (classes, agents) that give each agent so many images, and the counts."""
    for shares in draws:
        num_agents = shares.shape[1]
        if min_images * num_agents > len(labels):
            raise ValueError(f"--min_images {min_images}: {num_agents} agents share {len(labels)} training images")
        counts = _at_least_one(_apportion(shares, labels), shares)
        if counts.sum(axis=0).min() >= min_images:
            return shares, counts
    raise ValueError(f"{name}: in {TRIES} draws some agent always has fewer than {min_images} images: use a larger "
                     "--alpha, a smaller --min_images or fewer agents")


def _by_counts(train_labels: np.ndarray, test_labels: np.ndarray, counts: np.ndarray, seed: int,
               name: str) -> tuple[Parts, Parts]:
    """The partition with these counts (classes, agents) of training images, drawn by the seed."""
    nobodys = np.bincount(train_labels, minlength=len(counts)) - counts.sum(axis=1)
    train = _split(train_labels, np.column_stack([counts, nobodys]), _random(seed, f"{name} train"))
    return train[:-1], _test_parts(test_labels, counts, seed, name)


def _test_parts(labels: np.ndarray, train_counts: np.ndarray, seed: int, name: str) -> Parts:
    """Every class split as its training images are, counts (classes, agents); one that nobody trains on is nobody's."""
    held = train_counts.sum(axis=1, keepdims=True)
    nobodys = held == 0
    shares = np.column_stack([train_counts / np.maximum(held, 1), nobodys])
    counts = _apportion(shares, labels)
    if counts[:, :-1].sum() >= counts.shape[1] - 1:  # else somebody has none, whatever is done
        counts[:, :-1] = _at_least_one(counts[:, :-1], train_counts)
    return _split(labels, counts, _random(seed, f"{name} test"))[:-1]


def _random(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng(generator(seed, purpose=f"partition {purpose}").initial_seed())


def _shuffled_by_class(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Indices in random order within each class, one class after the other."""
    order = random.permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]


def _deal(labels: np.ndarray, num_agents: int, random: np.random.Generator) -> Parts:
    # One round of dealing through all classes: class counts and totals of two agents differ by at most one.
    order = _shuffled_by_class(labels, random)
    return [np.sort(order[agent::num_agents]) for agent in range(num_agents)]


def _cut(labels: np.ndarray, shares: np.ndarray, random: np.random.Generator) -> Parts:
    """Parts of the sizes nearest to the shares (1, agents), one image at least; each has all classes alike."""
    order = _shuffled_by_class(labels, random)
    of_class = np.bincount(labels)[labels[order]]
    order = order[np.argsort((rank_in_class(labels[order]) + 0.5) / of_class, kind="stable")]  # the classes in turn
    sizes = _at_least_one(_apportion(shares, np.zeros_like(labels)), shares)[0]
    return [np.sort(part) for part in np.split(order, np.cumsum(sizes)[:-1])]


def _by_class(labels: np.ndarray, num_agents: int, num_classes: int) -> Parts:
    # Agents a, a + num_classes, ... share class a and take its images in turn (one sharer when agents are few).
    first = labels % num_agents
    sharers = (num_agents - 1 - first) // num_classes + 1
    owner = first + num_classes * (rank_in_class(labels) % sharers)
    return [np.flatnonzero(owner == agent) for agent in range(num_agents)]


def _apportion(shares: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Image counts (classes, agents) nearest to the shares (classes, agents, rows sum to 1); each class adds up."""
    images = np.bincount(labels, minlength=len(shares))[:, None]
    bounds = np.rint(np.cumsum(shares, axis=1) * images).astype(np.int64)
    bounds[:, -1] = images[:, 0]  # whatever the rounding of the sums
    return np.diff(bounds, axis=1, prepend=0)


def _at_least_one(counts: np.ndarray, preference: np.ndarray) -> np.ndarray:
    """Give every agent without an image one of the class it prefers most, from the agent that has most of that class.

    counts, preference: (classes, agents). Agents never give their only image away.
    """
    counts = counts.copy()
    for agent in np.flatnonzero(counts.sum(axis=0) == 0):
        can_give = np.where(counts.sum(axis=0) > 1, counts, 0)
        available = can_give.any(axis=1)
        chosen = np.argmax(np.where(available, preference[:, agent], -1))
        donor = np.argmax(can_give[chosen])
        counts[chosen, donor] -= 1
        counts[chosen, agent] += 1
    return counts


def _split(labels: np.ndarray, counts: np.ndarray, random: np.random.Generator) -> Parts:
    """Index lists with the given counts (classes, agents)."""
    owner = np.repeat(np.tile(np.arange(counts.shape[1]), len(counts)), counts.ravel())
    order = _shuffled_by_class(labels, random)
    return [np.sort(order[owner == agent]) for agent in range(counts.shape[1])]
