"""Cross-gradient aggregation: no agent moves where a neighbour's data says the loss goes up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from optimizers.agent import Agent
from optimizers.cdsgd import combine, heavy_ball
from optimizers.registry import Neighbourhood, Settings, Step, register_baseline
from utils.distributed import Mail

CGA_FORMS = ("paper", "authors")
CGA_SCOPES = ("model", "tensor")
MARGIN = 0.5  # of the authors' form


@register_baseline("CGA", momentum=True)
def cga(agent: Agent, hood: Neighbourhood, s: Settings) -> Step:
    """g~ = project(g_ii, {g_ij});  v <- momentum v + g~;  x_i <- sum_j pi_ij x_j - lr v.

    g_ij is the gradient of agent i's model on agent j's batch: i's model goes to j (while both take their own
    gradients), the cross-gradient comes back, and no image leaves its agent.
    s.cga_form "authors": all gradients are weighted by pi_ij, g_ii by pi_ii, the multipliers of the projection are at
    least 0.5, and x_i moves by g~ + momentum v, as the published code has it. s.cga_scope "tensor": every parameter
    tensor is projected by itself.
    Source: Esfandiari et al. 2021 (arXiv 2103.02051), Algorithm 1.
    """
    arriving = yield hood.send(agent.shared)
    buffers = agent.buffers.clone()
    g = agent.gradient()
    models = arriving.wait()
    crossed = {j: agent.cross_gradient(x, owner=j) for j, x in models.items()}
    back = yield Mail(crossed, tuple(hood.sources), g)
    theirs = back.wait()
    rows = [theirs[j] for j in hood.sources]
    weighted = s.cga_form == "authors"
    if weighted:
        rows = [row * weight for row, weight in zip(rows, hood.sources.values(), strict=True)]
        g = g * hood.own
    projected = project(g, rows, margin=MARGIN if weighted else 0.0,
                        sizes=agent.flat.sizes if s.cga_scope == "tensor" else None)
    v = heavy_ball(agent, projected, s.momentum)
    combine(agent, hood, models, buffers)
    agent.parameters.sub_(projected + s.momentum * v if weighted else v, alpha=s.lr)


def project(g: Tensor, rows: Sequence[Tensor], margin: float = 0.0, sizes: Sequence[int] | None = None) -> Tensor:
    """g~ = g + G'u with u = argmin_{u >= margin} 1/2 u'GG'u + (Gg)'u, where G's rows are `rows` (m of shape (P,)).

    With margin 0 that is the point nearest to g that makes no acute angle with any -row: <g~, row> >= 0 for each.
    sizes: lengths that add up to P; each part is projected by itself.

    Solved exactly in float64: with u = margin + s, g~ is the shortest vector in h + {G's : s >= 0}, h = g + margin G'1,
    a non-negative least-squares problem, which needs no more of the vectors than their inner products.
    """
    if not rows:
        return g.clone()
    parts = [torch.stack([*some]) for some in zip(*(v.split(list(sizes or [len(g)])) for v in (*rows, g)), strict=True)]
    wide = torch.float64 if g.device.type != "mps" else torch.float32
    grams = torch.stack([part.to(wide) @ part.to(wide).T for part in parts]).cpu().double().numpy()
    multipliers = torch.from_numpy(np.stack([_multipliers(gram, margin) for gram in grams])).to(g)
    return torch.cat([part[-1] + u @ part[:-1] for part, u in zip(parts, multipliers, strict=True)])


def _multipliers(gram: np.ndarray, margin: float) -> np.ndarray:
    """u (m,) from the inner products (m + 1, m + 1) of the rows and, last, g."""
    if not np.isfinite(gram).all():
        return np.full(len(gram) - 1, np.nan)  # the agent notices that it has diverged
    change = np.eye(len(gram))
    change[-1, :-1] = margin  # the last vector becomes h
    gram = change @ gram @ change.T
    lengths = np.sqrt(np.clip(np.diag(gram), 0, None))
    u = np.full(len(gram) - 1, margin)
    if lengths[-1] == 0:
        return u
    # Vectors of length 1 keep rounding errors small beside them all; a row of zeros has no say.
    alive = np.flatnonzero(lengths)
    gram = gram[np.ix_(alive, alive)] / np.outer(lengths[alive], lengths[alive])
    values, vectors = np.linalg.eigh(gram)
    root = np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T  # columns with the same inner products
    s = nnls(root[:, :-1], -root[:, -1], maxiter=100 * len(gram))[0]
    u[alive[:-1]] += s * lengths[-1] / lengths[alive[:-1]]
    return u
