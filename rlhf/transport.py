"""Partial optimal transport between two uniform distributions: the exact plan, and a smooth one for a GPU."""

from __future__ import annotations

import logging
import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import csr_array, eye_array, kron, vstack

logger = logging.getLogger(__name__)

WHOLE = 1e-9
"""A mass within this distance of a whole number of samples counts as whole."""


def transport_plan(cost: torch.Tensor, mass: float) -> torch.Tensor:
    r"""Solve the partial optimal transport problem between two uniform distributions exactly.

    .. math::
        \gamma = \arg\min_\gamma \langle \gamma, C \rangle
        \quad s.t. \quad \gamma \geq 0, \quad \gamma 1 \leq 1/B, \quad \gamma^T 1 \leq 1/B', \quad 1^T \gamma 1 = m

    where :math:`C` is the cost and :math:`m` the mass. For :math:`B = B'` and whole :math:`k = m B` this is the
    k-cardinality assignment problem, solved by adding :math:`B - k` dummy columns, where a row that is left out goes
    for a price (see `_assign`). The least cost is a convex function of :math:`m` with kinks only at whole :math:`k`,
    therefore a fractional :math:`m B` is solved by mixing the plans of the two whole numbers around it. For
    :math:`B \neq B'` the linear programme itself is solved.

    Parameters
    ----------
    cost : torch.Tensor, shape (B, B'), floating point
        Cost of moving row i to column j; may be negative.
    mass : float in (0, 1]
        Total mass to transport.

    Returns
    -------
    plan : torch.Tensor, shape (B, B')
        Optimal plan on the device and in the dtype of `cost`, without gradient; the same cost gives the same plan.

    Raises
    ------
    ValueError
        If `cost` is no finite floating-point matrix with at least one entry, or `mass` lies outside (0, 1].

    Examples
    --------
    >>> transport_plan(torch.tensor([[0.0, 2.0], [2.0, 5.0]]), 0.5)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.0000]])
    >>> transport_plan(torch.tensor([[0.0, 2.0], [2.0, 5.0]]), 1.0)
    tensor([[0.0000, 0.5000],
            [0.5000, 0.0000]])

    References
    ----------
    .. [1] Chapel, L., Alaya, M. Z. and Gasso, G. (2020). Partial optimal transport with applications on
       positive-unlabeled learning. NeurIPS 33.
    .. [2] Dell'Amico, M. and Martello, S. (1997). The k-cardinality assignment problem. Discrete Applied
       Mathematics 76.
    """
    _check_plan_input(cost, mass)
    if cost.ndim != 2:
        raise ValueError(f"cost has shape {tuple(cost.shape)}; pass one matrix; entropic_plan takes many")
    values = cost.detach().to("cpu", torch.float64).numpy()
    solve = _solve_square if values.shape[0] == values.shape[1] else _solve_rectangular
    return torch.from_numpy(solve(values, mass)).to(cost.device, cost.dtype)


def _solve_square(cost: np.ndarray, mass: float) -> np.ndarray:
    size = len(cost)
    units = mass * size
    whole = int(np.floor(units + WHOLE))
    share = units - whole
    plan = np.zeros_like(cost)
    if whole:
        plan[_assign(cost, whole)] += 1 if share < WHOLE else 1 - share
    if share >= WHOLE:
        plan[_assign(cost, whole + 1)] += share
    return plan / size


def _assign(cost: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the cheapest `count` pairs that share no row and no column.

    A row that stays alone pays the `count`-th smallest of the rows' minima p (or of the columns', the larger). Any
    price up to what one more pair would cost has the same solution, and one more pair costs at least p: of `count` + 1
    pairs one lies in a row whose minimum is p or more, and without it they are `count` pairs. Where one more costs just
    p, the solver may return it; the dearest is then the one too many. A price near that limit spares the solver nearly
    all of its search.
    """
    size = len(cost)
    minima = (np.partition(cost.min(axis), count - 1)[count - 1] for axis in (0, 1))
    padded = np.full((size, 2 * size - count), max(minima))
    padded[:, :size] = cost
    rows, columns = linear_sum_assignment(padded)
    pairs = np.flatnonzero(columns < size)
    pairs = np.sort(pairs[np.argsort(cost[pairs, columns[pairs]], kind="stable")[:count]])
    return pairs, columns[pairs]


def _solve_rectangular(cost: np.ndarray, mass: float) -> np.ndarray:
    rows, columns = cost.shape
    row_sums = kron(eye_array(rows), np.ones((1, columns)))
    column_sums = kron(np.ones((1, rows)), eye_array(columns))
    limits = np.concatenate([np.full(rows, 1 / rows), np.full(columns, 1 / columns)])
    constraints = csr_array(vstack([row_sums, column_sums]))
    scale = np.abs(cost).max() or 1.0
    everything = csr_array(np.ones((1, cost.size)))
    solution = linprog(cost.ravel() / scale, constraints, limits, everything, [mass], method="highs")
    if solution.x is None:
        raise ValueError(f"the solver found no plan of mass {mass} ({solution.message}); use as many rows as columns")
    return np.clip(solution.x, 0, None).reshape(cost.shape)


ANNEALING = 4.0
"""The regularisation starts at the costs' range and is divided by this whenever the plan has settled."""


def entropic_plan(
    cost: torch.Tensor, mass: float, regularisation: float, tolerance: float = 1e-3, max_iterations: int = 2000
) -> torch.Tensor:
    r"""Solve entropic partial optimal transport, many problems at once, where the cost lies.

    .. math::
        \gamma = \arg\min_\gamma \langle \gamma, C \rangle + \varepsilon \sum_{ij} \gamma_{ij} (\log \gamma_{ij} - 1)

    with the constraints of `transport_plan`. The solution is :math:`\gamma_{ij} = e^{(\lambda + f_i + g_j - C_{ij}) /
    \varepsilon}` with :math:`f, g \leq 0`. Its dual is ascended in the log domain with vectors as state, by turns in
    :math:`(f, \lambda)` and :math:`(g, \lambda)`: for a fixed :math:`g` the rows would have masses in the proportion
    :math:`r_i = \sum_j e^{(g_j - C_{ij}) / \varepsilon}`, and the best :math:`f, \lambda` cut them off at :math:`1/B`,
    so that they add up to :math:`m` (`_fill`). Moving the level :math:`\lambda` with each side, rather than on its
    own, is what makes small regularisations converge; in the smallest ones annealing helps.

    A plan has settled when one more turn moves at most `tolerance` of its mass between rows. It is then rounded to one
    that keeps all constraints. One that has not settled is replaced by the exact plan, with a warning in the log.

    Parameters
    ----------
    cost : torch.Tensor, shape (..., B, B'), floating point
        Cost of moving row i to column j; may be negative.
    mass : float in (0, 1]
        Total mass to transport.
    regularisation : float > 0
        :math:`\varepsilon`, in units of the cost; towards 0 the plan becomes the exact one and iterations more.
    tolerance : float > 0
        See above; float32 reaches about 1e-6 times the costs' range over `regularisation`.
    max_iterations : int > 0
        Turns of rows and columns before the exact solver takes over.

    Returns
    -------
    plan : torch.Tensor, shape (..., B, B')
        On the device and in the dtype of `cost` (computed in float32 at least), without gradient.

    Raises
    ------
    ValueError
        If `cost` is no finite floating-point tensor of matrices, `mass` lies outside (0, 1], or `regularisation` or
        `tolerance` is not positive.

    Examples
    --------
    >>> entropic_plan(torch.tensor([[0.0, 2.0], [2.0, 5.0]]), 0.5, 0.1).round(decimals=4)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.0000]])

    References
    ----------
    .. [1] Benamou et al. (2015). Iterative Bregman projections for regularized transportation problems. SIAM Journal
       on Scientific Computing 37.
    .. [2] Altschuler, J., Weed, J. and Rigollet, P. (2017). Near-linear time approximation algorithms for optimal
       transport via Sinkhorn iteration. NeurIPS 30. The rounding.
    """
    _check_plan_input(cost, mass)
    for name, value in (("regularisation", regularisation), ("tolerance", tolerance)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; choose a positive number, e.g. 0.01")
    values = cost.detach().to(torch.promote_types(cost.dtype, torch.float32)).reshape(-1, *cost.shape[-2:])
    values = values - values.amin((1, 2), keepdim=True)
    plan, has_settled = _ascend(values, mass, regularisation, (tolerance, max_iterations))
    plan = _round_plan(plan, mass)
    unsettled = torch.nonzero(~has_settled).flatten().tolist()
    for index in unsettled:
        plan[index] = transport_plan(values[index], mass)
    if unsettled:
        logger.warning(
            "%d of %d plans of regularisation %g have not settled in %d iterations; they are solved exactly instead",
            *(len(unsettled), len(values), regularisation, max_iterations),
        )
    return plan.reshape(cost.shape).to(cost.dtype)


def _ascend(
    cost: torch.Tensor, mass: float, regularisation: float, limits: tuple[float, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plans (problems, B, B') of the dual after ascent, and whether each has settled within (tolerance, iterations)."""
    tolerance, max_iterations = limits
    smoothing = cost.amax((1, 2))[:, None].clamp_min(regularisation)
    rows, columns, level = (cost.new_zeros(len(cost), size) for size in (*cost.shape[1:], 1))
    has_settled = torch.zeros(len(cost), dtype=torch.bool, device=cost.device)
    for _ in range(max_iterations):
        kernel = -cost / smoothing[..., None]
        new_columns, column_level = _fill((kernel + rows[..., None]).logsumexp(1), mass)
        log_rows = (kernel + new_columns[:, None]).logsumexp(2)
        new_rows, new_level = _fill(log_rows, mass)
        moved = ((new_rows + new_level + log_rows).exp() - (rows + column_level + log_rows).exp()).abs().sum(1)
        going = ~has_settled[:, None]
        rows, columns = torch.where(going, new_rows, rows), torch.where(going, new_columns, columns)
        level = torch.where(going, new_level, level)
        is_still = (moved <= tolerance * mass)[:, None]
        has_settled |= (is_still & (smoothing == regularisation))[:, 0]
        if has_settled.all():
            break
        next_smoothing = torch.where(is_still & going, (smoothing / ANNEALING).clamp_min(regularisation), smoothing)
        rows, columns = rows * (smoothing / next_smoothing), columns * (smoothing / next_smoothing)
        smoothing = next_smoothing
    return (level[..., None] + rows[..., None] + columns[:, None] - cost / smoothing[..., None]).exp(), has_settled


def _fill(log_masses: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale masses (problems, B), given as logarithms, so that cut off at 1/B they add up to `mass`.

    Returns how much each is cut, (problems, B) and at most 0, and the scale, (problems, 1), in logarithms. If the
    largest q are cut, the others must make up mass - q/B; q is the smallest number that leaves none of them too large.
    """
    size = log_masses.shape[1]
    most = math.ceil(mass * size - WHOLE)
    ordered = log_masses.sort(1, descending=True).values
    others = ordered.flip(1).logcumsumexp(1).flip(1)[:, :most]
    levels = torch.log(mass - torch.arange(most, dtype=torch.float64) / size).to(ordered) - others
    fits = levels + ordered[:, :most] <= -math.log(size)
    fits[:, -1] = True
    level = levels.gather(1, fits.byte().argmax(1, keepdim=True))
    return (-math.log(size) - level - log_masses).clamp_max(0), level


def _round_plan(plan: torch.Tensor, mass: float) -> torch.Tensor:
    """The plans (problems, B, B') cut where rows or columns are too full, what was cut put where there is room."""
    for axis in (2, 1):
        sums = plan.sum(axis, keepdim=True)
        plan = plan * (1 / plan.shape[3 - axis] / sums.clamp_min(torch.finfo(plan.dtype).tiny)).clamp_max(1)
    plan = plan * (mass / plan.sum((1, 2), keepdim=True)).clamp_max(1)
    row_room, column_room = ((1 / plan.shape[3 - a] - plan.sum(a, keepdim=True)).clamp_min(0) for a in (2, 1))
    missing = (mass - plan.sum((1, 2), keepdim=True)).clamp_min(0)
    room = row_room.sum((1, 2), keepdim=True) * column_room.sum((1, 2), keepdim=True)
    return plan + missing * row_room * column_room / room.clamp_min(torch.finfo(plan.dtype).tiny)


def _check_plan_input(cost: torch.Tensor, mass: float) -> None:
    if not isinstance(cost, torch.Tensor) or not cost.is_floating_point():
        found = str(cost.dtype) if isinstance(cost, torch.Tensor) else type(cost).__name__
        raise ValueError(f"cost is {found}; pass a torch tensor of a floating-point dtype")
    if cost.ndim < 2 or cost.numel() == 0:
        raise ValueError(f"cost has shape {tuple(cost.shape)}; pass a matrix (B, B') with at least one row and column")
    if not torch.isfinite(cost).all():
        raise ValueError("cost holds NaN or infinite entries; if they come from a model, lower its learning rate")
    if not 0 < mass <= 1:
        raise ValueError(f"mass is {mass}; choose the share of samples to transport in (0, 1], e.g. 1 - noise rate")
