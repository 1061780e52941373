"""Shared prompts read once: the packing itself, models of several families, and whole trainings."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from rlhf.curves import CurveRecorder, no_log
from rlhf.models import trained_weights
from rlhf.params import AdapterParams
from rlhf.params_file import load_params
from rlhf.policies import PolicyFiles, prefixes, train_policy
from rlhf.policies.prefixes import LONGEST, pack_rows, shared_prefixes
from tests.tiny import paid_by_chance

ROOT = Path(__file__).parent.parent
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


# packing ------------------------------------------------------------------------------------------

ROWS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=9), min_size=1, max_size=12)


def padded(rows: list[list[int]], left: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention (rows, length), each row with its own padding on the left."""
    width = max(len(row) + gap for row, gap in zip(rows, left, strict=True))
    tokens, attention = torch.zeros(2, len(rows), width, dtype=torch.long)
    for place, (row, gap) in enumerate(zip(rows, left, strict=True)):
        tokens[place, gap : gap + len(row)] = torch.tensor(row)
        attention[place, gap : gap + len(row)] = 1
    return tokens, attention


@given(ROWS, st.lists(st.integers(0, 4), min_size=12, max_size=12))
def test_every_token_sees_its_own_row_before_it_and_nothing_else(rows: list[list[int]], left: list[int]) -> None:
    tokens, attention = padded(rows, left[: len(rows)])
    packing = pack_rows(tokens, attention)
    width = packing.tokens.shape[1]
    assert width <= LONGEST * max(map(len, rows))
    assert packing.tokens.ne(0).sum() <= attention.sum()
    for row in range(len(rows)):
        places = packing.places[row][attention[row].bool()]
        assert packing.tokens.flatten()[places].tolist() == rows[row]
        assert packing.positions.flatten()[places].tolist() == list(range(len(places)))
        for end, place in enumerate(places.tolist()):
            seen = packing.mask[place // width, 0, place % width].nonzero().flatten() + place // width * width
            assert seen.tolist() == places[: end + 1].tolist()


def test_each_prompt_of_pairs_and_of_groups_stands_once() -> None:
    """So far as no packed row gets longer than it may."""
    prompts = [[9, 8, 7, 6, 5, 4], [9, 8, 3, 3, 3, 3]]
    pairs = [prompt + [answer] for answer in (1, 2) for prompt in prompts]
    assert pack_rows(*padded(pairs, [0] * 4)).tokens.numel() == 2 * (6 + 2)
    long = list(range(20, 60))
    assert pack_rows(*padded([*pairs, long], [0] * 5)).tokens.ne(0).sum() == 2 * (6 + 2) + len(long)
    group = [prompts[0] + [answer] for answer in range(11, 19)]
    assert pack_rows(*padded(group, [3] * 8)).tokens.tolist() == [prompts[0] + list(range(11, 19))]
    assert pack_rows(*padded([prompts[0]] * 8, [0] * 8)).tokens.tolist() == [prompts[0]]


# models -------------------------------------------------------------------------------------------


def pairs_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Four pairs with prompts of 12 tokens of 20, of different lengths."""
    tokens = torch.randint(3, 97, (8, 20), generator=torch.Generator().manual_seed(0))
    tokens[4:, :12] = tokens[:4, :12]
    attention = torch.ones_like(tokens)
    attention[1, 15:] = attention[6, 18:] = 0
    return tokens, attention


def read(model: Any, tokens: torch.Tensor, attention: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """The states and all gradients of a fixed loss, and how many tokens the transformer has embedded."""
    counted: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *call: counted.append(call[1][0].numel()))
    model.zero_grad()
    states = model.base_model(input_ids=tokens, attention_mask=attention, use_cache=False).last_hidden_state
    states = states[attention.bool()]
    (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
    hook.remove()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return [states.detach(), *(gradient.clone() for gradient in gradients)], counted[0]


def make(config: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config(**changes)).train()


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (transformers.LlamaConfig, SHAPE),
        (transformers.Qwen2Config, SHAPE),
        (transformers.Qwen3Config, {**SHAPE, "head_dim": 8}),
        (transformers.GemmaConfig, {**SHAPE, "head_dim": 8}),
        (transformers.SmolLM3Config, SHAPE),
        (transformers.MistralConfig, {**SHAPE, "sliding_window": None}),
        (transformers.GPT2Config, GPT2),
    ],
)
def test_states_and_gradients_are_those_of_the_whole_batch(config: Any, shape: dict[str, Any]) -> None:
    model = make(config, **shape)
    expected, whole = read(model, *pairs_batch())
    with shared_prefixes() as share:
        share(model)
        share(model)
        found, packed = read(model, *pairs_batch())
    assert whole == 160
    assert packed <= 120
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    assert read(model, *pairs_batch())[1] == whole, "the model is as it was"


@pytest.mark.parametrize(
    ("config", "shape", "reason"),
    [
        (transformers.MistralConfig, {**SHAPE, "sliding_window": 8}, "do not all see the whole text"),
        (transformers.Gemma3TextConfig, {**SHAPE, "head_dim": 8}, "do not all see the whole text"),
        (transformers.LlamaConfig, {**SHAPE, "attn_implementation": "eager"}, "its attention is eager, not sdpa"),
    ],
)
def test_models_that_cannot_are_left_alone(
    config: Any, shape: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(config, **shape)
    with caplog.at_level(logging.INFO), shared_prefixes() as share:
        share(model)
        assert read(model, *pairs_batch())[1] == 160
    assert reason in caplog.text


def test_a_transformer_that_reads_packed_batches_otherwise_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(transformers.LlamaConfig, **SHAPE)
    forward = type(model.base_model).forward

    def forgetful(self: Any, position_ids: Any = None, **settings: Any) -> Any:
        return forward(self, **settings)

    monkeypatch.setattr(type(model.base_model), "forward", forgetful)
    with caplog.at_level(logging.INFO), shared_prefixes() as share:
        share(model)
        assert read(model, *pairs_batch())[1] == 160
    assert "it reads a packed batch in another way" in caplog.text


def test_dropout_sampling_and_small_gains_are_left_alone() -> None:
    model = make(transformers.LlamaConfig, **SHAPE)
    tokens, attention = pairs_batch()
    plain = model.generate(tokens, attention_mask=attention, max_new_tokens=4, do_sample=False)
    with shared_prefixes() as share:
        share(model)
        assert torch.equal(plain, model.generate(tokens, attention_mask=attention, max_new_tokens=4, do_sample=False))
        assert read(model, tokens[:4], attention[:4])[1] == 80, "four prompts of their own"
        model.config.attention_dropout = 0.1
        assert read(model, tokens, attention)[1] == 160
        assert read(model.eval(), tokens, attention)[1] < 160


# trainings ----------------------------------------------------------------------------------------

SMALL: dict[str, dict[str, Any]] = {
    "dpo": {"contradicted": "keep", "epochs": 1, "batch_size": 16, "max_length": 256, "precision": "fp32"},
    "grpo": {"steps": 2, "batch_size": 16, "group_size": 4, "max_new_tokens": 6, "beta": 0.1, "mask_truncated": False},
    "ppo": {
        "steps": 2,
        "batch_size": 16,
        "group_size": 4,
        "minibatches": 2,
        "update_epochs": 1,
        "max_new_tokens": 6,
        "mask_truncated": False,
        "advantage": "group",
    },
}
ADAPTER = AdapterParams(rank=2, alpha=4, dropout=0.0, target_modules="all-linear", quantise=None)


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["full", "lora"])
@pytest.mark.parametrize("name", SMALL)
def test_a_training_learns_the_same_from_fewer_tokens(
    name: str, adapter: Any, policy_files: PolicyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params: Any = load_params(ROOT / "params.yaml").policies[name]
    params = params.model_copy(update={**SMALL[name], "adapter": adapter})
    files = policy_files
    if name != "dpo":
        params = params.model_copy(update={"rewards": paid_by_chance(tmp_path)})
        files = replace(policy_files, root=tmp_path)
    sizes: list[tuple[int, int]] = []

    def counted(tokens: torch.Tensor, attention: torch.Tensor) -> Any:
        packing = pack_rows(tokens, attention)
        sizes.append((tokens.numel(), packing.tokens.numel()))
        return packing

    curves, weights = {}, {}
    for worthwhile in (prefixes.WORTHWHILE, 0.0):
        monkeypatch.setattr(prefixes, "WORTHWHILE", worthwhile)
        monkeypatch.setattr(prefixes, "pack_rows", counted if worthwhile else pack_rows)
        curves[worthwhile] = CurveRecorder(no_log)
        weights[worthwhile] = trained_weights(train_policy(params, files, 0, curves[worthwhile]).requires_grad_(True))
    read_here = [(given, packed) for given, packed in sizes if given > 100]
    assert sum(packed for _, packed in read_here) < 0.75 * sum(given for given, _ in read_here)
    (shared, plain), (shared_curves, plain_curves) = weights.values(), curves.values()
    assert shared_curves.rows.keys() == plain_curves.rows.keys()
    for name, value in plain.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-3, atol=1e-5)
