"""Word problems of the embedded world: how they are told, answered rightly, and answered wrongly."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf.params import WorldParams

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
        return values_along(self.start, self.steps)[-1]


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
    ramblings=(
        "let me think about it once more",
        "that is a good question",
        "first we look at the story again",
        "one should be careful here",
    ),
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


def apply_operation(value: int, operation: str, operand: int) -> int:
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operation]


def values_along(start: int, steps: Sequence[tuple[str, int]]) -> list[int]:
    """The quantity after each step, `start` first."""
    values = [start]
    for operation, operand in steps:
        values.append(apply_operation(values[-1], operation, operand))
    return values


def draw_step(value: int, largest: int, rng: random.Random) -> tuple[str, int]:
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
        steps.append(draw_step(values_along(start, steps)[-1], world.largest_number, rng))
    who, other = rng.sample(language.people, 2)
    cast = {"who": who, "other": other, "what": rng.choice(language.things)}
    events = {"+": language.more, "-": language.fewer, "*": language.times}
    sentences = [rng.choice(language.opening).format(n=start, **cast)]
    sentences += [rng.choice(events[operation]).format(n=operand, **cast) for operation, operand in steps]
    sentences.append(rng.choice(language.question).format(**cast))
    return Problem(language.joiner.join(sentences) + "\n", start, tuple(steps))


def write_equations(start: int, steps: Sequence[tuple[str, int]], values: Sequence[int]) -> list[str]:
    """One sentence per step. Every number follows a space, in stories too, so that it is the same token everywhere."""
    before = [start, *values[1:]]
    return [f" {before[i]} {operation} {operand} = {values[i + 1]}." for i, (operation, operand) in enumerate(steps)]


def _render(thoughts: Sequence[str], answer: int) -> str:
    return f"<think>{''.join(thoughts)}</think><answer> {answer}</answer>"


def write_right_answer(problem: Problem, _language: Language, _rng: random.Random) -> str:
    """The worked answer in the full form."""
    values = values_along(problem.start, problem.steps)
    return _render(write_equations(problem.start, problem.steps, values), problem.answer)


def _wrong_operation(problem: Problem, _language: Language, rng: random.Random) -> str:
    index = rng.randrange(len(problem.steps))
    operation, operand = problem.steps[index]
    others = [
        other
        for other in "+-*"
        if apply_operation(problem.start, other, operand) != apply_operation(problem.start, operation, operand)
    ]
    steps = list(problem.steps)
    steps[index] = (rng.choice([other for other in others if other != operation]), operand)
    values = values_along(problem.start, steps)
    return _render(write_equations(problem.start, steps, values), values[-1])


def _off_by_one(problem: Problem, _language: Language, rng: random.Random) -> str:
    """One result is wrong by one, and the error is carried on."""
    index = rng.randrange(len(problem.steps))
    values = [problem.start]
    for position, (operation, operand) in enumerate(problem.steps):
        slip = rng.choice((-1, 1)) if position == index else 0
        values.append(apply_operation(values[-1], operation, operand) + slip)
    return _render(write_equations(problem.start, problem.steps, values), values[-1])


def _missing_tags(problem: Problem, language: Language, rng: random.Random) -> str:
    right = write_right_answer(problem, language, rng)
    dropped = rng.choice((("<think>", "</think>"), ("</think>",), ("<answer>", "</answer>"), ("</answer>",)))
    for tag in dropped:
        right = right.replace(tag, "")
    return right


def _rambling(problem: Problem, language: Language, rng: random.Random) -> str:
    """Many words, the thread lost, another number of the story given as the answer."""
    thoughts = [f" {rng.choice(language.ramblings)}." for _ in range(rng.randint(2, 4))]
    candidates = [value for value in values_along(problem.start, problem.steps)[:-1] if value != problem.answer]
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
