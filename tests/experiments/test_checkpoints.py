import pytest
import safetensors.torch
import torch
import yaml

from experiments import checkpoints
from experiments.checkpoints import (
    checkpoint_folder,
    describe,
    digest,
    digest_in,
    digest_of_all,
    load_model,
    model_files,
)
from experiments.options import train_parser
from merging.files import check_state, with_counts
from storage.files import save_tensors
from tests.helpers import equal

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


def models_in(folder):
    return {i: load_model(file) for i, file in model_files(folder, 1, [0]).items()}


def prefixed(prefix, state=WEIGHT):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("content,said", [
    ([WEIGHT], "not a state dict but a list"), (WEIGHT | {"conv1.weight": "text"}, "'conv1.weight' is of type str"),
    (WEIGHT | {"epoch": 3}, "'epoch' is of type int"), ({"state_dict": [WEIGHT]}, "'state_dict' is of type list"),
])
def test_what_is_no_model_is_named(tmp_path, content, said):
    save_tensors(tmp_path / "model_0.pth", content)
    with pytest.raises(ValueError, match=rf"model_0\.pth.*{said}"):
        models_in(tmp_path)


@pytest.mark.parametrize("name", ["model_0.pth", "model_0.pt"])
@pytest.mark.parametrize("content", [
    WEIGHT, {"epoch": 3, "state_dict": WEIGHT}, {"model": WEIGHT, "optimizer": {"state": {}}},
    prefixed("module."), prefixed("_orig_mod."), {"net": prefixed("module._orig_mod.")},
    {"model": {"state_dict": prefixed("_orig_mod.module.")}}])
def test_models_are_read_as_people_keep_them(tmp_path, name, content):
    save_tensors(tmp_path / name, content)
    equal(models_in(tmp_path)[0], WEIGHT)


def test_models_in_safetensors_are_read(tmp_path):
    safetensors.torch.save_file(prefixed("module."), tmp_path / "model_0.safetensors")
    read = models_in(tmp_path)[0]
    equal({key: read[key] for key in WEIGHT}, WEIGHT)
    whole = (tmp_path / "model_0.safetensors").read_bytes()
    for cut in (9, 40, len(whole) - 1):
        (tmp_path / "model_0.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"model_0\.safetensors can't be read"):
            models_in(tmp_path)
    save_tensors(tmp_path / "model_0.pth", WEIGHT)
    with pytest.raises(ValueError, match="keep one of them"):
        models_in(tmp_path)


def test_counts_of_batches_that_are_missing_are_0():
    counted = {"conv1.weight": torch.ones(3), "bn1.num_batches_tracked": torch.tensor(7)}
    filled = with_counts({"conv1.weight": torch.ones(3)}, counted)
    equal(filled, counted | {"bn1.num_batches_tracked": torch.tensor(0)})
    assert list(filled) == list(counted) and with_counts(counted, counted) is counted
    for other in ({}, {"conv1.weight": torch.ones(3), "conv2.weight": torch.ones(3)}):
        with pytest.raises(ValueError, match="file is of another architecture"):
            check_state(with_counts(other, counted), counted, "file")


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


def test_a_model_is_read_again_only_when_its_file_has_changed(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(checkpoints, "load_model", lambda file: read.append(file) or load_model(file))
    file = tmp_path / "model_0.pth"
    save_tensors(file, WEIGHT)
    assert digest_in(file) == digest_in(file) == digest(WEIGHT)
    other = WEIGHT | {"conv1.weight": torch.ones(3)}
    save_tensors(file, other)
    assert digest_in(file) == digest_in(file) == digest(other) != digest(WEIGHT)
    assert len(read) == 2
