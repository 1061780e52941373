"""A tokenizer and a small Llama-type base model made from scratch on plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.curves import Log
from rlhf.encoding import IGNORED
from rlhf.models import set_determinism
from rlhf.params import PretrainingParams

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

END, PADDING = "<eos>", "<pad>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
WARMUP_SHARE = 0.05


def train_tokenizer(texts: Sequence[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, each tag one token; decoding gives back every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(TAGS),
        special_tokens=[PADDING, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PADDING,
        model_max_length=context,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(params: PretrainingParams, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights and tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    set_determinism(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=params.hidden_size,
        intermediate_size=params.hidden_size * 3,
        num_hidden_layers=params.layers,
        num_attention_heads=params.heads,
        num_key_value_heads=params.heads,
        max_position_embeddings=params.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.vocab[END],
        pad_token_id=tokenizer.vocab[PADDING],
    )
    return LlamaForCausalLM(config)


def pack(
    texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole texts, each closed by the end token, laid side by side in padded rows: token ids and labels (rows, length).

    Labels count what follows from a story, not the story: that is drawn at random, there is nothing to learn in it.
    No text is cut, as a story without its beginning would teach the model to invent numbers; one that is longer than a
    row is left out.
    """
    import torch

    rows: list[list[int]] = [[]]
    labels: list[list[int]] = [[]]
    stories = tokenizer([story for story, _ in texts], add_special_tokens=False)["input_ids"]
    rests = tokenizer([rest for _, rest in texts], add_special_tokens=False)["input_ids"]
    for story, rest in zip(stories, rests, strict=True):
        counted = [*rest, tokenizer.eos_token_id]
        if len(story) + len(counted) > length:
            continue
        if len(rows[-1]) + len(story) + len(counted) > length:
            rows.append([])
            labels.append([])
        rows[-1] += [*story, *counted]
        labels[-1] += [*[IGNORED] * len(story), *counted]
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    return ids, torch.tensor([row + [IGNORED] * (length - len(row)) for row in labels])


def pretrain(
    params: PretrainingParams,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[tuple[str, str]],
    seed: int,
    log: Log,
) -> LlamaForCausalLM:
    """Train a model from scratch: AdamW, linear warm-up, cosine decay to a tenth."""
    import torch
    from tqdm import tqdm

    model = build_model(params, tokenizer, seed)
    order = torch.Generator().manual_seed(seed)
    shuffled = [texts[index] for index in torch.randperm(len(texts), generator=order).tolist()]
    rows, labels = pack(shuffled, tokenizer, params.row_length)
    optimiser = torch.optim.AdamW(model.parameters(), params.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _learning_rate_factor(step, params.steps))
    model.train()
    for step in tqdm(range(1, params.steps + 1), desc="pretraining", unit="step"):
        batch = torch.randint(len(rows), (params.batch_size,), generator=order)
        loss = model(input_ids=rows[batch], labels=labels[batch]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 20 == 0 or step == params.steps:
            log({"loss": loss.item()}, step)
    return model.eval()


def _learning_rate_factor(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
