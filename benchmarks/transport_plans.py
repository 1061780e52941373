r"""How long plans take: the exact one, POT's and scipy's own, and the entropic ones, on the same costs.

Each cost is a batch of random points with labels, 40 % of them against the prediction; `gap` is the mean cost of a
matched pair above the exact plan's, in percent of it.

    OMP_NUM_THREADS=1 python benchmarks/transport_plans.py [--sizes 512 1024 2048] [--device cuda]
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable

import numpy as np
import ot
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import softplus

from rlhf.transport import entropic_plan, transport_plan

KEPT, LABEL_WEIGHT, DIMENSIONS = 0.625, 0.1, 384
"""The mass makes a whole number of pairs of every size that 8 divides."""
REGULARISATIONS = (0.05, 0.01)
POT_ITERATIONS = 200
"""More would take minutes; POT does not say whether it has converged."""


def draw_cost(size: int) -> torch.Tensor:
    """(size, size) in float64: points of five topics of different width, predictions that are mostly right."""
    generator = torch.Generator().manual_seed(0)
    topics = torch.randint(0, 5, (size,), generator=generator)
    centres = torch.randn(5, DIMENSIONS, generator=generator, dtype=torch.float64)
    spread = torch.randn(size, DIMENSIONS, generator=generator, dtype=torch.float64) * (0.2 + 0.2 * topics[:, None])
    points = centres[topics] + spread
    logits = 2 * torch.randn(size, generator=generator, dtype=torch.float64)
    wrong = torch.rand(size, generator=generator) < 0.4
    labels = torch.where(wrong, -logits.sign(), logits.sign())
    semantic = torch.cdist(points, points).square().fill_diagonal_(0)
    return semantic / semantic.max() + LABEL_WEIGHT * softplus(-labels * logits[:, None])


def solve_padded(cost: torch.Tensor) -> torch.Tensor:
    """Scipy alone: rows and columns that are left out go to dummies at no cost, which may not meet."""
    size, spare = len(cost), len(cost) - round(KEPT * len(cost))
    padded = np.zeros((size + spare, size + spare))
    padded[:size, :size] = cost
    padded[size:, size:] = 2 * size * cost.max()
    rows, columns = linear_sum_assignment(padded)
    is_real = (rows < size) & (columns < size)
    plan = torch.zeros_like(cost)
    plan[rows[is_real], columns[is_real]] = 1 / size
    return plan


def solve_pot(cost: torch.Tensor, regularisation: float | None = None) -> torch.Tensor:
    """POT, exact or entropic."""
    masses = np.full(len(cost), 1 / len(cost))
    if regularisation is None:
        plan = ot.partial.partial_wasserstein(masses, masses, cost.numpy(), m=KEPT)
    else:
        plan = ot.partial.entropic_partial_wasserstein(
            masses, masses, cost.numpy(), regularisation, m=KEPT, numItermax=POT_ITERATIONS, stopThr=1e-6
        )
    return torch.from_numpy(np.asarray(plan))


def main() -> None:
    """Print a row per solver and size: milliseconds, the smallest of the runs, the gap and the broken constraints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--device", default="cpu", help="of the entropic plans")
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig()
    warnings.simplefilter("ignore", UserWarning)  # POT's on convergence, which it gives only for the exact solver
    print("| plan | B | ms | gap, % | overfull, % |\n|---|---|---|---|---|")
    for size in options.sizes:
        cost = draw_cost(size)
        exact = (transport_plan(cost, KEPT) * cost).sum().item()
        for name, solve in _solvers(options.device).items():
            seconds, plan = [], cost
            for _ in range(options.runs):
                start = time.perf_counter()
                plan = solve(cost)
                seconds.append(time.perf_counter() - start)
            gap = (plan * cost).sum().item() / exact - 1
            sums = torch.stack([plan.sum(0), plan.sum(1)])
            overfull = (sums - 1 / size).clamp_min(0).sum(1).max().item() / KEPT + abs(plan.sum().item() / KEPT - 1)
            print(
                f"| {name} | {size} | {1e3 * min(seconds):.3g} | {100 * gap:.2g} | {100 * overfull:.1g} |", flush=True
            )


def _solvers(device: str) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    solvers: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "exact, `transport_plan`": lambda cost: transport_plan(cost, KEPT),
        "exact, POT": solve_pot,
        "exact, scipy with dummies": solve_padded,
    }
    for value in REGULARISATIONS:
        for dtype in (torch.float64, torch.float32):
            solvers[f"ε = {value}, `entropic_plan`, {str(dtype)[6:]}"] = lambda cost, value=value, dtype=dtype: (
                entropic_plan(cost.to(device, dtype), KEPT, value).to(cost)
            )
        solvers[f"ε = {value}, POT"] = lambda cost, value=value: solve_pot(cost, value)
    return solvers


if __name__ == "__main__":
    main()
