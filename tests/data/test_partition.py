"""Partitions: who gets which images."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.partition import PARTITIONS, make_partition

CLASSES = 10
RANDOM = np.random.default_rng(0)
TRAIN = RANDOM.permutation(np.repeat(np.arange(CLASSES), 60 + 3 * np.arange(CLASSES)))
TEST = RANDOM.permutation(np.repeat(np.arange(CLASSES), 12 + np.arange(CLASSES)))
AGENTS = (1, 2, 3, 5, 10, 20, 33)


def partition(name, num_agents, train=TRAIN, test=TEST, **options):
    return make_partition(name, train, test, num_agents, num_classes=CLASSES, **options)


def counts(parts, labels):
    return np.stack([np.bincount(labels[indices], minlength=CLASSES) for indices in parts])


def assert_covers(parts, expected):
    assert all((np.diff(indices) > 0).all() and len(indices) for indices in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), expected)


@pytest.mark.parametrize("num_agents", AGENTS)
@pytest.mark.parametrize("name", ["iid", "non-iid", "dirichlet"])
def test_every_image_goes_to_exactly_one_agent(name, num_agents):
    train, test = partition(name, num_agents)
    assert len(train) == len(test) == num_agents
    assert_covers(train, np.arange(len(TRAIN)))
    assert_covers(test, np.arange(len(TEST)))


@pytest.mark.parametrize("num_agents", AGENTS)
def test_iid_gives_every_agent_the_same_share_of_every_class(num_agents):
    for parts, labels in zip(partition("iid", num_agents), (TRAIN, TEST), strict=True):
        table = counts(parts, labels)
        assert np.ptp(table, axis=0).max() <= 1
        assert np.ptp(table.sum(axis=1)) <= 1


@pytest.mark.parametrize("num_agents", [1, 2, 3, 5, 10])
def test_non_iid_deals_classes_round_robin(num_agents):
    for parts, labels in zip(partition("non-iid", num_agents), (TRAIN, TEST), strict=True):
        for agent, indices in enumerate(parts):
            np.testing.assert_array_equal(indices, np.flatnonzero(labels % num_agents == agent))


@pytest.mark.parametrize("num_agents", [11, 20, 33])
def test_more_agents_than_classes_share_classes_evenly(num_agents):
    for parts, labels in zip(partition("non-iid", num_agents), (TRAIN, TEST), strict=True):
        table = counts(parts, labels)
        for label in range(CLASSES):
            assert set(np.flatnonzero(table[:, label])) == set(range(label, num_agents, CLASSES))
            assert np.ptp(table[label::CLASSES, label]) <= 1


@pytest.mark.parametrize("num_agents", [1, 3, 5, 20])
def test_pf_pretrains_on_the_first_half_of_every_class_and_finetunes_on_the_second(num_agents):
    pretrain, test_iid = partition("non-iid-PF", num_agents, phase="pretrain")
    finetune, test_classes = partition("non-iid-PF", num_agents, phase="finetune")
    first = np.concatenate([np.flatnonzero(c == TRAIN)[: np.sum(c == TRAIN) // 2] for c in range(CLASSES)])
    assert_covers(pretrain, np.sort(first))
    assert_covers(finetune, np.setdiff1d(np.arange(len(TRAIN)), first))
    assert np.ptp(counts(pretrain, TRAIN), axis=0).max() <= 1
    for agent, (train, test) in enumerate(zip(finetune, test_classes, strict=True)):
        classes = {c for c in range(CLASSES) if (c % num_agents if num_agents <= CLASSES else c) == agent % CLASSES}
        assert set(TRAIN[train]) == set(TEST[test]) == classes
    for test in (test_iid, test_classes):
        assert_covers(test, np.arange(len(TEST)))


def test_dirichlet_test_set_has_the_training_proportions():
    train_labels, test_labels = np.repeat(np.arange(CLASSES), 1000), np.repeat(np.arange(CLASSES), 200)
    train, test = partition("dirichlet", 5, train_labels, test_labels, alpha=0.5)
    shares, test_shares = counts(train, train_labels) / 1000, counts(test, test_labels) / 200
    np.testing.assert_allclose(test_shares, shares, atol=0.006)
    assert shares.std() > 0.1  # really uneven


def test_dirichlet_evens_out_with_alpha():
    spread = [counts(partition("dirichlet", 5, alpha=alpha)[0], TRAIN).std() for alpha in (0.1, 1, 100)]
    assert spread[0] > spread[1] > spread[2]


@pytest.mark.parametrize("num_agents", AGENTS)
def test_dirichlet_at_the_ends_of_alpha(num_agents):
    even, alone = (counts(partition("dirichlet", num_agents, alpha=alpha)[0], TRAIN) for alpha in (1e300, 1e-300))
    assert np.ptp(even, axis=0).max() <= 1
    assert len(TRAIN) - alone.max(axis=0).sum() < num_agents  # a class is one agent's, but for others' only images


@pytest.mark.parametrize("name", sorted(PARTITIONS))
def test_far_too_many_agents_are_a_sentence(name):
    with pytest.raises(ValueError, match="1000000 agents cannot share 735 training images"):
        partition(name, 10**6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.sampled_from([1e-3, 0.01, 0.1, 1.0]), st.integers(-3, 10**6))
def test_dirichlet_leaves_nobody_without_images(num_agents, alpha, seed):
    train_labels, test_labels = TRAIN[:40], TEST[:20]
    train, test = partition("dirichlet", num_agents, train_labels, test_labels, alpha=alpha, seed=seed)
    assert_covers(train, np.arange(40))
    assert_covers(test, np.arange(20))


def test_an_agent_given_its_only_test_image_trains_on_that_class():
    train, test = partition("dirichlet", 8, alpha=0.01, seed=1)
    alone = [agent for agent, indices in enumerate(test) if len(indices) == 1]
    assert alone  # this seed leaves someone without
    for agent in alone:
        assert TEST[test[agent]][0] in TRAIN[train[agent]]


@pytest.mark.parametrize("name", sorted(PARTITIONS))
def test_the_same_arguments_give_the_same_partition_and_leave_them_alone(name):
    train, test, state = TRAIN.copy(), TEST.copy(), np.random.get_state()[1].copy()
    first, second = (partition(name, 5, train, test, seed=3) for _ in range(2))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(train, TRAIN)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("name", ["iid", "dirichlet", "non-iid"])
def test_the_seed_decides_except_for_non_iid(name):
    (a, _), (b, _) = (partition(name, 5, seed=seed) for seed in (0, 1))
    same = all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert same == (name == "non-iid")


@pytest.mark.parametrize(
    "name, num_agents, options, message",
    [
        ("sorted", 5, {}, "choose from dirichlet, iid, non-iid, non-iid-PF"),
        ("iid", 0, {}, "at least one"),
        ("iid", len(TEST) + 1, {}, "cannot share"),
        ("dirichlet", 5, {"alpha": 0.0}, "alpha is 0.0"),
        ("dirichlet", 5, {"alpha": float("nan")}, "alpha is nan"),
        ("dirichlet", 5, {"alpha": 1.7e308}, r"alpha is 1.7e\+308: it must be between 1e-300 and 1e300"),
        ("dirichlet", 5, {"alpha": 5e-324}, "alpha is 5e-324"),
        ("non-iid-PF", 5, {"phase": "later"}, "choose from pretrain, finetune"),
        ("non-iid", 150, {}, "would get no test image"),
        ("iid", 5, {"train": TRAIN + 1}, "expected 0 to 9"),
    ],
)
def test_errors_say_what_is_wrong(name, num_agents, options, message):
    with pytest.raises(ValueError, match=message):
        partition(name, num_agents, **options)
