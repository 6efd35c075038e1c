import pytest
import torch

from utils.files import claim, load_tensors, save_tensors, save_text


def test_a_folder_belongs_to_one_process_and_leftovers_of_a_killed_one_are_swept(tmp_path):
    folder = tmp_path / "run"
    (folder / "trained").mkdir(parents=True)
    (folder / "trained" / ".model_0.pth.4711.tmp").write_text("half")
    save_text(folder / "trained" / "model_0.pth", "whole")
    with claim(folder):
        assert [file.name for file in (folder / "trained").iterdir()] == ["model_0.pth"]
    with claim(folder):  # free again
        pass


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "state.pt"
    save_tensors(file, torch.arange(3))
    with pytest.raises(AttributeError):
        save_tensors(file, lambda: None)  # can't be saved
    assert torch.equal(load_tensors(file), torch.arange(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("length", [0, 10, 400])
def test_a_truncated_file_is_named(tmp_path, length):
    file = tmp_path / "model_0.pth"
    save_tensors(file, {"weight": torch.zeros(1000)})
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model_0\.pth can't be read"):
        load_tensors(file)
