"""What can be measured on a row, as one table per kind of data: lengths, forms, repeats, leaks; no texts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf.data.formats import Row, render_prompt, row_id
from rlhf.data.sources import REQUIRED, REQUIRED_NUMBERS

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")
ROLES = ("system", "user", "assistant", "tool")
NUMBERS = ("margin", "weight")
"""Optional columns that training reads as numbers."""
BATCH = 1024
"""Rows measured at a time."""


def measure(rows: Mapping[str, Iterable[Row]], kind: str, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """One line per row of every split (train, test), in order; a million rows take some 300 MB.

    Columns: `row` (place in the table), `id`, `split`; for every text column `x` of the kind: `x_characters` (of its
    trimmed words; null where the row has none), `x_form` (text, messages, other), `x_turns` (roles in order),
    `x_tokens`, `x_key` (a hash); `form_fits`, `total_tokens` (prompt, longest answer and end token), `numbers_fit`,
    `leaks` (the prompt is held out, yet this row trains), `is_duplicate`, `repeats_id`, and for preferences
    `answers_differ`, `is_contradicted` and `longer_chosen` (null for equal lengths), for ratings `score` (null where it
    is no number), for prompts that have answers `answer` (a hash).
    Raises UserError where rows are conversations and the tokenizer has no chat template.
    """
    import pandas as pd

    listed = ((split, row) for split, members in rows.items() for row in members)
    parts = [_measure_batch(batch, kind, tokenizer) for batch in in_batches(listed, BATCH)]
    table = pd.concat(parts or [_measure_batch([], kind, tokenizer)], ignore_index=True)
    table.insert(0, "row", range(len(table)))
    _add_form_fit(table, REQUIRED[kind])
    _add_number_fit(table, REQUIRED_NUMBERS.get(kind, ()))
    _add_repeats(table)
    if kind == "preferences":
        add_pair_columns(table)
    if "has_answer" in table and True not in set(table["has_answer"]):
        del table["answer"]
    return table


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one of what is left."""
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch


def _measure_batch(batch: list[tuple[str, Row]], kind: str, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """What each row tells by itself."""
    import pandas as pd

    listed = [row for _, row in batch]
    table = pd.DataFrame(
        {
            "id": _objects([str(row.get("id") or row_id(row)) for row in listed]),
            "split": _objects([split for split, _ in batch]),
        }
    )
    prompt, *answers = REQUIRED[kind]
    words = {name: _add_text(table, name, [row.get(name) for row in listed]) for name in (prompt, *answers)}
    _add_prompt_tokens(table, [row.get(prompt) for row in listed], tokenizer)
    for name in answers:
        _add_answer_tokens(table, name, words[name], tokenizer)
    for name in (*NUMBERS, *REQUIRED_NUMBERS.get(kind, ())):
        table[f"has_{name}"] = [name in row for row in listed]
        table[name] = [float(row[name]) if _is_number(row.get(name)) else math.nan for row in listed]
    keys = [*REQUIRED[kind], *REQUIRED_NUMBERS.get(kind, ()), "annotator"]
    table["content"] = hash_texts(_key([row.get(name) for name in keys]) for row in listed)
    if kind == "preferences":
        for name in (prompt, *answers):
            table[f"{name}_words"] = hash_texts(text or "" for text in words[name])
    if kind == "prompts":
        table["has_answer"] = ["answer" in row for row in listed]
        table["answer"] = hash_texts(_key(row.get("answer")) for row in listed)
    return table


def _add_text(table: pd.DataFrame, name: str, values: list[Any]) -> list[str | None]:
    """Form, order of turns, characters and key of a column of texts; returns the trimmed words."""
    turns = _prompt_turns_fit if name == "prompt" else _answer_turns_fit
    forms = [_form(value) for value in values]
    words = [_words(value, form) for value, form in zip(values, forms, strict=True)]
    table[f"{name}_characters"] = _integers([None if text is None else len(text) for text in words])
    table[f"{name}_form"] = _objects(forms)
    table[f"{name}_turns"] = [form != "messages" or turns(value) for value, form in zip(values, forms, strict=True)]
    table[f"{name}_key"] = hash_texts(_key(value) for value in values)
    return words


def hash_texts(texts: Iterable[str]) -> Any:
    """Sixty-four bits of each text's hash: a million texts share one by chance once in 40 million files."""
    import numpy as np

    digests = (blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def _objects(values: list[Any]) -> Any:
    """A column of plain Python objects; pandas would turn None into NaN elsewhere."""
    import pandas as pd

    return pd.Series(values, dtype=object)


def _form(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        return "text"
    is_messages = isinstance(value, list) and all(
        isinstance(message, dict) and "content" in message for message in value
    )
    return "messages" if is_messages else "other"


def _words(value: Any, form: str | None) -> str | None:
    if form is None:
        return None
    if form == "text":
        return value.strip()
    if form == "messages":
        contents = [message["content"] for message in value]
        return "\n".join(content for content in contents if isinstance(content, str)).strip()
    return json.dumps(value, ensure_ascii=False)


def _well_formed(messages: list[Any]) -> bool:
    return all(
        message.get("role") in ROLES and isinstance(message["content"], str) and message["content"].strip()
        for message in messages
    )


def _prompt_turns_fit(messages: list[Any]) -> bool:
    """Known roles, no empty turn, a system turn at the start only, and the last word not the assistant's."""
    if not messages or not _well_formed(messages):
        return False
    roles = [message["role"] for message in messages]
    return "system" not in roles[1:] and roles[-1] in ("user", "tool")


def _answer_turns_fit(messages: list[Any]) -> bool:
    """Known roles, no empty turn, and the assistant has the first word and the last."""
    if not messages or not _well_formed(messages):
        return False
    roles = [message["role"] for message in messages]
    return "system" not in roles and roles[0] == roles[-1] == "assistant"


def _add_prompt_tokens(table: pd.DataFrame, prompts: list[Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokens of every readable prompt; one that the chat template refuses has turns that do not fit."""
    usable = (table["prompt_form"].isin(["text", "messages"]) & table["prompt_turns"]).tolist()
    keys = [_key(prompt) if fits else None for prompt, fits in zip(prompts, usable, strict=True)]
    rendered = _render({key: prompt for key, prompt in zip(keys, prompts, strict=True) if key is not None}, tokenizer)
    table["prompt_turns"] = [
        fits and (key is None or key in rendered) for fits, key in zip(table["prompt_turns"], keys, strict=True)
    ]
    counts = count_tokens(rendered.values(), tokenizer)
    table["prompt_tokens"] = _integers([counts[rendered[key]] if key in rendered else None for key in keys])


def _add_answer_tokens(
    table: pd.DataFrame, name: str, words: list[str | None], tokenizer: PreTrainedTokenizerBase
) -> None:
    readable = table[f"{name}_form"].isin(["text", "messages"]).tolist()
    texts = [text if fits else None for text, fits in zip(words, readable, strict=True)]
    counts = count_tokens((text for text in texts if text is not None), tokenizer)
    table[f"{name}_tokens"] = _integers([None if text is None else counts[text] for text in texts])


def _integers(values: list[int | None]) -> Any:
    import pandas as pd

    return pd.Series(values, dtype="Int32")


def _render(prompts: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The text of every prompt by its key; a conversation that the template refuses is left out."""
    from jinja2 import TemplateError

    texts: dict[str, str] = {}
    for key, prompt in prompts.items():
        try:
            texts[key] = render_prompt(tokenizer, prompt)
        except TemplateError:  # such as roles that this model's template does not know or wants to alternate
            continue
    return texts


def count_tokens(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens of every distinct text, special tokens not counted: they are part of a chat template or added by it."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    if tokenizer.is_fast:  # three times as fast as the call below, which builds masks, offsets and warnings
        backend: Any = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return {
            text: len(encoding.ids)
            for text, encoding in zip(
                distinct, backend.encode_batch_fast(distinct, add_special_tokens=False), strict=True
            )
        }
    encoded = tokenizer(distinct, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return {text: len(ids) for text, ids in zip(distinct, encoded["input_ids"], strict=True)}


def _add_form_fit(table: pd.DataFrame, columns: tuple[str, ...]) -> None:
    """Prompt and answers of one form, and that the commonest one: a trainer reads a whole file in one way."""
    forms = table.loc[table["prompt_form"].isin(["text", "messages"]), "prompt_form"].value_counts()
    common = forms.index[0] if len(forms) else "text"
    table["form_fits"] = True
    for name in columns:
        table["form_fits"] &= ~table[f"{name}_form"].isin(["text", "messages"]) | (table[f"{name}_form"] == common)
    tokens: Any = table[[f"{name}_tokens" for name in columns[1:]]]  # pandas' own types are unions no checker follows
    table["total_tokens"] = table["prompt_tokens"] + (tokens.max(axis=1) if len(columns) > 1 else 0) + 1


def _add_number_fit(table: pd.DataFrame, needed: tuple[str, ...]) -> None:
    """A number column that any row has must be a number in all."""
    present = [name for name in NUMBERS if True in set(table[f"has_{name}"])]
    table["numbers_fit"] = table[[*present, *needed]].notna().all(axis=1)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _add_repeats(table: pd.DataFrame) -> None:
    """Leaks by prompt, repeated content (the same verdict of two annotators is none) and repeated ids."""
    is_held_out = (table["split"] == "test") & table["prompt_characters"].notna()
    table["leaks"] = (table["split"] == "train") & table["prompt_key"].isin(table.loc[is_held_out, "prompt_key"])
    table["is_duplicate"] = table[["split", "content"]].duplicated()
    table["repeats_id"] = table["id"].duplicated()


def add_pair_columns(table: pd.DataFrame) -> None:
    """`answers_differ`; `is_contradicted`: the two answers are preferred the other way elsewhere; `longer_chosen`."""
    pairs: Any = table[["prompt_words", "chosen_words", "rejected_words"]].copy()  # Any as above
    chosen, rejected = pairs["chosen_words"], pairs["rejected_words"]
    table["answers_differ"] = (chosen != rejected) | table[["chosen_characters", "rejected_characters"]].isna().any(
        axis=1
    )
    pairs["forward"] = chosen < rejected
    pairs["first"] = chosen.where(pairs["forward"], rejected)
    pairs["second"] = rejected.where(pairs["forward"], chosen)
    ways = pairs.groupby(["prompt_words", "first", "second"], sort=False)["forward"].transform("nunique")
    table["is_contradicted"] = (chosen != rejected) & (ways > 1)
    lengths = [table[f"{name}_characters"].fillna(0).astype(int) for name in ("chosen", "rejected")]
    table["longer_chosen"] = (lengths[0] > lengths[1]).astype(float).where(lengths[0] != lengths[1])
