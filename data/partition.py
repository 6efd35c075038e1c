"""Who gets which images: pure functions from labels to one sorted index list per agent.

Every partition is disjoint and deterministic, and splits the test set in the proportions of the training set.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data.datasets import rank_in_class
from utils.seeds import generator

Parts = list[np.ndarray]
PARTITIONS: dict[str, Callable[..., tuple[Parts, Parts]]] = {}


def register_partition(name: str) -> Callable:
    """Enter a function (train_labels, test_labels, num_agents, *, num_classes, alpha, seed, phase) in `PARTITIONS`."""

    def enter(function: Callable[..., tuple[Parts, Parts]]) -> Callable:
        PARTITIONS[name] = function
        return function

    return enter


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
) -> tuple[Parts, Parts]:
    """Split a training and a test set, given by their labels (n,), over the agents.

    alpha: concentration of `dirichlet`; phase: `pretrain` or `finetune`, for `non-iid-PF`; seed: for all but `non-iid`.
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
        *labels.values(), num_agents, num_classes=num_classes, alpha=alpha, seed=seed, phase=phase
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
    **_,
) -> tuple[Parts, Parts]:
    """Every class is split over the agents in proportions drawn from a symmetric Dirichlet distribution.

    An agent left without an image gets one of the class that it has the largest share in (Hsu et al., arXiv 1909.06335,
    draw per agent; per class as here: Yurochkin et al., arXiv 1905.12022).
    """
    shares = _random(seed, "dirichlet shares").dirichlet(np.full(num_agents, alpha), size=num_classes)
    train_counts = _at_least_one(_apportion(shares, train_labels), shares)
    # A test image is of a class that the agent trains on.
    test_counts = _at_least_one(_apportion(shares, test_labels), train_counts)
    return (
        _split(train_labels, train_counts, _random(seed, "dirichlet train")),
        _split(test_labels, test_counts, _random(seed, "dirichlet test")),
    )


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
