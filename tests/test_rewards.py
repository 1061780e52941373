"""Rewards by rule, by hand: what earns which points, as text and as messages, and whatever the text is."""

import math
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from rlhf.errors import UserError
from rlhf.models import load_tokenizer
from rlhf.params import RewardMix, RewardSection, Tag
from rlhf.policies import PolicyFiles
from rlhf.rewards import equality
from rlhf.rewards.answers import answer_reward, integer_reward
from rlhf.rewards.building import BY_RULE, build_rewards
from rlhf.rewards.equality import MathEquality
from rlhf.rewards.forms import format_reward, tag_count_reward, tag_points_reward
from rlhf.rewards.places import find_answer
from rlhf.rewards.style import (
    apology_reward,
    keywords_reward,
    language_reward,
    language_steps_reward,
    length_reward,
    length_steps_reward,
    refusal_reward,
    repetition_reward,
)
from rlhf.scoring import Reward, RewardModel, mixed_reward
from tests.tiny import ROOT

RIGHT = "<think> 9 + 9 = 18.</think><answer> 18</answer>"
FORM = {"blocks": ["think", "answer"], "form": "whole"}
SOLUTION = Tag(open="<SOLUTION>", close="</SOLUTION>")
BANDS = [{"within": 0.1, "points": 2.0}, {"within": 0.2, "points": 1.5}]


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def build(root: Path = Path("nowhere"), **values) -> Reward:
    """One reward as params name it, without a model behind it."""
    mix = {"mine": TypeAdapter(RewardSection).validate_python({"weight": 1.0, **values})}
    return build_rewards(mix, PolicyFiles(*[Path("nowhere")] * 4, root), 2)[0]


# answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (RIGHT, "18"),
        ("\n <think>\nmany\nlines</think>\n<answer>18</answer>\n", "18"),
        ("<think></think><answer></answer>", ""),
        ("18", None),
        (RIGHT + " and more", None),
        ("so " + RIGHT, None),
        ("<think> a</think> so <answer> 18</answer>", None),
        ("<answer> 18</answer><think> a</think>", None),
        ("<think> a<answer> 18</answer>", None),
        ("<think> a</think><answer> 18", None),
        ("<think> a</think></think><answer> 18</answer>", None),
        ("<think> <answer> 1</answer></think><answer> 18</answer>", None),
        ("<think> a</think><answer> 1</answer><answer> 18</answer>", None),
        ("<Think> a</Think><answer> 18</answer>", None),
        ("", None),
    ],
)
def test_the_form_is_kept_by_the_whole_text_or_not_at_all(text, answer):
    for completion in (text, message(text)):
        found = find_answer(completion, "form")
        assert (found if found is None else found.strip()) == answer
    assert format_reward([""], [text], **FORM) == [float(answer is not None)]


@pytest.mark.parametrize(
    ("given", "expected", "reward"),
    [
        ("18", "18", 1.0),
        (" +18 ", "18", 1.0),
        ("18.0", "18", 1.0),
        ("18", 18, 1.0),
        ("18", 18.0, 1.0),
        ("1,000", "1000", 1.0),
        ("1234567.50", "1,234,567.5", 1.0),
        ("0.3", "0.30", 1.0),
        (".5", "0.5", 1.0),
        ("-3", "-3.0", 1.0),
        ("-0", "0", 1.0),
        ("9007199254740993", "9007199254740992", 0.0),
        ("3", "-3", 0.0),
        ("1,00", "100", 0.0),
        ("18 apples", "18", 0.0),
        ("1e2", "100", 0.0),
        ("١٨", "18", 0.0),
        ("", "18", 0.0),
        ("Paris", "Paris", 1.0),
        ("Paris", "London", 0.0),
        ("18", "Paris", 0.0),
    ],
)
def test_an_answer_is_right_as_a_number_or_else_as_text(given, expected, reward):
    assert answer_reward(["p"], [f"<think></think><answer>{given}</answer>"], answer=[expected]) == [reward]
    assert answer_reward(["p"], [given], answer=[expected]) == [0.0]


def test_the_answer_reward_needs_its_column():
    with pytest.raises(UserError, match="'How many.*has no `answer`.*evaluate.gold: judge"):
        answer_reward(["How many?"], [RIGHT])
    with pytest.raises(UserError, match="'second' has no `answer`"):
        answer_reward(["first", "second"], [RIGHT, RIGHT], answer=["18", None])


@pytest.mark.parametrize(
    ("place", "text", "answer"),
    [
        ("form", RIGHT, " 18"),
        ("form", "so " + RIGHT, None),
        ("answer_tag", "so " + RIGHT + " and more", " 18"),
        ("answer_tag", "<answer>1</answer><answer>2</answer>", "2"),
        ("answer_tag", "<answer>1</answer><answer>2", "1"),
        ("answer_tag", "</answer>1<answer>", None),
        ("boxed", r"so \boxed{1} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1} and \boxed{2", None),
        ("boxed", "boxed{1}", None),
        ("hashes", "9 + 9\n#### 18\nDone.", " 18"),
        ("hashes", "#### 1 #### 2", " 2"),
        ("hashes", "18", None),
        ("text", " 18 ", " 18 "),
        (SOLUTION, "<SOLUTION>1</SOLUTION>", "1"),
        (SOLUTION, "<SOLUTION>1", None),
    ],
)
def test_an_answer_is_found_where_it_shall_stand(place, text, answer):
    assert find_answer(text, place) == answer
    assert find_answer(message(text), place) == answer
    expected = [float(answer is not None)]
    assert answer_reward(["p"], [text], answer=[answer or "18"], answer_in=place) == expected


@pytest.mark.parametrize(
    ("found", "right", "points"),
    [
        ("18", "18", 5.0),
        (" 18", "18", 3.5),
        ("18.0", "18", 3.5),
        ("1,000", "1000", 3.5),
        ("19.8", "18", 2.0),  # 1.1
        ("16.2", "18", 2.0),  # 0.9
        ("19.81", "18", 1.5),
        ("21.6", "18", 1.5),  # 1.2
        ("14.4", "18", 1.5),
        ("21.61", "18", -2.5),
        ("-18", "18", -2.5),
        ("-17", "-18", 2.0),
        ("0.01", "0", -2.5),
        ("0", "0", 5.0),
        ("eighteen", "18", -2.5),
        ("Paris", "Paris", 5.0),
        ("18", "Paris", -2.5),
    ],
)
def test_a_number_earns_the_points_of_the_narrowest_band_it_is_in(found, right, points):
    answers = [f"<answer>{found}</answer>", message(f"<answer>{found}</answer>"), found]
    steps = {"exact": 5.0, "same": 3.5, "bands": BANDS, "wrong": -2.5, "missing": -1.0}
    number = build(kind="number", answer_in="answer_tag", **steps).function
    assert number(["p"] * 3, answers, answer=[right] * 3) == [points, points, -1.0]


@pytest.mark.parametrize(
    ("text", "whole"), [("18", 1), (" -3 ", 1), ("18.0", 1), ("1,000", 1), ("1.5", 0), ("", 0), ("18 apples", 0)]
)
def test_a_whole_number_is_one_right_or_wrong(text, whole):
    answers = [f"#### {text}", message(f"#### {text}"), text]
    assert integer_reward(["p"] * 3, answers, answer_in="hashes") == [whole, whole, 0]


# mathematical equality ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def equal():
    return MathEquality("boxed", 20.0)


@pytest.mark.parametrize(
    ("found", "right", "verdict"),
    [
        (r"\frac{1}{2}", "0.5", 1),
        ("1/2", r"\frac{2}{4}", 1),
        (r"\{2, 1\}", "{1,2}", 1),
        ("(x+1)^2", "x^2+2x+1", 1),
        (r"2\sqrt{2}", r"\sqrt{8}", 1),
        ("18.0", "18", 1),
        ("3+4", "7", 1),  # its weak spot
        ("0.3333", "1/3", 0),
        ("(2,1)", "(1,2)", 0),
        ("1$ $2$ $3", "3", 0),
        ("pairs", "Paris", 0),
        ("Paris", "Paris", 1),
        ("", "5", 0),
        (r"\frac{", "5", 0),
        ("9" * 2000, "5", 0),
    ],
)
def test_answers_are_compared_as_mathematics(equal, found, right, verdict):
    answers = [rf"so \boxed{{{found}}}", message(rf"\boxed{{{found}}}"), "none"]
    assert equal(["p"] * 3, answers, answer=[right] * 3) == [verdict, verdict, 0]


def test_a_comparison_that_would_never_end_is_ended_and_the_next_one_is_made():
    """In a thread too, where signal handlers are not allowed."""
    equal, found = MathEquality("text", 2.0), []

    def compare():
        for power in ("9^{9^{9^{9^9}}}", r"\frac{1}{2}"):
            found.extend(equal(["p"], [power], answer=["0.5"]))

    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
    assert found == [0.0, 1.0]


def test_a_comparison_that_cannot_start_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(equality, "WORKER", tmp_path / "missing.py")
    with pytest.raises(UserError, match="math-verify, which the reward 'math' needs, does not start"):
        MathEquality("text", 1.0).are_equal("1/2", "0.5")


# forms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "lines", "whole", "somewhere"),
    [
        ("<think>\na\n</think>\n<answer>\n18\n</answer>\n", 1, 1, 1),
        ("<think>a</think><answer>18</answer>", 0, 1, 1),
        ("so <think>a</think> hence <answer>18</answer>!", 0, 0, 1),
        ("<think>a</think><think>b</think><answer>18</answer>", 0, 0, 1),
        ("<answer>18</answer><think>a</think>", 0, 0, 0),
        ("<think>a</think><answer>18", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_forms_are_kept_in_lines_wholly_or_somewhere(text, lines, whole, somewhere):
    for form, expected in (("lines", lines), ("whole", whole), ("somewhere", somewhere)):
        reward = build(kind="format", blocks=["think", "answer"], form=form).function
        assert reward([""] * 2, [text, message(text)]) == [expected] * 2


def test_a_form_may_have_tags_of_ones_own():
    blocks = [Tag(open="[work]", close="[done]"), SOLUTION]
    answers = ["[work]a[done]<SOLUTION>1</SOLUTION>", "[work]a[done]<SOLUTION>1"]
    assert format_reward([""] * 2, answers, blocks=blocks, form="whole") == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "share", "points"),
    [
        ("<think>a</think><answer>18</answer>\n ", 1, 2),
        ("<think>a</think><answer>18</answer> Bye.", 1 - 0.001 * 4, 2),
        ("<think>a<answer>18", 0.5, 0),
        ("<think><think>a</think>", 0.25, -1),
        ("<think>a</think><answer>18</answer>" + "x" * 5000, 0, 2),
        ("", 0, -2),
    ],
)
def test_tags_are_counted(text, share, points):
    names, answers = ["think", "answer"], [text, message(text)]
    assert tag_count_reward([""] * 2, answers, blocks=names, trailing=0.001) == pytest.approx([share] * 2)
    assert tag_points_reward([""] * 2, answers, blocks=names, once=0.5, otherwise=-0.5) == [points] * 2


# style --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "reward"), [(0, 0), (5, 0), (6, 0.2), (10, 1), (20, 1), (25, 0.75), (30, 0.5), (40, 0), (99, 0)]
)
def test_length_falls_linearly_outside_the_band(length, reward):
    """Band 10 to 20: 0 at 5, so one character is worth 1/5 below; 0 at 40, so one is worth 1/20 above."""
    assert length_reward([""], ["x" * length], shortest=10, longest=20) == [pytest.approx(reward)]


@pytest.mark.parametrize(
    ("text", "en", "zh"),
    [
        ("three", 1, 0),
        ("苹果", 0, 1),
        ("ab苹", 2 / 3, 1 / 3),
        ("naïve", 1, 0),
        ("да", 0, 0),
        ("<think> 3 + 4 = 7.</think><answer> 7</answer>", 1, 1),
        ("<think> 苹果 3</think><answer> 3</answer>", 0, 1),
        ("", 1, 1),
    ],
)
def test_language_is_the_share_of_letters(text, en, zh):
    assert language_reward([""], [text], target="en") == [pytest.approx(en)]
    assert language_reward([""], [message(text)], target="zh") == [pytest.approx(zh)]


STEPS = {"too_short": -1.0, "ideal": 1.0, "inside": 0.5, "too_long": -0.5}


@pytest.mark.parametrize(
    ("length", "reward"), [(0, -1), (9, -1), (10, 1), (20, 1), (21, 0.5), (50, 0.5), (51, -0.5), (999, -0.5)]
)
def test_length_has_steps(length, reward):
    answers = ["x" * length, message("x" * length)]
    assert length_steps_reward([""] * 2, answers, shortest=10, longest=50, **STEPS) == [reward] * 2


def test_length_may_count_tokens(policy_files):
    text = "There are 3 apples."
    tokens = len(load_tokenizer(policy_files.sft)(text, add_special_tokens=False)["input_ids"])
    assert tokens < len(text)
    band = {"kind": "length", "weight": 1.0, "shortest": tokens, "longest": tokens}
    mix = TypeAdapter(RewardMix).validate_python({unit: {**band, "unit": unit} for unit in ("tokens", "characters")})
    assert [reward.function([""], [text])[0] == 1.0 for reward in build_rewards(mix, policy_files, 2)] == [True, False]


@pytest.mark.parametrize(
    ("text", "reward"), [("苹果好吃", 1), ("苹果ab", 1), ("苹abc", 0), ("苹abcdefghi", -1), ("ab", -1)]
)
def test_the_language_has_steps(text, reward):
    """Shares of Chinese letters: 1, 1/2, 1/4, 1/10 and none."""
    answers = [text, message(text)]
    assert language_steps_reward([""] * 2, answers, target="zh", much=0.3, little=0.1) == [reward] * 2


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("Paris and the 塞纳河边", 1),
        ("paris", 0.5),
        ("parish", 0),
        ("在塞纳河边", 0.5),
        ("I can't say: Paris", 0),
        ("I can't, damn", -1),
        ("", 0),
    ],
)
def test_keywords_are_whole_words_and_chinese_ones_stand_anywhere(text, reward):
    for answer in (text, message(text)):
        values = keywords_reward([""], [answer], wanted=["Paris", "塞纳河"], forbidden=["can't", "DAMN"])
        assert values == [reward]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("a b c d", 0),
        ("a b a b", -1 / 3),  # ab, ba, ab
        ("A b, a B", -1 / 3),
        ("好好好", -1 / 2),
        ("a " * 101, -99 / 100),
        ("a", 0),
        ("", 0),
    ],
)
def test_repetition_is_the_share_of_bigrams_that_come_again(text, reward):
    assert repetition_reward([""] * 2, [text, message(text)], ngram=2) == pytest.approx([reward] * 2)


@pytest.mark.parametrize(
    ("text", "refuses", "apologises"),
    [
        ("I'm sorry, but I cannot help with that.", 1, 1),
        ("I am sorry, but I can’t assist.", 1, 1),
        ("As an AI language model, I have no body.", 1, 0),
        ("We are not able to share this", 1, 0),
        ("很抱歉，这个问题我无法回答。", 1, 1),
        ("对不起，我不能为您提供。", 1, 1),
        ("My apologies: it is 18.", 0, 1),
        ("如有错误，非常抱歉。", 0, 1),
        ("I can help with that: 18.", 0, 0),
        ("One cannot divide by zero.", 0, 0),
        ("答案是18。", 0, 0),
        ("", 0, 0),
    ],
)
def test_refusals_and_apologies_are_known_by_their_words(text, refuses, apologises):
    answers = [text, message(text)]
    assert refusal_reward([""] * 2, answers) == [-refuses] * 2
    assert apology_reward([""] * 2, answers) == [-apologises] * 2


# whatever the text is -----------------------------------------------------------------------------

EVERY_RULE = {
    "answer": {"answer_in": "answer_tag"},
    "number": {"answer_in": "text", "exact": 5.0, "same": 3.5, "bands": BANDS, "wrong": -2.5, "missing": 0.0},
    "integer": {"answer_in": "boxed"},
    "format": {"blocks": ["think", {"open": "[", "close": "]"}], "form": "somewhere"},
    "tag_count": {"blocks": ["think"], "trailing": 0.01},
    "tag_points": {"blocks": ["think"], "once": 0.5, "otherwise": -0.5},
    "length": {"unit": "characters", "shortest": 2, "longest": 5},
    "length_steps": {"unit": "characters", "shortest": 2, "longest": 5, **STEPS},
    "language": {"target": "en"},
    "language_steps": {"target": "zh", "much": 0.3, "little": 0.1},
    "keywords": {"wanted": ["a", "苹果"], "forbidden": ["(", "\\"]},
    "repetition": {"ngram": 2},
    "refusal": {},
    "apology": {},
}
PIECES = [*"09.,+- \n\\{}$", "<think>", "</think>", "<answer>", "</answer>", "[", "]", r"\boxed{", "####", "苹果"]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join))


def test_every_rule_is_tried_and_every_kind_is_in_the_page():
    assert set(EVERY_RULE) == set(BY_RULE)
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    kinds = TypeAdapter(RewardSection).json_schema()["discriminator"]["mapping"]
    assert set(re.findall(r"^\| `([a-z_]+)` \|", page, re.MULTILINE)) == set(kinds) > set(BY_RULE)
    example = YAML(typ="safe", pure=True).load(page.split("```yaml\n")[1].split("```")[0])
    assert TypeAdapter(RewardMix).validate_python(example["rewards"]).keys() == {"right", "tags", "polite", "mine"}


@pytest.mark.parametrize("kind", EVERY_RULE)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(texts=st.lists(TEXTS, max_size=4), right=TEXTS)
def test_any_text_gets_one_finite_number_and_as_messages_the_same(kind, texts, right):
    prompts, columns = ["p"] * len(texts), {"answer": [right] * len(texts)}
    reward = build(kind=kind, **EVERY_RULE[kind]).function
    values = reward(prompts, texts, **columns)
    assert len(values) == len(texts)
    assert all(isinstance(value, float) and math.isfinite(value) for value in values)
    assert reward(prompts, [message(text) for text in texts], **columns) == values


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(text=TEXTS, right=TEXTS)
def test_any_two_texts_are_equal_or_not(equal, text, right):
    assert equal(["p"], [rf"\boxed{{{text}}}"], answer=[right])[0] in (0.0, 1.0)


# mix ----------------------------------------------------------------------------------------------


def test_a_mix_is_built_in_order_with_its_settings(tiny_model_dir, tiny_reward_dir, tmp_path):
    mix = TypeAdapter(RewardMix).validate_python(
        {
            "reward_model": {"kind": "reward_model", "weight": 1.0},
            "answer": {"kind": "answer", "weight": 2.0, "answer_in": "form"},
            "format": {"kind": "format", "weight": 0.25, **FORM},
            "brief": {"kind": "length", "weight": -1.0, "unit": "characters", "shortest": 10, "longest": 20},
            "language": {"kind": "language", "weight": 0.5, "target": "zh"},
        }
    )
    files = PolicyFiles(tiny_model_dir, tiny_reward_dir, tmp_path, tmp_path, tmp_path)
    rewards = build_rewards(mix, files, 2)
    assert [(reward.name, reward.weight) for reward in rewards] == [
        ("reward_model", 1.0),
        ("answer", 2.0),
        ("format", 0.25),
        ("brief", -1.0),
        ("language", 0.5),
    ]
    columns = {"answer": ["18", "19"], "id": ["a", "b"], "target": ["en", "en"]}  # as a setting is called
    total, parts = mixed_reward(rewards, ["p", "p"], [RIGHT, "x" * 30], columns)
    score = RewardModel(tiny_reward_dir, 2).score(["p", "p"], [RIGHT, "x" * 30])
    assert parts["reward_model"] == pytest.approx(score, abs=1e-5)
    assert {name: values for name, values in parts.items() if name != "reward_model"} == {
        "answer": [1.0, 0.0],
        "format": [1.0, 0.0],
        "brief": [0.0, 0.5],
        "language": [1.0, 0.0],
    }
    assert total == pytest.approx([score[0] + 2 + 0.25 + 0.5, score[1] - 0.5], abs=1e-5)
    with pytest.raises(UserError, match="holds no reward model"):
        build_rewards(mix, replace(files, reward=tmp_path), 2)
