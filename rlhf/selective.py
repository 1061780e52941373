"""The mathematics of selective reward modelling: exact partial optimal transport and the loss built on it."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import csr_array, eye_array, kron, vstack
from torch.nn.functional import softplus

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
    values = cost.detach().to("cpu", torch.float64).numpy()
    solve = _solve_square if values.shape[0] == values.shape[1] else _solve_rectangular
    return torch.from_numpy(solve(values, mass)).to(cost.device, cost.dtype)


def _check_plan_input(cost: torch.Tensor, mass: float) -> None:
    if not isinstance(cost, torch.Tensor) or not cost.is_floating_point():
        found = str(cost.dtype) if isinstance(cost, torch.Tensor) else type(cost).__name__
        raise ValueError(f"cost is {found}; pass a torch tensor of a floating-point dtype")
    if cost.ndim != 2 or cost.numel() == 0:
        raise ValueError(f"cost has shape {tuple(cost.shape)}; pass a matrix (B, B') with at least one row and column")
    if not torch.isfinite(cost).all():
        raise ValueError("cost holds NaN or infinite entries; if they come from a model, lower its learning rate")
    if not 0 < mass <= 1:
        raise ValueError(f"mass is {mass}; choose the share of samples to transport in (0, 1], e.g. 1 - noise rate")


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


def mass_schedule(epoch: float, warmup_epochs: float, ramp_epochs: float, noise_rate: float) -> float:
    """The mass at a (fractional) epoch: 1 while warming up, then linearly down to `1 - noise_rate`.

    A cold model cannot tell wrong labels from right ones and would drop samples at random; hence the ramp.
    """
    if epoch < warmup_epochs:
        return 1.0
    done = 1.0 if ramp_epochs == 0 else min(1.0, (epoch - warmup_epochs) / ramp_epochs)
    return 1.0 - noise_rate * done


def orient_batch(
    differences: torch.Tensor, margins: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""Turn pairs around at random, so that there are two kinds of labels.

    Every pair says "the first is better"; with equal labels the transport plan could only trim the largest losses.

    Parameters
    ----------
    differences : torch.Tensor, shape (B, D)
        Embedding of the chosen minus embedding of the rejected answer.
    margins : torch.Tensor, shape (B,)
        Reward of the chosen minus reward of the rejected answer.
    generator : torch.Generator
        Draws the orientations; on the CPU.

    Returns
    -------
    points : torch.Tensor, shape (B, D)
        First minus second answer, without gradient.
    logits : torch.Tensor, shape (B,)
        Of the first answer being better.
    labels : torch.Tensor, shape (B,)
        1 where the first answer is the chosen one, else -1.
    """
    labels = torch.randint(0, 2, (len(margins),), generator=generator).mul(2).sub(1).to(margins.device, margins.dtype)
    return differences.detach().to(margins.dtype) * labels[:, None], margins * labels, labels


def selective_loss(
    points: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    mass: float,
    label_weight: float,
    doubt: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The selective loss: labels that contradict predictions nearby are left out.

    For points :math:`z_i` with logits :math:`s_i` and labels :math:`y_i = \pm 1`

    .. math::
        S_{ij} = \|z_i - z_j\|^2 / \max S, \quad L_{ij} = BCE(\sigma(s_i), y_j) = \log(1 + e^{-y_j s_i}),
        \quad C_{ij} = S_{ij} + \kappa L_{ij} + u_j

    and the loss is :math:`\langle \gamma^*, S / \kappa + L \rangle / m`, with :math:`\gamma^*` the partial transport
    plan of :math:`C` and mass :math:`m`. By the envelope theorem the plan needs no gradient. :math:`S` gets none
    either: with embeddings that are trained it would be made small by moving all answers to one point. For
    :math:`m = 1` and a plan on the diagonal the loss is the mean of :math:`-\log \sigma(y_i s_i)`: of oriented pairs
    Bradley-Terry's, of ratings logistic regression's.

    Parameters
    ----------
    points : torch.Tensor, shape (B, D)
        Embeddings of rated answers, or oriented differences of pairs (`orient_batch`).
    logits : torch.Tensor, shape (B,)
        The model's prediction; its gradient is the loss's.
    labels : torch.Tensor, shape (B,)
        1 or -1.
    mass : float in (0, 1]
        Share of the batch that is kept.
    label_weight : float > 0
        :math:`\kappa`. Small: predictions are matched with their own labels and the loss is small-loss trimming. Large:
        they are matched with whatever label agrees, near or far.
    doubt : torch.Tensor, shape (B,), or None for zeros
        :math:`u`, what is known against a label from elsewhere, in nats (rlhf.trust); it only steers the plan.

    Returns
    -------
    loss : torch.Tensor, scalar
    kept : torch.Tensor, shape (B,)
        Share of each label that the plan uses, between 0 (left out) and 1, without gradient.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, or `mass` or `label_weight` is out of range.

    References
    ----------
    .. [1] Pan et al. (2026). Optimal Transport for LLM Reward Modeling from Noisy Preference. arXiv 2605.06036;
       pointwise; the pairwise form and the doubt are this project's (docs/methods/selectiverm.md).
    """
    _check_loss_input(points, logits, labels, label_weight, doubt)
    semantic = _semantic_cost(points.detach())
    label = softplus(-labels[None, :] * logits[:, None])
    cost = semantic + label_weight * label.detach()
    plan = transport_plan(cost if doubt is None else cost + doubt.to(cost), mass)
    loss = (plan * (semantic / label_weight + label)).sum() / mass
    return loss, len(logits) * plan.sum(0)


def _check_loss_input(
    points: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, label_weight: float, doubt: torch.Tensor | None
) -> None:
    if doubt is not None and doubt.shape != logits.shape:
        raise ValueError(f"doubt has shape {tuple(doubt.shape)}, logits {tuple(logits.shape)}; pass one per sample")
    if points.ndim != 2 or logits.shape != points.shape[:1] or labels.shape != logits.shape:
        raise ValueError(
            f"points {tuple(points.shape)}, logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit; "
            "pass (B, D), (B,) and (B,) of the same batch"
        )
    if not (label_weight > 0 and np.isfinite(label_weight)):
        raise ValueError(f"label_weight is {label_weight}; choose a positive number, e.g. 1")


def _semantic_cost(points: torch.Tensor) -> torch.Tensor:
    """Squared distances of (B, D) points, divided by the largest; exactly 0 on the diagonal."""
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    largest = distances.max()
    return distances / largest if largest > 0 else distances
