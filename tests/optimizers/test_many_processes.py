"""One launched group runs every method over every kind of graph, and must agree with all agents in one process."""

import os
import subprocess
import sys

import pytest
import torch

from network.processes import OneProcess
from optimizers import BASELINES, FlatModel
from tests.helpers import ROOT
from tests.optimizers.steps_worker import AGENTS, CASES, LOCAL_STEPS, STEPS, graph_of, model, run_cases

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """case -> agent -> (vector, bytes sent, bytes received, what torch.distributed was called for)."""
    folder = tmp_path_factory.mktemp("launched")
    command = [sys.executable, "-m", "torch.distributed.launch", "--master_port", "0", "--nnodes", "1",
               f"--nproc_per_node={AGENTS}", str(ROOT / "tests/optimizers/steps_worker.py"), str(folder)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob("dimat-*/*"))  # the meeting place is cleared away
    parts = [torch.load(folder / f"agent_{i}.pt", weights_only=True) for i in range(AGENTS)]
    return {case: {i: part[case][i] for i, part in enumerate(parts)} for case in parts[0]}


@pytest.fixture(scope="module")
def together():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run_cases(OneProcess(AGENTS))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", [" ".join(case) for case in CASES])
def test_many_processes_give_one_processs_numbers(launched, together, case):
    start = FlatModel(model(0)).vector
    for i in range(AGENTS):
        x, *bytes_of, _ = launched[case][i]
        expected, *expected_bytes, _ = together[case][i]
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-7)
        assert bytes_of == expected_bytes
        assert (x - start).abs().max() > 0.01  # they have moved


@pytest.mark.parametrize("case", [" ".join(case) for case in CASES])
def test_nothing_but_the_neighbours_vectors_crosses_the_wire(launched, case):
    flat = FlatModel(model(0))
    whole, gradient = 4 * len(flat.vector), 4 * flat.num_parameters
    name, topology, form = case.split()
    sizes = dict.fromkeys(("CGA", "DSGT", "KGT"), whole + gradient)
    sizes |= dict.fromkeys(("SGP", "RELAYSGD"), whole + 4)  # a push-sum weight or a count travels along
    size = sizes.get(name, whole)
    graph, steps = graph_of(name, topology), range(STEPS // (LOCAL_STEPS if form == "local" else 1))
    for i in range(AGENTS):
        _, sent, received, wire = launched[case][i]
        assert wire.keys() <= {"isend", "irecv", "isend bytes", "irecv bytes"}
        assert (wire["isend bytes"], wire["irecv bytes"]) == (sent, received)
        to, of = (sum(int((graph.weights(step) > 0).sum(axis)[i]) - 1 for step in steps) for axis in (0, 1))
        assert (sent, received) == (to * size, of * size)
        if topology == "ring" and name != "RELAYSGD":
            assert sent == len(steps) * 2 * size  # whatever N


def test_every_method_is_run():
    assert {name for name, *_ in CASES} == set(BASELINES)
