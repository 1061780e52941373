"""Gold beside proxy: what a look sees, which state is kept, and when over-optimisation gets its name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from rlhf import watch as module
from rlhf.curves import CurveRecorder, no_log
from rlhf.data.formats import write_rows
from rlhf.errors import UserError
from rlhf.evaluation.generation import Completion
from rlhf.evaluation.prompts import GoldFiles
from rlhf.models import load_causal
from rlhf.params import AdapterParams, EvaluateParams, WatchParams
from rlhf.params_file import load_params
from rlhf.policies import train_policy
from rlhf.policies.actors import with_adapter
from rlhf.scoring import Reward
from rlhf.watch import GoldWatch, WatchFiles
from tests.tiny import ROOT

PROMPTS = 40


@dataclass
class Script:
    """Rewards that come as they are written: look for look, so many right answers, and a proxy reward for all."""

    right: Sequence[int]
    proxy: Sequence[float]
    looks: int = field(default=0)

    def gold(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        count = self.right[self.looks]
        return [float(place < count) for place in range(len(completions))]

    def believed(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        self.looks += 1
        return [self.proxy[self.looks - 1]] * len(completions)


@pytest.fixture
def evaluate() -> EvaluateParams:
    params = load_params(ROOT / "params.yaml").evaluate
    return params.model_copy(update={"prompts": 2, "max_new_tokens": 4, "batch_size": 64})


@pytest.fixture
def files(policy_files, tiny_world, tmp_path) -> WatchFiles:
    rows = [{**row, "id": f"{index}"} for index, row in enumerate(tiny_world.prompts[1] * 4)]
    write_rows(tmp_path / "test.jsonl", rows)
    gold = GoldFiles(policy_files.sft, policy_files.reward, tmp_path)
    return WatchFiles(policy_files.sft, policy_files.reward, gold, tmp_path / "test.jsonl")


@pytest.fixture
def scripted(monkeypatch, evaluate, files):
    """A watch with a script instead of rewards, and its log."""

    def make(right: Sequence[int], proxy: Sequence[float], reaction: str = "warn") -> tuple[GoldWatch, CurveRecorder]:
        script = Script(right, proxy)
        monkeypatch.setattr(module, "gold_reward", lambda *_: Reward("gold", script.gold, 1.0))
        monkeypatch.setattr(module, "proxy_reward", lambda *_: Reward("proxy", script.believed, 1.0))
        curves = CurveRecorder(no_log)
        params = WatchParams(evaluations=len(right) - 1, prompts=PROMPTS, on_over_optimisation=reaction)
        return GoldWatch(params, evaluate, files, 0, curves), curves

    return make


def walk(watch: GoldWatch, model: Any, looks: int) -> list[bool]:
    """Look at a model whose weights are all as large as the step's number; returns what each look said."""
    said = []
    for step in range(looks):
        fill(model, step)
        said.append(watch.look(model, step, looks - 1))
    return said


def fill(model: Any, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def weight(model: Any) -> float:
    return next(model.parameters()).flatten()[0].item()


# which state is kept ------------------------------------------------------------------------------


def test_the_state_with_the_highest_gold_reward_is_kept(scripted, files):
    watch, curves = scripted([10, 25, 30, 28], [0, 1, 2, 3])
    model = load_causal(files.sft)
    walk(watch, model, 4)
    watch.roll_back(model, 3)
    assert weight(model) == 2
    assert curves.rows[3]["watch/saved_step"] == 2
    assert [curves.rows[step]["watch/gold_reward"] for step in range(4)] == [0.25, 0.625, 0.75, 0.7]
    assert [curves.rows[step]["watch/proxy_reward"] for step in range(4)] == [0, 1, 2, 3]


def test_of_equally_good_states_the_last_is_kept(scripted, files):
    watch, _ = scripted([10, 10, 10], [0, 0, 0])
    model = load_causal(files.sft)
    walk(watch, model, 3)
    watch.roll_back(model, 2)
    assert weight(model) == 2


def test_looks_come_at_even_steps_and_at_the_start(scripted, files):
    watch, curves = scripted([1, 2, 3], [0, 0, 0])
    model = load_causal(files.sft)
    for step in range(11):
        watch.look(model, step, 10)
    assert sorted(curves.rows) == [0, 5, 10]


# over-optimisation --------------------------------------------------------------------------------


def test_fallen_gold_under_a_risen_proxy_is_called_by_its_name(scripted, files, caplog):
    watch, curves = scripted([20, 38, 20], [0, 1, 2])
    walk(watch, load_causal(files.sft), 3)
    assert [curves.rows[step]["watch/over_optimised"] for step in range(3)] == [0, 0, 1]
    assert "from step 1 to 2 the gold reward fell from 0.950 to 0.500 while the proxy reward rose" in caplog.text


@pytest.mark.parametrize(
    ("right", "proxy"), [([38, 20], [2, 1]), ([38, 37], [1, 2]), ([20, 38], [1, 2])], ids=["proxy", "noise", "gain"]
)
def test_nothing_else_is_called_so(scripted, files, right, proxy):
    watch, curves = scripted(right, proxy)
    walk(watch, load_causal(files.sft), 2)
    assert curves.rows[1]["watch/over_optimised"] == 0


def test_more_looks_ask_for_a_larger_fall(scripted, files):
    """Eight answers lost and none won are beyond chance for one look, not for the best of ten and any other."""
    named = {}
    for looks in (1, 10):
        watch, curves = scripted([38] + [30] * looks, range(looks + 1))
        walk(watch, load_causal(files.sft), looks + 1)
        named[looks] = curves.rows[1]["watch/over_optimised"]
    assert named == {1: 1, 10: 0}


@pytest.mark.parametrize(
    ("reaction", "right", "said"),
    [
        ("stop", [38, 20, 20, 20], [False, False, True, True]),
        ("stop", [38, 20, 37, 20], [False, False, False, False]),
        ("warn", [38, 20, 20, 20], [False, False, False, False]),
    ],
    ids=["stays", "recovers", "warns"],
)
def test_training_ends_where_it_stays_over_optimised_and_shall_stop(scripted, files, reaction, right, said):
    watch, _ = scripted(right, [0, 1, 2, 3], reaction)
    model = load_causal(files.sft)
    assert walk(watch, model, 4) == said
    watch.roll_back(model, 3)
    assert weight(model) == 0


# what a look leaves behind ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo", "dpo", "grpo"])
def test_a_look_changes_nothing_in_the_training(name, policy_files, scripted):
    section = load_params(ROOT / "params.yaml").policies[name]
    sizes = {"steps": 2, "batch_size": 8, "minibatches": 2, "max_new_tokens": 4, "max_length": 200, "group_size": 4}
    section = section.model_copy(update={key: size for key, size in sizes.items() if hasattr(section, key)})
    watch, curves = scripted([1, 2, 3], [0, 0, 0])
    watched = train_policy(section, policy_files, 3, curves, watch=watch)
    alone = train_policy(section, policy_files, 3, no_log)
    assert sum("watch/gold_reward" in row for row in curves.rows.values()) == 3
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))


@pytest.mark.parametrize("name", ["ppo", "dpo", "grpo"])
def test_training_stops_and_returns_its_best_state(name, policy_files, scripted):
    section = load_params(ROOT / "params.yaml").policies[name]
    sizes = {"steps": 6, "batch_size": 8, "minibatches": 2, "max_new_tokens": 4, "max_length": 200, "group_size": 4}
    section = section.model_copy(update={key: size for key, size in sizes.items() if hasattr(section, key)})
    watch, curves = scripted([38, 20, 20, 20, 20, 20, 20], [0, 1, 2, 3, 4, 5, 6], "stop")
    model = train_policy(section, policy_files, 3, curves, watch=watch)
    start = load_causal(policy_files.sft)
    assert sum("watch/gold_reward" in row for row in curves.rows.values()) == 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))


def test_an_adapter_is_measured_against_its_own_base_and_trains_on(evaluate, files):
    policy = with_adapter(
        load_causal(files.sft),
        AdapterParams(rank=2, alpha=4, dropout=0.0, target_modules="all-linear", quantise=None),
        "CAUSAL_LM",
    )
    curves = CurveRecorder(no_log)
    params = WatchParams(evaluations=1, prompts=8, on_over_optimisation="warn")
    watch = GoldWatch(params, evaluate, files, 0, curves)
    trained = [name for name, value in policy.named_parameters() if value.requires_grad]
    policy.train()
    watch.look(policy, 0, 1)
    assert curves.rows[0]["watch/kl_to_sft"] == 0
    assert policy.training
    assert [name for name, value in policy.named_parameters() if value.requires_grad] == trained
    with torch.no_grad():
        for name, value in policy.named_parameters():
            if "lora_B" in name:
                value.fill_(0.3)
    watch.look(policy, 1, 1)
    assert abs(curves.rows[1]["watch/kl_to_sft"]) > 1e-3


def test_a_watch_goes_on_from_its_state(scripted, files):
    watch, _ = scripted([38, 20, 30], [0, 1, 2])
    model = load_causal(files.sft)
    walk(watch, model, 2)
    state = watch.state()
    resumed, curves = scripted([30, 30, 30], [2, 2, 2])
    resumed.restore(state)
    fill(model, 2)
    resumed.look(model, 1, 2)
    resumed.look(model, 2, 2)
    resumed.roll_back(model, 2)
    assert [curves.rows[step]["watch/gold_reward"] for step in range(3)] == [0.95, 0.5, 0.75]
    assert curves.rows[2]["watch/over_optimised"] == 1
    assert weight(model) == 0


# rewards ------------------------------------------------------------------------------------------


def test_rewards_are_those_of_the_answers_given(evaluate, files, monkeypatch):
    """Gold by the rule, proxy by the reward model of the folder, on the rows behind those of the evaluation."""
    seen: list[Any] = []

    def answer(self, model, temperature, draw=0):
        seen.extend(self.rows)
        return [
            Completion(f"<think>1</think><answer>{row['answer'] if place % 4 else 'no'}</answer>", [1, 2], True)
            for place, row in enumerate(self.rows)
        ]

    monkeypatch.setattr(module.HeldOutPrompts, "answer", answer)
    curves = CurveRecorder(no_log)
    params = WatchParams(evaluations=1, prompts=8, on_over_optimisation="warn")
    GoldWatch(params, evaluate, files, 0, curves).look(load_causal(files.sft), 0, 1)
    assert [row["id"] for row in seen] == [f"{place}" for place in range(2, 10)]
    assert curves.rows[0]["watch/gold_reward"] == 0.75
    assert curves.rows[0]["watch/mean_tokens"] == 2
    assert curves.rows[0]["watch/stop_rate"] == 1


def test_without_a_reward_model_gold_stands_alone(evaluate, files):
    curves = CurveRecorder(no_log)
    params = WatchParams(evaluations=1, prompts=8, on_over_optimisation="stop")
    alone = WatchFiles(files.sft, None, files.gold, files.prompts)
    GoldWatch(params, evaluate, alone, 0, curves).look(load_causal(files.sft), 0, 1)
    assert "watch/gold_reward" in curves.rows[0]
    assert "watch/proxy_reward" not in curves.rows[0]


def test_no_prompt_left_to_look_at_is_refused(evaluate, files):
    params = WatchParams(evaluations=1, prompts=8, on_over_optimisation="warn")
    greedy = evaluate.model_copy(update={"prompts": 64})
    with pytest.raises(UserError, match="no held-out prompt beyond the 64 that evaluate.prompts takes; raise prepare"):
        GoldWatch(params, greedy, files, 0, no_log)


def test_the_log_says_what_is_kept(scripted, files, caplog):
    caplog.set_level(logging.INFO)
    watch, _ = scripted([10, 20], [0, 1])
    model = load_causal(files.sft)
    walk(watch, model, 2)
    watch.roll_back(model, 1)
    assert "the policy of step 1 is kept, the best of 2 looks" in caplog.text
