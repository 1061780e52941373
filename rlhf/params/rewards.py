"""The section `rewards` of a policy: a map of names to rewards, each of a `kind`, with its weight and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, model_validator
from pydantic import Tag as Member

from rlhf.params.fields import Key, PositiveFloat, PositiveInt, Section, Share

Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
File = Annotated[str, Field(min_length=1)]
"""A path relative to the repository's root, or an absolute one."""


class Tag(Section):
    """What opens a block and what closes it, such as `<SOLUTION>` and `</SOLUTION>`."""

    open: Text
    close: Text

    @model_validator(mode="after")
    def _differ(self) -> Tag:
        if self.open == self.close:
            raise ValueError(f"open and close are both {self.open!r}; give two different tags")
        return self


BY_TYPE = Discriminator(lambda value: "name" if isinstance(value, str) else "tag")
"""A name or a Tag, so that a wrong value has one fault and not one for either."""
_Tag = Annotated[Tag, Member("tag")]

Place = Annotated[Annotated[Literal["form", "answer_tag", "boxed", "hashes", "text"], Member("name")] | _Tag, BY_TYPE]
"""Where an answer stands: in the form `<think>…</think><answer>…</answer>` that is the whole text; in the last
`<answer>…</answer>`, `\\boxed{…}` or block of a tag of one's own; behind the last `####`; or it is the whole text."""

_Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$"), Member("name")]
Blocks = Annotated[list[Annotated[_Name | _Tag, BY_TYPE]], Field(min_length=1)]
"""The blocks of a form in their order: `think` stands for `<think>…</think>`, a Tag for itself."""


class Weight(Section):
    """How much a reward counts in the sum."""

    weight: Number


# by a model ---------------------------------------------------------------------------------------


class ModelReward(Weight):
    """The score of the reward model of the stage `reward`."""

    kind: Literal["reward_model"]


class ClassifierReward(Weight):
    """The probability or the logit of one label of a text classifier: sentiment, toxicity.

    `model` is a folder or a hub id; `label` its name or its place in the classifier's list; `reads` the answer alone,
    or the prompt before it.
    """

    kind: Literal["classifier"]
    model: File
    label: Annotated[int, Field(ge=0)] | Text
    output: Literal["probability", "logit"]
    reads: Literal["answer", "prompt_and_answer"]


# answers ------------------------------------------------------------------------------------------


class AnswerReward(Weight):
    """1 for the right number or text, else 0."""

    kind: Literal["answer"]
    answer_in: Place


class Band(Section):
    """The points of a number that is off by at most the share `within` of the right one."""

    within: Annotated[float, Field(gt=0, lt=1)]
    points: Number


class NumberReward(Weight):
    """Partial credit: `exact` for the very text, `same` for the same number, then by bands; else `wrong`, `missing`."""

    kind: Literal["number"]
    answer_in: Place
    exact: Number
    same: Number
    bands: list[Band]
    wrong: Number
    missing: Number

    @model_validator(mode="after")
    def _ordered(self) -> NumberReward:
        for inner, outer in pairwise(self.bands):
            if inner.within >= outer.within:
                raise ValueError(
                    f"bands has within {inner.within} before {outer.within}, which never counts; put the narrow first"
                )
        return self


class MathReward(Weight):
    """1 where the answer is mathematically equal to the right one, else 0; a comparison may take `seconds`."""

    kind: Literal["math"]
    answer_in: Place
    seconds: PositiveFloat


class IntegerReward(Weight):
    """1 where the answer is a whole number, right or wrong, else 0."""

    kind: Literal["integer"]
    answer_in: Place


# forms --------------------------------------------------------------------------------------------


class FormatReward(Weight):
    """1 where the blocks stand in order, else 0.

    `whole`: nothing but white space around them, and each tag once; `lines`: each tag on a line of its own as well;
    `somewhere`: anywhere in the answer.
    """

    kind: Literal["format"]
    blocks: Blocks
    form: Literal["whole", "lines", "somewhere"]


class TagCountReward(Weight):
    """The share of the tags that stand exactly once, less `trailing` for each character behind the last of them."""

    kind: Literal["tag_count"]
    blocks: Blocks
    trailing: Share


class TagPointsReward(Weight):
    """The sum over the tags of `once` for one that stands exactly once, else of `otherwise`."""

    kind: Literal["tag_points"]
    blocks: Blocks
    once: Number
    otherwise: Number


# text ---------------------------------------------------------------------------------------------


class _Band(Weight):
    unit: Literal["characters", "tokens"]
    shortest: PositiveInt
    longest: PositiveInt

    @model_validator(mode="after")
    def _ends_ordered(self) -> Self:
        if self.shortest > self.longest:
            raise ValueError(f"shortest is {self.shortest} but longest is {self.longest}; swap them")
        return self


class LengthReward(_Band):
    """1 within the band, falling linearly to 0 at half and at twice the band's ends."""

    kind: Literal["length"]


class LengthStepsReward(_Band):
    """`too_short` below the band, `too_long` above, `ideal` up to twice the shortest, `inside` elsewhere in it."""

    kind: Literal["length_steps"]
    too_short: Number
    ideal: Number
    inside: Number
    too_long: Number


class LanguageReward(Weight):
    """The share of letters in the target language's script."""

    kind: Literal["language"]
    target: Literal["en", "zh"]


class LanguageStepsReward(Weight):
    """1 where the share of letters in the target's script is above `much`, 0 where it is above `little`, else −1."""

    kind: Literal["language_steps"]
    target: Literal["en", "zh"]
    much: Share
    little: Share

    @model_validator(mode="after")
    def _ordered(self) -> LanguageStepsReward:
        if self.little > self.much:
            raise ValueError(f"little is {self.little} but much is {self.much}; swap them")
        return self


class KeywordsReward(Weight):
    """The share of `wanted` that occur less the share of `forbidden` that occur."""

    kind: Literal["keywords"]
    wanted: list[Text]
    forbidden: list[Text]

    @model_validator(mode="after")
    def _not_empty(self) -> KeywordsReward:
        if not self.wanted and not self.forbidden:
            raise ValueError("wanted and forbidden are both empty; name a word in one of them")
        return self


class RepetitionReward(Weight):
    """Minus the share of n-grams of `ngram` words that stood in the answer before."""

    kind: Literal["repetition"]
    ngram: PositiveInt


class RefusalReward(Weight):
    """−1 for an answer that refuses, else 0."""

    kind: Literal["refusal"]


class ApologyReward(Weight):
    """−1 for an answer that apologises, else 0."""

    kind: Literal["apology"]


# execution and one's own --------------------------------------------------------------------------


class SQLReward(Weight):
    """1 where the query gives the rows that the one in `answer` gives, `runs` where it only executes, else 0.

    `databases` is an SQLite file, or a folder of them in which the column `database` names one. A query may take
    `max_steps` instructions of SQLite's machine, `seconds`, and give `max_rows` rows. A right query that does not
    execute pays nothing to anyone; more than `max_failing_share` of them stop the training.
    """

    kind: Literal["sql"]
    answer_in: Place
    databases: File
    runs: Share
    max_steps: PositiveInt
    seconds: PositiveFloat
    max_rows: PositiveInt
    max_failing_share: Share


class FunctionReward(Weight):
    """A function `name(prompts, completions, **columns)` of one's own, in a Python file."""

    kind: Literal["function"]
    path: File
    name: Text


# mix ----------------------------------------------------------------------------------------------

RewardSection = Annotated[
    ModelReward
    | ClassifierReward
    | AnswerReward
    | NumberReward
    | MathReward
    | IntegerReward
    | FormatReward
    | TagCountReward
    | TagPointsReward
    | LengthReward
    | LengthStepsReward
    | LanguageReward
    | LanguageStepsReward
    | KeywordsReward
    | RepetitionReward
    | RefusalReward
    | ApologyReward
    | SQLReward
    | FunctionReward,
    Field(discriminator="kind"),
]


Gold = Annotated[
    Annotated[Literal["judge"], Member("name")] | Annotated[RewardSection, Member("tag")],
    BY_TYPE,
]
"""The judge, or a reward of a kind."""


def _named(rewards: dict[str, RewardSection]) -> dict[str, RewardSection]:
    if not rewards:
        raise ValueError("no reward is named; give at least one, such as answer: {kind: answer, …}")
    models = [name for name, section in rewards.items() if isinstance(section, ModelReward)]
    if len(models) > 1:
        raise ValueError(f"{' and '.join(models)} are the same reward model; give one of them both weights")
    return rewards


RewardMix = Annotated[dict[Key, RewardSection], AfterValidator(_named)]
"""The weighted sum a policy maximises, by the names under which its parts are logged."""


def reads_reward_model(rewards: Mapping[str, RewardSection]) -> bool:
    """Whether the reward model is among them."""
    return any(isinstance(section, ModelReward) for section in rewards.values())


def files_read(rewards: Mapping[str, RewardSection]) -> list[str]:
    """The files and folders (a classifier's may be a hub id) that rewards are made from, as params.yaml names them."""
    names: list[str] = []
    for section in rewards.values():
        match section:
            case ClassifierReward():
                names.append(section.model)
            case SQLReward():
                names.append(section.databases)
            case FunctionReward():
                names.append(section.path)
    return names


def inputs_read(rewards: Mapping[str, RewardSection], root: Path) -> list[Path]:
    """Those of them that are on this machine; relative paths begin at `root`."""
    return [path for name in files_read(rewards) if (path := root / name).exists()]
