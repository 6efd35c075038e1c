"""Exact diffusion: a correction of each agent's steps takes away what unlike data do to consensus and gradient.

W is a symmetric doubly stochastic matrix whose eigenvalues are above -1/3; where pi's are not, (pi + I) / 2 is. Only
parameters are corrected. BatchNorm's buffers are mixed, or not, as in DPSGD.
"""

from __future__ import annotations

import torch

from network.topology import lazy_where_needed
from optimizers.agent import Agent
from optimizers.registry import Neighbourhood, Settings, Step, register_baseline


@register_baseline("LED", graph=lazy_where_needed)
def led(agent: Agent, hood: Neighbourhood, s: Settings) -> Step:
    """Each step x_i <- x_i - lr (g_i(x_i) + y_i); every T-th then also
    phi_i = x_i;  x_i <- sum_j w_ij phi_j;  y_i <- y_i + (phi_i - x_i) / (T lr).

    Local exact diffusion. y_i starts at 0, and the sum of all stays 0. At the end y_i is what agent i's gradient lacks
    to the mean. The paper's y is T lr times as large; counted in gradients it fits any learning rate.
    Source: Alghunaim 2023 (arXiv 2302.00620), Algorithm 1.
    """
    y = agent.keeps("y")
    g = agent.gradient()
    agent.parameters.sub_(g + y, alpha=s.lr)
    if hood.exchange:
        phi = agent.parameters.clone()
        arriving = yield hood.send(agent.shared)
        hood.mix(agent.shared, arriving.wait())
        y.add_(phi - agent.parameters, alpha=1 / (s.local_steps * s.lr))


@register_baseline("D2", every_step=True, graph=lazy_where_needed)
def d2(agent: Agent, hood: Neighbourhood, s: Settings) -> Step:
    """x_i(t+1) <- sum_j w_ij (2 x_j(t) - x_j(t-1) - lr g_j(t) + lr g_j(t-1));  at first sum_j w_ij (x_j - lr g_j).

    Each gradient counts with the learning rate of its own step. With today's for both, as the paper's constant one
    may be read, each decay of it would push the mean off for ever. LED is its form with local steps.
    Source: Tang et al. 2018 (arXiv 1803.07068), Algorithm 1.
    """
    ahead = agent.keeps("ahead")  # x(t) - (x(t-1) - lr g(t-1))
    g = agent.gradient()
    agent.parameters.sub_(g, alpha=s.lr)
    alone = agent.parameters.clone()
    agent.parameters.add_(ahead)
    arriving = yield hood.send(agent.shared)
    hood.mix(agent.shared, arriving.wait())
    torch.sub(agent.parameters, alone, out=ahead)
