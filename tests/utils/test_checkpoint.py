import torch

from utils.checkpoint import checkpoint_folder, describe, digest, digest_of_all

OPTIONS = {"dataset": "cifar10", "model": "tv:resnet18", "num_models": 5, "data_dist": "dirichlet", "epochs": 7,
           "seed": 3, "init_seed": True, "phase": "pretrain", "width_multiplier": 2, "alpha": 0.1, "train_samples": 200}


def test_a_folder_without_config_is_described_by_its_path(tmp_path):
    folder = checkpoint_folder(OPTIONS | {"save_folder": tmp_path})
    folder.mkdir(parents=True)
    said = describe(folder)
    expected = {**OPTIONS, "model": "tv_resnet18"}
    for key in ("num_models", "phase"):
        del expected[key]
    assert {key: said[key] for key in expected} == expected


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
