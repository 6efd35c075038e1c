"""Momentum that isn't an agent's own for long: it follows the mixed models, or starts anew after each exchange.

BatchNorm's buffers are mixed, or not, as in DPSGD.
"""

from __future__ import annotations

from optimizers.agent import Agent
from optimizers.cdsgd import heavy_ball
from optimizers.registry import Neighbourhood, Settings, Step, register_baseline


@register_baseline("QGDSGDM", momentum=True)
def qgdsgdm(agent: Agent, hood: Neighbourhood, s: Settings) -> Step:
    """x_i <- sum_j pi_ij (x_j - lr (momentum m_j + g_j(x_j)));  m_i <- momentum m_i + (1 - momentum) (x_i's way) / lr.

    Quasi-global momentum. The way is x_i before less x_i after, mixing included: m_i follows what all agents do. Of K
    local steps m_i stays as it is until the exchange, and the way from one exchange to the next counts as 1 / K.
    Source: Lin et al. 2021 (arXiv 2102.04761), Algorithm 1, whose mu is the momentum, too.
    """
    m = agent.keeps("m")
    yield from _quasi_global(agent, hood, s, lambda g: s.momentum * m + g)


@register_baseline("QGDSGDMN", momentum=True)
def qgdsgdmn(agent: Agent, hood: Neighbourhood, s: Settings) -> Step:
    """QGDSGDM in Nesterov's form: the step is by g_i + momentum (momentum m_i + g_i). Source: the same."""
    m = agent.keeps("m")
    yield from _quasi_global(agent, hood, s, lambda g: g + s.momentum * (s.momentum * m + g))


def _quasi_global(agent: Agent, hood: Neighbourhood, s: Settings, direction) -> Step:
    m = agent.keeps("m")
    if "start" not in agent.memory:
        agent.memory["start"] = agent.parameters.clone()  # where it was after the last exchange
    start = agent.memory["start"]
    g = agent.gradient()
    agent.parameters.sub_(direction(g), alpha=s.lr)
    if hood.exchange:
        arriving = yield hood.send(agent.shared)
        hood.mix(agent.shared, arriving.wait())
        m.mul_(s.momentum).add_(start - agent.parameters, alpha=(1 - s.momentum) / (s.local_steps * s.lr))
        start.copy_(agent.parameters)


@register_baseline("DFEDAVGM", momentum=True)
def dfedavgm(agent: Agent, hood: Neighbourhood, s: Settings) -> Step:
    """Each step v_i <- momentum v_i + g_i(x_i);  x_i <- x_i - lr v_i; every K-th then also x_i <- sum_j pi_ij x_j;
    v_i <- 0.

    With one local step it is DPSGD.
    Source: Sun et al. 2021 (arXiv 2104.11375), Algorithm 1.
    """
    g = agent.gradient()
    v = heavy_ball(agent, g, s.momentum)
    agent.parameters.sub_(v, alpha=s.lr)
    if hood.exchange:
        arriving = yield hood.send(agent.shared)
        hood.mix(agent.shared, arriving.wait())
        v.zero_()
