"""Self-Instruct: from a few tasks a model makes more of them, with answers (Wang et al., arXiv 2212.10560)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from tqdm import tqdm

from rlhf.data.formats import Row, completion_text, is_conversational, with_id
from rlhf.data.quality.answers import holds, last_turn, make_plain
from rlhf.errors import UserError
from rlhf.synthesis.overlap import OverlapIndex, split_words
from rlhf.synthesis.speaker import Speaker
from rlhf.synthesis.tally import Tally
from rlhf.synthesis.wording import Demonstration, ask_for_answer, ask_for_tasks, read_answer, read_tasks

BANNED = ("audio", "diagram", "draw", "file", "image", "images", "link", "photo", "picture", "plot", "video", "website")
"""Words of tasks that a model of text cannot solve."""
SHOWN_SOLVED = 3
"""Seeds with answers before a task that a model without a chat template is to solve."""


@dataclass(frozen=True)
class InstructionSettings:
    """How many instructions, how many candidates at most, by which examples and which filters.

    `shortest` and `longest` are in words of the instruction, `list_tokens` and `answer_tokens` the longest list and
    answer that the model may write, `lists` how many lists it writes at a time.
    """

    count: int
    tries: int
    examples: int
    made_examples: int
    lists: int
    shortest: int
    longest: int
    banned: tuple[str, ...]
    overlap: float
    list_tokens: int
    answer_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Seed:
    """A task that is there at the outset."""

    id: str
    instruction: str
    answer: str


def read_seeds(rows: Sequence[Row]) -> list[Seed]:
    """The last turn of each row's prompt and its answer. Raises UserError where there is none."""
    seeds = [Seed(row["id"], last_turn(row["prompt"]).strip(), completion_text(row["completion"])) for row in rows]
    if not seeds:
        raise UserError(
            "there is no seed task to begin with; give a file with an instruction and an answer in each row"
        )
    return seeds


def make_instructions(
    rows: Sequence[Row], speaker: Speaker, settings: InstructionSettings, tally: Tally
) -> Iterator[Row]:
    """Rows of kind sft, one by one, until there are `count`, or `tries` candidates are made.

    A round shows the model examples from seeds and from what was made, reads the tasks it writes, sieves them, has it
    answer those left, and sieves the answers. Rows are messages where the seeds are. The tally has every candidate,
    complete once the iterator ends.
    Raises UserError where there are no seeds, or the model's context holds no example.
    """
    seeds, form = read_seeds(rows), is_conversational(rows[0]["prompt"]) if rows else False
    work = _Workshop(seeds, speaker, settings, tally)
    with tqdm(total=settings.count, desc="instructions", unit="row") as bar:
        while tally.kept < settings.count and tally.made < settings.tries:
            candidates = work.propose()
            for candidate, answer in work.answer(candidates):
                if reason := work.judge_answer(candidate.text, *answer):
                    tally.drop(f"{candidate.text} → {answer[0]}", reason)
                elif tally.kept == settings.count:
                    tally.drop(candidate.text, "not_needed")
                else:
                    tally.keep()
                    work.made.append((candidate.text, answer[0]))
                    bar.update()
                    yield _row(candidate, answer[0], form, speaker.name, settings.temperature)


@dataclass(frozen=True)
class Candidate:
    """A task that a model wrote, and the ids of the seeds that it was shown."""

    text: str
    shown: list[str]


class _Workshop:
    """The pool as it grows, and the rounds of asking."""

    def __init__(self, seeds: list[Seed], speaker: Speaker, settings: InstructionSettings, tally: Tally) -> None:
        self.speaker, self.settings, self.tally = speaker, settings, tally
        self.made: list[Demonstration] = []
        self._random = Random(settings.seed)
        self._calls = 0
        self._overlap = OverlapIndex(settings.overlap)
        self._known: set[str] = set()
        self._banned = set(settings.banned)
        for seed in seeds:
            self._admit(seed.instruction)
        # One that the sieve would not let through is no good example, but nothing made may be like it.
        self._seeds = [seed for seed in seeds if not self._length_fault(seed.instruction)]
        if not self._seeds:
            raise UserError(
                f"none of the {len(seeds)} seed instructions has {settings.shortest} to {settings.longest} words; "
                "change --shortest or --longest"
            )

    def propose(self) -> list[Candidate]:
        """The tasks of a round's lists that pass; one that passes bars those like it, whatever its answer."""
        asked = [self._ask() for _ in range(self.settings.lists)]
        passed = []
        for said, (_, shown) in zip(
            self._say([one for one, _ in asked], self.settings.list_tokens), asked, strict=True
        ):
            tasks = read_tasks(said, self.speaker.is_chat)
            if not tasks:
                self.tally.drop(said.text, "no_task")
            for text, is_whole in tasks:
                if reason := self.judge_task(text) if is_whole else "cut_off":
                    self.tally.drop(text, reason)
                else:
                    self._admit(text)
                    passed.append(Candidate(text, shown))
        return passed

    def answer(self, candidates: list[Candidate]) -> Iterator[tuple[Candidate, tuple[str, bool]]]:
        """The candidates for which the context has room, each with its answer and whether that is whole."""
        asked = []
        for candidate in candidates:
            if (prompt := self._ask_answer(candidate.text)) is None:
                self.tally.drop(candidate.text, "longer_than_context")
            else:
                asked.append((candidate, prompt))
        if not asked:
            return
        said = self._say([prompt for _, prompt in asked], self.settings.answer_tokens)
        for (candidate, _), one in zip(asked, said, strict=True):
            yield candidate, read_answer(one, self.speaker.is_chat)

    # sieve

    def judge_task(self, text: str) -> str | None:
        """Why the instruction is left out; None where it is not."""
        if fault := self._length_fault(text):
            return fault
        if self._banned & set(split_words(text)):
            return "banned_word"
        if make_plain(text) in self._known:
            return "duplicate"
        return "overlap" if self._overlap.find(text) else None

    def judge_answer(self, instruction: str, answer: str, is_whole: bool) -> str | None:
        """Why the answer is no good; None where it is."""
        if not answer:
            return "answer_empty"
        if not is_whole:
            return "answer_cut_off"
        repeats = holds(make_plain(answer), make_plain(instruction))
        if repeats or self._overlap.measure(instruction, answer) >= self.settings.overlap:
            return "answer_repeats_instruction"
        return None

    def _length_fault(self, text: str) -> str | None:
        words = len(split_words(text))
        if words < self.settings.shortest:
            return "too_short"
        return "too_long" if words > self.settings.longest else None

    def _admit(self, text: str) -> None:
        self._known.add(make_plain(text))
        self._overlap.add(text)

    # asking

    def _say(self, prompts: list[Any], tokens: int) -> list[Any]:
        self._calls += 1
        return self.speaker.say(prompts, tokens, self.settings.seed + self._calls)

    def _ask(self) -> tuple[Any, list[str]]:
        """A prompt of examples, fewer where the context does not hold all, and the ids of the seeds among them."""
        old = min(self.settings.made_examples, len(self.made), self.settings.examples - 1)
        made = [text for text, _ in self._random.sample(self.made, old)]
        seeds = self._random.sample(self._seeds, min(self.settings.examples - old, len(self._seeds)))
        examples = [(seed.instruction, [seed.id]) for seed in seeds] + [(text, []) for text in made]
        self._random.shuffle(examples)
        while examples:
            prompt = ask_for_tasks([text for text, _ in examples], self.speaker.is_chat)
            if self.speaker.fits(prompt, self.settings.list_tokens):
                return prompt, [name for _, names in examples for name in names]
            examples.remove(max(examples, key=lambda example: len(example[0])))
        raise UserError(
            f"the context of {self.speaker.name} does not hold one example and {self.settings.list_tokens} new tokens "
            "(--list-tokens); lower that, or name a model that reads more"
        )

    def _ask_answer(self, instruction: str) -> Any:
        """The prompt for an answer; None where the context has no room for it."""
        solved = [(seed.instruction, seed.answer) for seed in self._seeds]
        shown = [] if self.speaker.is_chat else self._random.sample(solved, min(SHOWN_SOLVED, len(solved)))
        for count in range(len(shown), -1, -1):
            prompt = ask_for_answer(
                instruction, sorted(shown, key=lambda one: len(one[1]))[:count], self.speaker.is_chat
            )
            if self.speaker.fits(prompt, self.settings.answer_tokens):
                return prompt
        return None


def _row(candidate: Candidate, answer: str, is_messages: bool, model: str, temperature: float) -> Row:
    said: Row = {"prompt": candidate.text, "completion": answer}
    if is_messages:
        said = {
            "prompt": [{"role": "user", "content": candidate.text}],
            "completion": [{"role": "assistant", "content": answer}],
        }
    return with_id(
        {**said, "source_model": model, "sampled_at_temperature": temperature, "shown_seeds": candidate.shown}
    )
