"""What is seen of texts without understanding them: marks, letters, and what either is when there is little to see."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf import surface
from rlhf.surface import COUNTS, MEASURES, read_surface

MARKS = [*COUNTS, *MEASURES]


def read(texts: list[str]) -> dict[str, list[float]]:
    """The marks by name; what follows them are letters."""
    return dict(zip(MARKS, read_surface(texts, 0).T.tolist(), strict=False))


@pytest.mark.parametrize(
    ("name", "plain", "marked"),
    [
        ("characters", "Short.", "Not as short as the other one."),
        ("words", "One long-winded-word", "one two three four five"),
        ("sentences", "No end, no end 3.5", "An end. Another! 完。"),
        ("full stops", "none", "v1.2。"),
        ("commas", "none", "one，two、three"),
        ("questions", "none?", "why? 为什么？"),
        ("quotations", "none", "“so” 'it' 「is」"),
        ("brackets", "none", "(so) [it]（is）"),
        ("dashes and colons", "none", "note: a-b; c"),
        ("line breaks", "one line", "two\nlines\n"),
        ("capitals", "iPhone", "IBM PC"),
        ("words in capitals", "I am A B", "THIS IS it"),
        ("exclamations", "none", "yes!！"),
        ("letters per word", "a bc de", "abcdef ghijkl"),
        ("distinct words", "so so so so", "one two three so"),
        ("begins with a capital", "no. Yes", " Yes. no"),
        ("ends with a mark", "no. end", "an end! "),
    ],
)
def test_a_mark_tells_a_text_that_has_it_from_one_that_has_not(name: str, plain: str, marked: str) -> None:
    without, with_it = read([plain, marked])[name]
    assert (without, with_it) == pytest.approx((-1.0, 1.0))


def test_every_column_has_no_mean_and_deviation_one_or_says_nothing() -> None:
    texts = [f"Answer {number}: " + "so it is, " * (number % 7) + "!" * (number % 3) for number in range(60)]
    found = read_surface(texts, 0)
    assert found.shape[1] > len(MARKS)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-9)
    assert set(found.std(0).round(6)) == {0.0, 1.0}
    np.testing.assert_array_equal(found, read_surface(texts, 0))


def test_letters_know_words() -> None:
    """Two words of one length in texts that are alike in all that is counted."""
    texts = [f"The {word} one it is, {end}." for word in ("better", "poorer") for end in ("said Ann", "said Bob") * 10]
    found = read_surface(texts, 0)
    assert np.abs(found[:, : len(MARKS)]).max() < 1e-6
    assert np.abs(found[:20, len(MARKS) :].mean(0) - found[20:, len(MARKS) :].mean(0)).max() > 1.9


@pytest.mark.parametrize("texts", [["one"], ["", ""], ["a", "b", "c"], ["same text"] * 5, ["!", "?"] * 3])
def test_little_to_see_is_no_reason_to_fail(texts: list[str]) -> None:
    found = read_surface(texts, 0)
    assert len(found) == len(texts)
    assert np.isfinite(found).all()


def test_of_many_texts_the_letters_of_some_are_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{'good' if number % 2 else 'evil'} answer {number}" for number in range(300)]
    everything = read_surface(texts, 0)
    monkeypatch.setattr(surface, "LEARNT_FROM", 70)
    found = read_surface(texts, 0)
    assert found.shape == everything.shape
    gaps = np.abs(found[::2].mean(0) - found[1::2].mean(0))
    assert gaps.max() > 1.9
