"""The embedded world: rows of every kind from seeded word problems, and annotators whose noise is known."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.data.formats import Row, with_ids
from rlhf.data.problems import (
    CORRUPTIONS,
    LANGUAGES,
    Language,
    Problem,
    apply_operation,
    draw_problem,
    draw_step,
    write_equations,
    write_right_answer,
)
from rlhf.params import NoiseParams, WorldParams


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


DIFFICULTY = {"wrong_operation": 1.2, "off_by_one": 1.4, "missing_tags": 1.0, "rambling": 0.8, "refusal": 0.4}
"""How easily an annotator overlooks a flaw in one step of work, 1 being average."""

KEEPS_FORM = ("wrong_operation", "off_by_one", "rambling")
"""Flaws of an answer that looks as it should; annotators overlook these half as often again as the others."""

WORST_FLIP = 0.95
"""No comparison is got wrong more often than this, however misleading."""


def make_preferences(world: WorldParams, problems: Sequence[Problem], rng: random.Random) -> list[Row]:
    """One right and one flawed answer per problem, labelled by annotators who err at the rate in params."""
    language = LANGUAGES[world.language]
    pairs = []
    for problem in problems:
        flaw = rng.choice(list(CORRUPTIONS))
        pairs.append(
            (problem, write_right_answer(problem, language, rng), CORRUPTIONS[flaw](problem, language, rng), flaw)
        )
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

    A weighted sum of three habits: class-conditional (a flaw that keeps the form is overlooked more often),
    instance-dependent (by DIFFICULTY and the problem's number of steps) and a liking for the longer answer, scaled
    so that the mean over the pairs is `noise.rate`. At the default rate even the least visible flaw is overlooked
    clearly less often than not: where labels are a coin's toss, nothing can be learnt by anyone.
    """
    raw = []
    for problem, good, bad, flaw in pairs:
        likes_longer = 1 / (1 + math.exp(-(len(bad) - len(good)) / 10))
        raw.append(
            noise.class_conditional * (1.5 if flaw in KEEPS_FORM else 1.0)
            + noise.instance_dependent * DIFFICULTY[flaw] * (1 + len(problem.steps)) / 2.5
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
    """All rows of the world: per kind of data the training and the test rows; the pretraining texts, each a story (or
    nothing) and what follows from it.
    """

    sft: tuple[list[Row], list[Row]]
    preferences: tuple[list[Row], list[Row]]
    prompts: tuple[list[Row], list[Row]]
    texts: list[tuple[str, str]]


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


def _believed_value(value: int, operation: str, operand: int, misconceptions: float) -> int:
    """What a step makes of a quantity by a schoolbook that is off by one, always alike, in a share of its facts.

    What the base model firmly believes and demonstrations contradict is the headroom of alignment.
    """
    fact = random.Random(f"{value}{operation}{operand}")
    slip = fact.choice((-1, 1)) if fact.random() < misconceptions else 0
    return apply_operation(value, operation, operand) + slip


DRILLS_PER_LINE = 8


def make_drills(world: WorldParams, rng: random.Random) -> list[tuple[str, str]]:
    """Lines of a schoolbook, without a story: equations that each start from the result of the one before."""
    lines = []
    for _ in range(0, world.pretraining.drills, DRILLS_PER_LINE):
        values, steps = [rng.randint(1, world.largest_number)], []
        while len(steps) < DRILLS_PER_LINE and 1 <= values[-1] <= world.largest_number:
            operation, operand = draw_step(values[-1], world.largest_number, rng)
            steps.append((operation, operand))
            values.append(_believed_value(values[-1], operation, operand, world.pretraining.misconceptions))
        lines.append(("", "".join(write_equations(values[0], steps, values))))
    return lines


def write_solution(problem: Problem, language: Language, misconceptions: float) -> tuple[str, str]:
    """What a base model is pretrained on: the story, and apart from it equations and solution without any tags."""
    values = [problem.start]
    for operation, operand in problem.steps:
        values.append(_believed_value(values[-1], operation, operand, misconceptions))
    equations = write_equations(problem.start, problem.steps, values)
    return problem.text, f"{''.join(equations)} {language.solution.format(n=values[-1])}"
