"""Linear assignment for all groups of a spec, units within blocks included."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from merging.permutation import Permutations, PermutationSpec, nest

# Units from which on a group's assignment takes longer than to hand it to a thread
LARGE = 256


def solve(similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pairs with the largest sum."""
    from scipy.optimize import linear_sum_assignment  # here: a quarter of what `import torch` takes, for --help too

    return linear_sum_assignment(similarity, maximize=True)


def assign(spec: PermutationSpec, similarity: Mapping[str, Tensor], groups: list[str] | None = None) -> Permutations:
    """The permutations that maximise the summed similarity of paired units.

    similarity: group -> (units, units), a's units by b's; blocks may be left out, they are judged by what they hold.
    groups: which groups without blocks around them to assign, with all that lies in them; None: all.
    Blocks are paired by the best pairing of the units within each pair of them (a nested assignment, exact).
    Large groups are assigned side by side, one in each of torch's threads: none depends on another.
    """
    outer = [group for group in (spec.sizes if groups is None else groups) if group not in spec.blocks]
    assign_one = partial(_assign_group, spec, similarity)
    found: Permutations = {}
    if sum(spec.sizes[group] >= LARGE for group in outer) < 2:
        for group in outer:
            found |= assign_one(group)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # the solver lets go of Python's lock
            for of_group in pool.map(assign_one, outer):
                found |= of_group
    return found


def _assign_group(spec: PermutationSpec, similarity: Mapping[str, Tensor], group: str) -> Permutations:
    """The permutations of a group without blocks around it, and of those that lie in it."""
    inner = inner_groups(spec, group)
    value = similarity[group].numpy() if group in similarity else np.zeros((spec.sizes[group],) * 2)
    for name in inner:
        value = value + _values_of_blocks(similarity[name].numpy(), spec.sizes[group])
    found = {group: best(value)}
    for name in inner:
        found[name] = nest(found[group], within_blocks(_blocks(similarity[name].numpy(), found[group])))
    return found


def inner_groups(spec: PermutationSpec, outer: str) -> list[str]:
    """The groups whose units lie in the blocks of `outer`."""
    return [group for group, blocks in spec.blocks.items() if blocks == outer]


def best(similarity: np.ndarray) -> Tensor:
    """(units,): the column for each row that makes the sum largest; of equal ones, the one that moves fewest."""
    # Dead units are no more like one another than like any other, and would trade places for nothing.
    favoured = similarity.astype(np.float64)  # a copy
    favoured[np.diag_indices_from(favoured)] += 1e-9 * np.abs(similarity).max(initial=0.0)
    return torch.from_numpy(solve(favoured)[1])


def within_blocks(similarity: np.ndarray) -> Tensor:
    """(blocks, units): the best columns for the rows of each of the (blocks, units, units)."""
    return torch.stack([best(block) for block in similarity])


def _blocks(similarity: np.ndarray, outer: Tensor) -> np.ndarray:
    """(blocks, units, units): between block b and block outer[b]."""
    blocks = len(outer)
    split = similarity.reshape(blocks, len(similarity) // blocks, blocks, -1)
    return split[np.arange(blocks), :, outer.numpy()]


def _values_of_blocks(similarity: np.ndarray, blocks: int) -> np.ndarray:
    """(blocks, blocks): the sum over the best pairing of the units within each pair of blocks."""
    units = len(similarity) // blocks
    split = similarity.reshape(blocks, units, blocks, units).swapaxes(1, 2)
    if units == 1:
        return split[:, :, 0, 0]
    value = np.empty((blocks, blocks))
    for i, j in np.ndindex(blocks, blocks):
        rows, columns = solve(split[i, j])
        value[i, j] = split[i, j][rows, columns].sum()
    return value
