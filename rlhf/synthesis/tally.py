"""What became of everything that was read or made: kept, or left out for one reason each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import brief

EXAMPLES = 3
"""Texts remembered for each reason."""


@dataclass
class Tally:
    """made = kept + left out."""

    made: int = 0
    kept: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def keep(self, count: int = 1) -> None:
        self.made += count
        self.kept += count

    def drop(self, text: str, reason: str) -> None:
        self.made += 1
        self.left_out[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES:
            shown.append(brief(text, 160))

    def figures(self) -> dict[str, Any]:
        """The counts, the share of each reason, and examples."""
        return {
            "made": self.made,
            "kept": self.kept,
            "left_out": dict(sorted(self.left_out.items())),
            "shares": {reason: count / self.made for reason, count in sorted(self.left_out.items())},
            "examples": self.examples,
        }

    def describe(self) -> str:
        """The counts in a line."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.left_out.most_common())
        return f"{self.made} made, {self.kept} kept" + (f"; left out: {reasons}" if reasons else "")
