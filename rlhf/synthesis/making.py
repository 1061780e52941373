"""The two tools whole: read, make, write as it goes, report."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rlhf.data.formats import Row
from rlhf.errors import UserError
from rlhf.scoring import Reward
from rlhf.synthesis.files import growing_file
from rlhf.synthesis.instructions import InstructionSettings, make_instructions
from rlhf.synthesis.preferences import Accounts, PreferenceSettings, make_preferences
from rlhf.synthesis.report import instruction_bias, preference_bias, write_report
from rlhf.synthesis.speaker import ModelSpeaker, Speaker
from rlhf.synthesis.tally import Tally

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Made:
    """The rows, the folder of the reports, and the tallies by name."""

    rows: list[Row]
    folder: Path
    tallies: dict[str, Tally]


def write_instructions(seeds: list[Row], out: Path, speaker: Speaker, settings: InstructionSettings) -> Made:
    """Make instructions from seeds, with reports beside `out`.

    Raises UserError as `make_instructions`, and where no candidate is left.
    """
    tally = Tally()
    made = _write(out, make_instructions(seeds, speaker, settings, tally))
    folder = write_report(out, {"instructions": tally}, instruction_bias(seeds, made), made)
    if not made:
        raise UserError(
            f"none of {tally.made} candidates is left ({tally.describe()}; {folder}); "
            "name a more capable model, raise --tries or --list-tokens, or relax the filter that took most"
        )
    if len(made) < settings.count:
        logger.warning("%d of %d instructions after %d candidates (--tries)", len(made), settings.count, tally.made)
    return Made(made, folder, {"instructions": tally})


def write_preferences(
    prompts: list[Row], out: Path, speaker: ModelSpeaker, rewards: list[Reward], settings: PreferenceSettings
) -> Made:
    """Make preferences for prompts, with reports beside `out`.

    Raises UserError as `make_preferences`, and where no prompt has two whole answers with different rewards.
    """
    accounts = Accounts(Tally(), Tally())
    made = _write(out, make_preferences(prompts, speaker, rewards, settings, accounts))
    tallies = {"prompts": accounts.prompts, "answers": accounts.answers}
    folder = write_report(out, tallies, preference_bias(made), made)
    if not made:
        raise UserError(
            f"no prompt has two whole answers with different rewards ({accounts.prompts.describe()}; {folder}); "
            "raise --samples, --temperature or --max-new-tokens, or rank by a finer reward"
        )
    return Made(made, folder, tallies)


def _write(out: Path, rows: Iterable[Row]) -> list[Row]:
    """The rows, each written as soon as it is made."""
    made = []
    with growing_file(out) as write:
        for row in rows:
            write(row)
            made.append(row)
    return made
