"""The audit of preference labels on its way out: one row per pair in audit.parquet, the worst of them on a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlhf.audit import rank_suspects
from rlhf.curves import rounded_number
from rlhf.neighbours import Contradictions
from rlhf.noise import NoiseEstimate
from rlhf.pages import open_templates
from rlhf.trust import Trust

if TYPE_CHECKING:
    import pyarrow

Action = Literal["keep", "drop", "relabel"]
ACTIONS: tuple[Action, ...] = ("keep", "drop", "relabel")
RELABEL_ABOVE = 0.9
"""A label is turned around rather than dropped where it is wrong with more probability than this."""
ROWS_SHOWN = 1000
"""So many of the most suspicious pairs are on the page; audit.parquet has all."""
CUT = 300
"""A neighbour's texts are cut to so many characters on the page."""


@dataclass(frozen=True)
class LabelAudit:
    """What is known of each pair, in the order of the data.

    `texts` and `figures` are columns by name (prompt, chosen, rejected; what training noted); `trust` and
    `contradictions` are None where nobody asked the other labels; `rate` is the noise rate used; `groupings` are
    sentences on columns by which labels are wrong together, where no groups were named.
    """

    ids: list[str]
    texts: dict[str, list[str]]
    figures: dict[str, np.ndarray]
    groups: list[str] | None
    trust: Trust | None
    contradictions: Contradictions | None
    rate: float
    estimate: NoiseEstimate | None
    left_out: int
    groupings: Sequence[str] = ()

    @cached_property
    def actions(self) -> list[Action]:
        """What to do with each label, [] without trust: keep up to .5, relabel above RELABEL_ABOVE, drop between."""
        if self.trust is None:
            return []
        return [
            "keep" if p <= 0.5 else "relabel" if p > RELABEL_ABOVE else "drop" for p in (1 - self.trust.right).tolist()
        ]

    def order(self) -> np.ndarray:
        """Positions of the pairs, the most suspicious first: by trust, without it by margin."""
        margins = self.figures.get("margin", np.zeros(len(self.ids)))
        return rank_suspects(margins, self.trust.right if self.trust else None)

    def suggested(self) -> dict[str, float]:
        """The share of pairs for each action."""
        counts = Counter(self.actions)
        return {f"audit_suggested_{action}": counts[action] / len(self.actions) for action in ACTIONS if self.actions}

    def columns(self) -> dict[str, list[Any]]:
        """Everything by pair, figures at six digits; columns of which nothing is known are not there."""
        columns: dict[str, list[Any]] = {"id": self.ids}
        if self.trust:
            columns |= {"action": list(self.actions), "wrong": _rounded(1 - self.trust.right)}
            columns |= {"called_wrong": _rounded(self.trust.called_wrong)}
        if self.contradictions:
            nearest = self.contradictions.nearest
            columns |= {"contradicting": self.contradictions.counts.tolist()}
            columns |= {"contradicting_ids": [[self.ids[place] for place in places] for places in nearest]}
        columns |= {name: _rounded(values) for name, values in self.figures.items()}
        if self.groups:
            columns |= {"group": self.groups}
        return columns | self.texts


def _rounded(values: np.ndarray) -> list[Any]:
    return rounded_number(values.astype(float).tolist())


def write_audit(folder: Path, audit: LabelAudit) -> None:
    """audit.parquet with all pairs, the most suspicious first; audit.html with the first ROWS_SHOWN in full."""
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    order = audit.order()
    # What pyarrow would choose by itself is written down, as the same audit must give the same bytes.
    pyarrow.parquet.write_table(
        tabulate(audit, order), folder / "audit.parquet", compression="zstd", version="2.6", row_group_size=10_000
    )
    (folder / "audit.html").write_text(_render(audit, order[:ROWS_SHOWN].tolist()), encoding="utf-8")


def tabulate(audit: LabelAudit, order: np.ndarray) -> pyarrow.Table:
    import pyarrow

    kinds = {"contradicting_ids": pyarrow.list_(pyarrow.string()), "contradicting": pyarrow.int32()}
    kinds |= {name: pyarrow.float64() for name in ("wrong", "called_wrong", *audit.figures)}
    arrays = {
        name: pyarrow.array([values[place] for place in order], kinds.get(name, pyarrow.string()))
        for name, values in audit.columns().items()
    }
    return pyarrow.table(arrays)


def sample_suspects(audit: LabelAudit, count: int) -> list[dict[str, Any]]:
    """The most suspicious pairs as flat rows."""
    columns = {name: values for name, values in audit.columns().items() if name != "contradicting_ids"}
    return [{name: values[place] for name, values in columns.items()} for place in audit.order()[:count]]


def _render(audit: LabelAudit, shown: list[int]) -> str:
    columns = audit.columns()
    pairs = []
    for place in shown:
        pair = {name: values[place] for name, values in columns.items()}
        near = audit.contradictions.nearest[place] if audit.contradictions else []
        pair["neighbours"] = [{name: _cut(texts[other]) for name, texts in audit.texts.items()} for other in near]
        pairs.append(pair)
    rates = audit.trust.rates if audit.trust and audit.groups else {}
    return (
        open_templates(Path(__file__).parent)
        .get_template("label_audit.html")
        .render(
            pairs=pairs,
            audit=audit,
            counts=Counter(audit.actions),
            rates=sorted(((n, r) for n, r in rates.items() if r > audit.rate), key=lambda one: (-one[1], one[0])),
            figures=[name for name in ("wrong", "called_wrong", "contradicting", *audit.figures) if name in columns],
            sides=[name for name in audit.texts if name != "prompt"],
        )
    )


def _cut(text: str) -> str:
    return text if len(text) <= CUT else text[:CUT].rstrip() + " …"
