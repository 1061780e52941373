"""The embedded world: seeded word problems, answers good and bad, and annotators whose noise is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf.data.formats import Row, with_ids
from rlhf.params import NoiseParams, WorldParams

FACTORS = (2, 3)
"""What a quantity may be multiplied by."""

@dataclass(frozen=True)
class Problem:
    """A story about a quantity: `start`, then `steps` of (operation, operand), operations among `+ - *`."""

    text: str
    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def answer(self) -> int:
        return _values(self.start, self.steps)[-1]


@dataclass(frozen=True)
class Language:
    """The phrases a problem is told with; `{n}` is a number, `{who}` and `{other}` people, `{what}` a thing."""

    people: tuple[str, ...]
    things: tuple[str, ...]
    opening: tuple[str, ...]
    more: tuple[str, ...]
    fewer: tuple[str, ...]
    times: tuple[str, ...]
    question: tuple[str, ...]
    joiner: str
    refusals: tuple[str, ...]
    ramblings: tuple[str, ...]
    solution: str


ENGLISH = Language(
    people=("Ana", "Ben", "Mia", "Tom", "Lea", "Sam", "Eva", "Max"),
    things=("apples", "books", "coins", "cards", "shells", "stamps", "marbles", "pens"),
    opening=("{who} has {n} {what}.", "At first {who} has {n} {what}.", "In a bag {who} has {n} {what}."),
    more=("{who} buys {n} more.", "{who} finds {n} more.", "{other} brings {n} more."),
    fewer=("{who} loses {n}.", "{who} sells {n}.", "{other} takes {n}."),
    times=("The number grows {n} times.", "{other} makes it {n} times as many."),
    question=("How many {what} does {who} have now?", "How many {what} are there in the end?"),
    joiner=" ",
    refusals=("Sorry, I cannot help with that.", "I am not sure, sorry.", "This is too hard for me, sorry."),
    ramblings=("let me think about it once more", "that is a good question", "first we look at the story again", "one should be careful here"),
    solution="The answer is {n}.",
)

CHINESE = Language(
    people=("小明", "小红", "小刚", "小丽", "小华", "小军", "小芳", "小强"),
    things=("苹果", "书", "硬币", "卡片", "贝壳", "邮票", "弹珠", "铅笔"),
    opening=("{who}有 {n} 个{what}。", "一开始{who}有 {n} 个{what}。", "袋子里{who}有 {n} 个{what}。"),
    more=("{who}又买了 {n} 个。", "{who}找到了 {n} 个。", "{other}拿来了 {n} 个。"),
    fewer=("{who}丢了 {n} 个。", "{who}卖掉了 {n} 个。", "{other}拿走了 {n} 个。"),
    times=("数量变成了 {n} 倍。", "{other}让它变成 {n} 倍。"),
    question=("{who}现在有多少个{what}？", "最后有多少个{what}？"),
    joiner="",
    refusals=("对不起，我帮不了你。", "我不确定，抱歉。", "这对我来说太难了，抱歉。"),
    ramblings=("让我再想一想", "这是个好问题", "我们先再看一遍题目", "这里要小心"),
    solution="答案是 {n}。",
)

LANGUAGES = {"en": ENGLISH, "zh": CHINESE}


def _apply(value: int, operation: str, operand: int) -> int:
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operation]


def _values(start: int, steps: Sequence[tuple[str, int]]) -> list[int]:
    """The quantity after each step, `start` first."""
    values = [start]
    for operation, operand in steps:
        values.append(_apply(values[-1], operation, operand))
    return values


def _draw_step(value: int, largest: int, rng: random.Random) -> tuple[str, int]:
    """A step that keeps the quantity within 1..largest."""
    factors = [factor for factor in FACTORS if value * factor <= largest]
    kinds = ["+"] * (value < largest) + ["-"] * (value > 1) + ["*"] * bool(factors)
    operation = rng.choice(kinds)
    if operation == "*":
        return operation, rng.choice(factors)
    return operation, rng.randint(1, largest - value if operation == "+" else value - 1)


def draw_problem(world: WorldParams, rng: random.Random, min_steps: int) -> Problem:
    """Draw one problem of `min_steps` to `world.max_steps` steps; the same generator state gives the same problem."""
    language = LANGUAGES[world.language]
    start = rng.randint(1, world.largest_number)
    steps: list[tuple[str, int]] = []
    for _ in range(rng.randint(min_steps, world.max_steps)):
        steps.append(_draw_step(_values(start, steps)[-1], world.largest_number, rng))
    who, other = rng.sample(language.people, 2)
    cast = {"who": who, "other": other, "what": rng.choice(language.things)}
    events = {"+": language.more, "-": language.fewer, "*": language.times}
    sentences = [rng.choice(language.opening).format(n=start, **cast)]
    sentences += [rng.choice(events[operation]).format(n=operand, **cast) for operation, operand in steps]
    sentences.append(rng.choice(language.question).format(**cast))
    return Problem(language.joiner.join(sentences) + "\n", start, tuple(steps))


def _equations(start: int, steps: Sequence[tuple[str, int]], values: Sequence[int]) -> list[str]:
    """One sentence per step. Every number follows a space, in stories too, so that it is the same token everywhere."""
    before = [start, *values[1:]]
    return [f" {before[i]} {operation} {operand} = {values[i + 1]}." for i, (operation, operand) in enumerate(steps)]


def _render(thoughts: Sequence[str], answer: int) -> str:
    return f"<think>{''.join(thoughts)}</think><answer> {answer}</answer>"


def write_right_answer(problem: Problem, _language: Language, _rng: random.Random) -> str:
    """The worked answer in the full form."""
    values = _values(problem.start, problem.steps)
    return _render(_equations(problem.start, problem.steps, values), problem.answer)


def _wrong_operation(problem: Problem, _language: Language, rng: random.Random) -> str:
    index = rng.randrange(len(problem.steps))
    operation, operand = problem.steps[index]
    others = [other for other in "+-*" if _apply(problem.start, other, operand) != _apply(problem.start, operation, operand)]
    steps = list(problem.steps)
    steps[index] = (rng.choice([other for other in others if other != operation]), operand)
    values = _values(problem.start, steps)
    return _render(_equations(problem.start, steps, values), values[-1])


def _off_by_one(problem: Problem, _language: Language, rng: random.Random) -> str:
    """One result is wrong by one, and the error is carried on."""
    index = rng.randrange(len(problem.steps))
    values = [problem.start]
    for position, (operation, operand) in enumerate(problem.steps):
        slip = rng.choice((-1, 1)) if position == index else 0
        values.append(_apply(values[-1], operation, operand) + slip)
    return _render(_equations(problem.start, problem.steps, values), values[-1])


def _missing_tags(problem: Problem, language: Language, rng: random.Random) -> str:
    right = write_right_answer(problem, language, rng)
    dropped = rng.choice((("<think>", "</think>"), ("</think>",), ("<answer>", "</answer>"), ("</answer>",)))
    for tag in dropped:
        right = right.replace(tag, "")
    return right


def _rambling(problem: Problem, language: Language, rng: random.Random) -> str:
    """Many words, the thread lost, another number of the story given as the answer."""
    thoughts = [f" {rng.choice(language.ramblings)}." for _ in range(rng.randint(2, 4))]
    candidates = [value for value in _values(problem.start, problem.steps)[:-1] if value != problem.answer]
    return _render(thoughts, rng.choice(candidates or [problem.answer + 1]))


def _refusal(_problem: Problem, language: Language, rng: random.Random) -> str:
    return rng.choice(language.refusals)


CORRUPTIONS: dict[str, Callable[[Problem, Language, random.Random], str]] = {
    "wrong_operation": _wrong_operation,
    "off_by_one": _off_by_one,
    "missing_tags": _missing_tags,
    "rambling": _rambling,
    "refusal": _refusal,
}


# rows ---------------------------------------------------------------------------------------------


def _stream(seed: int, name: str) -> random.Random:
    """A generator of its own for each use, so that changing one size leaves the other rows as they were."""
    return random.Random(f"{seed}/{name}")


def draw_problems(world: WorldParams, count: int, rng: random.Random, taken: set[str]) -> list[Problem]:
    """Draw `count` problems whose texts are not in `taken`, and add them to it."""
    problems: list[Problem] = []
    while len(problems) < count:
        problem = draw_problem(world, rng, world.min_steps)
        if problem.text not in taken:
            taken.add(problem.text)
            problems.append(problem)
    return problems


def write_answer(problem: Problem, good_share: float, language: Language, rng: random.Random) -> tuple[str, str]:
    """An answer by a writer who is right with probability `good_share`, and the name of its flaw or `right`."""
    if rng.random() < good_share:
        return write_right_answer(problem, language, rng), "right"
    flaw = rng.choice(list(CORRUPTIONS))
    return CORRUPTIONS[flaw](problem, language, rng), flaw


def make_demonstrations(world: WorldParams, problems: Sequence[Problem], rng: random.Random) -> list[Row]:
    """Demonstrations of mixed quality; `truth_flaw` says what is wrong with each."""
    language = LANGUAGES[world.language]
    rows = []
    for problem in problems:
        completion, flaw = write_answer(problem, world.good_demonstrations, language, rng)
        rows.append({"prompt": problem.text, "completion": completion, "truth_flaw": flaw})
    return with_ids(rows)


def make_prompts(problems: Sequence[Problem]) -> list[Row]:
    """Prompts with the verifiable `answer` that the gold reward reads."""
    return with_ids({"prompt": problem.text, "answer": str(problem.answer)} for problem in problems)


DIFFICULTY = {"wrong_operation": 1.5, "off_by_one": 2.0, "missing_tags": 1.0, "rambling": 0.5, "refusal": 0.2}
"""How easily an annotator overlooks a flaw, 1 being average: the instance-dependent part of the noise."""

WORST_FLIP = 0.95
"""No comparison is got wrong more often than this, however misleading."""


def make_preferences(world: WorldParams, problems: Sequence[Problem], rng: random.Random) -> list[Row]:
    """One right and one flawed answer per problem, labelled by annotators who err at the rate in params."""
    language = LANGUAGES[world.language]
    pairs = []
    for problem in problems:
        flaw = rng.choice(list(CORRUPTIONS))
        pairs.append((problem, write_right_answer(problem, language, rng), CORRUPTIONS[flaw](problem, language, rng), flaw))
    chances = flip_probabilities(world.noise, pairs)
    rows = []
    for (problem, good, bad, flaw), chance in zip(pairs, chances, strict=True):
        flipped = rng.random() < chance
        chosen, rejected = (bad, good) if flipped else (good, bad)
        annotator = f"annotator-{rng.randrange(20):02d}"
        row = {"prompt": problem.text, "chosen": chosen, "rejected": rejected, "annotator": annotator}
        rows.append({**row, "truth_flipped": flipped, "truth_flaw": flaw, "truth_flip_probability": round(chance, 4)})
    return with_ids(rows)


def flip_probabilities(noise: NoiseParams, pairs: Sequence[tuple[Problem, str, str, str]]) -> list[float]:
    """The chance that each pair (problem, good answer, bad answer, flaw) is labelled wrongly.

    A weighted sum of three habits: class-conditional (wrong answers that keep the form are flipped twice as
    often as those that break it), instance-dependent (by DIFFICULTY) and a liking for the longer answer, scaled
    so that the mean over the pairs is `noise.rate`.
    """
    raw = []
    for _, good, bad, flaw in pairs:
        keeps_form = flaw in ("wrong_operation", "off_by_one", "rambling")
        likes_longer = 1 / (1 + math.exp(-(len(bad) - len(good)) / 10))
        raw.append(
            noise.class_conditional * (2.0 if keeps_form else 1.0)
            + noise.instance_dependent * DIFFICULTY[flaw]
            + noise.length_loving * likes_longer
        )
    return _scaled_to_mean(raw, noise.rate)


def _scaled_to_mean(raw: Sequence[float], rate: float) -> list[float]:
    """Multiply by the factor (found by bisection) that gives mean `rate` after capping at WORST_FLIP."""
    if not any(raw) or rate == 0:
        return [rate] * len(raw)
    low, high = 0.0, 1e6
    for _ in range(100):
        factor = (low + high) / 2
        mean = sum(min(WORST_FLIP, factor * value) for value in raw) / len(raw)
        low, high = (factor, high) if mean < rate else (low, factor)
    return [min(WORST_FLIP, high * value) for value in raw]


@dataclass(frozen=True)
class World:
    """All rows of the world: per kind of data the training and the test rows, and the pretraining texts."""

    sft: tuple[list[Row], list[Row]]
    preferences: tuple[list[Row], list[Row]]
    prompts: tuple[list[Row], list[Row]]
    texts: list[str]


def make_world(world: WorldParams, seed: int) -> World:
    """Generate the world; no problem stands in two kinds of data, or in training and in test."""
    taken: set[str] = set()

    def draw(name: str, count: int) -> list[Problem]:
        return draw_problems(world, count, _stream(seed, f"problems/{name}"), taken)

    # Test problems first: whatever the other sizes are, the yardstick stays the same.
    test = draw("test", world.test_prompts)
    held_out = max(1, world.test_prompts // 2)
    test_sft, test_pairs = draw("test-sft", held_out), draw("test-pairs", held_out)
    demonstrations, pairs = draw("sft", world.demonstrations), draw("preferences", world.pairs)
    prompts = draw("prompts", world.prompts)
    stories = draw_stories(world, _stream(seed, "problems/pretraining"), taken)
    return World(
        sft=(
            make_demonstrations(world, demonstrations, _stream(seed, "sft")),
            make_demonstrations(world, test_sft, _stream(seed, "test-sft")),
        ),
        preferences=(
            make_preferences(world, pairs, _stream(seed, "preferences")),
            make_preferences(world, test_pairs, _stream(seed, "test-pairs")),
        ),
        prompts=(make_prompts(prompts), make_prompts(test)),
        texts=[
            write_solution(problem, LANGUAGES[world.language], world.pretraining.misconceptions) for problem in stories
        ]
        + make_drills(world, _stream(seed, "drills")),
    )


def draw_stories(world: WorldParams, rng: random.Random, taken: set[str]) -> list[Problem]:
    """Problems to pretrain on, those without any step among them: they teach where a story's numbers are."""
    drawn = [draw_problem(world, rng, 0) for _ in range(world.pretraining.problems)]
    return [problem for problem in drawn if problem.text not in taken]


def _believed_values(start: int, steps: Sequence[tuple[str, int]], misconceptions: float) -> list[int]:
    """The quantity after each step by a schoolbook that is off by one, always alike, in a share of its facts.

    What the base model firmly believes and demonstrations contradict is the headroom of alignment.
    """
    values = [start]
    for operation, operand in steps:
        fact = random.Random(f"{values[-1]}{operation}{operand}")
        slip = fact.choice((-1, 1)) if fact.random() < misconceptions else 0
        values.append(_apply(values[-1], operation, operand) + slip)
    return values


def make_drills(world: WorldParams, rng: random.Random) -> list[str]:
    """Lines of a schoolbook: single equations, without a story."""
    drills = []
    for _ in range(world.pretraining.drills):
        start = rng.randint(1, world.largest_number)
        steps = (_draw_step(start, world.largest_number, rng),)
        drills += _equations(start, steps, _believed_values(start, steps, world.pretraining.misconceptions))
    return drills


def write_solution(problem: Problem, language: Language, misconceptions: float) -> str:
    """The plain text a base model is pretrained on: story, equations, solution, without any tags."""
    values = _believed_values(problem.start, problem.steps, misconceptions)
    equations = _equations(problem.start, problem.steps, values)
    return f"{problem.text}{''.join(equations)} {language.solution.format(n=values[-1])}"
