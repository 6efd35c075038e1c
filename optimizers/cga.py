"""Cross-gradient aggregation: no agent moves where a neighbour's data says the loss goes up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from network.processes import Mail
from optimizers.agent import Agent
from optimizers.cdsgd import heavy_ball
from optimizers.registry import Neighbourhood, Settings, Step, register_baseline

CGA_FORMS = ("paper", "authors")
CGA_SCOPES = ("model", "tensor")
MARGIN = 0.5  # of the authors' form


@register_baseline("CGA", momentum=True, options={
    "cga_form": lambda o: "paper", "cga_scope": lambda o: "tensor" if o["cga_form"] == "authors" else "model"})
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
    hood.mix(agent.shared, models)
    agent.parameters.sub_(projected + s.momentum * v if weighted else v, alpha=s.lr)


def project(g: Tensor, rows: Sequence[Tensor], margin: float = 0.0, sizes: Sequence[int] | None = None) -> Tensor:
    """g~ = g + G'u with u = argmin_{u >= margin} 1/2 u'GG'u + (Gg)'u, where G's rows are `rows` (m of shape (P,)).

    With margin 0 that is the point nearest to g that makes no acute angle with any -row: <g~, row> >= 0 for each.
    sizes: lengths that add up to P; each part is projected by itself.

    Solved in float64: with u = margin + s, g~ is the shortest vector in h + {G's : s >= 0}, h = g + margin G'1, which
    needs no more of the vectors than their inner products.
    """
    if not rows:
        return g.clone()
    wide = torch.float64 if g.device.type != "mps" else torch.float32
    vectors = zip(*(v.split(list(sizes or [len(g)])) for v in (*rows, g)), strict=True)
    parts = [torch.stack(some).to(wide) for some in vectors]
    for part in parts:
        part[-1] += margin * part[:-1].sum(0)  # h
    grams = torch.stack([part @ part.T for part in parts]).cpu().numpy()
    shares = torch.from_numpy(np.stack([_shares(gram) for gram in grams])).to(parts[0])
    return torch.cat([part[-1] + s @ part[:-1] for part, s in zip(parts, shares, strict=True)]).to(g)


def _shares(gram: np.ndarray) -> np.ndarray:
    """argmin_{s >= 0} |h + G's|, (m,), from the inner products (m + 1, m + 1) of G's rows and, last, h."""
    noise = 100 * np.finfo(gram.dtype).eps  # of an inner product over millions of entries, between unit vectors
    gram = gram.astype(np.float64)
    s = np.zeros(len(gram) - 1)
    if not np.isfinite(gram).all():
        return s + np.nan  # the agent notices that it has diverged
    if gram[-1, -1] == 0 or (gram[:-1, -1] >= 0).all():  # h harms nobody
        return s
    alive = np.flatnonzero(np.diag(gram)[:-1])  # a row of zeros has no say
    kept = [*alive, -1]
    lengths = np.sqrt(np.diag(gram)[kept])
    values, vectors = np.linalg.eigh(gram[np.ix_(kept, kept)] / lengths / lengths[:, None])
    root = np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T  # columns of length 1 with the same inner products
    s[alive] = _active_set(root[:, :-1], root[:, -1], noise) * (lengths[-1] / lengths[:-1])
    return s


def _active_set(A: np.ndarray, h: np.ndarray, noise: float) -> np.ndarray:
    """argmin_{s >= 0} |h + A s|, (m,); h and A's m columns have length 1, their inner products errors of up to `noise`.

    Columns come in one by one, the steepest descent first, and leave where their share would be negative: Lawson and
    Hanson 1974, Solving Least Squares Problems, chapter 23. A column nearer than noise^(1/3) to the span of those that
    are in stays out: what it adds is less sure than what it may violate.

    scipy won't do: its nnls frees memory twice, which aborts Python, when the matrix has no columns (all rows are
    zero), and nnls and lsq_linear both return wrong points where columns depend on one another.
    """
    s, free = np.zeros(A.shape[1]), np.zeros(A.shape[1], dtype=bool)
    for _ in range(10 * len(s)):  # it takes about as many as there are columns; a bound against rounding errors
        among = np.linalg.lstsq(A[:, free], np.column_stack([A, h]), rcond=None)[0]
        best = np.zeros(len(s))
        best[free] = -among[:, -1]
        negative = np.flatnonzero(free & (best <= 0))
        if len(negative):  # on the way there, the first that gets to zero leaves
            way = s[negative] / np.maximum(s[negative] - best[negative], np.finfo(float).tiny)
            first = negative[way.argmin()]
            s = np.maximum(s + way.min() * (best - s), 0)
            s[first], free[first] = 0, False
            continue
        s = best
        beside = A - A[:, free] @ among[:, :-1]  # what of each column lies outside of the span
        slope = np.where(np.linalg.norm(beside, axis=0) > noise ** (1 / 3), beside.T @ h, 0)
        if slope.min() >= -noise:
            break
        free[slope.argmin()] = True
    return s
