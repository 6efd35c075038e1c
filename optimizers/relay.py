"""RelaySGD: sums that are relayed over a spanning tree weigh all agents alike, the far ones later."""

from __future__ import annotations

import torch

from network.processes import Mail
from network.topology import spanning_tree
from optimizers.agent import Agent
from optimizers.registry import Neighbourhood, Settings, Step, register_baseline


@register_baseline("RELAYSGD", graph=spanning_tree)
def relaysgd(agent: Agent, hood: Neighbourhood, s: Settings) -> Step:
    """h_i = x_i - lr g_i(x_i);  m_ij = h_i + the sum of the m_ki that came last from the other neighbours k;
    x_i <- (h_i + sum_j m_ji) / (how many models that is).

    m_ij goes from i to j, and says in its last entry of how many models it is the sum. A message that is lost is
    missing in the sum and in the count, here and where it would have been relayed next. BatchNorm's buffers are
    relayed too, or left alone.
    Source: Vogels et al. 2021 (arXiv 2110.04175), Algorithm 1, with the counts of its code.
    """
    agent.parameters.sub_(agent.gradient(), alpha=s.lr)
    if hood.exchange:
        h = torch.cat([agent.shared, agent.shared.new_ones(1)])
        everything = h + sum(agent.memory.values())
        messages = {j: everything - agent.memory.get(f"from {j}", 0) for j in hood.targets}
        arriving = yield Mail(messages, tuple(hood.sources), h)
        agent.memory = {f"from {j}": message.clone() for j, message in arriving.wait().items()}
        total = h + sum(agent.memory.values())
        torch.div(total[:-1], total[-1], out=agent.shared)
