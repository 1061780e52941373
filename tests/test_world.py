"""The embedded world: right answers are right, flaws are flaws, noise is as planned, nothing leaks."""

import random

import pytest

from rlhf.data.problems import CORRUPTIONS, LANGUAGES, draw_problem, write_right_answer
from rlhf.data.world import flip_probabilities, make_world
from rlhf.rewards.answers import answer_reward


def gold(prompt: str, completion: str, answer: int) -> float:
    return answer_reward([prompt], [completion], answer=[str(answer)])[0]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_right_answers_earn_the_gold_reward_and_flawed_ones_do_not(world_params, language):
    world = world_params.model_copy(update={"language": language})
    rng = random.Random(0)
    for _ in range(200):
        problem = draw_problem(world, rng, 1)
        phrases = LANGUAGES[language]
        assert gold(problem.text, write_right_answer(problem, phrases, rng), problem.answer) == 1.0
        for name, corrupt in CORRUPTIONS.items():
            flawed = corrupt(problem, phrases, rng)
            assert gold(problem.text, flawed, problem.answer) == 0.0, (name, problem, flawed)


def test_quantities_stay_in_bounds(world_params):
    rng = random.Random(1)
    for _ in range(500):
        problem = draw_problem(world_params, rng, 1)
        assert 1 <= problem.answer <= world_params.largest_number
        assert world_params.min_steps <= len(problem.steps) <= world_params.max_steps


def test_the_same_seed_gives_the_same_world(world_params, tiny_world):
    assert make_world(world_params, 17) == tiny_world
    assert make_world(world_params, 18) != tiny_world


def test_no_prompt_stands_twice(tiny_world):
    kinds = (tiny_world.sft, tiny_world.preferences, tiny_world.prompts)
    prompts = [row["prompt"] for kind in kinds for split in kind for row in split]
    assert len(prompts) == len(set(prompts))
    assert not {row["prompt"] for row in tiny_world.prompts[1]} & {story for story, _ in tiny_world.texts}


def test_another_size_leaves_the_yardstick_alone(world_params, tiny_world):
    larger = make_world(world_params.model_copy(update={"pairs": 70}), 17)
    assert larger.prompts[1] == tiny_world.prompts[1]
    assert larger.sft[0] == tiny_world.sft[0]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.45])
def test_noise_has_the_planned_rate(world_params, rate):
    noise = world_params.noise.model_copy(update={"rate": rate})
    world = make_world(world_params.model_copy(update={"pairs": 2000, "noise": noise}), 3)
    flipped = [row["truth_flipped"] for row in world.preferences[0]]
    # Three standard deviations of a mean of 2,000 coin flips.
    assert abs(sum(flipped) / len(flipped) - rate) <= 3 * (rate * (1 - rate) / 2000) ** 0.5


def test_flips_follow_the_habits(world_params):
    rng = random.Random(2)
    problem = draw_problem(world_params, rng, 1)
    short, long = "x", "x" * 60
    loving = world_params.noise.model_copy(update={"class_conditional": 0.0, "instance_dependent": 0.0})
    chances = flip_probabilities(loving, [(problem, short, long, "rambling"), (problem, long, short, "refusal")])
    assert chances[0] > 10 * chances[1]
    careless = world_params.noise.model_copy(update={"class_conditional": 0.0, "length_loving": 0.0})
    chances = flip_probabilities(careless, [(problem, short, short, "off_by_one"), (problem, short, short, "refusal")])
    assert chances[0] == pytest.approx(3.5 * chances[1])  # 1.4 against 0.4, the same problem


def test_flipped_pairs_prefer_the_flawed_answer(tiny_world):
    answers = {row["prompt"]: row for row in tiny_world.preferences[0]}
    for row in answers.values():
        worse = row["chosen"] if row["truth_flipped"] else row["rejected"]
        better = row["rejected"] if row["truth_flipped"] else row["chosen"]
        final = better.rsplit("<answer>", 1)[1].removesuffix("</answer>").strip()
        assert gold(row["prompt"], better, int(final)) == 1.0
        assert gold(row["prompt"], worse, int(final)) == 0.0


def test_the_tokenizer_gives_every_text_back(tiny_world, tiny_model_dir):
    from rlhf.models import load_tokenizer

    tokenizer = load_tokenizer(tiny_model_dir)
    for row in tiny_world.sft[0]:
        text = row["prompt"] + row["completion"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
