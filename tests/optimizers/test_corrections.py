"""Local corrections on a problem whose minimiser is known."""

import numpy as np
import pytest
import torch

from network.faults import Faults, surviving
from network.topology import make_topology
from optimizers.corrections import CORRECTIONS, OfMerge, register_correction

N, T, LR = 5, 4, 0.02
CURVATURE = torch.tensor([[1.0], [2.0], [0.5], [3.0], [1.5]], dtype=torch.float64)
CENTRE = torch.tensor([[3.0], [-1.0], [5.0], [0.0], [-4.0]], dtype=torch.float64)  # of agent i: a_i (x - b_i)^2 / 2
MINIMISER = float((CURVATURE * CENTRE).sum() / CURVATURE.sum())


def run(correction: str | None, rounds: int, faults: Faults | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Every agent's x (N, 1) after a last merge, and y (N, 1): merge, T steps, merge, ... with constant step size."""
    pi = make_topology("ring", N).pi
    x, y = torch.zeros(N, 1, dtype=torch.float64), torch.zeros(N, 1, dtype=torch.float64)
    begun = x.clone()
    for k in range(1, rounds + 1):
        w = torch.from_numpy(surviving(pi, faults.links(k, N)) if faults else pi)
        merged = w @ x
        if correction and k > 1:
            y = CORRECTIONS[correction].update(y, OfMerge(x, merged, x - begun, w @ (x - begun)))
        x = begun = merged
        for _ in range(T):
            x = x - LR * CURVATURE * (x - CENTRE) - y / T
    return w @ x, y


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_corrected_agents_reach_the_minimiser_of_all_data(correction):
    x, y = run(correction, 3000)
    assert torch.allclose(x, torch.full_like(x, MINIMISER), atol=1e-6)
    assert abs(float(y.sum())) < 1e-9


def test_without_a_correction_they_stop_elsewhere():
    """Where x = W(A x + c) with A, c of T steps: the bias that a correction takes away."""
    x, _ = run(None, 3000)
    pi = torch.from_numpy(make_topology("ring", N).pi)
    keep = (1 - LR * CURVATURE) ** T
    expected = torch.linalg.solve(torch.eye(N, dtype=torch.float64) - pi * keep.T, pi @ ((1 - keep) * CENTRE))
    assert torch.allclose(x, expected, atol=1e-9)
    assert float((x - MINIMISER).abs().max()) > 0.1


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_lost_links_and_absent_agents_leave_the_sum_at_zero(correction):
    y = run(correction, 200, Faults(0.3, 0.2, seed=0))[1]
    assert abs(float(y.sum())) < 1e-9 < float(y.abs().max())


def test_a_correction_is_one_function(monkeypatch):
    monkeypatch.setattr("optimizers.corrections.CORRECTIONS", mine := {})
    monkeypatch.setitem(globals(), "CORRECTIONS", mine)

    @register_correction("HALF")
    def half(y, merge):
        return y + 0.5 * (merge.own - merge.merged)

    x, _ = run("HALF", 3000)
    assert np.allclose(x.numpy(), MINIMISER, atol=1e-6)
