"""Questions with one right answer: mathematics (GSM8K, DAPO, Open-R1, ASDiv, SVAMP) and SQL."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from rlhf.data.formats import Row, last_box
from rlhf.data.shapes.forms import (
    Form,
    Message,
    answer,
    has,
    is_list,
    is_messages,
    is_text,
    read_messages,
    user,
)

CALCULATION = re.compile(r"<<[^<>]*>>")
"""GSM8K's notes for a calculator, which stand inside the solution."""


def gsm8k_demonstration(row: Row) -> list[Row]:
    """The solution without the calculator's notes, down to its last line `#### answer`."""
    solution = row.get("answer")
    text = CALCULATION.sub("", solution) if isinstance(solution, str) else None
    return [{"prompt": user(row.get("question")), "completion": answer(text)}]


def gsm8k_prompt(row: Row) -> list[Row]:
    """The question, and as `answer` the number after `####`, without commas."""
    _, mark, last = str(row.get("answer")).rpartition("####")
    return [{"prompt": user(row.get("question")), "answer": last.strip().replace(",", "") if mark else None}]


def is_gsm8k_solution(value: Any) -> bool:
    return isinstance(value, str) and "####" in value


def dapo_prompt(row: Row) -> list[Row]:
    """The prompt's messages, and as `answer` the ground truth of the reward."""
    model = row.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, dict) else None
    return [{"prompt": read_messages(row.get("prompt")), "answer": None if truth is None else str(truth)}]


def maths_demonstration(row: Row) -> list[Row]:
    return [{"prompt": user(row.get("problem")), "completion": answer(row.get("solution"))}]


def maths_prompt(row: Row) -> list[Row]:
    """The problem, and as `answer` the column of that name, else what the solution has boxed last."""
    given = row.get("answer")
    return [
        {"prompt": user(row.get("problem")), "answer": last_box(row.get("solution")) if given is None else str(given)}
    ]


def word_problem_prompt(row: Row) -> list[Row]:
    """Story and question in one, and as `answer` the number: ASDiv's `9 (apples)` and SVAMP's `9.0` are 9."""
    by_name = {name.lower(): value for name, value in row.items()}
    parts = [by_name[name].strip() for name in ("body", "question") if isinstance(by_name.get(name), str)]
    text = " ".join(parts) if len(parts) == 2 else None
    number = re.match(r"[^(]*", str(by_name.get("answer")))
    said = number[0].strip().removesuffix(".0") if number and by_name.get("answer") is not None else None
    return [{"prompt": user(text), "answer": said or None}]


def word_problem_demonstration(row: Row) -> list[Row]:
    """The formula (SVAMP: the equation) as the solution, and a last line `#### answer`, as GSM8K writes them."""
    (asked,) = word_problem_prompt(row)
    formula = row.get("formula", row.get("Equation"))
    is_whole = isinstance(formula, str) and asked["answer"] is not None
    solution = f"{str(formula).strip()}\n#### {asked['answer']}" if is_whole else None
    return [{"prompt": asked["prompt"], "completion": answer(solution)}]


# SQL ----------------------------------------------------------------------------------------------


def sql_question(row: Row) -> list[Message] | None:
    """The question below the tables it is about."""
    question, tables = row.get("question"), row.get("context")
    if not isinstance(question, str) or not isinstance(tables, str):
        return None
    return user(f"{tables.strip()}\n\nWrite one SQL query: {question.strip()}")


def sql_context_demonstration(row: Row) -> list[Row]:
    return [{"prompt": sql_question(row), "completion": answer(row.get("answer"))}]


def sql_context_prompt(row: Row) -> list[Row]:
    """The query as `answer`, the tables also as `context`, for a reward that runs it."""
    return [{"prompt": sql_question(row), "answer": row.get("answer"), "context": row.get("context")}]


def text2sql_demonstrations(row: Row) -> Iterator[Row]:
    """One row per sentence: the sentence and the first of the equivalent queries, their variables filled in."""
    for question, query, split in _sentences(row):
        yield {"prompt": user(question), "completion": answer(query), "question_split": split}


def text2sql_prompts(row: Row) -> Iterator[Row]:
    """One row per sentence, with the query as `answer`."""
    for question, query, split in _sentences(row):
        yield {"prompt": user(question), "answer": query, "question_split": split}


def _sentences(row: Row) -> Iterator[tuple[str | None, str | None, Any]]:
    queries, sentences = row.get("sql"), row.get("sentences")
    query = queries[0] if isinstance(queries, list) and queries and isinstance(queries[0], str) else None
    variables = row.get("variables")
    objects = [one for one in variables if isinstance(one, dict)] if isinstance(variables, list) else []
    examples = {one.get("name"): one.get("example") for one in objects}
    for sentence in sentences if isinstance(sentences, list) and sentences else [None]:
        if not isinstance(sentence, dict):
            yield None, None, None
            continue
        values = sentence.get("variables")
        told = {name: value for name, value in (values if isinstance(values, dict) else {}).items() if value != ""}
        text = sentence.get("text")
        yield (
            _fill(text, told) if isinstance(text, str) else None,
            _fill(query, examples | told) if query is not None else None,
            sentence.get("question-split"),
        )


def _fill(text: str, values: dict[Any, Any]) -> str:
    """The text with the names of variables, whole words all, replaced by their values."""
    return re.sub(r"\w+", lambda found: str(values.get(found[0], found[0])), text)


MATHS = {"problem": is_text, "solution": is_text}
WORD_PROBLEM = {"body": is_text, "question": is_text, "answer": is_text}
SVAMP = {"Body": is_text, "Question": is_text, "Answer": lambda value: value is not None}
GSM8K = {"question": is_text, "answer": is_gsm8k_solution}
SQL_CONTEXT = {"question": is_text, "context": is_text, "answer": is_text}
TEXT2SQL = {"sql": is_list, "sentences": is_list}
FORMS = {
    "gsm8k_sft": Form(GSM8K, gsm8k_demonstration),
    "gsm8k_prompts": Form(GSM8K, gsm8k_prompt),
    "dapo_prompts": Form({"prompt": is_messages, "reward_model": has("ground_truth")}, dapo_prompt),
    "maths_sft": Form(MATHS, maths_demonstration),
    "maths_prompts": Form(MATHS, maths_prompt, ("answer",)),
    "asdiv_sft": Form(WORD_PROBLEM | {"formula": is_text}, word_problem_demonstration),
    "asdiv_prompts": Form(WORD_PROBLEM, word_problem_prompt),
    "svamp_sft": Form(SVAMP | {"Equation": is_text}, word_problem_demonstration),
    "svamp_prompts": Form(SVAMP, word_problem_prompt),
    "sql_context_sft": Form(SQL_CONTEXT, sql_context_demonstration),
    "sql_context_prompts": Form(SQL_CONTEXT, sql_context_prompt),
    "text2sql_sft": Form(TEXT2SQL, text2sql_demonstrations, ("variables",)),
    "text2sql_prompts": Form(TEXT2SQL, text2sql_prompts, ("variables",)),
}
