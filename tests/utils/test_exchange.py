"""Agents that meet in a folder only, here as objects of one process."""

import threading
import time

import numpy as np
import pytest
import torch

from utils.exchange import SharedFolder, forget, run_name
from utils.files import save_tensors
from utils.topology import make_topology

RING = make_topology("ring", 3).pi
LIKE = {"w": torch.zeros(4, 5), "count": torch.tensor(0)}


def model(i, iteration=0):
    return {"w": torch.full((4, 5), float(10 * iteration + i)), "count": torch.tensor(iteration)}


def joined(agent, folder, timeout=0.0, staleness=0, run="run", fresh=False, overwrite=False):
    network = SharedFolder(agent, folder, timeout, staleness)
    network.place = network.meet(run, [j for j in range(3) if j != agent], 99, LIKE, "fp32", fresh, overwrite)
    return network


def share(network, iteration, mixing=RING, wire="fp32", state=None):
    mine = model(network.agent, iteration) if state is None else state
    return network.share(iteration, {network.agent: mine}, mixing, wire, LIKE)


def values(models):
    return {j: int(state["w"][0, 0]) for j, state in models.items()}


def file_of(folder, agent, iteration, run="run"):
    return folder / run_name(run) / f"agent_{agent}" / f"iteration_{iteration:06d}.pt"


def test_agents_wait_for_each_other(tmp_path):
    networks, found = [joined(i, tmp_path, timeout=30) for i in range(3)], {}

    def live(network):
        for iteration in (1, 2, 3):
            time.sleep(0.05 * network.agent)
            assert network.turn(iteration, lambda t: RING) == iteration
            found[network.agent, iteration] = values(share(network, iteration))

    threads = [threading.Thread(target=live, args=[network]) for network in networks]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 9
    for (_, iteration), models in found.items():
        assert models == {i: 10 * iteration + i for i in range(3)}
    size = 4 * 5 * 4 + 8
    assert all(network.sent == network.received == {network.agent: 3 * 2 * size} for network in networks)
    assert all(not network.old for network in networks)


def test_who_does_not_come_is_left_out_and_not_waited_for_again(tmp_path, capsys):
    one, two = joined(0, tmp_path, timeout=0.4), joined(1, tmp_path)
    for iteration in (1, 2, 3):
        share(two, iteration)  # agent 2 never comes
        began = time.monotonic()
        assert values(share(one, iteration)) == {0: 10 * iteration, 1: 10 * iteration + 1}
        assert (0.4 <= time.monotonic() - began < 1.2) == (iteration == 1)
    assert capsys.readouterr().out.count("no model of agent 2 within --timeout 0.4 s: merging without it") == 1
    three = joined(2, tmp_path)
    share(three, 3)  # too late; but now it is waited for again
    began = time.monotonic()
    share(two, 4)
    share(one, 4)
    assert time.monotonic() - began >= 0.4


def test_stale_models_stand_in_while_they_are_young_enough(tmp_path, capsys):
    one, two = joined(0, tmp_path, staleness=2), joined(1, tmp_path)
    share(two, 3)
    ages = {}
    for iteration in (3, 4, 5, 6):
        ages[iteration] = values(share(one, iteration)).get(1), dict(one.old)
    assert ages == {3: (31, {}), 4: (31, {1: 3}), 5: (31, {1: 3}), 6: (None, {})}
    assert capsys.readouterr().out.count("its model of iteration 3 stands in") == 1


def test_a_model_that_its_owner_has_replaced_is_taken_as_it_is_now(tmp_path):
    one, two = joined(0, tmp_path), joined(1, tmp_path)
    for iteration in range(1, 8):
        share(two, iteration)
    assert not file_of(tmp_path, 1, 5).exists() and file_of(tmp_path, 1, 6).exists()
    assert values(share(one, 6))[1] == 61 and not one.old
    assert values(share(one, 2))[1] == 61 and one.old == {1: 6}


def test_who_was_away_goes_on_where_the_others_are(tmp_path):
    one, two, three = (joined(i, tmp_path) for i in range(3))
    for network in (one, two, three):
        share(network, 1)
    for iteration in (2, 3, 4):
        share(one, iteration)
    # Agent 0 is in iteration 4: it has merged 2 and 3 without the others.
    assert two.turn(2, lambda t: RING) == 4
    # In iterations in which nobody takes its model it isn't missed.
    alone = np.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    assert three.turn(2, lambda t: RING if t < 3 else alone) == 3
    # What it has published was there for the others, whether it was done with that iteration or not.
    share(two, 3)
    assert two.turn(2, lambda t: RING) == 2 and two.turn(3, lambda t: RING) == 3


@pytest.mark.parametrize("spoil", [
    lambda file, content: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    lambda file, content: file.write_bytes(b"not of us"),
    lambda file, content: file.write_bytes(b""),
    lambda file, content: save_tensors(file, torch.zeros(3)),
    lambda file, content: save_tensors(file, {"model": torch.zeros(3)}),
    lambda file, content: save_tensors(file, content | {"run": "another"}),
    lambda file, content: save_tensors(file, content | {"agent": 2}),
    lambda file, content: save_tensors(file, content | {"iteration": 7}),
    lambda file, content: save_tensors(file, content | {"model": content["model"].roll(1)}),
    lambda file, content: save_tensors(file, content | {"model": "text"}),
    lambda file, content: (file.unlink(), file.mkdir())])
def test_what_is_broken_or_foreign_is_ignored_with_a_warning(tmp_path, capsys, spoil):
    one, two = joined(0, tmp_path, timeout=0.1), joined(1, tmp_path)
    share(two, 1)
    file = file_of(tmp_path, 1, 1)
    spoil(file, torch.load(file))
    assert values(share(one, 1)) == {0: 10}
    out = capsys.readouterr().out
    assert out.count(f"agent 0 ignores {file}: ") == 1


def test_a_model_of_another_shape_or_not_finite_is_ignored(tmp_path, capsys):
    one, two, three = joined(0, tmp_path), joined(1, tmp_path), joined(2, tmp_path)
    two.share(1, {1: {"w": torch.zeros(2)}}, RING, "fp32", {"w": torch.zeros(2)})
    share(three, 1, state=model(2, 1) | {"w": torch.full((4, 5), torch.nan)})
    assert values(share(one, 1)) == {0: 10}
    out = capsys.readouterr().out
    assert "8 bytes came" in out and "NaN" in out


def test_other_files_are_no_matter(tmp_path):
    one, two = joined(0, tmp_path), joined(1, tmp_path)
    for name in ("iteration_x.pt", "notes.txt", ".iteration_000009.pt.77.tmp", "iteration_000001.pt.bak"):
        (tmp_path / run_name("run") / "agent_1" / name).write_text("")
    share(two, 1)
    assert values(share(one, 1)) == {0: 10, 1: 11}


def test_runs_do_not_meet_and_agents_are_once(tmp_path):
    one, other = joined(0, tmp_path, run="a"), joined(1, tmp_path, run="b")
    share(other, 1)
    assert values(share(one, 1)) == {0: 10}
    with pytest.raises(ValueError, match="another process is writing to"):
        joined(0, tmp_path, run="a")
    again = joined(0, tmp_path, run="c")
    share(again, 1)
    again.place.__exit__(None, None, None)
    assert joined(0, tmp_path, run="c")._newest(0) == 1
    forget(tmp_path, "a")
    assert not (tmp_path / run_name("a")).exists() and file_of(tmp_path, 1, 1, "b").exists()


def test_names_alone_are_not_believed(tmp_path, capsys):
    one, two = joined(0, tmp_path), joined(1, tmp_path)
    home = file_of(tmp_path, 1, 1).parent
    (home / "iteration_005000.pt").write_bytes(b"")  # beyond the run's end
    (home / "iteration_000009.pt").write_bytes(b"")
    share(two, 1)
    assert one.turn(1, lambda t: RING) == 1 and values(share(one, 1)) == {0: 10, 1: 11}
    assert "iteration_000009.pt: " in capsys.readouterr().out
    one.timeout = 0.3
    for iteration, waits in ((2, True), (3, False)):  # neither of them comes
        began = time.monotonic()
        share(one, iteration)
        assert (time.monotonic() - began >= 0.3) == waits
    share(two, 2)  # a sign of life, whatever else lies there
    began = time.monotonic()
    share(one, 4)
    assert time.monotonic() - began >= 0.3


def test_on_one_way_edges_a_sender_may_be_far_ahead(tmp_path):
    """A model stays until its reader has gone on, even if its owner has nobody to wait for."""
    one_way = np.array([[0.5, 0.5, 0], [0, 0.5, 0.5], [0.5, 0, 0.5]])  # 0 takes of 1, 1 of 2, 2 of 0
    ahead, behind = joined(1, tmp_path, staleness=9), joined(0, tmp_path)
    ahead.staleness = 0
    for iteration in (1, 2, 3):
        share(ahead, iteration, mixing=one_way)
    for iteration in (1, 2, 3):
        assert values(share(behind, iteration, mixing=one_way))[1] == 10 * iteration + 1 and not behind.old
    for iteration in (4, 5):
        share(ahead, iteration, mixing=one_way)
    assert sorted(ahead._published(1)) == [3, 4, 5]  # of what has been read, only what is recent
    for iteration in range(6, 12):
        share(ahead, iteration, mixing=one_way)
    assert sorted(ahead._published(1)) == [8, 9, 10, 11]  # and for a dead reader not all


def test_who_starts_afresh_is_told_of_others_that_have_not(tmp_path):
    first, second = joined(0, tmp_path), joined(1, tmp_path)
    share(first, 3), share(second, 3)
    first.place.__exit__(None, None, None)
    with pytest.raises(ValueError, match="holds models of agent 1"):
        joined(0, tmp_path, overwrite=True)
    assert file_of(tmp_path, 0, 3).exists()


def test_who_begins_has_published_nothing(tmp_path):
    first = joined(0, tmp_path)
    share(first, 8)
    first.place.__exit__(None, None, None)
    assert joined(0, tmp_path, fresh=True)._newest(0) == 0


@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_everybody_merges_the_same(tmp_path, wire):
    """Its own model too has been through the wire."""
    torch.manual_seed(0)
    states = [{"w": torch.randn(4, 5), "count": torch.tensor(0)} for _ in range(3)]
    networks = [joined(i, tmp_path, timeout=5) for i in range(3)]
    found = {}

    def live(i):
        found[i] = share(networks[i], 1, wire=wire, state=states[i])

    threads = [threading.Thread(target=live, args=[i]) for i in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for j in range(3):
        assert all(torch.equal(found[i][j]["w"], found[j][j]["w"]) for i in range(3))
        assert not torch.equal(found[j][j]["w"], states[j]["w"])
