"""Gradient tracking: each agent also mixes an estimate of the mean gradient, and steps by that.

It sends two vectors in an exchange. Only parameters are tracked. BatchNorm's buffers are mixed, or not, as in DPSGD.
"""

from __future__ import annotations

import torch

from optimizers.agent import Agent
from optimizers.registry import Neighbourhood, Settings, Step, register_baseline


@register_baseline("DSGT")
def dsgt(agent: Agent, hood: Neighbourhood, s: Settings) -> Step:
    """d_i <- d_i + g_i(x_i) - what it was a step before;  x_i <- sum_j pi_ij (x_j - lr d_j);  d_i <- sum_j pi_ij d_j.

    The d_i start at 0, and sum up to the sum of the agents' last gradients. In local steps they are not mixed, as in
    Nguyen et al. 2023 (arXiv 2210.04757).
    Source: Pu and Nedic 2020 (arXiv 1805.11454), adapt first.
    """
    d, before = agent.keeps("d"), agent.keeps("g")
    g = agent.gradient()
    d.add_(g - before)
    before.copy_(g)
    agent.parameters.sub_(d, alpha=s.lr)
    if hood.exchange:
        both = torch.cat([agent.shared, d])
        arriving = yield hood.send(both)
        hood.mix(both, arriving.wait())
        agent.shared.copy_(both[: -len(d)])
        d.copy_(both[-len(d) :])


@register_baseline("KGT")
def kgt(agent: Agent, hood: Neighbourhood, s: Settings) -> Step:
    """Each step x_i <- x_i - lr (g_i(x_i) + c_i); every T-th then also
    z_i = mean of these g_i + c_i;  c_i <- c_i + sum_j pi_ij z_j - z_i;  x_i <- sum_j pi_ij x_j.

    Local gradient tracking. c_i starts at 0, and the sum of all stays 0. z_i is the paper's (x_i at the last exchange
    - x_i) / (T lr), also where the learning rate or the number of steps differ. The communication step size is 1.
    Source: Liu et al. 2023 (arXiv 2301.01313), Algorithm 1.
    """
    c, taken = agent.keeps("c"), agent.keeps("directions", agent.flat.num_parameters + 1)
    directions, steps = taken[:-1], taken[-1:]
    g = agent.gradient()
    agent.parameters.sub_(g + c, alpha=s.lr)
    directions.add_(g + c)
    steps.add_(1)
    if hood.exchange:
        z = directions / steps
        both = torch.cat([agent.shared, z])
        arriving = yield hood.send(both)
        hood.mix(both, arriving.wait())
        agent.shared.copy_(both[: -len(z)])
        c.add_(both[-len(z) :] - z)
        taken.zero_()
