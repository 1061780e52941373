"""Chat templates of base models: their own, or the plain one for models that have none."""

from pathlib import Path

import pytest

from rlhf.base_models import load_base, set_chat_template
from rlhf.data.formats import render_prompt
from rlhf.encoding import encode_answer, read_answer
from rlhf.models import load_tokenizer, save_model

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello."}]
ANSWER = [{"role": "assistant", "content": "Hello."}]


@pytest.fixture
def stories(stories_dir, tmp_path):
    """The real model with the plain template, saved and read again."""
    model, tokenizer = load_base(str(stories_dir), Path("/"))
    set_chat_template(tokenizer, "plain")
    save_model(model, tokenizer, tmp_path / "base")
    return load_tokenizer(tmp_path / "base")


def test_the_plain_template_reads_as_headings(tiny_model_dir):
    tokenizer = load_tokenizer(tiny_model_dir)
    set_chat_template(tokenizer, "plain")
    text = render_prompt(tokenizer, TURNS)
    assert text.removeprefix(tokenizer.bos_token or "") == (
        "### System\nBe brief.\n\n### User\nSay hello.\n\n### Assistant\n"
    )


def test_own_leaves_the_tokenizer_alone(tiny_model_dir):
    tokenizer = load_tokenizer(tiny_model_dir)
    before = tokenizer.chat_template
    set_chat_template(tokenizer, "own")
    assert tokenizer.chat_template == before


def test_with_a_real_tokenizer_a_conversation_starts_once_and_ends(stories):
    ids = encode_answer(stories, TURNS, ANSWER)
    assert ids.count(stories.bos_token_id) == 1
    assert ids[0] == stories.bos_token_id
    assert stories.eos_token_id in ids
    prompt = stories(render_prompt(stories, TURNS), add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt)] == prompt


def test_with_a_real_tokenizer_the_loss_covers_the_answer_and_its_end(stories):
    row = {"id": "r", "prompt": TURNS, "completion": ANSWER}
    (learnt,) = read_answer(stories, row, "completion").answers
    assert stories.decode(learnt, skip_special_tokens=True).strip() == "Hello."
    assert stories.eos_token_id in learnt
