"""main.py --average_last: the merges that end a run are of the means of each agent's last models."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import agents.merging
from agents.merging import MergingAgents
from agents.tail import TailAverage
from merging.averaging import State, weighted_average
from merging.batch_norm import reestimate
from merging.permutation import derive_spec, permute, random_permutations
from models import build_model
from network.topology import make_topology
from tests.helpers import TINY, equal_runs, folder_of, process, rows_of, script
from tests.scripts.test_main_processes import same_but_for_what_nobody_knows

RUN = [*TINY, "--num_models=4", "--exp=2", "--randominit", "--diffinit", "--train_samples=80", "--training",
       "--epochs=1", "--batch_size=20", "--test_samples=50", "--match_samples=50", "--merg_itr=6", "--last_merges=2",
       "--average_last=0.6"]  # once the fifth is done: of the third to the fifth


def run(home: Path, *flags: str) -> Path:
    home.mkdir(exist_ok=True)
    return folder_of(script("main", *RUN, *flags, cwd=home), home)


def after_merges(monkeypatch, then: Callable[[int, MergingAgents], None]) -> None:
    """`then` hears of each merge of the agents here, by its iteration."""
    merge = MergingAgents.merge

    def told(self: MergingAgents, iteration: int) -> dict:
        figures = merge(self, iteration)
        then(iteration, self)
        return figures

    monkeypatch.setattr(MergingAgents, "merge", told)


def close(one: State, other: State) -> None:
    for name, t in one.items():
        torch.testing.assert_close(t, other[name], rtol=1e-5, atol=1e-6)


def test_the_last_merges_begin_with_the_mean_of_the_models_before(tmp_path, monkeypatch):
    states: dict[int, dict[int, State]] = {}
    after_merges(monkeypatch, lambda k, here: states.__setitem__(k, dict(here.states)))
    folder = run(tmp_path, "--opt=WA", "--bn_reset=none")
    assert "train_itr=4,average_last=0.6" in folder.parent.name and sorted(states) == [1, 2, 3, 4, 5, 6]
    means = [weighted_average([states[k][i] for k in (5, 4, 3)], [1 / 3] * 3) for i in range(4)]
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

    def stop(iteration: int, _: MergingAgents) -> None:
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
    tail.add(1, 0, one)
    assert tail.take(1, [0]) == {}
    tail.add(2, 0, two)
    tail.reorder(0, order)
    tail.reorder(1, order)  # nothing is known of it yet
    tail.add(3, 0, three)
    tail.add(4, 0, one)
    assert tail.take(3, [0]) == {} == tail.take(4, [1])
    assert tail.saved(0)["tail_count"] == 2
    close(tail.take(4, [0, 1])[0], weighted_average([three, permute(spec, order, two)], [0.5, 0.5]))
    assert tail.take(5, [0, 1]) == {} == tail.saved(0)["tail"]


def test_where_a_merge_moves_an_agents_units_its_mean_moves_with_them(tmp_path, monkeypatch):
    """Fully connected agents of DIMAT all take one agent's order. Followed by hand, from what each merge found."""
    merges, means = [], []
    merge, take = agents.merging.merge, TailAverage.take
    monkeypatch.setattr(agents.merging, "merge", lambda *a, **k: merges.append(merge(*a, **k)) or merges[-1])
    monkeypatch.setattr(TailAverage, "take", lambda self, *a: means.append((self.spec, take(self, *a))) or means[-1][1])
    run(tmp_path, "--opt=DIMAT", "--exp=1", "--merg_itr=4", "--average_last=1", "--bn_reset=none")
    assert [sorted(taken) for _, taken in means] == [[], [], [], [0, 1, 2, 3]]
    spec, taken = means[-1]
    for i in range(4):
        mean, moved = merges[0].states[i], 0
        for k, merged in enumerate(merges[1:3], start=2):
            if order := merged.permutations.get((merged.basis[i], i)):
                mean, moved = permute(spec, order, mean), moved + 1
            mean = weighted_average([merged.states[i], mean], [1 / k, 1 - 1 / k])
        close(taken[i], mean)
        assert moved == (2 if i else 0)


def test_agents_that_align_themselves_take_their_mean_along():
    spec = derive_spec(resnet(0), torch.rand(4, 1, 8, 8))
    order = random_permutations(spec, torch.Generator().manual_seed(1))
    some = object.__new__(MergingAgents)
    some.correction, some.tail = None, TailAverage(1, 2, spec)
    some.tail.add(1, 0, resnet(0).state_dict())
    some.reordered(0, order)
    close(some.tail.take(3, [0])[0], permute(spec, order, resnet(0).state_dict()))


def test_who_does_not_merge_any_more_has_statistics_of_its_mean(tmp_path, monkeypatch):
    """And is evaluated with it. Two and two merge, then all; then nobody is reached, and one that is down stays."""
    pairs, all_alike = np.kron(np.eye(2), np.full((2, 2), 0.5)), np.full((4, 4), 0.25)
    monkeypatch.setattr(MergingAgents, "weights", lambda self, k: {5: all_alike, 6: np.eye(4)}.get(k, pairs))
    monkeypatch.setattr(MergingAgents, "up", lambda self, k: [i for i in self.states if (k, i) != (6, 3)])
    told: dict[int, tuple[dict[int, State], MergingAgents]] = {}
    after_merges(monkeypatch, lambda k, here: told.__setitem__(k, (dict(here.states), here)))
    folder = run(tmp_path, "--opt=WA", "--exp=1", "--correction=LED")
    (shared, _), (last, here) = told[5], told[6]
    first = [state["conv1.weight"] for state in last.values()]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    for i in range(3):
        assert not torch.equal(first[i], shared[i]["conv1.weight"])
        close(last[i], reestimate(here.trainer.model, last[i], here.matching_batches(i, 6)))
    close(last[3], shared[3])
    losses = [row["test_loss"] for row in rows_of(folder) if row["iteration"] == "6"]
    assert len(set(losses)) == 4  # two with one mean each have statistics of their own images


def test_an_average_of_another_model_is_refused():
    tail = TailAverage(1, 2, None)
    other = build_model("resnet20", 7, in_channels=1, image_size=8, width_multiplier=1, seed=0).state_dict()
    with pytest.raises(ValueError, match=r"agent 3's tail average in the run's state.pt: .* has shape"):
        tail.take_up(3, {"tail": other, "tail_count": 1}, resnet(0).state_dict())
    with pytest.raises(ValueError, match=r"agent 3's tail average .* is of no model"):
        tail.take_up(3, {"tail": resnet(0).state_dict()}, resnet(0).state_dict())


@pytest.mark.parametrize("flags", [["--last_merges=1"], ["--average_last=1.5"], ["--opt=NONE"]], ids=" ".join)
def test_an_average_that_no_merge_follows_is_refused(flags, tmp_path):
    result = script("main", *RUN, *flags, cwd=tmp_path, check=False)
    assert result.returncode and "average_last" in result.stderr and not (tmp_path / "results").exists()


def test_a_mean_of_one_model_is_said_to_be_nothing(tmp_path):
    printed = script("main", *RUN, "--opt=WA", "--merg_itr=3", "--average_last=0.2", cwd=tmp_path).stdout
    assert "note: --average_last 0.2 of so few merges is one" in printed


def test_the_share_is_of_the_merges_up_to_the_first_in_a_row():
    for share, last, first in ((0.2, 45, 37), (0.2, 5, 5), (0.01, 10, 10), (1.0, 4, 1)):
        some = object.__new__(MergingAgents)
        some.settings = type("Settings", (), {"average_last": share, "train_itr": last - 1, "method": None})
        assert (some.tail.first, some.tail.last) == (first, last)
