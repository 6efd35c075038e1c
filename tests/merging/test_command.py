"""`python -m merging A B ...`: checkpoints that become one."""

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from merging.__main__ import main
from merging.files import load_tensors, state_in
from merging.images import folder
from merging.named import build
from merging.permutation import derive_spec, permute, random_permutations
from tests.helpers import equal

NETWORK = """
from beside import UNITS
from torch import nn

def make(classes=2, norm=True):
    return nn.Sequential(nn.Conv2d(3, UNITS, 3, padding=1), nn.BatchNorm2d(UNITS) if norm else nn.Identity(), nn.ReLU(),
                         nn.Conv2d(UNITS, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, classes))

def number():
    return 1
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A network in a file, images of two classes, and the same trained model in two orders of units."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "beside.py").write_text("UNITS = 6\n")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in range(20):
            pixels = rng.integers(100 * label, 100 * label + 156, (10, 12, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{k}.png")
    torch.manual_seed(0)
    model = build("net.py:make")
    images = folder(tmp_path / "images", 8, (0.5,) * 3, (0.5,) * 3)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for x, y in [*images] * 20:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    state = model.eval().state_dict()
    spec = derive_spec(model, torch.zeros(1, 3, 8, 8))
    torch.save(state, "a.pth")
    moved = permute(spec, random_permutations(spec, torch.Generator().manual_seed(1)), state)
    safetensors.torch.save_file({f"module.{key}": value for key, value in moved.items()}, "b.safetensors")
    return tmp_path


COMMAND = ["--model=net.py:make", "--image_size=8", "--images=images", "--mean=0.5,0.5,0.5", "--std=0.5,0.5,0.5"]


@pytest.mark.parametrize("out", ["merged.safetensors", "merged.pth"])
@pytest.mark.parametrize("method", ["DIMAT", "WM", "C2M3", "WA"])
def test_a_model_and_its_permuted_copy_become_the_model(home, capsys, method, out):
    assert main(["a.pth", "b.safetensors", *COMMAND, f"--method={method}", f"--out={out}"]) == 0
    said = capsys.readouterr().out
    own, read = (state_in(load_tensors(home / file), file) for file in ("a.pth", out))
    weights = [key for key in own if "running" not in key and "tracked" not in key]
    apart = max(float((own[key] - read[key]).abs().max()) for key in weights)
    assert (apart < 1e-6) == (method != "WA")
    if method != "WA":
        assert "b.safetensors to a.pth: 2 groups, 10 units" in said
        accuracy = dict(reversed(line.split(" %  ")) for line in said.splitlines() if " %  " in line)
        assert accuracy.keys() == {"a.pth", "b.safetensors", "merged"} and float(accuracy["merged"]) > 95
    assert said.splitlines()[-1] == f"written: {out}"


def test_weights_and_arguments_are_used(home):
    for k, file in enumerate(("c.pth", "d.pth")):
        torch.manual_seed(k)
        torch.save({"state_dict": build("net.py:make", norm=False, classes=3).state_dict()}, file)
    command = ["--model=net.py:make", "--image_size=8", "--model_args", "classes=3", "norm=False"]
    assert main(["c.pth", "d.pth", *command, "--method=WA", "--weights=0.25,0.75", "--out=m.pth"]) == 0
    c, d, merged = (state_in(load_tensors(home / file), file) for file in ("c.pth", "d.pth", "m.pth"))
    equal({key: 0.25 * c[key].double() + 0.75 * d[key].double() for key in c} | merged, merged)
    assert all(torch.allclose(0.25 * c[key] + 0.75 * d[key], merged[key]) for key in c)


@pytest.mark.parametrize(("arguments", "message"), [
    (["a.pth", "b.safetensors"], "--model is missing"),
    (["a.pth", *COMMAND], "--out is missing"),
    (["a.pth", *COMMAND, "--out=a.pth"], "--out a.pth is there already"),
    (["a.pth", *COMMAND, "--out=nowhere/m.pth"], "there is no folder nowhere"),
    (["a.pth", "b.safetensors", *COMMAND, "--out=m.pth", "--weights=0.5"], "--weights 0.5: give 2 numbers"),
    (["a.pth", "b.safetensors", *COMMAND, "--out=m.pth", "--weights=0.5,half"], "--weights 0.5,half"),
    (["a.pth", "c.pth", *COMMAND, "--out=m.pth"], "c.pth does not exist"),
    (["a.pth", "net.py", *COMMAND, "--out=m.pth"], "net.py can't be read as a checkpoint"),
    (["a.pth", *COMMAND, "--out=m.pth", "--model_args", "classes=3"], "the model's is (3, 144)"),
    (["a.pth", *COMMAND, "--out=m.pth", "--model_args", "classes"], "--model_args classes: give KEY=VALUE"),
    (["a.pth", *COMMAND, "--out=m.pth", "--model_args", "size=3"], "calling it with size=3 fails"),
    (["a.pth", *COMMAND, "--out=m.pth", "--images=net.py"], "net.py is not a folder of images"),
    (["a.pth", *COMMAND, "--out=m.pth", "--std=1,1"], "--mean and --std are 3 numbers"),
    (["a.pth", "--model=net.py:make", "--image_size=8", "--out=m.pth"], "--images is missing: --method DIMAT"),
    (["a.pth", "--model=net.py:make", "--out=m.pth", "--method=WM"], "--images is missing: the model has BatchNorm"),
    (["a.pth", *COMMAND, "--out=m.pth", "--model=net.py:number"], "returns a int, not an nn.Module"),
    (["a.pth", *COMMAND, "--out=m.pth", "--model=nets.py:number"], "nets.py does not exist"),
    (["timm:no_such_model"], "timm:no_such_model: "),
])
def test_what_is_wrong_is_said_in_a_line_and_nothing_is_written(home, capsys, arguments, message):
    before = {file: file.read_bytes() for file in home.glob("*.*")}
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1, error
    assert before == {file: file.read_bytes() for file in home.glob("*.*")}


def test_a_file_that_is_no_image_is_named(home, capsys):
    (home / "images" / "dark" / "0.png").write_text("no image")
    assert main(["a.pth", "b.safetensors", *COMMAND, "--out=m.pth"]) == 2
    assert "0.png can't be read as an image" in capsys.readouterr().err


def test_images_without_classes_are_taken_as_they_are(home):
    flat = folder(home / "images" / "dark", 8, (0.5,), (0.5,), samples=5)
    (x, y), = flat
    assert x.shape == (5, 1, 8, 8) and not flat.has_classes and y.tolist() == [-1] * 5
    assert [file.name for file in flat.files] == sorted(file.name for file in flat.files)
    assert -1 <= float(x.min()) < float(x.max()) <= 1
