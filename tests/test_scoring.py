"""A reward model's score whatever stands beside it, the mix, and what is refused."""

import json
import logging
import math
import shutil

import pytest
import torch
from transformers import LlamaForSequenceClassification

from rlhf import scoring
from rlhf.data.formats import with_ids
from rlhf.errors import UserError
from rlhf.models import load_causal, load_scorer, load_tokenizer, save_model
from rlhf.scoring import Reward, RewardModel, check_reward_model, check_same_tokenizer, mixed_reward


def message(text):
    return [{"role": "assistant", "content": text}]


# reward model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tiny_world):
    """Prompts, and answers of very different lengths."""
    rows = tiny_world.preferences[0][:6]
    prompts = [row["prompt"] for row in rows for _ in (0, 1)]
    return prompts, [row[side][: 8 + 8 * number] for number, row in enumerate(rows) for side in ("chosen", "rejected")]


@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_a_score_is_that_of_the_text_alone(tiny_reward_dir, texts, batch_size):
    tokenizer, model = load_tokenizer(tiny_reward_dir), load_scorer(tiny_reward_dir)
    alone = []
    for prompt, answer in zip(*texts, strict=True):
        ids = [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
        with torch.inference_mode():
            alone.append(model(input_ids=torch.tensor([ids])).logits.item())
    assert max(alone) - min(alone) > 0.01
    assert RewardModel(tiny_reward_dir, batch_size).score(*texts) == pytest.approx(alone, abs=1e-5)


def test_padding_side_and_messages_do_not_change_a_score(tiny_reward_dir, texts):
    model = RewardModel(tiny_reward_dir, 12)
    sequences = [model.encode(*pair) for pair in zip(*texts, strict=True)]
    assert len({len(ids) for ids in sequences}) > 2
    assert model.score_ids(sequences, left=True) == pytest.approx(model.score_ids(sequences), abs=1e-5)
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    model.tokenizer.chat_template = template
    messages = [[{"role": "user", "content": prompt}] for prompt in texts[0]]
    expected = model.score(*texts)
    assert model.score(messages, texts[1]) == pytest.approx(expected, abs=1e-6)
    assert model.score(messages, [message(text) for text in texts[1]]) == pytest.approx(expected, abs=1e-6)


def test_a_text_beyond_the_context_is_scored_by_its_end_and_said_once(tiny_reward_dir, caplog):
    model = RewardModel(tiny_reward_dir, 2)
    limit = model.model.config.max_position_embeddings
    rambling = " 7" * (limit + 10)
    with caplog.at_level(logging.WARNING):
        scores = model.score(["start", "START"], [rambling, rambling])
    assert scores[0] == scores[1]
    assert len(model.encode("start", rambling)) == limit
    assert model.encode("start", rambling)[-1] == model.tokenizer.eos_token_id
    warnings = [record.getMessage() for record in caplog.records if record.name == "rlhf.scoring"]
    assert len(warnings) == 1
    assert f"its last {limit}" in warnings[0]


def test_no_answers_have_no_scores(tiny_reward_dir):
    assert RewardModel(tiny_reward_dir, 2).score([], []) == []


# hand-over ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tiny_world):
    return with_ids(tiny_world.preferences[0][:4])


def copy(folder, target, **config):
    shutil.copytree(folder, target)
    settings = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**settings, **config}))
    return target


def test_a_sound_reward_model_is_accepted(tiny_reward_dir, rows):
    check_reward_model(tiny_reward_dir, rows)
    check_reward_model(tiny_reward_dir, rows[:1])


def test_a_model_that_ignores_the_attention_mask_is_refused(tiny_reward_dir, rows, monkeypatch):
    class Forgetful(LlamaForSequenceClassification):
        def forward(self, input_ids, attention_mask=None, position_ids=None):
            return super().forward(input_ids, position_ids=position_ids)

    monkeypatch.setattr(scoring, "load_scorer", lambda folder: Forgetful.from_pretrained(folder).eval())
    with pytest.raises(UserError, match="depends on padding side"):
        check_reward_model(tiny_reward_dir, rows)


def test_a_model_that_does_not_know_the_padding_token_is_refused(tiny_reward_dir, rows, tmp_path):
    """It then reads its score from the padding: another one in every batch."""
    wrong = load_tokenizer(tiny_reward_dir).convert_tokens_to_ids("a")
    broken = copy(tiny_reward_dir, tmp_path / "broken", pad_token_id=wrong)
    with pytest.raises(UserError, match="depends on .*check pad_token_id"):
        check_reward_model(broken, rows)


def test_scores_that_are_no_numbers_are_refused(tiny_reward_dir, rows, tmp_path):
    model = load_scorer(tiny_reward_dir)
    model.score.weight.data.fill_(math.nan)
    save_model(model, load_tokenizer(tiny_reward_dir), tmp_path / "nan")
    with pytest.raises(UserError, match="not finite"):
        check_reward_model(tmp_path / "nan", rows)


@pytest.mark.parametrize("labels", [2, 3])
def test_a_model_with_several_scores_is_refused(tiny_reward_dir, tiny_model_dir, rows, tmp_path, labels):
    config = load_scorer(tiny_reward_dir).config
    config.num_labels = labels
    save_model(LlamaForSequenceClassification(config), load_tokenizer(tiny_model_dir), tmp_path / "many")
    with pytest.raises(UserError, match=f"has {labels} labels, not 1"):
        check_reward_model(tmp_path / "many", rows)


def test_a_folder_without_a_reward_model_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        RewardModel(tmp_path, 1)
    with pytest.raises(UserError, match="holds LlamaForCausalLM, not a reward model"):
        RewardModel(tiny_model_dir, 1)


def test_no_preferences_no_check(tiny_reward_dir):
    with pytest.raises(UserError, match="no answer to check"):
        check_reward_model(tiny_reward_dir, [])


def test_tokenizers_are_compared_by_all_that_splits_text(tiny_model_dir, tiny_reward_dir, tmp_path):
    check_same_tokenizer(tiny_model_dir, tiny_reward_dir)

    def changed(name, change):
        target = tmp_path / name
        shutil.copytree(tiny_reward_dir, target)
        file = target / ("tokenizer_config.json" if name == "settings" else "tokenizer.json")
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        return target

    def swap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    with pytest.raises(UserError, match="the id of the token 'a' is .* in .* but .* same SFT model"):
        check_same_tokenizer(tiny_model_dir, changed("swapped", swap))
    with pytest.raises(UserError, match="the model is"):
        check_same_tokenizer(tiny_model_dir, changed("merges", lambda content: content["model"]["merges"].reverse()))
    with pytest.raises(UserError, match="end token is '<eos>' .* but '<pad>'"):
        check_same_tokenizer(tiny_model_dir, changed("settings", lambda content: content.update(eos_token="<pad>")))
    larger = load_tokenizer(tiny_reward_dir)
    larger.add_tokens(["<new>"])
    save_model(load_causal(tiny_model_dir), larger, tmp_path / "larger")
    with pytest.raises(UserError, match="vocabulary size is"):
        check_same_tokenizer(tiny_model_dir, tmp_path / "larger")


# mix ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ([1.0], "returned 1 values for 2 answers"),
        (None, "returned NoneType for 2"),
        (1.0, "returned float for 2"),
        ([1.0, None], "is None for the answer 'second'"),
        ([1.0, math.nan], "is nan for the answer 'second'"),
        ([math.inf, 1.0], "is inf for the answer 'first'"),
        (["1", "2"], "is '1' for the answer 'first'"),
    ],
)
def test_a_broken_reward_is_named(values, complaint):
    reward = Reward("mine", lambda prompts, completions, **columns: values, 1.0)
    with pytest.raises(UserError, match=f"`mine` {complaint}"):
        mixed_reward([reward], ["p", "p"], ["first", "second"], {})


def test_a_reward_that_fails_is_named_and_keeps_its_cause():
    def divide(prompts, completions, **columns):
        return [1 / len(columns["answer"][0]) for _ in prompts]

    with pytest.raises(UserError, match=r"the reward `mine` failed \(ZeroDivisionError: division by zero\)") as caught:
        mixed_reward([Reward("mine", divide, 1.0)], ["p"], ["c"], {"answer": [""]})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_columns_reach_rewards_and_those_named_like_arguments_do_not():
    seen = {}

    def remember(prompts, completions, **columns):
        seen.update(columns)
        return [0.0]

    mixed_reward(
        [Reward("mine", remember, 1.0)], ["p"], ["c"], {"answer": ["1"], "prompts": ["x"], "completions": ["y"]}
    )
    assert seen == {"answer": ["1"]}
