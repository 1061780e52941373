"""GRPO over TRL's trainer: it learns what is rewarded, from any reward, and says what is wrong with one."""

from pathlib import Path

import pytest

from rlhf.curves import CurveRecorder, no_log
from rlhf.errors import UserError
from rlhf.models import load_tokenizer, save_model
from rlhf.params_file import load_params
from rlhf.policies import groups, train_policy
from rlhf.scoring import Reward
from tests.tiny import share_of_letters

ROOT = Path(__file__).parent.parent


@pytest.fixture
def params():
    section = load_params(ROOT / "params.yaml").policies["grpo"]
    return section.model_copy(update={"steps": 2, "batch_size": 8, "group_size": 4, "max_new_tokens": 6})


def reward_with(monkeypatch, function):
    monkeypatch.setattr(groups, "build_rewards", lambda *_: [Reward("mine", function, 1.0)])


def test_the_policy_learns_what_is_rewarded(params, policy_files, monkeypatch):
    reward_with(monkeypatch, share_of_letters)
    section = params.model_copy(update={"steps": 60, "batch_size": 32, "learning_rate": 0.02, "beta": 0.0})
    curves = CurveRecorder(no_log)
    train_policy(section, policy_files, 0, curves)
    rewards = [row["rewards/mine/mean"] for _, row in sorted(curves.rows.items())]
    assert rewards[0] < 0.4
    assert rewards[-1] > 0.6


def test_a_reward_sees_the_columns_of_its_prompts(params, policy_files, monkeypatch):
    seen = {}

    def look(prompts, completions, **columns):
        seen.update(columns)
        return [0.0] * len(prompts)

    reward_with(monkeypatch, look)
    train_policy(params, policy_files, 0, no_log)
    assert len(seen["answer"]) == 8
    assert all(isinstance(answer, str) for answer in seen["answer"])


@pytest.mark.parametrize("values", [[None] * 8, [float("nan")] * 8, [1.0] * 7])
def test_a_broken_reward_ends_in_a_sentence(params, policy_files, monkeypatch, values):
    reward_with(monkeypatch, lambda prompts, completions, **columns: values)
    with pytest.raises(UserError, match="mine"):
        train_policy(params, policy_files, 0, no_log)


def test_the_same_seed_gives_the_same_bytes(params, policy_files, tmp_path):
    tokenizer = load_tokenizer(policy_files.sft)
    for name in ("first", "second"):
        save_model(train_policy(params, policy_files, 5, no_log), tokenizer, tmp_path / name)
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
