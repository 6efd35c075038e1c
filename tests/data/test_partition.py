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


@pytest.fixture
def table(tmp_path):
    """Writes a matrix into a file: its path."""
    def write(name: str, numbers) -> str:
        file = tmp_path / name
        if file.suffix == ".npy":
            np.save(file, numbers)
        else:
            rows = np.asarray(numbers).tolist()
            file.write_text("\n".join(", ".join(map(str, row)) for row in rows) + "\n\n")
        return str(file)
    return write


def assert_test_images_are_of_own_classes(train, test):
    for own, tested in zip(counts(train, TRAIN), counts(test, TEST), strict=True):
        assert not tested[own == 0].any()


def assert_covers(parts, expected):
    assert all((np.diff(indices) > 0).all() and len(indices) for indices in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), expected)


@pytest.mark.parametrize("num_agents", AGENTS)
@pytest.mark.parametrize("name", ["iid", "non-iid", "dirichlet", "dirichlet-balanced", "shards", "quantity",
                                  "exponential"])
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
def test_the_same_arguments_give_the_same_partition_and_leave_them_alone(name, table):
    train, test, state = TRAIN.copy(), TEST.copy(), np.random.get_state()[1].copy()
    options = {"partition_file": table("numbers.csv", np.full((5, CLASSES), 0.2))} if name == "file" else {}
    first, second = (partition(name, 5, train, test, seed=3, **options) for _ in range(2))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(train, TRAIN)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("name", ["iid", "dirichlet", "non-iid", "dirichlet-balanced", "classes", "shards", "quantity",
                                  "exponential"])
def test_the_seed_decides_except_for_non_iid(name):
    (a, _), (b, _) = (partition(name, 5, seed=seed) for seed in (0, 1))
    same = all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert same == (name == "non-iid")


@pytest.mark.parametrize(
    "name, num_agents, options, message",
    [
        ("sorted", 5, {}, "choose from classes, dirichlet, dirichlet-balanced, exponential, file, iid"),
        ("iid", 0, {}, "at least one"),
        ("iid", len(TEST) + 1, {}, "cannot share"),
        ("dirichlet", 5, {"alpha": 0.0}, "alpha is 0.0"),
        ("dirichlet", 5, {"alpha": float("nan")}, "alpha is nan"),
        ("dirichlet", 5, {"alpha": 1.7e308}, r"alpha is 1.7e\+308: it must be between 1e-300 and 1e300"),
        ("dirichlet", 5, {"alpha": 5e-324}, "alpha is 5e-324"),
        ("non-iid-PF", 5, {"phase": "later"}, "choose from pretrain, finetune"),
        ("non-iid", 150, {}, "would get no test image"),
        ("iid", 5, {"train": TRAIN + 1}, "expected 0 to 9"),
        ("classes", 5, {"classes_per_agent": 11}, "--classes_per_agent 11: there are 10 classes"),
        ("classes", 5, {"classes_per_agent": 0}, "--classes_per_agent 0"),
        ("classes", 4, {}, "4 agents with 2 classes each can't hold all 10: use --classes_per_agent=3 or more"),
        ("classes", 200, {"train": TRAIN[:200], "test": TRAIN}, "would get no training image: use fewer"),
        ("shards", 5, {"classes_per_agent": 0}, "can't be cut into 5 x 0 shards"),
        ("shards", 5, {"classes_per_agent": 200}, "735 training images can't be cut into 5 x 200 shards"),
        ("dirichlet", 5, {"min_images": 148}, "--min_images 148: 5 agents share 735 training images"),
        ("dirichlet", 20, {"alpha": 0.01, "min_images": 30}, "=0.01: in 1000 draws some agent always has fewer"),
        ("quantity", 5, {"alpha": 1e-3, "min_images": 100}, "quantity --alpha=0.001: in 1000 draws some agent"),
        ("exponential", 5, {"size_ratio": 0.5}, "--size_ratio 0.5: it must be"),
        ("exponential", 5, {"size_ratio": float("nan")}, "--size_ratio nan"),
        ("file", 5, {}, "--data_dist=file needs --partition_file"),
    ],
)
def test_errors_say_what_is_wrong(name, num_agents, options, message):
    with pytest.raises(ValueError, match=message):
        partition(name, num_agents, **options)


# Partitions of unlike agents


@pytest.mark.parametrize("num_agents, per_agent", [(1, 10), (2, 5), (5, 2), (7, 3), (10, 1), (20, 2), (33, 4), (5, 10)])
def test_classes_gives_every_agent_as_many_and_shares_them_evenly(num_agents, per_agent):
    train, test = partition("classes", num_agents, classes_per_agent=per_agent, seed=4)
    assert_covers(train, np.arange(len(TRAIN)))
    assert_covers(test, np.arange(len(TEST)))
    held = counts(train, TRAIN)
    assert ((held > 0).sum(axis=1) == per_agent).all()
    holders = (held > 0).sum(axis=0)
    assert holders.min() >= 1 and np.ptp(holders) <= 1
    for of_class in held.T:
        assert np.ptp(of_class[of_class > 0]) <= 1
    assert_test_images_are_of_own_classes(train, test)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 10), st.integers(0, 10**6))
def test_classes_for_any_number_of_agents(num_agents, per_agent, seed):
    if num_agents * per_agent < CLASSES:
        with pytest.raises(ValueError, match="can't hold all 10"):
            partition("classes", num_agents, classes_per_agent=per_agent, seed=seed)
        return
    train, _ = partition("classes", num_agents, np.repeat(TRAIN, 5), classes_per_agent=per_agent, seed=seed)
    held = counts(train, np.repeat(TRAIN, 5)) > 0
    assert (held.sum(axis=1) == per_agent).all() and np.ptp(held.sum(axis=0)) <= 1


def test_classes_are_not_always_shared_by_the_same_agents():
    held = counts(partition("classes", 20)[0], TRAIN) > 0
    assert len({tuple(row) for row in held}) > 5  # a fixed order of classes would make five pairs


@pytest.mark.parametrize("num_agents, per_agent", [(1, 1), (5, 2), (10, 2), (7, 3), (100, 1)])
def test_shards_are_equal_and_of_few_classes(num_agents, per_agent):
    train, test = partition("shards", num_agents, classes_per_agent=per_agent)
    assert np.ptp([len(part) for part in train]) <= per_agent
    length = len(TRAIN) / (num_agents * per_agent)
    most = np.ceil(length / 60) + 1  # classes that a shard reaches into
    assert ((counts(train, TRAIN) > 0).sum(axis=1) <= per_agent * most).all()
    if num_agents < 50:
        assert_test_images_are_of_own_classes(train, test)


def test_shards_need_an_image_each():
    train, _ = partition("shards", 5, TRAIN[:10], classes_per_agent=2)
    assert [len(part) for part in train] == [2] * 5


@pytest.mark.parametrize("name, options", [("quantity", {"alpha": 0.5}), ("exponential", {"size_ratio": 8})])
def test_unlike_sizes_of_like_classes(name, options):
    for parts, labels in zip(partition(name, 5, **options), (TRAIN, TEST), strict=True):
        table = counts(parts, labels)
        sizes = table.sum(axis=1)
        assert sizes.max() > 3 * sizes.min()
        expected = np.outer(sizes, np.bincount(labels)) / len(labels)
        assert np.abs(table - expected).max() <= 1.5


def test_exponential_sizes_fall_by_one_factor():
    for parts, labels in zip(partition("exponential", 4, size_ratio=27), (TRAIN, TEST), strict=True):
        sizes = np.array([len(part) for part in parts])
        ideal = np.array([27, 9, 3, 1]) * len(labels) / 40
        assert np.abs(sizes - ideal).max() <= 1
    assert np.ptp([len(part) for part in partition("exponential", 4, size_ratio=1)[0]]) <= 1


def test_quantity_evens_out_with_alpha():
    spread = [np.std([len(part) for part in partition("quantity", 5, alpha=alpha)[0]]) for alpha in (0.1, 1, 1e300)]
    assert spread[0] > spread[1] > 10 > 1 > spread[2]


@pytest.mark.parametrize("name, least", [("dirichlet", 90), ("quantity", 30)])
def test_a_minimum_is_kept_and_a_draw_that_has_it_is_left_as_it_is(name, least):
    seeds = range(12)
    plain = {seed: partition(name, 5, alpha=0.7, seed=seed)[0] for seed in seeds}
    enough = {seed for seed in seeds if min(map(len, plain[seed])) >= least}
    assert 0 < len(enough) < len(seeds)
    for seed in seeds:
        train, test = partition(name, 5, alpha=0.7, min_images=least, seed=seed)
        assert min(map(len, train)) >= least
        assert_covers(train, np.arange(len(TRAIN)))
        assert_covers(test, np.arange(len(TEST)))
        same = all(np.array_equal(a, b) for a, b in zip(plain[seed], train, strict=True))
        assert same == (seed in enough)


@pytest.mark.parametrize("alpha", [1e-300, 0.01, 0.5, 1e300])
@pytest.mark.parametrize("num_agents", AGENTS)
def test_balanced_dirichlet_gives_all_equally_many(num_agents, alpha):
    train, test = partition("dirichlet-balanced", num_agents, alpha=alpha)
    assert_covers(train, np.arange(len(TRAIN)))
    assert_covers(test, np.arange(len(TEST)))
    assert np.ptp([len(part) for part in train]) <= 1
    shares, tested = counts(train, TRAIN) / np.bincount(TRAIN), counts(test, TEST) / np.bincount(TEST)
    if num_agents <= 5:
        assert np.abs(shares - tested).max() < 0.13  # one image of twelve, and the rounding


def test_balanced_dirichlet_evens_out_with_alpha():
    spread = [counts(partition("dirichlet-balanced", 5, alpha=alpha)[0], TRAIN).std(axis=0).mean()
              for alpha in (0.05, 1, 1e4)]
    assert spread[0] > 1.5 * spread[1] > 3 * spread[2]


def test_balanced_dirichlet_copes_with_a_class_that_is_absent():
    labels = TRAIN[TRAIN != 3]
    train, _ = partition("dirichlet-balanced", 4, labels, TEST)
    assert_covers(train, np.arange(len(labels)))


# From a file


@pytest.mark.parametrize("name", ["numbers.csv", "numbers.npy"])
def test_numbers_of_images_are_dealt_as_they_stand(table, name):
    wanted = np.random.default_rng(1).integers(0, 15, (4, CLASSES))
    wanted[:, 7] = 0
    train, test = partition("file", 4, partition_file=table(name, wanted))
    np.testing.assert_array_equal(counts(train, TRAIN), wanted)
    assert len(np.unique(np.concatenate(train))) == wanted.sum()
    assert_test_images_are_of_own_classes(train, test)
    assert len(np.unique(np.concatenate(test))) == (TEST != 7).sum()  # a class that nobody trains on is nobody's
    shares = counts(test, TEST) / np.bincount(TEST)
    np.testing.assert_allclose(shares, wanted / np.maximum(wanted.sum(axis=0), 1), atol=0.13)


def test_shares_are_of_each_class_and_may_leave_some_out(table):
    shares = np.zeros((3, CLASSES))
    shares[0], shares[1, :5], shares[2, 5:] = 0.5, 0.5, 0.25
    train, _ = partition("file", 3, partition_file=table("shares.csv", shares))
    assert np.abs(counts(train, TRAIN) - shares * np.bincount(TRAIN)).max() <= 1
    assert len(np.unique(np.concatenate(train))) == sum(map(len, train))


@pytest.mark.parametrize("change, message", [
    (lambda m: m[:3], "has the shape 3 x 10: 5 agents \\(rows\\) x 10 classes \\(columns\\) are needed"),
    (lambda m: m[:, :9], "has the shape 5 x 9"),
    (lambda m: m[0], "has the shape 10"),
    (lambda m: np.where(np.eye(5, 10) > 0, np.nan, m), "agent 0 and class 0 is not finite: nan"),
    (lambda m: np.where(np.eye(5, 10) > 0, np.inf, m), "not finite: inf"),
    (lambda m: m - 0.3 * np.eye(5, 10), "agent 0 and class 0 is negative"),
    (lambda m: m + np.eye(5, 10), "1.2 \\(agent 0, class 0\\) is no number of images"),
    (lambda m: m + 0.1, "the shares of class 0 sum to 1.5, more than 1"),
    (lambda m: 1000 * (m > 0), "class 0 has 60 training images, the column asks for 5000"),
    (lambda m: 1e30 * (m > 0), "is no number of images"),
    (lambda m: m * np.eye(5)[:, :1], "agent 1 of 5 would get no training image"),
])
def test_a_file_that_makes_no_sense_is_a_sentence(table, change, message):
    file = table("numbers.npy", change(np.full((5, CLASSES), 0.2)))
    with pytest.raises(ValueError, match=message):
        partition("file", 5, partition_file=file)


def test_a_file_that_is_no_table_is_a_sentence(tmp_path):
    for name, content, message in (("a.csv", b"1,2\n3", "is no table of numbers"), ("b.csv", b"x,y", "no table of"),
                                   ("c.npy", b"nothing", "no table of"), ("d.csv", b"", "has the shape 0"),
                                   ("e.csv", b"\xff\xfe\xff", "no table of")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            partition("file", 5, partition_file=str(tmp_path / name))
    np.save(tmp_path / "f.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="no table of"):
        partition("file", 5, partition_file=str(tmp_path / "f.npy"))
    with pytest.raises(FileNotFoundError):
        partition("file", 5, partition_file=str(tmp_path / "none.csv"))
