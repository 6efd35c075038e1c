"""Consensus and gradient in one step: CDSGD, its momentum form, and D-PSGD.

pi is the doubly stochastic mixing matrix, g_i the gradient of agent i on its own batch.
"""

from __future__ import annotations

import torch

from optimizers.agent import Agent
from optimizers.registry import Neighbourhood, Settings, Step, register_baseline


@register_baseline("CDSGD")
def cdsgd(agent: Agent, hood: Neighbourhood, s: Settings) -> Step:
    """x_i <- sum_j pi_ij x_j - lr g_i(x_i): combine, then adapt (Jiang et al. 2017, arXiv 1706.07880, Algorithm 1).

    The gradient is taken at the old point, so the models travel meanwhile.
    """
    arriving = yield hood.send(agent.shared)
    g = agent.gradient()
    hood.mix(agent.shared, arriving.wait())
    agent.parameters.sub_(g, alpha=s.lr)


@register_baseline("CDMSGD", momentum=True)
def cdmsgd(agent: Agent, hood: Neighbourhood, s: Settings) -> Step:
    """v_i <- momentum v_i + g_i(x_i);  x_i <- sum_j pi_ij x_j - lr v_i: CDSGD with the heavy ball of CGA.

    Momentum for CDSGD comes from the same paper, where it has several forms.
    """
    arriving = yield hood.send(agent.shared)
    g = agent.gradient()
    v = heavy_ball(agent, g, s.momentum)
    hood.mix(agent.shared, arriving.wait())
    agent.parameters.sub_(v, alpha=s.lr)


@register_baseline("DPSGD")
def dpsgd(agent: Agent, hood: Neighbourhood, s: Settings) -> Step:
    """x_i <- sum_j pi_ij (x_j - lr g_j(x_j)): adapt, then combine (D-PSGD in the form of Sayed's ATC diffusion).

    Lian et al. 2017 (arXiv 1705.09056) average first, which is CDSGD, and note that both orders converge alike.
    """
    g = agent.gradient()
    agent.parameters.sub_(g, alpha=s.lr)
    arriving = yield hood.send(agent.shared)
    hood.mix(agent.shared, arriving.wait())


def heavy_ball(agent: Agent, g: torch.Tensor, momentum: float) -> torch.Tensor:
    """v <- momentum v + g, in the agent's memory; it starts at 0."""
    return agent.keeps("v").mul_(momentum).add_(g)
