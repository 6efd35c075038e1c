"""Agents that meet in a folder only, here as objects of one process."""

import hashlib
import json
import os
import threading
import time

import numpy as np
import pytest
import torch

from agents.correction import WALK
from agents.merging import MergingAgents
from models import build_model
from network.folder import HEADER, SharedFolder, forget, read_key, run_name
from network.topology import make_topology
from network.wire import pack, unpack
from tests.helpers import TINY, rows_of, script

RING = make_topology("ring", 3).pi
LIKE = {"w": torch.zeros(4, 5), "count": torch.tensor(0)}


def model(i, iteration=0):
    return {"w": torch.full((4, 5), float(10 * iteration + i)), "count": torch.tensor(iteration)}


def joined(agent, folder, timeout=0.0, staleness=0, run="run", fresh=False, overwrite=False, key=None, agents=3,
           like=LIKE, wire="fp32", last=99):
    network = SharedFolder(agent, folder, timeout, staleness, key)
    network.place = network.meet(run, [j for j in range(agents) if j != agent], last, like, wire, fresh, overwrite)
    return network


def share(network, iteration, mixing=RING, wire="fp32", state=None):
    mine = model(network.agent, iteration) if state is None else state
    return network.share(iteration, {network.agent: mine}, mixing, wire, LIKE)


def values(models):
    return {j: int(state["w"][0, 0]) for j, state in models.items()}


def file_of(folder, agent, iteration, run="run"):
    return folder / run_name(run) / f"agent_{agent}" / f"iteration_{iteration:06d}.model"


def test_agents_wait_for_each_other(tmp_path):
    networks, found = [joined(i, tmp_path, timeout=30) for i in range(3)], {}

    def live(network):
        for iteration in (1, 2, 3):
            time.sleep(0.05 * network.agent)
            assert network.catch_up(iteration, lambda t: RING) == iteration
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
    assert two.catch_up(2, lambda t: RING) == 4
    # In iterations in which nobody takes its model it isn't missed.
    alone = np.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    assert three.catch_up(2, lambda t: RING if t < 3 else alone) == 3
    # What it has published was there for the others, whether it was done with that iteration or not.
    share(two, 3)
    assert two.catch_up(2, lambda t: RING) == 2 and two.catch_up(3, lambda t: RING) == 3


def test_models_of_another_shape_are_ignored(tmp_path, capsys):
    one, two = joined(0, tmp_path), joined(1, tmp_path, like={"w": torch.zeros(2)})
    two.share(1, {1: {"w": torch.zeros(2)}}, RING, "fp32", {"w": torch.zeros(2)})
    assert values(share(one, 1)) == {0: 10}
    assert f"{HEADER + 8} bytes, where a model takes {HEADER + 88}" in capsys.readouterr().out


def test_other_files_are_no_matter(tmp_path):
    one, two = joined(0, tmp_path), joined(1, tmp_path)
    for name in ("iteration_x.model", "notes.txt", ".77.tmp", "iteration_000001.model.bak", "iteration_1.model",
                 "iteration_00000\u0661.model", f"iteration_{10**40}.model", "iteration_000001.pt"):
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
    (home / "iteration_005000.model").write_bytes(b"")  # beyond the run's end
    (home / "iteration_000009.model").write_bytes(b"")
    share(two, 1)
    assert one.catch_up(1, lambda t: RING) == 1 and values(share(one, 1)) == {0: 10, 1: 11}
    assert "iteration_000009.model: " in capsys.readouterr().out
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
    networks = [joined(i, tmp_path, timeout=5, wire=wire) for i in range(3)]
    found = {}

    def live(i):
        found[i] = share(networks[i], 1, wire=wire, state=states[i])

    threads = [threading.Thread(target=live, args=[i]) for i in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for j in range(3):
        assert all(torch.equal(found[i][j]["w"], found[j][j]["w"]) for i in range(3))
        assert not torch.equal(found[j][j]["w"], states[j]["w"])


# What others leave there


def write(file, fields, body):
    file.write_bytes((fields if isinstance(fields, bytes) else json.dumps(fields).encode()).ljust(HEADER - 1) + b"\n"
                     + body)


def forge(**fields):
    """The file with other fields."""
    return lambda file, header, body: write(file, header | fields, body)


def header_of(text):
    return lambda file, header, body: write(file, text, body)


def flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


LENGTH, STRANGE, CHECKSUM = "its length is wrong", "it is not what an agent publishes", "its checksum is "


@pytest.mark.parametrize(("spoil", "reason"), [
    (lambda file, header, body: os.truncate(file, HEADER), LENGTH),
    (lambda file, header, body: os.truncate(file, 10 * 2**30), LENGTH),  # as a sparse file takes no room
    (lambda file, header, body: file.write_bytes(b"not of us"), LENGTH),
    (lambda file, header, body: file.write_bytes(b""), LENGTH),
    (lambda file, header, body: write(file, header, body + b"\0"), LENGTH),
    (lambda file, header, body: (file.unlink(), file.mkdir()), "it is no regular file"),
    (lambda file, header, body: (file.unlink(), os.mkfifo(file)), "it is no regular file"),
    (lambda file, header, body: (file.rename(file.with_name("sound")), file.symlink_to("sound")),
     "it is no regular file"),
    (lambda file, header, body: (file.unlink(), file.symlink_to("/dev/zero")), "it is no regular file"),
    (lambda file, header, body: write(file, header, flipped(body, 77)), CHECKSUM + "wrong"),
    (lambda file, header, body: write(file, header, body[1:] + body[:1]), CHECKSUM + "wrong"),
    (forge(sha256="0" * 64), CHECKSUM + "wrong"), (forge(sha256=5), CHECKSUM + "none"),
    (forge(sha256="A" * 64), CHECKSUM + "none"), (forge(sha256=["0" * 64]), CHECKSUM + "none"),
    (forge(run="another"), "its run is another"), (forge(agent=2), "its agent is another"),
    (forge(agent=True), "its agent is another"), (forge(iteration=7), "its iteration is another"),
    (forge(iteration=1.0), "its iteration is another"), (forge(iteration=[1]), "its iteration is another"),
    (forge(wire="int8"), "its wire is another"), (forge(bytes=8 * 2**30), "its bytes is another"),
    (forge(schema=2), "its schema is another"), (forge(label="x"), "its label is none"),
    (forge(label=True), "its label is none"), (forge(label=-2), "its label is none"),
    (forge(label=10**30), "its label is none"), (forge(label=float("nan")), "its label is none"),
    (forge(more=1), STRANGE), (forge(hmac="0" * 64), "it is signed"),
    (header_of(b"[" * 511), STRANGE), (header_of(b"9" * 511), STRANGE), (header_of(b'{"a":' * 100), STRANGE),
    (header_of(b"\xff\xfe"), STRANGE), (header_of(b"null"), STRANGE), (header_of(b"{}"), "its schema is another"),
    (header_of(b""), STRANGE)])
def test_what_is_broken_or_foreign_is_ignored_with_a_warning(tmp_path, capsys, spoil, reason):
    one, two = joined(0, tmp_path, timeout=0.05), joined(1, tmp_path)
    share(two, 1)
    file = file_of(tmp_path, 1, 1)
    spoil(file, json.loads(file.read_bytes()[:HEADER]), file.read_bytes()[HEADER:])
    began = time.monotonic()
    assert one.catch_up(1, lambda t: RING) == 1 and values(share(one, 1)) == {0: 10}
    assert time.monotonic() - began < 5
    out = capsys.readouterr().out
    assert out.count(f"agent 0 ignores {file}: {reason}") == 1 and out.count("ignores") == 1


def test_no_bit_can_be_flipped(tmp_path):
    one, two = joined(0, tmp_path), joined(1, tmp_path)
    share(two, 1)
    file = file_of(tmp_path, 1, 1)
    sound = file.read_bytes()
    for bit in range(0, 8 * len(sound), 29):
        file.write_bytes(flipped(sound, bit))
        assert not one._take(1, range(1, 2), 1, {}), bit
    file.write_bytes(sound)
    assert one._take(1, range(1, 2), 1, {})


@pytest.mark.parametrize(("change", "reason"), [
    ({"w": torch.full((4, 5), torch.nan)}, "NaN or infinite values: in w"),
    ({"w": torch.full((4, 5), -torch.inf)}, "NaN or infinite values: in w"),
    ({"norm.running_var": torch.tensor([1.0, -1e-9])}, "norm.running_var below 0"),
    ({"norm.num_batches_tracked": torch.tensor(-1)}, "norm.num_batches_tracked below 0")])
def test_values_that_cannot_be_are_ignored(tmp_path, capsys, change, reason):
    like = LIKE | {"norm.running_var": torch.ones(2), "norm.num_batches_tracked": torch.tensor(3)}
    one, two = joined(0, tmp_path, like=like), joined(1, tmp_path, like=like)
    for iteration, state in enumerate((like | change, like | {"norm.running_var": torch.zeros(2)}), 1):
        share(two, iteration, state=state)
        assert (1 in share(one, iteration, state=like)) == (iteration == 2)
    assert reason in capsys.readouterr().out


def test_what_was_refused_is_read_again_when_it_changes_and_a_flood_is_a_line(tmp_path, capsys, monkeypatch):
    one, two = joined(0, tmp_path), joined(1, tmp_path)
    reads = []
    monkeypatch.setattr(SharedFolder, "_read", lambda *args, read=SharedFolder._read: reads.append(1) or read(*args))
    share(two, 1)
    file = file_of(tmp_path, 1, 1)
    sound = file.read_bytes()
    file.write_bytes(flipped(sound, 8 * HEADER))
    for _ in range(5):
        assert not one._take(1, range(1, 99), 1, {})
    assert len(reads) == 1
    for k in range(100):
        file.write_bytes(flipped(sound, 8 * HEADER + k))
        one._take(1, range(1, 99), 1, {})
    assert capsys.readouterr().out.count("ignores") == 1
    one.complaints = {key: (said - 100, more) for key, (said, more) in one.complaints.items()}  # a while later
    file.write_bytes(sound[:-1])
    file.write_bytes(flipped(sound, 8 * HEADER))
    assert not one._take(1, range(1, 99), 1, {})
    assert "its checksum is wrong (100 more like this before)" in capsys.readouterr().out
    file.unlink()
    file.write_bytes(sound)
    assert one._take(1, range(1, 99), 1, {})


def test_of_many_damaged_files_one_is_read_at_a_time(tmp_path, monkeypatch):
    one, two = joined(0, tmp_path), joined(1, tmp_path, staleness=9)
    for k in range(1, 6):
        share(two, k)
        if k < 5:
            file = file_of(tmp_path, 1, k)
            file.write_bytes(flipped(file.read_bytes(), 8 * HEADER))
    for look in range(1, 6):
        assert one._take(1, range(1, 99), 1, {}) == (look == 5)


def test_what_was_found_sound_is_not_read_again_to_see_where_others_are(tmp_path, monkeypatch):
    one, two = joined(0, tmp_path), joined(1, tmp_path)
    share(one, 1), share(two, 50)
    monkeypatch.setattr(SharedFolder, "_read", lambda *args, read=SharedFolder._read: reads.append(1) or read(*args))
    reads = []
    for _ in range(3):
        assert one._newest(1) == 50 and one._newest(0) == 1
    assert len(reads) == 1


def test_whatever_reading_raises_is_said(tmp_path, capsys, monkeypatch):
    one, two = joined(0, tmp_path), joined(1, tmp_path)
    share(two, 1)
    for error in (MemoryError(), OSError(5, "Input/output error"), RuntimeError("of torch")):
        def fail(*_, error=error):
            raise error
        monkeypatch.setattr("network.folder.unpack", fail)
        assert values(share(one, 1)) == {0: 10}
    out = capsys.readouterr().out
    assert all(word in out for word in (": MemoryError", ": Input/output error", ": RuntimeError"))
    monkeypatch.undo()
    assert values(share(one, 1)) == {0: 10, 1: 11}  # it may have passed


def test_a_model_under_a_new_number_is_noticed(tmp_path, capsys):
    one, two = joined(0, tmp_path), joined(1, tmp_path)
    for iteration in (1, 2, 3):
        share(two, iteration, state=model(1, 1)), share(one, iteration)
    assert capsys.readouterr().out.count("agent 1's model of iteration 2 is that of iteration 1 once more") == 1


def test_links_are_not_followed(tmp_path, capsys):
    """Another's folder, the own one, the run's, the lock and models: none may lead elsewhere."""
    victim = tmp_path / "victim"
    two = joined(1, victim)
    share(two, 1)
    home = tmp_path / "meeting" / run_name("run")
    home.mkdir(parents=True)
    (home / "agent_1").symlink_to(file_of(victim, 1, 1).parent)
    one = joined(0, tmp_path / "meeting")
    assert values(share(one, 1)) == {0: 10}
    assert "agent_1 is a link, or no folder" in capsys.readouterr().out
    there = sorted(victim.rglob("*"))
    two.place.__exit__(None, None, None)
    for agent in (1, 2):
        if agent == 2:
            (home / "agent_2").write_text("")
        with pytest.raises(ValueError, match=f"agent_{agent} is a link, or no folder; delete it"):
            joined(agent, tmp_path / "meeting", fresh=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / run_name("run")).symlink_to(victim / run_name("run"))
    with pytest.raises(ValueError, match="is a link"):
        joined(1, tmp_path / "elsewhere", fresh=True)
    forget(tmp_path / "elsewhere", "run")
    assert not (tmp_path / "elsewhere").exists()
    assert sorted(victim.rglob("*")) == there


def test_files_that_lie_in_the_own_folder_beforehand_are_not_followed(tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    home = file_of(tmp_path, 0, 1).parent
    home.mkdir(parents=True)
    (home / ".lock").symlink_to(precious)
    with pytest.raises(ValueError, match="lock is a link, or no file"):
        joined(0, tmp_path)
    (home / ".lock").unlink()
    file_of(tmp_path, 0, 1).symlink_to(precious)
    file_of(tmp_path, 0, 2).symlink_to(precious)
    one = joined(0, tmp_path)
    share(one, 1)
    assert not file_of(tmp_path, 0, 1).is_symlink() and file_of(tmp_path, 0, 2).is_symlink()
    one.place.__exit__(None, None, None)
    one = joined(0, tmp_path, fresh=True)
    assert not file_of(tmp_path, 0, 1).exists() and not file_of(tmp_path, 0, 2).is_symlink()
    monkeypatch.setattr("secrets.token_hex", lambda _: "known")
    (home / ".known.tmp").symlink_to(precious)
    with pytest.raises(OSError, match="can't publish a model in"):
        share(one, 1)
    assert precious.read_text() == "precious"


def test_the_exchange_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    one, two = joined(0, tmp_path / "link"), joined(1, tmp_path / "real")
    share(two, 1)
    assert values(share(one, 1)) == {0: 10, 1: 11}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="gives a folder away, which takes root")
def test_another_users_folder_is_not_taken(tmp_path):
    home = file_of(tmp_path, 0, 1).parent
    home.mkdir(parents=True)
    os.chown(home, 12345, -1)
    with pytest.raises(ValueError, match="belongs to another user"):
        joined(0, tmp_path)


# Going on where the others are


def test_one_neighbours_word_takes_nobody_far(tmp_path, capsys):
    one, two = joined(0, tmp_path, last=30), joined(1, tmp_path, last=30)
    share(one, 1)
    done, iteration = [], 2
    while iteration <= 30:
        share(two, 30, state=model(1, iteration))  # sound, and another one each time
        iteration = one.catch_up(iteration, lambda t: RING)
        done.append(iteration)
        share(one, iteration)
        iteration += 1
    assert len(done) == 29 - 3
    said = capsys.readouterr().out
    assert said.count("it says to be far ahead: in iteration 30, but too few of the other neighbours say so too") == 1


@pytest.mark.parametrize(("agents", "liars", "far"), [(3, 2, True), (6, 1, False), (7, 2, False), (7, 3, True)])
def test_more_than_a_third_of_the_neighbours_are_believed(tmp_path, agents, liars, far):
    mixing = np.full((agents, agents), 1 / agents)
    one = joined(0, tmp_path, agents=agents)
    for j in range(1, agents):
        network = joined(j, tmp_path, agents=agents)
        network.share(50 if j <= liars else 1, {j: model(j)}, mixing, "fp32", LIKE)
    assert one.catch_up(1, lambda t: mixing) == (50 if far else 10)


def test_what_is_not_sound_is_not_believed_whoever_agrees(tmp_path):
    one, two, three = (joined(i, tmp_path) for i in range(3))
    share(two, 60), share(three, 60)
    for j in (1, 2):
        file = file_of(tmp_path, j, 60)
        file.write_bytes(flipped(file.read_bytes(), 8 * HEADER))
    assert one.catch_up(1, lambda t: RING) == 1
    share(three, 59), share(two, 59)
    assert one.catch_up(1, lambda t: RING) == 59


# The key


def test_without_the_key_nobody_is_one_of_the_agents(tmp_path, capsys):
    key, other = b"k" * 16, b"o" * 16
    one = joined(0, tmp_path, key=key)
    for stranger in (other, None):
        network = joined(1, tmp_path, key=stranger)
        share(network, 1)
        assert values(share(one, 1)) == {0: 10} and one.catch_up(1, lambda t: RING) == 1
        assert values(share(network, 1)) == {1: 11}  # nor the other way round
        network.place.__exit__(None, None, None)
    out = capsys.readouterr().out
    assert "agent 0 ignores" in out and "it is not signed with this --exchange_key" in out
    assert "it is signed, and there is no --exchange_key here" in out
    share(joined(1, tmp_path, key=key), 1)
    assert values(share(one, 1)) == {0: 10, 1: 11}


@pytest.mark.parametrize("change", [{"agent": 2}, {"iteration": 2}, {"label": 3}, {"sha256": None}])
def test_what_was_signed_serves_under_no_other_name(tmp_path, change):
    one, two = (joined(i, tmp_path, key=b"k" * 16) for i in range(2))
    joined(2, tmp_path, key=b"k" * 16)
    share(two, 1)
    content = file_of(tmp_path, 1, 1).read_bytes()
    header, body = json.loads(content[:HEADER]), content[HEADER:]
    if "sha256" in change:
        body = body[::-1]
        change = {"sha256": hashlib.sha256(body).hexdigest()}
    agent, iteration = change.get("agent", 1), change.get("iteration", 1)
    write(file_of(tmp_path, agent, iteration), header | change, body)
    assert not one._take(agent, range(iteration, iteration + 1), iteration, {})
    write(file_of(tmp_path, agent, iteration), header, content[HEADER:])
    assert one._take(agent, range(iteration, iteration + 1), iteration, {}) == (agent == iteration == 1)


def test_a_key_is_a_file_that_others_cannot_read(tmp_path):
    file = tmp_path / "key"
    for content, mode, message in ((b"short\n", 0o600, "16 to 4096 bytes"), (b"x" * 5000, 0o600, "16 to 4096 bytes"),
                                   (b"x" * 20, 0o644, "chmod 600"), (b" " * 50, 0o600, "16 to 4096 bytes")):
        file.write_bytes(content)
        file.chmod(mode)
        with pytest.raises(ValueError, match=message):
            read_key(file)
    file.chmod(0o600)
    file.write_bytes(b"\n a secret of some length \n")
    assert read_key(file) == b"a secret of some length"
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="not a"):
            read_key(other)
    with pytest.raises(OSError):
        read_key(tmp_path / "none")


# All of it


def test_a_hostile_agent_costs_the_honest_ones_nothing(tmp_path):
    """It leaves files from the future and junk, and with a key it can't be one of them. All iterations are done."""
    key = tmp_path / "key"
    key.write_text("a secret that only agents know")
    key.chmod(0o600)
    flags = [*TINY, "--num_models=3", "--randominit", "--exp=2", "--opt=WA", "--test_samples=50", "--bn_reset=none",
             "--merg_itr=4", "--exchange=folder:meeting", "--timeout=0", f"--exchange_key={key}"]
    script("main", *flags, "--agent=0", "--merg_itr=1", cwd=tmp_path)
    home, = (tmp_path / "meeting").iterdir()
    hostile = home / "agent_2"
    hostile.mkdir()
    (hostile / "iteration_000004.model").write_bytes(b"ten bytes!")
    content = (home / "agent_0" / "iteration_000001.model").read_bytes()
    write(hostile / "iteration_000003.model", json.loads(content[:HEADER]) | {"agent": 2, "iteration": 3},
          content[HEADER:])
    os.mkfifo(hostile / "iteration_000002.model")
    again = tmp_path / "key_elsewhere"  # where it lies is no option of the run
    key.rename(again)
    said = script("main", *flags, "--agent=0", f"--exchange_key={again}", cwd=tmp_path).stdout
    run, = tmp_path.glob("results/**/agent_0")
    merged = [line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines() if ",merged," in line]
    assert merged == ["1", "2", "3", "4"], said
    for reason in ("its length is wrong", "it is not signed", "it is no regular file"):
        assert said.count(reason) == 1, reason
    assert not any(b"only agents know" in file.read_bytes() for file in tmp_path.rglob("*")
                   if file.is_file() and file != again)


def test_a_neighbour_that_is_out_of_all_proportion_is_left_out(tmp_path, monkeypatch):
    """Agent 1's model is far away, agent 2's computes nothing finite, which at last only the merge finds out."""
    flags = [*TINY, "--num_models=3", "--randominit", "--exp=2", "--opt=DIMAT", "--test_samples=50", "--bn_reset=none",
             "--exchange=folder:meeting", "--timeout=0", "--match_samples=20", "--agent=0"]
    script("main", *flags, "--merg_itr=1", cwd=tmp_path)
    home, = (tmp_path / "meeting").iterdir()
    content = (home / "agent_0" / "iteration_000001.model").read_bytes()
    like = build_model("resnet20", 10, in_channels=1, image_size=8, width_multiplier=1).state_dict()
    honest = unpack(torch.frombuffer(bytearray(content[HEADER:]), dtype=torch.uint8), like, "fp32")
    hostile = {1: {key: 1e3 * value if value.is_floating_point() else value for key, value in honest.items()},
               2: {key: 0 * value if "running_var" in key else value for key, value in honest.items()}}

    def publish(agent, iteration):
        body = pack(hostile[agent], "fp32").numpy().tobytes()
        write(home / f"agent_{agent}" / f"iteration_{iteration:06d}.model", json.loads(content[:HEADER])
              | {"agent": agent, "iteration": iteration, "sha256": hashlib.sha256(body).hexdigest()}, body)

    for agent in hostile:
        (home / f"agent_{agent}").mkdir()
        publish(agent, 3)
    monkeypatch.setattr("network.folder.SharedFolder.catch_up", lambda self, iteration, weights: iteration)
    said = script("main", *flags, "--merg_itr=3", cwd=tmp_path).stdout
    assert said.count("agent 1's model is 999 times the norm of its own away (--max_distance 10)") == 2
    assert said.count("agent 2's model makes activations that are not finite: merging without it") == 2
    monkeypatch.setattr(MergingAgents, "has_finite_features", lambda *_: True)
    publish(2, 4)
    said = script("main", *flags, "--merg_itr=4", cwd=tmp_path).stdout
    assert "are not finite; check the images" in said and "it goes on without this merge" in said
    run, = tmp_path.glob("results/**/agent_0")
    assert all(row["merged_with"] == "" for row in rows_of(run))


def test_a_walk_out_of_all_proportion_is_left_out(tmp_path, monkeypatch):
    """Its model is as it should be, but what agent 1 says that it has walked would throw agent 0 far away."""
    flags = [*TINY, "--num_models=2", "--randominit", "--exp=2", "--opt=WA", "--test_samples=50", "--train_samples=40",
             "--training", "--epochs=1", "--correction=KGT", "--exchange=folder:meeting", "--timeout=0", "--agent=0"]
    script("main", *flags, "--merg_itr=1", cwd=tmp_path)
    home, = (tmp_path / "meeting").iterdir()
    content = (home / "agent_0" / "iteration_000001.model").read_bytes()
    model = build_model("resnet20", 10, in_channels=1, image_size=8, width_multiplier=1)
    like = model.state_dict() | {WALK + name: value.detach() for name, value in model.named_parameters()}
    sent = unpack(torch.frombuffer(bytearray(content[HEADER:]), dtype=torch.uint8), like, "fp32")
    far = sent | {key: 1e3 * sent[key.removeprefix(WALK)] for key in sent if key.startswith(WALK)}
    body = pack(far, "fp32").numpy().tobytes()
    (home / "agent_1").mkdir()
    write(home / "agent_1" / "iteration_000002.model", json.loads(content[:HEADER])
          | {"agent": 1, "iteration": 2, "sha256": hashlib.sha256(body).hexdigest()}, body)
    monkeypatch.setattr("network.folder.SharedFolder.catch_up", lambda self, iteration, weights: iteration)
    said = script("main", *flags, "--merg_itr=2", cwd=tmp_path).stdout
    assert said.count("agent 1's model has walked 1e+03 times the norm of its own since its last merge") == 1
    assert "test accuracy" in said.splitlines()[-2]
