"""What can be measured on a row, as one table per kind of data: texts, token counts, repeats, leaks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf.data.formats import Row, render_prompt, row_id
from rlhf.data.sources import REQUIRED, REQUIRED_NUMBERS

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool")
NUMBERS = ("margin", "weight")
"""Optional columns that training reads as numbers."""
TOKENISED_AT_ONCE = 1024


def measure(rows: Mapping[str, list[Row]], kind: str, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """One line per row of every split (train, test), in order.

    Columns: `row` (place in the table), `id`, `split`; for every text column `x` of the kind: `x` (its words,
    trimmed; null where the row has none), `x_form` (text, messages, other), `x_turns` (roles in order),
    `x_tokens`; `form_fits`, `total_tokens` (prompt, longest answer and end token), `numbers_fit`, `leaks`
    (the prompt is held out, yet this row trains), `is_duplicate`, `repeats_id`, and for preferences
    `is_contradicted` and `longer_chosen` (null for equal lengths), for ratings `score` (null where it is no number),
    for prompts that have answers `answer`.
    Raises UserError where rows are conversations and the tokenizer has no chat template.
    """
    import pandas as pd

    listed = [row for split in rows.values() for row in split]
    table = pd.DataFrame(
        {
            "row": range(len(listed)),
            "id": [str(row.get("id") or row_id(row)) for row in listed],
            "split": [split for split, members in rows.items() for _ in members],
        }
    )
    prompt, *answers = REQUIRED[kind]
    for name in (prompt, *answers):
        _add_text(table, name, [row.get(name) for row in listed])
    _add_tokens(table, [row.get(prompt) for row in listed], answers, tokenizer)
    _add_form_fit(table, answers)
    needed = REQUIRED_NUMBERS.get(kind, ())
    table["numbers_fit"] = _numbers_fit(listed, needed)
    for name in needed:
        table[name] = [float(row[name]) if _is_number(row.get(name)) else None for row in listed]
    _add_repeats(table, listed, kind)
    if kind == "preferences":
        add_pair_columns(table)
    if kind == "prompts" and any("answer" in row for row in listed):
        table["answer"] = [_key(row.get("answer")) for row in listed]
    return table


def _add_text(table: pd.DataFrame, name: str, values: list[Any]) -> None:
    turns = _prompt_turns_fit if name == "prompt" else _answer_turns_fit
    forms = [_form(value) for value in values]
    fits = [form != "messages" or turns(value) for value, form in zip(values, forms, strict=True)]
    table[name] = _objects([_words(value, form) for value, form in zip(values, forms, strict=True)])
    table[f"{name}_form"] = _objects(forms)
    table[f"{name}_turns"] = fits


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


def _add_tokens(
    table: pd.DataFrame, prompts: list[Any], answers: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    usable = (table["prompt_form"].isin(["text", "messages"]) & table["prompt_turns"]).tolist()
    keys = [_key(prompt) if fits else None for prompt, fits in zip(prompts, usable, strict=True)]
    rendered = _render({key: prompt for key, prompt in zip(keys, prompts, strict=True) if key is not None}, tokenizer)
    table["prompt_turns"] = [
        fits and (key is None or key in rendered) for fits, key in zip(table["prompt_turns"], keys, strict=True)
    ]
    counts = _count(list(dict.fromkeys(rendered.values())), tokenizer)
    table["prompt_tokens"] = _integers([counts[rendered[key]] if key in rendered else None for key in keys])
    for name in answers:
        words = [
            text if form in ("text", "messages") else None
            for text, form in zip(table[name], table[f"{name}_form"], strict=True)
        ]
        counts = _count(list(dict.fromkeys(text for text in words if text is not None)), tokenizer)
        table[f"{name}_tokens"] = _integers([None if text is None else counts[text] for text in words])
    longest = table[[f"{name}_tokens" for name in answers]].max(axis=1) if answers else 0
    table["total_tokens"] = table["prompt_tokens"] + longest + 1


def _integers(values: list[int | None]) -> Any:
    import pandas as pd

    return pd.Series(values, dtype="Int64")


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


def _count(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens of every text."""
    counts: dict[str, int] = {}
    for start in range(0, len(texts), TOKENISED_AT_ONCE):
        batch = texts[start : start + TOKENISED_AT_ONCE]
        # Special tokens are part of a chat template or added by it; verbose would warn about every long text.
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        counts |= {text: len(ids) for text, ids in zip(batch, encoded["input_ids"], strict=True)}
    return counts


def _add_form_fit(table: pd.DataFrame, answers: list[str]) -> None:
    """Prompt and answers of one form, and that the commonest one: a trainer reads a whole file in one way."""
    forms = table.loc[table["prompt_form"].isin(["text", "messages"]), "prompt_form"].value_counts()
    common = forms.index[0] if len(forms) else "text"
    readable = [table[f"{name}_form"].isin(["text", "messages"]) for name in ("prompt", *answers)]
    fits = [
        ~usable | (table[f"{name}_form"] == common) for name, usable in zip(("prompt", *answers), readable, strict=True)
    ]
    table["form_fits"] = True
    for fit in fits:
        table["form_fits"] &= fit


def _numbers_fit(rows: list[Row], needed: tuple[str, ...]) -> list[bool]:
    present = [name for name in NUMBERS if any(name in row for row in rows)]
    return [all(_is_number(row.get(name)) for name in (*present, *needed)) for row in rows]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _add_repeats(table: pd.DataFrame, rows: list[Row], kind: str) -> None:
    """Leaks by prompt, repeated content (the same verdict of two annotators is none) and repeated ids."""
    keys: Any = table[["split"]].copy()  # pandas' own types are unions that no checker follows
    for name in (*REQUIRED[kind], *REQUIRED_NUMBERS.get(kind, ()), "annotator"):
        keys[name] = [_key(row.get(name)) for row in rows]
    is_held_out = (table["split"] == "test") & table["prompt"].notna()
    table["leaks"] = (table["split"] == "train") & keys["prompt"].isin(keys.loc[is_held_out, "prompt"])
    table["is_duplicate"] = keys.duplicated()
    table["repeats_id"] = table["id"].duplicated()


def add_pair_columns(table: pd.DataFrame) -> None:
    """`is_contradicted`: the same two answers are preferred the other way round elsewhere; `longer_chosen`."""
    pairs: Any = table[["prompt", "chosen", "rejected"]].fillna("")  # Any as above
    pairs["forward"] = pairs["chosen"] < pairs["rejected"]
    pairs["first"] = pairs["chosen"].where(pairs["forward"], pairs["rejected"])
    pairs["second"] = pairs["rejected"].where(pairs["forward"], pairs["chosen"])
    differs = pairs["first"] != pairs["second"]
    ways = pairs.groupby(["prompt", "first", "second"], sort=False)["forward"].transform("nunique")
    table["is_contradicted"] = differs & (ways > 1)
    chosen, rejected = pairs["chosen"].str.len(), pairs["rejected"].str.len()
    table["longer_chosen"] = (chosen > rejected).astype(float).where(chosen != rejected)
