import contextlib
import os
import random
import resource
import warnings
import zipfile

import pytest
import torch
from torch import Tensor, nn

from storage.files import (
    SCHEMA,
    claim,
    clear,
    level,
    load_state,
    load_tensors,
    load_yaml,
    mismatch,
    read_rows,
    save_state,
    save_tensors,
    save_text,
    whole_numbers,
)

STATE = {"weight": torch.arange(1000.0), "count": torch.tensor(3)}


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


@contextlib.contextmanager
def full_disk(size: int):
    """Files can't grow beyond so many bytes, which the system says as it does of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("save,content", [(save_tensors, {"weight": torch.zeros(5000)}), (save_text, "x" * 20_000)])
def test_a_full_disk_is_a_sentence_and_the_old_file_stays(tmp_path, save, content):
    file = tmp_path / "state.pt"
    save_text(file, "before")
    with pytest.raises(OSError, match=r"can't write .*state\.pt: File too large; what was written before is kept"), \
            full_disk(4000):
        save(file, content)
    assert file.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_links_lead_nowhere(tmp_path, monkeypatch):
    victim, file = tmp_path / "victim", tmp_path / "run" / "state.pt"
    victim.write_text("precious")
    file.parent.mkdir()
    file.symlink_to(victim)
    save_text(file, "mine")
    assert (victim.read_text(), file.read_text(), file.is_symlink()) == ("precious", "mine", False)
    monkeypatch.setattr("storage.files.secrets.token_hex", lambda n: "foretold")
    (file.parent / ".state.pt.foretold.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        save_text(file, "mine")
    (file.parent / "linked").symlink_to(tmp_path, target_is_directory=True)
    clear(file.parent)
    assert victim.read_text() == "precious" and not list(file.parent.iterdir())


@pytest.mark.parametrize("length", [0, 10, 400])
def test_a_truncated_file_is_named(tmp_path, length):
    file = tmp_path / "model_0.pth"
    save_tensors(file, {"weight": torch.zeros(1000)})
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model_0\.pth can't be read"):
        load_tensors(file)


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """As torch.save leaves a file: so it is of those that are there already."""
    file, draw, refused = tmp_path / "model_0.pth", random.Random(0), 0
    torch.save(STATE, file)
    sound = file.read_bytes()
    for _ in range(300):
        flipped = bytearray(sound)
        flipped[draw.randrange(len(sound))] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        try:
            loaded = load_tensors(file)
        except ValueError:
            refused += 1
        else:  # between the records nothing counts
            assert all(torch.equal(loaded[key], value) for key, value in STATE.items())
    assert 200 < refused < 300  # torch itself loads nine in ten of these


def rezip(file, source):
    """What torch saved, compressed."""
    torch.save({"weight": torch.zeros(10_000_000)}, source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def quantised(scale):
    with warnings.catch_warnings():  # torch warns of such tensors, once a process
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), scale, 0, torch.qint8)


@pytest.mark.parametrize("write,word", [
    (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
    (lambda file: file.write_bytes(b"\x40\0\0\0\0\0\0\0" + b'{"weight": {}}'), "damaged"),
    (lambda file: file.write_text("hello"), "another kind"),
    (lambda file: torch.save(nn.Linear(2, 2), file), "Linear objects.*state_dict"),
    (lambda file: torch.save({"weight": torch.zeros(1).expand(10**13)}, file), "next to nothing"),
    (lambda file: torch.save({"a": [{"weight": torch.eye(3).to_sparse()}]}, file), "sparse"),
    (lambda file: torch.save({"weight": torch.zeros(3, device="meta")}, file), "meta"),
    (lambda file: torch.save({"weight": quantised(1.0)}, file), "quantised"),
    (lambda file: rezip(file, file.with_suffix(".plain")), "compressed"),
    (os.mkfifo, "not a regular file"),
    (lambda file: file.mkdir(), "a folder"),
])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_no_checkpoint_is_told_by_its_kind(tmp_path, write, word):
    file = tmp_path / "model_0.pth"
    write(file)
    with pytest.raises(ValueError, match=rf"model_0\.pth .*{word}") as refused:
        load_tensors(file)
    assert "\x1b" not in str(refused.value) and len(str(refused.value)) < 400


def test_a_state_of_a_newer_schema_or_another_structure_is_refused(tmp_path):
    file, structure = tmp_path / "state.pt", {"epoch": int, "model": {str: Tensor}, "note?": str}
    save_state(file, {"epoch": 3, "model": STATE})
    assert load_state(file, structure)["schema"] == SCHEMA
    save_tensors(file, {"epoch": 3, "model": STATE})  # from before there were schemas
    assert load_state(file, structure)["epoch"] == 3
    save_tensors(file, {"epoch": 3, "model": STATE, "schema": SCHEMA + 1})
    with pytest.raises(ValueError, match="update the program"):
        load_state(file, structure)
    save_state(file, {"epoch": "3", "model": STATE})
    with pytest.raises(ValueError, match=r"it\['epoch'\] is '3', not of type int"):
        load_state(file, structure)


@pytest.mark.parametrize("content,structure,said", [
    (5, int, None), (True, int, "True, not of type int"), (None, (int, type(None)), None), ("5", int, "'5'"),
    ([1, 2], [int], None), ([1, "x"], [int], r"it[1] is 'x'"), ({}, [int], "not a list"),
    ({"a": 1}, {str: int}, None), ({"a": "b"}, {str: int}, "it['a']"), ({3: 1}, {str: int}, "strange entry 3"),
    ({"a": 1}, {"a": int, "b?": int}, None), ({"a": 1, "b": None}, {"a": int, "b?": int}, "it['b']"),
    ({"b": 1}, {"a": int, "b?": int}, "no entry 'a'"), ({"a": 1, "c": 1}, {"a": int}, "strange entry 'c'"),
    ([], {"a": int}, "not a mapping"),
])
def test_a_structure_is_checked_and_what_differs_is_named(content, structure, said):
    found = mismatch(content, structure)
    assert found is None if said is None else said in found


@pytest.mark.parametrize("text,word", [
    (b"- 1", "option: value"), (b"5: 6", "option: value"), (b"", "option: value"), (b"a: [", "can't be read"),
    (b"a: 2026-13-45", "can't be read"), (b"a: \xff", "UTF-8"), (b"a: " + b"[" * 3000, "nested too deeply"),
])
def test_a_faulty_yaml_file_is_named(tmp_path, text, word):
    file = tmp_path / "config.yaml"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=rf"config\.yaml .*{word}"):
        load_yaml(file)
    file.write_bytes(b"\xef\xbb\xbfa: 1\r\n")  # as editors of Windows leave it
    assert load_yaml(file) == {"a": 1}


def test_tables_need_their_columns_and_a_cut_line_is_left_out(tmp_path):
    file = tmp_path / "metrics.csv"
    assert read_rows(file, ["agent"]) == []
    file.write_text("agent,loss\n0,1.5\n1\n2,3.5,4\n3,2.5\n")
    assert read_rows(file, ["agent"]) == [{"agent": "0", "loss": "1.5"}, {"agent": "3", "loss": "2.5"}]
    with pytest.raises(ValueError, match=r"metrics\.csv has no column accuracy"):
        read_rows(file, ["agent", "accuracy"])
    file.write_text(f"agent\n{'x' * 200_000}\n")
    with pytest.raises(ValueError, match=r"metrics\.csv can't be read"):
        read_rows(file)


@pytest.mark.parametrize("text", ["", ".", "..", "a/b", "../a", "a\0"])
def test_a_level_of_a_path_leads_nowhere_else(text):
    assert level("lr=0.1") == "lr=0.1" and level(5) == "5"
    with pytest.raises(ValueError, match="level of a path"):
        level(text)


def test_a_moved_file_is_on_the_disk_with_its_folder(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr("storage.files.os.fsync",
                        lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    save_text(tmp_path / "state.pt", "x")
    assert len(synced) == 2 and synced[0].endswith(".tmp") and synced[1] == str(tmp_path)


@pytest.mark.parametrize("number", [0, 1, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**40, -1, -(2**40)])
def test_numbers_are_found_in_a_state_of_any_size_without_loading_it(tmp_path, number):
    file = tmp_path / "state.pt"
    save_state(file, {"iteration": number, "said": "iteration", "states": [STATE] * 3, "metrics_bytes": number,
                      "text": "12", "yes": True, "more": [7], "real": 1.0})
    assert whole_numbers(file, ("iteration", "metrics_bytes", "schema")) == {
        "iteration": number, "metrics_bytes": number, "schema": SCHEMA}
    assert whole_numbers(file, ("text", "yes", "more", "real", "none")) == {}


def test_numbers_are_not_found_in_what_is_no_state(tmp_path):
    file = tmp_path / "state.pt"
    save_state(file, {"iteration": 3})
    whole = file.read_bytes()
    for content in (b"", b"text", whole[:-1], whole[:len(whole) // 2], whole.replace(b"iteration", b"iterasion")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"state\.pt can't be read"):
            whole_numbers(file, ["iteration"])
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/other.pkl", b"")
    with pytest.raises(ValueError, match=r"state\.pt can't be read"):
        whole_numbers(file, ["iteration"])
