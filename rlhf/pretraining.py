"""A tokenizer and a small Llama-type base model made from scratch on plain text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rlhf.curves import Log
from rlhf.encoding import IGNORED, pad_right
from rlhf.models import set_determinism
from rlhf.params import PretrainingParams

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

END, PADDING = "<eos>", "<pad>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
WARMUP_SHARE = 0.05
WINDOW = 8
"""So many batches are drawn at once and sorted by length."""

Text = tuple[list[int], list[int]]
"""Token ids and labels of one text."""


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
        initializer_range=params.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": params.rope_theta},
        bos_token_id=None,
        eos_token_id=tokenizer.vocab[END],
        pad_token_id=tokenizer.vocab[PADDING],
    )
    return LlamaForCausalLM(config)


def encode_texts(texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> list[Text]:
    """Token ids and labels of each text, the end token last.

    Labels count what follows from a story, not the story: that is drawn at random, there is nothing to learn in it.
    """
    stories = tokenizer([story for story, _ in texts], add_special_tokens=False)["input_ids"]
    rests = tokenizer([rest for _, rest in texts], add_special_tokens=False)["input_ids"]
    counted = [[*rest, tokenizer.eos_token_id] for rest in rests]
    return [([*story, *rest], [*[IGNORED] * len(story), *rest]) for story, rest in zip(stories, counted, strict=True)]


def text_batches(
    texts: Sequence[Text], size: int, padding: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled batches without end of `size` texts of similar length: token ids and labels, (size, longest).

    A row holds one text: beside others a story's numbers are copied from the neighbour, and learning takes twice
    as long (docs/LOG.md). Similar lengths leave little padding.
    """
    import torch

    window = size * WINDOW
    while True:
        order = torch.randperm(len(texts), generator=generator).tolist()
        for start in range(0, max(1, len(order) - window + 1), window):
            near = sorted(order[start : start + window], key=lambda index: len(texts[index][0]))
            batches = [near[first : first + size] for first in range(0, len(near), size)]
            for chosen in torch.randperm(len(batches), generator=generator).tolist():
                ids, labels = zip(*(texts[index] for index in batches[chosen]), strict=True)
                yield pad_right(ids, padding), pad_right(labels, IGNORED)


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
    batches = text_batches(
        encode_texts(texts, tokenizer), params.batch_size, tokenizer.vocab[PADDING], torch.Generator().manual_seed(seed)
    )
    optimiser = torch.optim.AdamW(model.parameters(), params.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _learning_rate_factor(step, params.steps))
    model.train()
    for step in tqdm(range(1, params.steps + 1), desc="pretraining", unit="step"):
        ids, labels = next(batches)
        loss = model(input_ids=ids, labels=labels).loss
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
