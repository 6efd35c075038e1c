"""Stochastic gradient push: consensus on the true average over one-way graphs."""

from __future__ import annotations

import torch

from optimizers.agent import Agent
from optimizers.registry import Neighbourhood, Settings, Step, register_baseline


@register_baseline("SGP", directed=True)
def sgp(agent: Agent, hood: Neighbourhood, s: Settings) -> Step:
    """x_i <- sum_j p_ij (x_j - lr g_j(z_j));  w_i <- sum_j p_ij w_j;  z_i = x_i / w_i, with P's columns summing to 1.

    The push-sum weight w_i (1 at first) is how much more or less than the others agent i has been given; dividing by it
    takes that bias away. The model is z; x, which carries w as its last entry, is the agent's memory. BatchNorm's
    buffers b_i count as entries w_i b_i of x: they are mixed with the weights p_ij w_j / sum_k p_ik w_k.
    Where P is doubly stochastic w stays 1, and SGP is DPSGD.
    Source: Assran et al. 2019 (arXiv 1811.10792), Algorithm 1.
    """
    z = agent.shared
    if "push" not in agent.memory:
        agent.memory["push"] = torch.cat([z, z.new_ones(1)])
    push = agent.memory["push"]
    x, w = push[:-1], push[-1:]
    g = agent.gradient()
    x[: len(g)].sub_(g, alpha=s.lr)
    torch.mul(agent.buffers, w, out=x[len(g) :])
    arriving = yield hood.send(push)
    hood.mix(push, arriving.wait())
    torch.div(x, w, out=z)
