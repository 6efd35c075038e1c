"""Several processes that go through the matching images together: here each is a thread."""

import threading

import pytest
import torch
from torch import nn

from merging.activation_matching import Comparison, match_activations, similarities
from merging.batch_norm import reestimate
from merging.divided import Divided, reestimate_all
from merging.permutation import derive_spec

EDGES = [(0, 1), (1, 2), (2, 3), (3, 0)]


class Threads:
    """What a team of threads has in common."""

    def __init__(self, size):
        self.size, self.barrier, self.desk = size, threading.Barrier(size), [None] * size


class Member:
    def __init__(self, threads, place):
        self.threads, self.place, self.size = threads, place, threads.size

    def everybody(self, thing):
        self.threads.desk[self.place] = thing
        self.threads.barrier.wait(30)
        things = list(self.threads.desk)
        self.threads.barrier.wait(30)
        return things

    def first(self, tensor):
        return self.everybody(tensor)[0].clone()

    def total(self, tensor):
        return sum(self.everybody(tensor))


def together(size, work):
    """What `work(member)` gives in each of `size` threads."""
    threads, results, failures = Threads(size), [None] * size, []

    def run(place):
        try:
            results[place] = work(Member(threads, place))
        except BaseException as failure:
            failures.append(failure)
            threads.barrier.abort()

    running = [threading.Thread(target=run, args=(place,)) for place in range(size)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failures:
        raise failures[0]
    return results


def network(seed):
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)
    return nn.Sequential(*layers).double()


@pytest.fixture(scope="module")
def problem():
    models = [network(seed) for seed in range(4)]
    # Means far from 0, and other ones in every batch: what each thread sees first is not what others do.
    batches = [torch.randn(size, 1, 8, 8, dtype=torch.float64) + 5 * k for k, size in enumerate((9, 9, 7, 1))]
    return derive_spec(models[0], batches[0]), models[0], [model.state_dict() for model in models], batches


@pytest.mark.parametrize("memory", [None, 2**20, 5_000])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_team_finds_what_one_finds(problem, size, memory):
    *models, batches = problem
    whole = {edge: (similarity, images) for edge, similarity, images in
             similarities(*models, EDGES, batches, Comparison(memory=memory))}
    found = together(size, lambda member: {edge: (similarity, images) for edge, similarity, images in similarities(
        *models, EDGES[member.place::size], Divided(batches, member), Comparison(memory=memory))})
    for place, mine in enumerate(found):
        assert set(mine) == {(min(edge), max(edge)) for edge in EDGES[place::size]}
        for edge, (similarity, images) in mine.items():
            assert images == whole[edge][1] == 26
            for group, expected in whole[edge][0].items():
                torch.testing.assert_close(similarity[group], expected, rtol=0, atol=1e-11)
                assert (similarity[group] - similarity[group].mean()).abs().max() > 0.1


def test_each_reads_a_part_of_the_images(problem):
    *models, batches = problem
    read = [[], []]

    class Noted(Divided):
        def part(self, images):
            read[self.team.place].append(super().part(images))
            return read[self.team.place][-1]

    whole = match_activations(*models, EDGES[:1], batches)
    for mine in together(2, lambda member: match_activations(*models, EDGES[:1], Noted(batches, member))):
        assert all(torch.equal(mine[0, 1].permutations[g], p) for g, p in whole[0, 1].permutations.items())
    for mine, others, batch in zip(*read, batches, strict=True):
        assert torch.equal(torch.cat([mine, others]), batch) and abs(len(mine) - len(others)) <= 1


def test_too_few_images_for_all_are_read_by_all(problem):
    spec, model, states, _ = problem
    batches = [torch.randn(2, 1, 8, 8, dtype=torch.float64)] * 3
    whole = match_activations(spec, model, states, EDGES[:2], batches)
    for mine in together(3, lambda member: match_activations(spec, model, states, EDGES[:member.place],
                                                             Divided(batches, member))):
        for edge, pairing in mine.items():
            assert pairing.correlations == whole[edge].correlations


class Normed(nn.Module):
    """A network with a layer that runs twice and one that never does."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.alias, self.twice, self.never = self.norm, nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.twice(self.twice(self.norm(self.conv(x)).relu()).relu()).sum((2, 3))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_team_estimates_what_one_estimates_in_as_many_passes(problem, size, monkeypatch):
    batches = problem[-1]
    states = {}
    for i in (2, 5, 7):
        torch.manual_seed(i)
        states[i] = Normed().double().state_dict()
    model = Normed().double()
    whole = {i: reestimate(model, state, batches) for i, state in states.items()}
    passes = []
    usual = Normed.forward
    monkeypatch.setattr(Normed, "forward", lambda self, x: passes.append(len(x)) or usual(self, x))
    homes = [[2, 5, 7][place::size] for place in range(size)]
    found = together(size, lambda member: reestimate_all(
        model, {i: states[i] for i in homes[member.place]},
        dict.fromkeys(homes[member.place], Divided(batches, member))))
    assert sorted(passes) == sorted([9, 9, 7] * 3)  # the last batch is of one image
    for mine, own in zip(found, homes, strict=True):
        assert list(mine) == own
        for i, state in mine.items():
            assert state.keys() == whole[i].keys()
            for key, value in whole[i].items():
                torch.testing.assert_close(state[key], value, rtol=1e-12, atol=1e-12)
            assert state["conv.weight"] is states[i]["conv.weight"]
            assert state["norm.num_batches_tracked"] == 3 and state["never.running_var"].eq(1).all()


def test_images_of_several_models_are_read_once():
    read = []

    class Images(list):
        def __iter__(self):
            read.append(self)
            return super().__iter__()

    torch.manual_seed(0)
    model = Normed()
    shared, own = (Images(torch.randn(5, 1, 6, 6) for _ in range(2)) for _ in range(2))
    states = {i: Normed().state_dict() for i in (3, 0, 4)}
    found = reestimate_all(model, states, {0: own, 3: shared, 4: shared})
    assert len(read) == 2 and read[0] is shared and read[1] is own
    assert list(found) == [3, 0, 4]
    for i, images in ((0, own), (3, shared), (4, shared)):
        for key, value in reestimate(model, states[i], images).items():
            assert torch.equal(found[i][key], value)


class Counting(nn.Module):
    """It writes to a buffer of its own, calls one norm past its hooks, and may overflow."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.direct = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen += 1
        return self.direct.forward(self.norm(self.conv(x).exp())).mean((2, 3))

    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        assert state == {"a": 1}


def test_models_of_a_team_keep_apart_and_what_is_given_is_left_alone():
    torch.manual_seed(0)
    model, batches = Counting(), [torch.randn(9, 1, 8, 8) for _ in range(3)]
    states = {0: {k: v * 1e4 if k == "conv.weight" else v for k, v in model.state_dict().items()},  # overflows
              1: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in model.state_dict().items()}}
    whole = reestimate(model, states[1], batches)
    assert states[1]["seen"] == 0 and whole["seen"] == 0 and whole["_extra_state"] == {"a": 1}
    assert whole["direct.num_batches_tracked"] == 3 and whole["direct.running_var"].ne(1).all()
    (found,) = together(1, lambda member: reestimate_all(model, states,
                                                         dict.fromkeys((0, 1), Divided(batches, member))))
    assert not found[0]["norm.running_mean"].isfinite().all()
    for key, value in whole.items():
        assert torch.equal(found[1][key], value) if isinstance(value, torch.Tensor) else found[1][key] == value
