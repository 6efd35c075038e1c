"""Activation matching against numpy and scipy, and the cost of it."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from benchmarks.scale import Held
from merging import activation_matching
from merging.activation_matching import Comparison, Correlation, Matching, _blocks, match_activations, similarities
from merging.permutation import FeatureReader, Read, derive_spec, permute, random_permutations, read_units
from network.topology import make_topology


def oracle(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    both = np.corrcoef(a.double().numpy(), b.double().numpy(), rowvar=False)
    return both[: a.shape[1], a.shape[1] :]


def streamed(features: dict[int, torch.Tensor], edges, batch: int = 70) -> Correlation:
    correlation = Correlation(edges)
    for start in range(0, len(features[0]), batch):
        correlation.update({agent: x[start : start + batch] for agent, x in features.items()})
    return correlation


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (100.0, 1.0), (-3.0, 1e-3), (1e-4, 1e-4)])
def test_correlation_is_numpys(mean, scale):
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(500, 6, generator=generator)
    features = {agent: source @ torch.randn(6, 7, generator=generator) * scale + mean for agent in range(3)}
    correlation = streamed(features, [(0, 1), (0, 2)])
    for j in (1, 2):
        np.testing.assert_allclose(correlation.between(0, j), oracle(features[0], features[j]), atol=1e-5)
    assert (1, 2) not in correlation.products
    assert correlation.near == (set() if abs(mean) > 10 * scale else {0, 1, 2})


def test_means_that_overflow_when_squared_are_taken_off():
    features = {agent: torch.randn(2000, 8, generator=torch.Generator().manual_seed(agent)) * 1e17 + 1e20
                for agent in range(2)}
    expected = oracle(features[0], features[1])
    np.testing.assert_allclose(streamed(features, [(0, 1)], batch=2000).between(0, 1), expected, atol=1e-3)


def test_a_batch_without_rows_adds_nothing():
    features = {agent: torch.randn(50, 8, generator=torch.Generator().manual_seed(agent)) for agent in range(2)}
    correlation = streamed(features, [(0, 1)])
    correlation.update({agent: x[:0] for agent, x in features.items()})
    np.testing.assert_allclose(correlation.between(0, 1), oracle(features[0], features[1]), atol=1e-5)


@pytest.mark.parametrize("by_convolution", [True, False])
@pytest.mark.parametrize(("rows", "units"), [(2**15, 16), (2**15 + 35, 17), (3000, 192)])
def test_correlations_of_many_features_are_numpys(rows, units, by_convolution, monkeypatch):
    monkeypatch.setattr(activation_matching, "BY_CONVOLUTION", by_convolution)
    used = []
    usual = nn.grad.conv2d_weight
    monkeypatch.setattr(nn.grad, "conv2d_weight", lambda *args: used.append(args) or usual(*args))
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(rows, units, generator=generator)
    features = {agent: (source @ torch.randn(units, units, generator=generator)).relu() for agent in range(2)}
    features[1][:, 0] += 50  # its mean is taken off, the first one's is not
    correlation = streamed(features, [(0, 1)], batch=rows // 2 + 1)
    np.testing.assert_allclose(correlation.between(0, 1), oracle(features[0], features[1]), atol=2e-6)
    assert bool(used) == by_convolution and correlation.near == {0}


def test_a_drift_away_from_the_first_batch_does_no_harm():
    generator = torch.Generator().manual_seed(0)
    drift = torch.linspace(0, 5, 500)[:, None]
    features = {agent: torch.randn(500, 4, generator=generator) + drift for agent in range(2)}
    np.testing.assert_allclose(streamed(features, [(0, 1)]).between(0, 1), oracle(features[0], features[1]), atol=1e-5)


def test_slices_of_a_batch_add_up(monkeypatch):
    monkeypatch.setattr(activation_matching, "SLICE", 4 * 33)
    features = {agent: torch.randn(100, 4, generator=torch.Generator().manual_seed(agent)) for agent in range(2)}
    np.testing.assert_allclose(streamed(features, [(0, 1)]).between(0, 1), oracle(features[0], features[1]), atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1234.567, -1e-6])
def test_dead_units_have_correlation_zero(value):
    features = {agent: torch.randn(300, 4, generator=torch.Generator().manual_seed(agent)) for agent in range(2)}
    features[0][:, 1] = value
    features[1][:, 2] = value
    result = streamed(features, [(0, 1)]).between(0, 1)
    assert (result[1] == 0).all() and (result[:, 2] == 0).all()
    alive = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 3])
    expected = oracle(features[0][:, alive[0]], features[1][:, alive[1]])
    np.testing.assert_allclose(result[alive[0]][:, alive[1]], expected, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-100, 1e-154, 1e-160, 1e-320])
def test_features_next_to_zero_are_correlated_or_dead_but_never_nan(scale):
    features = {agent: torch.randn(300, 4, dtype=torch.float64) for agent in range(2)}
    expected = oracle(features[0], features[1])
    result = streamed({agent: x * scale for agent, x in features.items()}, [(0, 1)]).between(0, 1)
    np.testing.assert_allclose(result, expected if scale > 1e-150 else np.zeros((4, 4)), atol=1e-5)


class Net(nn.Module):
    """Two convolutions with BatchNorm, a residual sum, a linear head: read at two places with at="all"."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.back = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, x):
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = torch.relu(x + self.back(torch.relu(self.inner(x))))
        return self.head(x).mean((2, 3))


def net(seed: int) -> Net:
    torch.manual_seed(seed)
    model = Net()
    nn.init.uniform_(model.stem_norm.running_mean, -0.2, 0.2)
    nn.init.uniform_(model.stem_norm.running_var, 0.2, 1.0)
    nn.init.normal_(model.back.weight, std=0.5)  # so that the residual sum is not just the stem again
    return model


def images(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(5, 2, 6, 6, generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def spec():
    return derive_spec(net(0), images()[0])


def features_by_hand(model: Net, at: str) -> dict[str, list[torch.Tensor]]:
    """By the group's size, which is unique in this network."""
    model.eval()
    with torch.no_grad():
        x = torch.cat(images())
        first = torch.relu(model.stem_norm(model.stem(x)))
        inner = torch.relu(model.inner(first))
        last = torch.relu(first + model.back(inner))
    rows = {6: [last] if at == "last" else [first, last], 5: [inner]}
    return {size: [y.movedim(1, -1).flatten(0, -2) for y in reads] for size, reads in rows.items()}


def same_pairing(one, other):
    return one.permutations.keys() == other.permutations.keys() and all(
        torch.equal(p, other.permutations[group]) for group, p in one.permutations.items())


@pytest.mark.parametrize("at", ["last", "all"])
def test_matches_are_the_best_assignments(spec, at):
    models = [net(seed) for seed in range(3)]
    states = [model.state_dict() for model in models]
    matched = match_activations(spec, models[0], states, [(1, 0), (1, 2)], images(), Matching(at=at))
    assert set(matched) == {(0, 1), (1, 0), (1, 2), (2, 1)}
    if at == "all":  # the first read of the residual group must have a say
        last = match_activations(spec, models[0], states, [(1, 0), (1, 2)], images(), Matching(at="last"))
        assert not all(same_pairing(matched[edge], last[edge]) for edge in last)
    features = [features_by_hand(model, at) for model in models]
    for i, j in [(0, 1), (1, 2)]:
        for group, size in spec.sizes.items():
            total = sum(oracle(a, b) for a, b in zip(features[i][size], features[j][size], strict=True))
            expected = linear_sum_assignment(total, maximize=True)[1]
            there, back = (matched[edge].permutations[group] for edge in ((i, j), (j, i)))
            assert there.tolist() == expected.tolist() and back[there].tolist() == list(range(size))


def test_a_permuted_copy_is_recovered_exactly(spec):
    model = net(0)
    state = model.state_dict()
    moved = permute(spec, random_permutations(spec, torch.Generator().manual_seed(3)), state)
    back = permute(spec, match_activations(spec, model, [state, moved], [(0, 1)], images())[0, 1].permutations, moved)
    assert all(torch.equal(back[key], state[key]) for key in state)


class Counting(list):
    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_blocks_give_the_same_matches_in_more_passes(spec, capsys):
    model, states = net(0), [net(seed).state_dict() for seed in range(4)]
    edges = [(0, 1), (1, 2), (2, 3), (3, 0)]
    whole, parts = Counting(images()), Counting(images())
    expected = match_activations(spec, model, states, edges, whole, Matching(at="last"))
    assert whole.passes == 1 and "blocks" not in capsys.readouterr().out
    per_edge = 8 * sum(size**2 for size in spec.sizes.values()) + 4 * 6**2 * torch.get_num_threads()
    per_image = 4 * 36 * (6 + 5 + 6)  # the largest one twice
    memory = 3 * per_edge + 4 * 5 * per_image
    found = match_activations(spec, model, states, edges, parts, Matching(at="last", memory=memory))
    assert parts.passes == 2 and "2 blocks" in capsys.readouterr().out
    assert found.keys() == expected.keys()
    assert all(same_pairing(found[edge], expected[edge]) for edge in found)


def test_batches_are_cut_before_passes_are_added(spec):
    states, edges = [net(seed).state_dict() for seed in range(4)], [(0, 1), (1, 2), (2, 3), (0, 3)]
    whole, cut = Counting(images(2)), Counting([torch.cat(images(2)), images(3)[2][:1]])
    expected = list(similarities(spec, net(0), states, edges, [*images(2), images(3)[2][:1]]))
    found = list(similarities(spec, net(0), states, edges, cut, Comparison(memory=150_000)))
    assert cut.passes == 1
    for (edge, one, count), (other, two, total) in zip(found, expected, strict=True):
        assert edge == other and count == total == 11
        assert all(torch.allclose(one[group], two[group], atol=1e-5) for group in two)
    for (_, one, _), (_, two, _) in zip(similarities(spec, net(0), states, edges, whole, Comparison(memory=2**30)),
                                        similarities(spec, net(0), states, edges, whole), strict=True):
        assert all(torch.equal(one[group], two[group]) for group in two)  # all fits: bit for bit


@pytest.mark.parametrize("memory", [2**20, *(pytest.param(2**k, marks=pytest.mark.long) for k in (18, 17))])
@pytest.mark.parametrize("dense", [False, True])
def test_the_memory_is_kept(spec, memory, dense):
    """But for what one model computes on its way, of an image or a few."""
    agents, x = 12, torch.randn(64, 2, 6, 6)
    edges = [(i, j) for i in range(agents) for j in range(i) if dense or i - j == 1]
    states = [net(k).state_dict() for k in range(agents)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Held() as alone:
            FeatureReader(net(0), spec, "all")(states[0], x)
        with Held() as free:
            list_of = [edge for edge, _, _ in similarities(spec, net(0), states, edges, [x])]
        with Held() as held:
            assert sorted(edge for edge, _, _ in similarities(spec, net(0), states, edges, [x],
                                                              Comparison(memory=memory))) == list_of
    finally:
        torch.set_num_threads(before)
    assert held.peak <= memory + alone.peak / 8 < free.peak


def test_features_hold_no_more_than_themselves():
    """A few columns of a tensor are copied: the whole of it would stay as long as they do."""
    read = Read("linear", 1, 0, (1,), (10,), torch.arange(3)[:, None], (), "fc", False)
    x = torch.randn(4, 10)
    rows = read_units(x, read)
    assert torch.equal(rows, x[:, :3]) and rows.untyped_storage().nbytes() == rows.nbytes
    everything = Read("linear", 1, 0, (1,), (10,), torch.arange(10)[:, None], (), "fc", False)
    assert read_units(x, everything).data_ptr() == x.data_ptr()


def test_a_memory_that_nothing_fits_into_is_said_once(spec, capsys):
    states = [net(seed).state_dict() for seed in range(3)]
    found = match_activations(spec, net(0), states, [(0, 1), (1, 2)], images(), Matching(memory=1))
    assert len(found) == 4 and capsys.readouterr().out.count("all the same") == 1


def test_one_product_per_edge_and_batch(spec, monkeypatch):
    updates = []
    original = Correlation.update
    monkeypatch.setattr(Correlation, "update", lambda self, x: (updates.append(len(self.edges)), original(self, x)))
    states = [net(seed).state_dict() for seed in range(3)]
    match_activations(spec, net(0), states, [(0, 1), (1, 0), (1, 2), (0, 0)], images())
    reads = sum(len(spec.reads[group]) for group in spec.sizes)
    assert reads > len(spec.sizes) and updates == [2] * (reads * len(images()))


def test_threads_change_neither_the_matches_nor_later_threads(spec):
    states, edges = [net(seed).state_dict() for seed in range(3)], [(0, 1), (1, 2)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(match_activations(spec, net(0), states, edges, images()))
            with ThreadPoolExecutor(1) as pool:
                assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == threads
    finally:
        torch.set_num_threads(before)
    assert all(same_pairing(found[0][edge], found[1][edge]) for edge in found[0])


def test_the_model_is_left_alone(spec):
    model, state = net(0), net(1).state_dict()
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    match_activations(spec, model, [state, net(2).state_dict()], [(0, 1)], images())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_not_finite_activations_are_named(spec):
    with pytest.raises(ValueError, match=r"models 0 and 1.*not finite"):
        match_activations(spec, net(0), [net(0).state_dict(), net(1).state_dict()], [(0, 1)],
                          [torch.full((2, 2, 6, 6), torch.inf)])


def test_no_images_is_an_error(spec):
    with pytest.raises(ValueError, match="no images"):
        match_activations(spec, net(0), [net(0).state_dict(), net(1).state_dict()], [(0, 1)], [])


def test_without_float64_sums_are_kept_on_the_cpu(monkeypatch):
    monkeypatch.setattr(activation_matching, "wide_dtype", lambda device: torch.float32)
    correlation = streamed({0: torch.randn(50, 3), 1: torch.randn(50, 3)}, [(0, 1)])
    assert correlation.products[0, 1].dtype == torch.float64 and correlation.between(0, 1).device.type == "cpu"


@pytest.mark.parametrize("length", [1, 3, 50, 10_000])
@pytest.mark.parametrize("name", ["ring", "exponential", "random", "star"])
def test_blocks_hold_every_edge_once_and_few_models(name, length):
    connectivity = np.triu(make_topology(name, 40).connectivity)
    edges = [(int(i), int(j)) for i, j in zip(*np.nonzero(connectivity), strict=True)]
    blocks = list(_blocks(edges, length))
    assert sorted(edge for block in blocks for edge in block) == edges
    assert [len(block) for block in blocks[:-1]] == [length] * (len(blocks) - 1)
    in_order = [edges[k : k + length] for k in range(0, len(edges), length)]
    passes, plain = (sum(len({agent for edge in block for agent in edge}) for block in some)
                     for some in (blocks, in_order))
    assert passes <= plain * 1.1
    if name == "exponential" and length == 50:
        assert passes < 0.8 * plain
