import pytest

from experiments.groups import main


def test_the_command_line_prints_and_draws_groups_sizes_and_members(capsys, tmp_path):
    main(["resnet20", "--width_multiplier", "1"])
    printed = capsys.readouterr().out
    assert "layer1.0.conv1: 16 units\n    layer1.0.conv1.weight dim 0\n" in printed
    assert "12 groups, 448 units\nfixed: conv1.weight dim 1 (" in printed
    main(["resnet20", "--width_multiplier", "1", "--plot", str(tmp_path / "groups.png")])
    assert (tmp_path / "groups.png").read_bytes().startswith(b"\x89PNG") and "drawn: " in capsys.readouterr().out
    assert main(["nonesuch"]) == 2 and "nonesuch" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--image_size="], ["--image_size=100000"], ["--plot=."], ["--plot=a.json"],
                                   ["--width_multiplier=1000000"], ["--num_classes=99999999999"], ["--nonesuch"]])
def test_what_makes_no_sense_is_a_line(flags, capsys):
    try:
        code = main(["resnet20", *flags])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
