"""main.py --average_last: the merges in a row begin with the mean of each agent's last models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from agents.merging import MergingAgents
from agents.tail import TailAverage
from merging.averaging import State, weighted_average
from merging.permutation import derive_spec, permute, random_permutations
from models import build_model
from network.topology import make_topology
from tests.helpers import TINY, equal_runs, folder_of, process, script
from tests.scripts.test_main_processes import same_but_for_what_nobody_knows

RUN = [*TINY, "--num_models=4", "--exp=2", "--randominit", "--diffinit", "--train_samples=80", "--training",
       "--epochs=1", "--batch_size=20", "--test_samples=50", "--match_samples=50", "--merg_itr=6", "--last_merges=2",
       "--average_last=0.4"]  # the first merge in a row is the fifth, so of the fourth and the fifth


def run(home: Path, *flags: str) -> Path:
    home.mkdir(exist_ok=True)
    return folder_of(script("main", *RUN, *flags, cwd=home), home)


def after_merges(monkeypatch, then: Callable[[int, dict[int, State]], None]) -> None:
    """`then` hears of each merge of the agents here, by its iteration, and of what they are after it."""
    merge = MergingAgents.merge

    def told(self: MergingAgents, iteration: int) -> dict:
        figures = merge(self, iteration)
        then(iteration, dict(self.states))
        return figures

    monkeypatch.setattr(MergingAgents, "merge", told)


def close(one: State, other: State) -> None:
    for name, t in one.items():
        torch.testing.assert_close(t, other[name], rtol=1e-5, atol=1e-6)


def test_the_last_merges_begin_with_the_mean_of_the_models_before(tmp_path, monkeypatch):
    states: dict[int, dict[int, State]] = {}
    after_merges(monkeypatch, states.__setitem__)
    folder = run(tmp_path, "--opt=WA", "--bn_reset=none")
    assert "train_itr=4,average_last=0.4" in folder.parent.name and sorted(states) == [1, 2, 3, 4, 5, 6]
    means = [weighted_average([states[5][i], states[4][i]], [0.5, 0.5]) for i in range(4)]
    pi = make_topology("ring", 4).weights(0)
    for i in range(4):
        merged = weighted_average(means, list(pi[i]), own=i)
        close(states[6][i], merged)
        plain = weighted_average([states[5][j] for j in range(4)], list(pi[i]), own=i)
        assert max(float((plain[name] - t).abs().max()) for name, t in merged.items()) > 1e-3


@pytest.mark.parametrize("flags", [
    ["--opt=COMMON", "--correction=LED", "--agent_failure=0.2"],
    pytest.param(["--opt=DIMAT", "--exp=1"], marks=pytest.mark.long)], ids=" ".join)
def test_it_resumes_to_an_equal_run(flags, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", *flags)
    stops = [4, 5, 6]

    def stop(iteration: int, _: dict) -> None:
        if stops and iteration == stops[0]:
            raise RuntimeError(f"stopped in {stops.pop(0)}")

    after_merges(monkeypatch, stop)
    (home := tmp_path / "parts").mkdir()
    for _ in (4, 5, 6):
        with pytest.raises(RuntimeError, match="stopped"):
            script("main", *RUN, *flags, "--resume", cwd=home)
    equal_runs(whole, run(home, *flags, "--resume"))


@pytest.mark.long
def test_processes_of_all_kinds_give_one_processs_figures(tmp_path):
    flags = ["--opt=COMMON", "--match_data=local"]
    one = run(tmp_path / "one", *flags)
    for kind in ("--workers=2", "--processes=4"):
        (home := tmp_path / kind).mkdir()
        running = process("main", *RUN, *flags, kind, cwd=home)
        printed, _ = running.communicate(timeout=120)
        assert running.returncode == 0, printed
        (equal_runs if kind == "--workers=2" else same_but_for_what_nobody_knows)(one, folder_of(printed, home))


def resnet(seed: int):
    return build_model("resnet20", 10, in_channels=1, image_size=8, width_multiplier=1, seed=seed)


def test_the_mean_is_in_the_agents_own_order_of_units():
    spec = derive_spec(resnet(0), torch.rand(4, 1, 8, 8))
    tail = TailAverage(2, 3, spec)
    one, two, three = (resnet(seed).state_dict() for seed in range(3))
    order = random_permutations(spec, torch.Generator().manual_seed(1))
    tail.add(1, {0: one})
    assert tail.take(1) == {}
    tail.add(2, {0: two})
    tail.reorder(0, order)
    tail.reorder(1, order)  # nothing is known of it yet
    tail.add(3, {0: three})
    tail.add(4, {0: one})
    assert tail.take(3) == {}
    close(tail.take(4)[0], weighted_average([three, permute(spec, order, two)], [0.5, 0.5]))
    assert tail.take(5) == {} and tail.saved(0) == {"tail": {}, "tail_count": 0}


def test_where_a_merge_moves_an_agents_units_its_mean_moves_with_them(tmp_path, monkeypatch):
    """Fully connected agents of DIMAT all take one agent's order."""
    moved, reorder = [], TailAverage.reorder

    def told(self: TailAverage, i: int, permutations: dict) -> None:
        moved.append((i, any(not torch.equal(p, torch.arange(len(p))) for p in permutations.values())))
        reorder(self, i, permutations)

    monkeypatch.setattr(TailAverage, "reorder", told)
    run(tmp_path, "--opt=DIMAT", "--exp=1", "--merg_itr=3", "--average_last=1")
    assert moved[:3] == [(1, True), (2, True), (3, True)] and {i for i, _ in moved} == {1, 2, 3}


def test_an_average_of_another_model_is_refused():
    tail = TailAverage(1, 2, None)
    other = build_model("resnet20", 7, in_channels=1, image_size=8, width_multiplier=1, seed=0).state_dict()
    with pytest.raises(ValueError, match=r"agent 3's tail average in the run's state.pt: .* has shape"):
        tail.take_up(3, {"tail": other, "tail_count": 1}, resnet(0).state_dict())


@pytest.mark.parametrize("flags", [["--last_merges=1"], ["--average_last=1.5"]], ids=" ".join)
def test_an_average_that_no_merge_follows_is_refused(flags, tmp_path):
    result = script("main", *RUN, *flags, cwd=tmp_path, check=False)
    assert result.returncode and "average_last" in result.stderr and not (tmp_path / "results").exists()


def test_the_share_is_of_the_merges_up_to_the_first_in_a_row():
    for share, last, first in ((0.2, 45, 37), (0.2, 5, 5), (0.01, 10, 10), (1.0, 4, 1)):
        agents = object.__new__(MergingAgents)
        agents.settings = type("Settings", (), {"average_last": share, "train_itr": last - 1, "method": None})
        assert (agents.tail.first, agents.tail.last) == (first, last)
