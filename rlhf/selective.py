"""The selective loss: what a label costs whom, and the partial transport plan that decides which labels are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize, softplus

from rlhf.transport import entropic_plan, transport_plan

if TYPE_CHECKING:  # only for its name: the loss itself needs torch, numpy and scipy alone
    from rlhf.params import TransportParams

LOCAL_NEIGHBOUR = 7
"""A point's own scale is its distance to this neighbour; the value of Zelnik-Manor and Perona (2004)."""
REVERSE_WEIGHT = 4.0
"""Minus what the logarithm of 0 is clipped to in the reverse cross entropy."""

LABEL_COSTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cross_entropy": softplus,
    "absolute": torch.sigmoid,
    "symmetric": lambda against: softplus(against) + REVERSE_WEIGHT * torch.sigmoid(against),
}
"""Of the logit against a label, -y s: -log σ(y s), σ(-y s) = |σ(s) - (y + 1)/2|, and cross entropy both ways round."""


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
    transport: TransportParams,
    doubt: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The selective loss: labels that contradict predictions nearby are left out.

    For points :math:`z_i` with logits :math:`s_i` and labels :math:`y_i = \pm 1`

    .. math::
        S_{ij} = \|z_i - z_j\|^2 / \max S, \quad L_{ij} = BCE(\sigma(s_i), y_j) = \log(1 + e^{-y_j s_i}),
        \quad C_{ij} = S_{ij} + \kappa L_{ij} + u_j + p [i = j]

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
    transport : TransportParams
        :math:`\kappa` (`label_weight`), which distance :math:`S` is and what divides it, which cost :math:`L` is, the
        price :math:`p` of a self-match, among how many neighbours a label may go (all if None), and the regularisation
        of the plan (exact if None). Small :math:`\kappa`: predictions are matched with their own labels and the loss
        is small-loss trimming. Large: they are matched with whatever label agrees, near or far.
    doubt : torch.Tensor, shape (B,), or None for zeros
        :math:`u`, what is known against a label from elsewhere, in nats (rlhf.trust). Like :math:`p` and the
        neighbours it only steers the plan.

    Returns
    -------
    loss : torch.Tensor, scalar
    kept : torch.Tensor, shape (B,)
        Share of each label that the plan uses, between 0 (left out) and 1, without gradient.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is not finite, or `mass` is out of range.

    References
    ----------
    .. [1] Pan et al. (2026). Optimal Transport for LLM Reward Modeling from Noisy Preference. arXiv 2605.06036;
       pointwise; the pairwise form, the doubt and the other costs are this project's (docs/methods/selectiverm.md).
    .. [2] Zelnik-Manor, L. and Perona, P. (2004). Self-tuning spectral clustering. NeurIPS 17. The local scale.
    .. [3] Wang et al. (2019). Symmetric cross entropy for robust learning with noisy labels. ICCV.
    """
    _check_loss_input(points, logits, labels, doubt)
    semantic = _semantic_cost(points.detach(), transport)
    label = LABEL_COSTS[transport.label_cost](-labels[None, :] * logits[:, None])
    cost = semantic + transport.label_weight * label.detach()
    plan = _plan(cost if doubt is None else cost + doubt.to(cost), semantic, mass, transport)
    loss = (plan * (semantic / transport.label_weight + label)).sum() / mass
    return loss, len(logits) * plan.sum(0)


def _check_loss_input(
    points: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, doubt: torch.Tensor | None
) -> None:
    if doubt is not None and doubt.shape != logits.shape:
        raise ValueError(f"doubt has shape {tuple(doubt.shape)}, logits {tuple(logits.shape)}; pass one per sample")
    if points.ndim != 2 or logits.shape != points.shape[:1] or labels.shape != logits.shape:
        raise ValueError(
            f"points {tuple(points.shape)}, logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit; "
            "pass (B, D), (B,) and (B,) of the same batch"
        )


def _semantic_cost(points: torch.Tensor, transport: TransportParams) -> torch.Tensor:
    """Distances of (B, D) points, squared or 1 - cos, on the chosen scale; exactly 0 between equal points."""
    if transport.semantic_cost == "cosine":
        # Between unit vectors this is half the squared distance; a vector of zeros is 1/2 away from all others.
        distances = _square_distances(normalize(points)) / 2
    else:
        distances = _square_distances(points)
    largest = distances.max()
    if not largest > 0:
        return distances
    if transport.scale == "max":
        return distances / largest
    # Hardly different points must not become infinitely different ones.
    smallest = torch.finfo(distances.dtype).eps * largest
    if transport.scale == "median":
        return distances / distances[distances > 0].median().clamp_min(smallest)
    own = _neighbour_distances(distances).clamp(smallest, largest).sqrt()
    return distances / (own[:, None] * own[None, :])


def _square_distances(points: torch.Tensor) -> torch.Tensor:
    """By the scalar products: several times as fast as by differences, and in double precision as exact as they."""
    products = points.double() @ points.double().T
    squares = products.diagonal()
    distances = squares[:, None] + squares[None, :] - 2 * products
    # What rounding leaves of equal points.
    return torch.where(distances > 1e-12 * squares.max(), distances, 0.0).to(points.dtype)


def _neighbour_distances(distances: torch.Tensor) -> torch.Tensor:
    """(B,) distance of each point to its LOCAL_NEIGHBOUR-th neighbour, or the last, not counting points equal to it."""
    ordered = distances.masked_fill(distances == 0, torch.inf).sort(1).values
    rank = (distances > 0).sum(1, keepdim=True).clamp(1, LOCAL_NEIGHBOUR)
    return ordered.gather(1, rank - 1).squeeze(1)


def _plan(cost: torch.Tensor, semantic: torch.Tensor, mass: float, transport: TransportParams) -> torch.Tensor:
    if transport.self_match_penalty > 0:
        cost = cost + transport.self_match_penalty * torch.eye(len(cost), dtype=cost.dtype, device=cost.device)
    if transport.neighbours is not None:
        cost = _forbid_strangers(cost, semantic, transport.neighbours)
    if transport.regularisation is None:
        return transport_plan(cost, mass)
    return entropic_plan(cost, mass, transport.regularisation)


def _forbid_strangers(cost: torch.Tensor, semantic: torch.Tensor, neighbours: int) -> torch.Tensor:
    """The cost with a price on labels other than a point's own and those of its nearest neighbours.

    The own labels alone make a plan of any mass, so that a price of more than all of them together is never paid.
    """
    nearest = semantic.clone().fill_diagonal_(-1).argsort(dim=1, stable=True)[:, : neighbours + 1]
    is_stranger = torch.ones_like(cost, dtype=torch.bool).scatter(1, nearest, False)
    return cost + 2 * len(cost) * (cost.max() - cost.min() + 1) * is_stranger
