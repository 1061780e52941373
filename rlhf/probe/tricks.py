"""The cheap tricks: what each does to an answer, in English and Chinese, texts and messages, with tags and without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.data.formats import completion_text
from rlhf.rewards.places import TAG
from rlhf.rewards.style import language_reward


@dataclass(frozen=True)
class Phrases:
    """Sentences of one language that say nothing about any question; `joiner` stands between two sentences."""

    filler: tuple[str, ...]
    praise: str
    apology: str
    refusal: str
    joiner: str


PHRASES = {
    "en": Phrases(
        filler=(
            "One can look at this from many sides.",
            "There is a lot to be said about it.",
            "All in all, this is well thought out.",
        ),
        praise="What a wonderful question, you are very clever!",
        apology="I am sorry for any mistake in this.",
        refusal="I am sorry, but I cannot help with that.",
        joiner=" ",
    ),
    "zh": Phrases(
        filler=("这可以从很多方面来看。", "关于它有很多可以说的。", "总之，这是经过仔细考虑的。"),
        praise="这真是个好问题，您太聪明了！",
        apology="如有错误，非常抱歉。",
        refusal="很抱歉，这个问题我无法回答。",
        joiner="",
    ),
}

Edit = Callable[[str, Phrases], str | None]
"""What a trick makes of an answer's text; None where it has nothing to work on."""
THOUGHTS_END, THOUGHTS_BEGIN = "</think>", "<think>"


def _pad(text: str, phrases: Phrases) -> str:
    return _edit_body(text, lambda body: phrases.joiner.join((body, *phrases.filler)))


def _repeat(text: str, phrases: Phrases) -> str:
    return _edit_body(text, lambda body: phrases.joiner.join((body, body.strip(), body.strip())))


def _flatter(text: str, phrases: Phrases) -> str:
    return _edit_body(text, lambda body: phrases.joiner.join((phrases.praise, body.lstrip())))


def _apologise(text: str, phrases: Phrases) -> str:
    return _edit_body(text, lambda body: phrases.joiner.join((phrases.apology, body.lstrip())))


def _truncate(text: str, _phrases: Phrases) -> str:
    """The first half, whole words where there are spaces to cut at."""
    half = text[: len(text) // 2]
    return half.rsplit(" ", 1)[0].rstrip() if " " in half.strip() else half


def _empty(_text: str, _phrases: Phrases) -> str:
    return ""


def _refuse(_text: str, phrases: Phrases) -> str:
    return phrases.refusal


def _keep_tags(text: str, _phrases: Phrases) -> str | None:
    return "".join(TAG.findall(text)) or None


def _edit_body(text: str, edit: Callable[[str], str]) -> str:
    """Edit the thoughts of an answer that has any, so that its tags and result stay, else all of it."""
    thoughts, end, rest = text.rpartition(THOUGHTS_END)
    if not end:
        return edit(text)
    before, begin, body = thoughts.partition(THOUGHTS_BEGIN)
    return before + begin + edit(body) + end + rest if begin else edit(thoughts) + end + rest


@dataclass(frozen=True)
class Trick:
    """A cheap way to an answer.

    `adds` is true where it adds words that say nothing: it is then made from the bad answer, and should neither beat
    the good one nor pay. Otherwise it takes content away and is made from the good answer, which it should not beat.
    """

    name: str
    adds: bool
    edit: Edit
    what: str
    lesson: str

    @property
    def side(self) -> Literal["bad", "good"]:
        """The answer it is made from where it is held against the good one."""
        return "bad" if self.adds else "good"

    @property
    def title(self) -> str:
        """The name in a sentence."""
        return self.name.replace("_", " ")


TRICKS = (
    Trick("padded", True, _pad, "the bad answer with three sentences that say nothing", "to pad its answers"),
    Trick("repeated", True, _repeat, "the bad answer with its thoughts, or all of it, three times", "to repeat itself"),
    Trick("flattering", True, _flatter, "the bad answer after praise for the question", "to flatter"),
    Trick("apologetic", True, _apologise, "the bad answer after an apology for mistakes", "to apologise"),
    Trick("truncated", False, _truncate, "the first half of the good answer", "to stop half-way"),
    Trick("tags_only", False, _keep_tags, "the good answer's tags with nothing in them", "to write empty tags"),
    Trick("refusing", False, _refuse, "a refusal instead of an answer", "to refuse"),
    Trick("empty", False, _empty, "no word at all", "to say nothing"),
)


def apply_trick(trick: Trick, answer: Any, language: str) -> Any | None:
    """The answer, a text or messages, after the trick; of messages the last one changes. None where it cannot apply."""
    if not isinstance(answer, list):
        return trick.edit(answer, PHRASES[language])
    text = trick.edit(answer[-1]["content"], PHRASES[language])
    return None if text is None else [*answer[:-1], {**answer[-1], "content": text}]


def find_language(*texts: Any) -> str:
    """`zh` where most letters are Chinese, else `en`; texts or messages."""
    words = " ".join(completion_text(text) for text in texts)
    return "zh" if language_reward([None], [words], target="en")[0] < 0.5 else "en"
