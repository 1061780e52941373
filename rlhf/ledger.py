"""The token ledger: what became of every row on its way into a training, and how long rows are in tokens."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf.curves import write_json
from rlhf.data.formats import Row
from rlhf.encoding import Reading
from rlhf.errors import UserError
from rlhf.params import LedgerParams

EXAMPLES = 3
"""Row ids kept for each reason, to be named."""
QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Limit:
    """How many tokens a sequence may have, the params that say so, and whether a longer one may be cut."""

    tokens: int
    reason: str
    is_cuttable: bool = False


@dataclass
class Account:
    """One file's rows: read = used + dropped for one reason each. Of those used some are cut or lack an end token."""

    limit: int
    read: int = 0
    used: int = 0
    truncated: int = 0
    without_end: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def lost_share(self) -> float:
        """Of the rows read, those left out or cut."""
        return (self.dropped.total() + self.truncated) / self.read if self.read else 0.0

    def drop(self, row: str, reason: str) -> None:
        self.dropped[reason] += 1
        self._remember(row, reason)

    def use(self, reading: Reading, is_cut: bool, end: int | None) -> None:
        self.used += 1
        self.without_end += any(end not in answer for answer in reading.answers)
        if is_cut:
            self.truncated += 1
            self._remember(reading.row, "truncated")

    def _remember(self, row: str, reason: str) -> None:
        rows = self.examples.setdefault(reason, [])
        if len(rows) < EXAMPLES:
            rows.append(row)

    def figures(self) -> dict[str, Any]:
        """Counts, and quantiles of the rows' tokens."""
        return {
            "read": self.read,
            "used": self.used,
            "truncated": self.truncated,
            "without_end_token": self.without_end,
            "dropped": dict(sorted(self.dropped.items())),
            "limit": self.limit,
            "tokens": {f"p{share * 100:g}": self.quantile(share) for share in QUANTILES} if self.read else {},
        }

    def quantile(self, share: float) -> int:
        """The smallest length that at least `share` of the rows do not exceed."""
        seen = 0
        for length in sorted(self.lengths):
            seen += self.lengths[length]
            if seen >= share * self.read:
                return length
        raise ValueError("there are no rows")


class Ledger:
    """Lets rows into a training and accounts for each, one account per file, by name."""

    def __init__(self, settings: LedgerParams) -> None:
        self.settings = settings
        self.accounts: dict[str, Account] = {}

    def admit(self, name: str, readings: Iterable[Reading], limit: Limit, tokenizer: Any) -> list[Reading]:
        """The rows that fit, in order; cut where the settings say so and the limit allows it.

        A row is left out as `too_long`, as `nothing_trainable` where no token of an answer is left, or as `identical`
        where the answers of a pair are the same tokens.
        Raises UserError for a row too long under `on_too_long: raise`, for more rows lost than `max_lost_share`, and
        for a sequence that begins with the begin token twice: then the chat template and the tokenizer both write it.
        """
        account = self.accounts[name] = Account(limit.tokens)
        admitted = [kept for reading in readings if (kept := self._admit_one(account, name, reading, limit, tokenizer))]
        if account.lost_share > self.settings.max_lost_share:
            raise UserError(
                f"{name}: {account.dropped.total()} of {account.read} rows are left out and {account.truncated} cut "
                f"({_reasons(account)}; {limit.reason}), above ledger.max_lost_share "
                f"{self.settings.max_lost_share:g}; raise the limit, mend the rows, or raise that share"
            )
        return admitted

    def admit_rows(
        self, name: str, rows: Iterable[Row], readings: Iterable[Reading], limit: Limit, tokenizer: Any
    ) -> list[Row]:
        """The rows of the readings that `admit` lets in."""
        kept = {reading.row for reading in self.admit(name, readings, limit, tokenizer)}
        return [row for row in rows if row["id"] in kept]

    def _admit_one(self, account: Account, name: str, reading: Reading, limit: Limit, tokenizer: Any) -> Reading | None:
        account.read += 1
        account.lengths[reading.length] += 1
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        if begin is not None and any(ids[:2] == [begin, begin] for ids in reading.sequences):
            raise UserError(
                f"row {reading.row} of {name} begins with the token {tokenizer.bos_token} twice: the chat template "
                "writes it and the tokenizer adds it; take it out of the template, or set prepare.chat_template: plain"
            )
        is_long = reading.length > limit.tokens
        if is_long and self.settings.on_too_long == "raise":
            raise UserError(
                f"row {reading.row} of {name} is {reading.length} tokens long, {limit.reason}; "
                "raise the limit, shorten the row, or set ledger.on_too_long to drop"
            )
        if is_long and (self.settings.on_too_long == "drop" or not limit.is_cuttable):
            return account.drop(reading.row, "too_long")
        if is_long:
            reading = replace(reading, sequences=tuple(ids[: limit.tokens] for ids in reading.sequences))
        if not all(reading.answers):
            return account.drop(reading.row, "nothing_trainable")
        if len(set(map(tuple, reading.sequences))) < len(reading.sequences):
            return account.drop(reading.row, "identical")
        account.use(reading, is_long, end)
        return reading

    def write(self, folder: Path) -> dict[str, Any]:
        """Write ledger.json, lengths.csv and lengths.png; returns the figures of every account."""
        figures = {name: account.figures() for name, account in self.accounts.items()}
        shown = {name: {**figures[name], "examples": account.examples} for name, account in self.accounts.items()}
        write_json(folder / "ledger.json", shown)
        with (folder / "lengths.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["file", "tokens", "rows"])
            for name, account in self.accounts.items():
                writer.writerows([name, length, account.lengths[length]] for length in sorted(account.lengths))
        draw_lengths(folder / "lengths.png", self.accounts)
        return figures


def _reasons(account: Account) -> str:
    counts = {**account.dropped, **({"truncated": account.truncated} if account.truncated else {})}
    return "; ".join(f"{reason} {counts[reason]}, such as {' '.join(account.examples[reason])}" for reason in counts)


def draw_lengths(path: Path, accounts: Mapping[str, Account]) -> None:
    """How many rows have how many tokens, a panel per file, with its limit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * max(1, len(accounts)), 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(accounts)), squeeze=False)[0]
    for axis, (name, account) in zip(axes, accounts.items(), strict=False):
        lengths = sorted(account.lengths)
        weights = [account.lengths[length] for length in lengths]
        axis.hist(lengths, bins=min(50, max(1, len(lengths))), weights=weights, color="C0")
        axis.axvline(account.limit, color="C3", linewidth=1, linestyle="--")
        axis.set(title=f"{name}: {account.used} of {account.read} rows used", xlabel="tokens", ylabel="rows")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
