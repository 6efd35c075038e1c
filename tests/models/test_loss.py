"""Logit adjustment: the loss, where it is used, and what follows the checkpoints."""

import pytest
import torch
import yaml
from torch.nn import functional as F

from models.training import make_loss
from tests.helpers import TINY, folder_of, rows_of, script

SKEWED = [*TINY, "--num_models=2", "--data_dist=non-iid", "--batch_size=50"]


def test_it_is_cross_entropy_of_scores_shifted_by_the_classes_shares():
    labels = torch.tensor([0, 0, 0, 1])  # and none of class 2
    scores, asked = torch.randn(8, 3), torch.tensor([0, 1] * 4)
    for tau in (1.0, 0.5):
        shifted = scores + tau * torch.tensor([0.75, 0.25, 1e-9]).log()
        assert torch.allclose(make_loss("adjusted", tau, labels, 3)(scores, asked), F.cross_entropy(shifted, asked))
    assert torch.equal(make_loss("adjusted", 0.0, labels, 3)(scores, asked), F.cross_entropy(scores, asked))
    even = torch.arange(3).repeat(4)  # a shift of all scores alike changes nothing
    assert torch.allclose(make_loss("adjusted", 1.0, even, 3)(scores, asked), F.cross_entropy(scores, asked))
    assert make_loss("cross_entropy", 1.0, labels, 3) is F.cross_entropy


def test_a_class_that_an_agent_lacks_is_left_as_it_is():
    """Plain cross-entropy pushes its score down with every image; the adjusted one has next to no gradient there."""
    scores = torch.zeros(4, 3, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    pushed = {name: torch.autograd.grad(make_loss(name, 1.0, labels, 3)(scores, labels), scores)[0][:, 2].abs().max()
              for name in ("cross_entropy", "adjusted")}
    assert pushed["adjusted"] < 1e-8 < 0.05 < pushed["cross_entropy"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict:
    homes = {loss: tmp_path_factory.mktemp(loss) for loss in ("cross_entropy", "adjusted")}
    return {loss: home / script("train", *SKEWED, "--epochs=2", f"--loss={loss}", cwd=home).stdout.splitlines()[-1]
            .removeprefix("checkpoints: ") for loss, home in homes.items()}


def test_it_is_in_the_checkpoints_and_their_path(trained):
    assert "loss=adjusted" in str(trained["adjusted"]) and "loss" not in trained["cross_entropy"].parent.name
    models = [torch.load(folder / "model_0.pth", weights_only=True)["linear.bias"] for folder in trained.values()]
    assert not torch.equal(*models)
    assert yaml.safe_load((trained["adjusted"] / "config.yaml").read_text())["loss"] == "adjusted"


@pytest.mark.parametrize(("name", "flags"), [
    ("main", ["--opt=WA", "--merg_itr=2", "--training", "--epochs=1"]),
    ("base_lines", ["--opt=CDSGD", "--epochs=1", "--num_epochs=1"])])
def test_runs_have_the_checkpoints_loss_unless_they_are_given_one(name, flags, trained, tmp_path):
    run = [*SKEWED, *flags, "--exp=1", f"--ckp={trained['adjusted']}"]
    inherited = folder_of(script(name, *run, cwd=tmp_path), tmp_path)
    given = folder_of(script(name, *run, "--loss=cross_entropy", cwd=tmp_path), tmp_path)
    assert "loss=adjusted" in inherited.parent.name and "pretrain_loss" not in inherited.parent.name
    assert "pretrain_loss=adjusted" in given.parent.name
    for phase, column, same in (("initial", "test_loss", True), ("trained", "train_loss", False)):
        ours, theirs = ([row[column] for row in rows_of(folder) if row["phase"] == phase]
                        for folder in (inherited, given))
        assert (ours == theirs) == same  # models are evaluated by their plain scores
