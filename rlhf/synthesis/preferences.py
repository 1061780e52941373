"""Preferences between a model's own answers: sampled, ranked by rewards, the best set against a worse one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tqdm import tqdm

from rlhf.data.formats import Row, completion_text, with_id
from rlhf.errors import UserError
from rlhf.params.fields import Section
from rlhf.params.rewards import ModelReward, RewardMix, reads_reward_model
from rlhf.params_file import load_sections
from rlhf.policies.ranking import best_and_worst, fits_when_read, is_better, shape_answer
from rlhf.policies.rollout import score_answers
from rlhf.rewards.building import build_rewards
from rlhf.scoring import Reward, check_rows, find_reward_model
from rlhf.synthesis.speaker import ModelSpeaker
from rlhf.synthesis.tally import Tally

PROMPTS_AT_A_TIME = 32
"""Prompts between two looks at the file; no parameter, as the luck of an answer depends on its place among them."""

AGAINST = ("worst", "random")
"""The last of all, or by lot one of those that are worse."""


@dataclass(frozen=True)
class PreferenceSettings:
    """How many answers per prompt, of how many tokens at most, and which of AGAINST the best one meets."""

    samples: int
    against: str
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Accounts:
    """What became of the prompts and of the answers: made = kept + left out, for each."""

    prompts: Tally
    answers: Tally


class Ranking(Section):
    """The file of `--rank`: the map of rewards that policies have in params.yaml."""

    rewards: RewardMix


@dataclass(frozen=True)
class RankingFiles:
    """What rewards may read: the model's tokenizer, the reward model, and paths relative to the working folder."""

    sft: Path
    reward: Path
    root: Path = Path()


def load_ranking(rank: Path | None, reward_model: str | None, model: str, batch_size: int) -> list[Reward]:
    """The rewards of a file, or the reward model alone where there is none.

    Raises UserError where neither is given, where the file asks for a reward model and none is given, or the other way
    round, and as `build_rewards`.
    """
    if rank is None and reward_model is None:
        raise UserError(
            "nothing ranks the answers; name rewards with --rank FILE or a reward model with --reward-model"
        )
    alone: RewardMix = {"reward_model": ModelReward(kind="reward_model", weight=1.0)}
    mix = load_sections(rank, Ranking).rewards if rank else alone
    if reads_reward_model(mix) and reward_model is None:
        raise UserError(f"{rank} has a reward of kind reward_model; name its folder with --reward-model")
    if reward_model is not None and not reads_reward_model(mix):
        raise UserError(f"{rank} has no reward of kind reward_model; add one, or leave out --reward-model")
    folder = find_reward_model(reward_model) if reward_model else Path()
    return build_rewards(mix, RankingFiles(Path(model), folder), batch_size)


def make_preferences(
    rows: Sequence[Row],
    speaker: ModelSpeaker,
    rewards: Sequence[Reward],
    settings: PreferenceSettings,
    accounts: Accounts,
) -> Iterator[Row]:
    """Pairs, one per prompt at most, in the order of the prompts; `accounts` are complete once the iterator ends.

    Raises UserError for fewer than two answers per prompt, where the context has room for no prompt, and as the
    rewards do.
    """
    if settings.samples < 2:
        raise UserError(f"--samples is {settings.samples}, but a pair takes two answers; give 2 or more")
    if settings.against not in AGAINST:
        raise UserError(f"--against is {settings.against!r}; give {' or '.join(AGAINST)}")
    fitting = []
    for row in rows:
        if speaker.fits(row["prompt"], settings.max_new_tokens):
            fitting.append(row)
        else:
            accounts.prompts.drop(completion_text(row["prompt"]), "longer_than_context")
    if not fitting:
        raise UserError(
            f"the context of {speaker.name} ({speaker.context} tokens) holds none of the {len(rows)} prompts and the "
            f"{settings.max_new_tokens} tokens of --max-new-tokens; lower that, or name a model that reads more"
        )
    check_rows(rewards, fitting)
    with tqdm(total=len(fitting), desc="preferences", unit="prompt") as bar:
        for first in range(0, len(fitting), PROMPTS_AT_A_TIME):
            part = fitting[first : first + PROMPTS_AT_A_TIME]
            for ranked in _rank(part, _sample(part, speaker, settings, first), rewards, settings):
                bar.update()
                if pair := _settle(ranked, settings, accounts):
                    yield _row(pair, speaker.name, settings)


@dataclass(frozen=True)
class Answer:
    """One answer, in its prompt's form; `fault` where it may stand in no pair."""

    said: str | list[dict[str, str]]
    fault: str | None


def _sample(rows: list[Row], speaker: ModelSpeaker, settings: PreferenceSettings, first: int) -> list[list[Answer]]:
    """`samples` answers to each prompt; one that was cut off has a fault, as a trainer would end it there."""
    asked = [row["prompt"] for row in rows for _ in range(settings.samples)]
    answers = []
    for prompt, one in zip(asked, speaker.say(asked, settings.max_new_tokens, settings.seed + first), strict=True):
        said, fault = shape_answer(prompt, one.text), None
        if not one.ended:
            fault = "cut_off"
        elif not one.text.strip():
            fault = "empty"
        elif not fits_when_read(speaker.tokenizer, prompt, said, speaker.context):
            fault = "longer_than_context"
        answers.append(Answer(said, fault))
    return [answers[place : place + settings.samples] for place in range(0, len(answers), settings.samples)]


@dataclass(frozen=True)
class Ranked:
    """A prompt, its answers, and the rewards of the whole ones, in their order."""

    row: Row
    answers: list[Answer]
    scores: list[float]

    @property
    def whole(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.fault]


def _rank(
    rows: list[Row], answers: list[list[Answer]], rewards: Sequence[Reward], settings: PreferenceSettings
) -> Iterator[Ranked]:
    owners = [row for row, own in zip(rows, answers, strict=True) for answer in own if not answer.fault]
    said = [answer.said for own in answers for answer in own if not answer.fault]
    scores = iter(score_answers(owners, said, rewards)[0] if said else [])
    for row, own in zip(rows, answers, strict=True):
        yield Ranked(row, own, [next(scores) for answer in own if not answer.fault])


@dataclass(frozen=True)
class _Pair:
    ranked: Ranked
    chosen: int
    rejected: int


def _settle(ranked: Ranked, settings: PreferenceSettings, accounts: Accounts) -> _Pair | None:
    """The pair of a prompt, if there is one; books the prompt and each of its answers."""
    pair, reason = _choose(ranked, settings)
    for answer in ranked.answers:
        if answer.fault:
            accounts.answers.drop(completion_text(answer.said), answer.fault)
    for place, answer in enumerate(ranked.whole):
        if pair and place in (pair.chosen, pair.rejected):
            accounts.answers.keep()
        else:
            accounts.answers.drop(completion_text(answer.said), "not_in_the_pair" if pair else "without_a_pair")
    if reason:
        accounts.prompts.drop(completion_text(ranked.row["prompt"]), reason)
    else:
        accounts.prompts.keep()
    return pair


def _choose(ranked: Ranked, settings: PreferenceSettings) -> tuple[_Pair | None, str | None]:
    """A pair, or the reason why there is none."""
    places = range(len(ranked.scores))
    if len(places) < 2:
        return None, "fewer_than_two_whole_answers"
    if not (found := best_and_worst(ranked.scores, places)):
        return None, "equal_rewards"
    best, worst = found
    if settings.against == "random":
        worse = [place for place in places if is_better(ranked.scores[best], ranked.scores[place])]
        worst = Random(f"{settings.seed} {ranked.row['id']}").choice(worse)
    if ranked.whole[best].said == ranked.whole[worst].said:
        return None, "identical_answers"  # a batch rounds the scores of one text differently
    return _Pair(ranked, best, worst), None


def _row(pair: _Pair, model: str, settings: PreferenceSettings) -> Row:
    """The prompt's row with two answers and where they come from; rank 1 is the best of the whole answers."""
    row, scores = pair.ranked.row, pair.ranked.scores
    ranks = {
        place: 1 + sum(is_better(score, scores[place]) for score in scores) for place in (pair.chosen, pair.rejected)
    }
    return with_id(
        {
            **row,
            "chosen": pair.ranked.whole[pair.chosen].said,
            "rejected": pair.ranked.whole[pair.rejected].said,
            "margin": scores[pair.chosen] - scores[pair.rejected],
            "chosen_reward": scores[pair.chosen],
            "rejected_reward": scores[pair.rejected],
            "chosen_rank": ranks[pair.chosen],
            "rejected_rank": ranks[pair.rejected],
            "answers_ranked": len(scores),
            "source_model": model,
            "sampled_at_temperature": settings.temperature,
        }
    )
