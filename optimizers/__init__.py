"""The update rules of the baselines: what an agent does in one step, each a generator that reads like its pseudocode.

A step yields what the agent sends (a `Mail`) and goes on with what arrives; who carries it, a dictionary in one process
or messages between many, is the network's business:

    @register_baseline("CDSGD")
    def cdsgd(agent, hood, s):
        arriving = yield hood.send(agent.shared)
        g = agent.gradient()
        hood.mix(agent.shared, arriving.wait())
        agent.parameters.sub_(g, alpha=s.lr)
"""

from optimizers import cdsgd, cga, exact_diffusion, momentum, relay, sgp, tracking  # noqa: F401  (register steps)
from optimizers.agent import Agent, FlatModel
from optimizers.registry import (
    BASELINES,
    LOCAL,
    Neighbourhood,
    Settings,
    neighbourhood,
    register_baseline,
    take_step,
)

__all__ = [
    "BASELINES", "LOCAL", "Agent", "FlatModel", "Neighbourhood", "Settings", "neighbourhood", "register_baseline",
    "take_step",
]
