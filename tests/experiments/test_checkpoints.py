import pytest
import torch
import yaml

from experiments.checkpoints import check_state, checkpoint_folder, describe, digest, digest_of_all, load_states
from experiments.options import train_parser
from storage.files import save_tensors

OPTIONS = {"dataset": "cifar10", "model": "tv:resnet18", "num_models": 5, "data_dist": "dirichlet", "epochs": 7,
           "seed": 3, "init_seed": True, "phase": "pretrain", "width_multiplier": 2, "alpha": 0.1, "train_samples": 200}


def test_a_folder_without_config_is_described_by_its_path(tmp_path):
    folder = checkpoint_folder(OPTIONS | {"save_folder": tmp_path})
    folder.mkdir(parents=True)
    said = describe(folder, train_parser())
    expected = {**OPTIONS, "model": "tv_resnet18"}
    for key in ("num_models", "phase"):
        del expected[key]
    assert {key: said[key] for key in expected} == expected


@pytest.mark.parametrize("above", [
    "lr=0.1,seed=3,holdout=100/final", "alpha=1e-05,width=[1/x", "random_seed_5/models",
    "a/b/diff_initialization/models_no4/data_dist_iid/num_epochs_3/random_seed_2/mine"])
def test_only_this_programs_own_levels_say_something(tmp_path, above):
    folder = tmp_path / above
    folder.mkdir(parents=True)
    assert describe(folder, train_parser()) == {}


@pytest.mark.parametrize("key,value", [("seed", "x/../../victim"), ("epochs", "1/../../../victim"), ("model", [5]),
                                       ("width_multiplier", 1.5), ("holdout", [1]), ("num_models", "many")])
def test_a_config_that_lies_is_named(tmp_path, key, value):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({key: value}))
    with pytest.raises(ValueError, match=rf"config\.yaml says {key}: "):
        describe(tmp_path, train_parser())


WEIGHT = {"conv1.weight": torch.zeros(3), "bn1.num_batches_tracked": torch.tensor(0)}


@pytest.mark.parametrize("content,said", [
    ({"epoch": 3, "state_dict": WEIGHT}, "holds one under 'state_dict'"), ([WEIGHT], "not a state dict but a list"),
    (WEIGHT | {"conv1.weight": "text"}, "'conv1.weight' is of type str"),
    (WEIGHT | {"epoch": 3}, "'epoch' is of type int"),
    ({f"module.{key}": value for key, value in WEIGHT.items()}, "DataParallel"),
    ({f"_orig_mod.{key}": value for key, value in WEIGHT.items()}, "torch.compile"),
])
def test_models_as_people_keep_them_are_told_apart(tmp_path, content, said):
    save_tensors(tmp_path / "model_0.pth", content)
    with pytest.raises(ValueError, match=rf"model_0\.pth.*{said}"):
        load_states(tmp_path, 1, [0])


def test_a_model_without_counts_of_batches_is_told_apart():
    with pytest.raises(ValueError, match=r"file lacks bn1\.num_batches_tracked"):
        check_state({"conv1.weight": torch.zeros(3)}, WEIGHT, "file")


def test_data_sets_in_one_layout_have_folders_of_their_own(tmp_path):
    paths = {checkpoint_folder(OPTIONS | {"save_folder": "checkpoint", "imgntdir": imgntdir})
             for imgntdir in (None, "a/tiny-imagenet-200", "a/tiny-imagenet-20", "b/tiny-imagenet-20")}
    assert len(paths) == 2


def test_a_digest_tells_models_apart():
    a, b = {"w": torch.zeros(2, 3), "n": torch.tensor(1)}, {"w": torch.zeros(2, 3), "n": torch.tensor(2)}
    assert digest(a) == digest({k: v.clone() for k, v in a.items()}) != digest(b)
    digests = {"a": digest(a), "b": digest(b)}
    several = [digest_of_all({i: digests[name] for i, name in enumerate(names)}) for names in ("ab", "ba", "aa", "a")]
    assert len(set(several)) == 4
    assert several[0] == digest_of_all({1: digests["b"], 0: digests["a"]})
