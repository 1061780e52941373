"""params.yaml is closed: what it accepts, and the sentence that meets everything else."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from rlhf.errors import UserError
from rlhf.params import PPOParams, RewardParams
from rlhf.params_file import load_params

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "params.yaml", *sorted((ROOT / "recipes").glob("*.yaml"))]
ADAPTER = {"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear", "quantise": None}
LENGTH = {"kind": "length", "weight": 1.0, "unit": "tokens", "shortest": 4, "longest": 8}
WIDE = {"within": 0.2, "points": 1.0}
NUMBER = {"exact": 5.0, "same": 3.5, "bands": [WIDE], "wrong": -2.5, "missing": 0.0}
NUMBER |= {"kind": "number", "weight": 1.0, "answer_in": "boxed"}
FORMAT = {"kind": "format", "weight": 1.0, "blocks": ["think"], "form": "whole"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_committed_files_load(path):
    assert load_params(path).policies


@pytest.fixture
def edited(tmp_path):
    """Write params.yaml with one change; `value` None deletes the key."""

    def edit(dotted: str, value: object, delete: bool = False) -> Path:
        raw = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        *sections, key = dotted.split(".")
        section = raw
        for name in sections:
            section = section[name]
        if delete:
            del section[key]
        else:
            section[key] = value
        path = tmp_path / "params.yaml"
        with path.open("w", encoding="utf-8") as file:
            YAML().dump(raw, file)
        return path

    return edit


@pytest.mark.parametrize(
    ("dotted", "value", "sentence"),
    [
        ("sft.learning_rat", 0.1, r"unknown key sft\.learning_rat; did you mean sft\.learning_rate\?"),
        ("policies.dpo.betta", 0.1, r"unknown key policies\.dpo\.betta; did you mean policies\.dpo\.beta\?"),
        ("polices", {}, r"unknown key polices; did you mean policies\?"),
        (
            "prepare.world.noise.rates",
            0.1,
            r"unknown key prepare\.world\.noise\.rates; did you mean prepare\.world\.noise\.rate\?",
        ),
        ("sft.learning_rate", -1.0, r"sft\.learning_rate is -1\.0; input should be greater than 0"),
        ("sft.learning_rate", "fast", r"sft\.learning_rate is 'fast'; input should be a valid number"),
        ("sft.epochs", True, r"sft\.epochs is True"),
        ("reward.noise_rate", 0.5, r"reward\.noise_rate is 0\.5; input should be less than 0\.5"),
        (
            "reward.transport.label_weight",
            0.0,
            r"reward\.transport\.label_weight is 0\.0; input should be greater than 0",
        ),
        ("reward.transport.self_match_penalty", -1.0, r"reward\.transport\.self_match_penalty is -1\.0"),
        ("reward.transport.neighbours", 0, r"reward\.transport\.neighbours is 0"),
        ("reward.transport.regularisation", 0.0, r"reward\.transport\.regularisation is 0\.0"),
        ("reward.transport.scale", "mean", r"reward\.transport\.scale is 'mean'; input should be 'max', 'median' or"),
        ("reward.label_weight", 0.1, r"unknown key reward\.label_weight"),
        ("policies.dpo.algorithm", "dpoo", r"policies\.dpo.*dpoo"),
        ("policies.ppo.batch_size", 33, r"policies\.ppo: batch_size 33 is not divisible by minibatches"),
        ("policies.ppo.precision", "bf16", r"policies\.ppo: ppo trains all weights in fp32 only; set precision"),
        ("policies.ppo.advantage", "group", r"advantage is 'group'.* but group_size is 1; raise group_size"),
        ("policies.ppo.group_size", 7, r"batch_size 128 is not divisible by group_size 7"),
        ("policies.ppo.kl_in", "loss", r"kl_estimator is 'k1' but its gradient in the loss is zero on average"),
        ("policies.ppo.critic", "adapter", r"critic is 'adapter' but adapter is null"),
        ("policies.ppo.adaptive_beta", {"target": 6.0, "horizon": 0}, r"adaptive_beta\.horizon is 0"),
        ("policies.ppo.beta", -0.1, r"policies\.ppo\.beta is -0\.1"),
        ("policies.ppo.gamma", 1.5, r"policies\.ppo\.gamma is 1\.5"),
        ("policies.ppo.gae_lambda", -1.0, r"policies\.ppo\.gae_lambda is -1"),
        ("policies.ppo.clip_range", 0.0, r"policies\.ppo\.clip_range is 0"),
        ("policies.ppo.clip_range_high", -0.2, r"policies\.ppo\.clip_range_high is -0\.2"),
        ("policies.ppo.dual_clip", 1.0, r"policies\.ppo\.dual_clip is 1"),
        ("policies.ppo.dynamic_sampling", {"max_refills": 2}, r"but with advantage 'gae' they teach too"),
        ("policies.ppo.dynamic_sampling", {"max_refills": 0}, r"dynamic_sampling\.max_refills is 0"),
        ("policies.ppo.advantage", "likelihood", r"advantage is 'likelihood'.* but group_size is 1"),
        ("policies.grpo.dynamic_sampling", True, r"policies\.grpo\.dynamic_sampling is True"),
        ("policies.grpo.beta", -0.1, r"policies\.grpo\.beta is -0\.1"),
        ("policies.grpo.clip_range", 1.0, r"policies\.grpo\.clip_range is 1\.0"),
        ("policies.grpo.temperature", 0.0, r"policies\.grpo\.temperature is 0\.0"),
        ("policies.grpo.group_size", 1, r"policies\.grpo\.group_size is 1"),
        ("policies.grpo.group_size", 7, r"not divisible by group_size 7"),
        ("policies.ppo.rewards", {}, r"policies\.ppo\.rewards: no reward is named"),
        ("policies.ppo.rewards.answer", {"weight": 1.0}, r"policies\.ppo\.rewards\.answer has no 'kind'; add it"),
        ("policies.ppo.rewards.answer.kind", "anser", r"policies\.ppo\.rewards\.answer.* 'anser'.*'answer'"),
        (
            "policies.ppo.rewards.answer.answer_in",
            "box",
            r"rewards\.answer\.answer_in is 'box'; input should be 'form'",
        ),
        (
            "policies.ppo.rewards.answer.wait",
            1.0,
            r"unknown key policies\.ppo\.rewards\.answer\.wait; did you mean \S+weight",
        ),
        ("policies.ppo.rewards.answer.weight", float("inf"), r"policies\.ppo\.rewards\.answer\.weight is inf"),
        ("policies.ppo.rewards.My Own", NUMBER, r"policies\.ppo\.rewards\.My Own is dict; string should match"),
        (
            "policies.ppo.rewards.again",
            {"kind": "reward_model", "weight": 1.0},
            r"policies\.ppo\.rewards: reward_model and again are the same reward model",
        ),
        (
            "policies.ppo.rewards.brief",
            {**LENGTH, "shortest": 9},
            r"rewards\.brief: shortest is 9 but longest is 8; swap",
        ),
        ("policies.ppo.rewards.brief", {**LENGTH, "longest": 0}, r"rewards\.brief\.longest is 0"),
        ("policies.ppo.rewards.brief", {**LENGTH, "unit": "words"}, r"rewards\.brief\.unit is 'words'"),
        (
            "policies.ppo.rewards.near",
            {**NUMBER, "bands": [WIDE, WIDE]},
            r"rewards\.near: bands has within 0\.2 before 0",
        ),
        (
            "policies.ppo.rewards.near",
            {**NUMBER, "bands": [{"within": 1.0, "points": 1.0}]},
            r"rewards\.near\.bands\.0\.within is 1\.0",
        ),
        ("policies.ppo.rewards.form", {**FORMAT, "blocks": []}, r"rewards\.form\.blocks is list"),
        ("policies.ppo.rewards.form", {**FORMAT, "blocks": ["<think>"]}, r"rewards\.form\.blocks\.0 is '<think>'"),
        (
            "policies.ppo.rewards.form",
            {**FORMAT, "blocks": [{"open": "##", "close": "##"}]},
            r"rewards\.form\.blocks\.0.*: open and close are both '##'; give two different tags",
        ),
        (
            "policies.ppo.rewards.words",
            {"kind": "keywords", "weight": 1.0, "wanted": [], "forbidden": []},
            r"rewards\.words: wanted and forbidden are both empty; name a word",
        ),
        (
            "policies.ppo.rewards.chinese",
            {"kind": "language_steps", "weight": 1.0, "target": "zh", "much": 0.1, "little": 0.3},
            r"rewards\.chinese: little is 0\.3 but much is 0\.1; swap them",
        ),
        ("policies", {}, r"policies is dict; dictionary should have at least 1 item"),
        ("prepare.world.test_prompts", 512, r"test_prompts is 512, all of which evaluate\.prompts takes, and"),
        ("evaluate.watch.prompts", 0, r"evaluate\.watch\.prompts is 0"),
        ("evaluate.watch.on_over_optimisation", "halt", r"on_over_optimisation is 'halt'; input should be 'warn' or"),
        ("evaluate.best_of", 1, r"evaluate\.best_of is 1"),
        ("evaluate.kl_budget", 0.0, r"evaluate\.kl_budget is 0"),
        ("evaluate.gold", {"kind": "reward_model", "weight": 1.0}, r"evaluate\.gold is the reward model"),
        ("evaluate.gold", "jugde", r"evaluate\.gold is 'jugde'"),
        ("evaluate.gold", {"kind": "anser"}, r"evaluate\.gold"),
        ("evaluate.gold", "judge", r"evaluate\.gold is 'judge' but reward\.judge is false"),
        ("prepare.data.preferences", None, r"prepare\.data\.preferences is null but policies\.dpo needs"),
        ("prepare.data.system", "Be brief.", r"prepare\.data: system is given but sft comes from the world"),
        ("prepare.data.form", "{solution}{answer}", r"prepare\.data: form is given but sft comes from the world"),
        ("prepare.world", None, r"prepare: world is null but prepare\.base_model comes from it"),
        ("prepare.chat_template", "chatml", r"prepare\.chat_template is 'chatml'; input should be 'own' or 'plain'"),
        ("prepare.world.min_steps", 4, r"min_steps is 4 but max_steps is 2"),
        ("seed", float("nan"), r"seed is nan"),
        ("reward.hidden", [64], r"reward: hidden is \[64\] but frozen is false; set frozen to true"),
        ("reward.hidden", [0], r"reward\.hidden\.0 is 0"),
        (
            "reward.ratings",
            {"low": 0, "high": 4, "positive": "mean"},
            r"reward\.ratings gives a scale but prepare\.data\.ratings is null",
        ),
        ("reward.ratings", {"low": 4, "high": 0, "positive": "mean"}, r"low is 4 but high is 0"),
        ("reward.ratings", {"low": 0, "high": 4, "positive": 0}, r"positive is 0, but ratings go from 0 to 4"),
        ("reward.ratings", {"low": 0, "high": 4, "positive": 5}, r"positive is 5, but ratings go from 0 to 4"),
        ("reward.ratings", {"low": 0, "high": 4, "positive": "mode"}, r"positive is 'mode'"),
        ("prepare.data.ratings", {"kind": "world"}, r"prepare\.data\.ratings"),
        ("embed.model", "", r"embed\.model is ''"),
        ("probe.rows", 0, r"probe\.rows is 0"),
        ("probe.on_hackable", "go", r"probe\.on_hackable is 'go'; input should be 'warn' or 'stop'"),
        ("probe.wins", {"warn": 0.05, "stop": 1.2}, r"probe\.wins\.stop is 1\.2"),
        ("probe.gain", {"warn": -0.1, "stop": 1.0}, r"probe\.gain\.warn is -0\.1"),
        ("probe.gain", {"warn": 0.5, "stop": 0.2}, r"probe\.gain: warn is 0\.5 but stop is 0\.2; lower the first"),
    ],
)
def test_wrong_value_is_one_sentence(edited, dotted, value, sentence):
    with pytest.raises(UserError) as caught:
        load_params(edited(dotted, value))
    message = str(caught.value)
    assert re.search(sentence, message), message
    assert "\n" not in message


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"gradient_checkpointing": True}, {"adapter": "lora"}])
def test_a_frozen_model_takes_nothing_that_trains_its_body(change):
    raw = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    adapter = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear", "quantise": None}
    change = {"adapter": adapter} if "adapter" in change else change
    RewardParams(**raw["reward"] | {"frozen": True})
    with pytest.raises(ValidationError, match="frozen trains a score head alone, in fp32; set adapter to null"):
        RewardParams(**raw["reward"] | change | {"frozen": True})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"group_size": 4, "advantage": "group"}, r"kl_in is 'reward' but advantage 'group' divides"),
        (
            {"beta": 0.0, "adaptive_beta": {"target": 6.0, "horizon": 1000}},
            r"beta is 0 but adaptive_beta multiplies it",
        ),
        (
            {"critic": "adapter", "adapter": ADAPTER, "gradient_checkpointing": True},
            r"gradient_checkpointing would recompute",
        ),
    ],
)
def test_values_of_ppo_that_do_not_fit_together_are_refused(changes, sentence):
    section = load_params(ROOT / "params.yaml").policies["ppo"]
    with pytest.raises(ValidationError, match=sentence):
        PPOParams.model_validate(section.model_dump(exclude_unset=True) | changes)


@pytest.mark.parametrize(
    "dotted",
    [
        "sft.learning_rate",
        "policies.ppo.beta",
        "seed",
        "prepare.world.noise",
        "prepare.world.language",  # the kind of a reward, too
        "policies.ppo.rewards.answer.weight",
    ],
)
def test_missing_key_is_named(edited, dotted):
    with pytest.raises(UserError, match=rf"{re.escape(dotted)} is missing"):
        load_params(edited(dotted, None, delete=True))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"seed: [1", r"not valid YAML"),
        (b"- 1\n- 2\n", r"holds list, not a map"),
        (b"", r"holds NoneType, not a map"),
        (b"seed: \xff\n", r"not UTF-8"),
        (b"seed: 1\nseed: 2\n", r"line 2: not valid YAML"),
    ],
)
def test_broken_file_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "params.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError, match=sentence):
        load_params(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_params(tmp_path / "params.yaml")
