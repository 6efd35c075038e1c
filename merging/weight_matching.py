"""Matching from the weights alone: Git Re-Basin's coordinate descent (arXiv 2209.04836, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from merging.assignment import assign, inner_groups, within_blocks
from merging.permutation import Member, Permutations, PermutationSpec, identity, nest, permute_tensor
from merging.tracing.running import is_mixed

_NOT_WEIGHTS = ("running_mean", "running_var", "num_batches_tracked")

# Of the order in which groups are visited, the same for all: both ends of an edge find the same.
SEED = 1160394274206875677


def match_weights(
    spec: PermutationSpec,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    max_iterations: int = 100,
) -> Permutations:
    """Permutations that take model b to model a: they (locally) maximise the inner product of a and permuted b.

    One group at a time (blocks together with the units in them) is assigned while the others stay put, in a shuffled
    but fixed order, until a whole sweep improves none; one near which nothing has moved is passed over. BatchNorm's
    affine parameters count, its running statistics do not. The first sweep goes from the input to the output and lets a
    tensor speak only when its other axes are settled already: without it, layers that are still unmatched drown the
    signal in deep networks (a permuted copy of a freshly initialised ResNet-50 or MobileNet-V2 is recovered in 0 of 37
    and 0 of 25 groups, with it in all).
    Computed on the CPU in float64. Deterministic. Raises ValueError for max_iterations < 1.
    """
    if max_iterations < 1:
        raise ValueError(f"max_iterations={max_iterations}: at least one sweep is needed")
    matching = _descent(spec, state_a, state_b)
    groups = [group for group in spec.sizes if group not in spec.blocks]
    for group in groups:
        matching.improve(group)

    shuffle = torch.Generator().manual_seed(SEED)
    for _ in range(max_iterations):
        order = torch.randperm(len(groups), generator=shuffle).tolist()
        improved = [matching.improve(groups[index]) for index in order]
        if not any(improved):
            break
    return {group: matching.permutations[group] for group in spec.sizes}


def match_unread(spec: PermutationSpec, state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor],
                 known: Permutations) -> Permutations:
    """`known`, which take model b to model a, but where no layer reads activations by the weights: a factor of a weight
    (LoRA's rank), a head that is used in training only. All other groups stay as they are known."""
    unread = [group for group in spec.sizes
              if not any(spec.reads[name] for name in (group, *inner_groups(spec, group)))]
    if not unread:
        return known
    matching = _descent(spec, state_a, state_b)
    matching.permutations |= known
    matching.settled = spec.sizes.keys() - set(unread)
    for _ in range(2):  # the second time each knows the others
        for group in unread:
            if group not in spec.blocks:
                matching.improve(group)
            elif spec.blocks[group] not in unread:
                outer = known[spec.blocks[group]]
                matching.permutations[group] = nest(outer, within_blocks(matching._within(group, outer).numpy()))
    return matching.permutations


def _descent(spec: PermutationSpec, state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor]) -> _Descent:
    """Of all that counts as a weight, on the CPU in float64."""
    weights = [name for name in spec.tensors
               if is_mixed(name, state_a[name]) and name.rpartition(".")[2] not in _NOT_WEIGHTS]
    return _Descent(spec, *({name: state[name].detach().cpu().double() for name in weights}
                            for state in (state_a, state_b)))


class _Descent:
    """The permutations so far of b's units, and which groups have had their turn.

    What a visit looked at is kept with what came of it: the products of two tensors are computed anew only when one of
    the groups on their other axes has moved, and a group is assigned anew only when something near it has.
    """

    def __init__(self, spec: PermutationSpec, a: Mapping[str, Tensor], b: Mapping[str, Tensor]):
        self.spec, self.a, self.b = spec, a, b
        self.members = {group: [m for m in members if m.tensor in a] for group, members in spec.members.items()}
        self.permutations = identity(spec)
        self.settled: set[str] = set()
        self.products: dict[Member, tuple[list[Tensor], Tensor]] = {}
        self.visited: dict[str, list[Tensor]] = {}

    def improve(self, group: str) -> bool:
        """Assign a group and all that lies in it, the others as they are. Whether it got better."""
        family = [group, *inner_groups(self.spec, group)]
        is_first = group not in self.settled
        near = self._near(family)
        if not is_first:
            if group in self.visited and _same(near, self.visited[group]):
                return False
            self.visited[group] = near
        similarity = {name: self._similarity(name) for name in family}
        found = assign(self.spec, similarity, [group])
        self.settled |= {group}
        if len(family) == 1:
            before, after = (float(similarity[group].gather(1, p[:, None]).sum())
                             for p in (self.permutations[group], found[group]))
        else:
            self.settled |= set(family)
            before = self._product(family, self.permutations)
            current, self.permutations = self.permutations, self.permutations | found
            for name in family[1:]:
                self.permutations[name] = nest(found[group], within_blocks(self._within(name, found[group]).numpy()))
            found = {name: self.permutations[name] for name in family}
            after, self.permutations = self._product(family, self.permutations), current
        scale = max(float(s.abs().max()) * len(s) for s in similarity.values())
        if is_first or after - before > 1e-12 * scale:  # more than rounding
            changed = any(not torch.equal(self.permutations[name], p) for name, p in found.items())
            self.permutations |= found
            return changed
        return False

    def _near(self, family: list[str]) -> list[Tensor]:
        """The permutations that a visit's outcome depends on: those of the groups on its tensors' other axes."""
        names = {name for group in family for member in self.members[group]
                 for name, other in self.spec.of_tensor[member.tensor] if other.dims != member.dims}
        return [self.permutations[name] for name in sorted(names)]

    def _similarity(self, group: str) -> Tensor:
        """(units, units) inner products of a's units with b's, b's other axes permuted; unsettled axes are left out."""
        similarity = torch.zeros(self.spec.sizes[group], self.spec.sizes[group], dtype=torch.float64)
        for member in self.members[group]:
            others = [(name, other) for name, other in self.spec.of_tensor[member.tensor] if other.dims != member.dims]
            if not all(name in self.settled for name, _ in others) or any(m.blocks for _, m in [("", member), *others]):
                continue
            similarity += self._product_of(member, others)
        return similarity

    def _product_of(self, member: Member, others: list[tuple[str, Member]]) -> Tensor:
        """(units, units) inner products in one tensor, b's other axes permuted."""
        orders = [self.permutations[name] for name, _ in others]
        if member in self.products and _same(orders, self.products[member][0]):
            return self.products[member][1]
        theirs = permute_tensor(self.b[member.tensor], others, self.permutations)
        product = _rows(self.a[member.tensor], member) @ _rows(theirs, member).T
        if theirs.ndim > 1:  # else computed as soon as kept
            self.products[member] = orders, product
        return product

    def _within(self, group: str, outer: Tensor) -> Tensor:
        """(blocks, units, units) inner products of the units in a's block k with those in b's block outer[k]."""
        blocks, units = len(outer), self.spec.sizes[group] // len(outer)
        plain = self.permutations | {group: nest(outer, torch.arange(units).expand(blocks, units))}
        similarity = torch.zeros(blocks, units, units, dtype=torch.float64)
        for member in self.members[group]:
            mine, theirs = self.a[member.tensor], self.b[member.tensor]
            theirs = permute_tensor(theirs, self.spec.of_tensor[member.tensor], plain)
            mine, theirs = (_rows(t, member).reshape(blocks, units, -1) for t in (mine, theirs))
            similarity += mine @ theirs.mT
        return similarity

    def _product(self, family: list[str], permutations: Permutations) -> float:
        """The part of the inner product in which these groups have a say."""
        tensors = {member.tensor for group in family for member in self.members[group]}
        return sum(float((self.a[name] * permute_tensor(self.b[name], self.spec.of_tensor[name], permutations)).sum())
                   for name in sorted(tensors))


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(torch.equal, some, others))


def _rows(tensor: Tensor, member: Member) -> Tensor:
    """(units, values): what the tensor holds of each unit."""
    if member.blocks:
        rows = tensor.unflatten(0, (member.blocks, -1)).movedim(2, 1).flatten(0, 1)
    else:
        rows = tensor.movedim(member.dims, tuple(range(len(member.dims)))).flatten(0, len(member.dims) - 1)
    order = member.entries.flatten()
    in_order = len(order) == len(rows) and torch.equal(order, torch.arange(len(order)))
    return (rows if in_order else rows[order]).reshape(len(member.entries), -1)
