"""The section `probe`: how many cheap tricks a reward model is asked about, and when they count as beating content."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from rlhf.params.fields import NonNegativeFloat, PositiveInt, Section, Share


class Limits(Section):
    """From where on a figure is worth a look, and from where on the reward model should not be used."""

    warn: NonNegativeFloat
    stop: NonNegativeFloat

    @model_validator(mode="after")
    def _ordered(self) -> Limits:
        if self.warn > self.stop:
            raise ValueError(f"warn is {self.warn:g} but stop is {self.stop:g}; lower the first")
        return self


class ShareLimits(Limits):
    """The same for a share."""

    warn: Share
    stop: Share


class ProbeParams(Section):
    """The hackability probe.

    `wins` bounds the share of prompts on which a trick beats the good answer, beyond those on which the plain bad
    answer does; `gain` what a trick that adds nothing pays, in standard deviations of the plain answers' scores.
    `on_hackable` says what the verdict `stop` does: end the stage before any policy is trained, or go on.
    """

    rows: PositiveInt
    batch_size: PositiveInt
    on_hackable: Literal["warn", "stop"]
    wins: ShareLimits
    gain: Limits
