"""Bytes to events and text to token ids: however they are cut, what comes out says what went in."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spotserve.config import DEMO_MODEL
from spotserve.core.errors import ModelError, WireError
from spotserve.engine.remote.sse import MAX_EVENT_BYTES, EventReader
from spotserve.engine.remote.vocabulary import RunningTokens, load_vocabulary

VOCABULARY = load_vocabulary(str(DEMO_MODEL))
WORDS = st.sampled_from(
    ["the", "Smith's", "42", "naïve", "🙂", "好", "\n", "\n\n", " ", "  ", "\t", "don't", "a,b", "«x»", "-" * 9]
)
TEXTS = st.lists(WORDS | st.text(max_size=6), max_size=40).map("".join) | st.lists(WORDS, max_size=40).map(" ".join)


def cut(whole: bytes | str, places: list[int]) -> list:
    borders = [0, *sorted(place % (len(whole) + 1) for place in places), len(whole)]
    return [whole[start:end] for start, end in pairwise(borders)]


LINES = st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=("Cs",)), max_size=30)


@given(
    st.lists(LINES.filter(bool), max_size=8),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.booleans(),
    st.lists(st.integers(0, 10_000), max_size=12),
)
@example(['{"text": "one line\u2028and no other\x85"}'], b"\n", True, [])
@example(["a", "b"], b"\r\n", True, [8, 9, 10])
def test_events_do_not_depend_on_how_bytes_arrive(texts: list[str], end: bytes, spaced: bool, places: list[int]) -> None:
    prefix = b"data: " if spaced else b"data:"
    stream = b"".join(b": a comment" + end + b"event: x" + end + prefix + text.encode() + end + end for text in texts)
    reader = EventReader()
    read = [data for chunk in cut(stream, places) for data in reader.feed(chunk)]
    read += reader.feed(b"\n") if end == b"\r" else []  # a CR at the very end may still become CR LF
    assert read == [text.encode() if spaced else text.encode().removeprefix(b" ") for text in texts]


def test_lines_of_one_event_are_joined_and_an_endless_one_is_refused() -> None:
    assert EventReader().feed(b"data: a\ndata: b\n\n\n: ping\n\ndata\n\n") == [b"a\nb", b""][:2]
    with pytest.raises(WireError, match="longer"):
        EventReader().feed(b"data: " + b"x" * (MAX_EVENT_BYTES + 1))


@settings(deadline=None, max_examples=60)
@given(TEXTS, TEXTS, st.lists(st.integers(0, 10_000), max_size=30))
@example("Once upon", " a time there was", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
@example("", "x" * 400, list(range(0, 400, 3)))
def test_ids_of_running_text_say_that_text(before: str, text: str, places: list[int]) -> None:
    history = VOCABULARY.encode(before, framed=True)
    running = RunningTokens(VOCABULARY, history)
    token_ids: list[int] = []
    for piece in cut(text, places):
        token_ids += running.push(piece)
        assert text.startswith(VOCABULARY.decode(token_ids)), "what was given out is final"
    token_ids += running.flush()
    assert VOCABULARY.decode(token_ids) == text
    assert running.flush() == ()


def test_ids_of_running_words_are_those_of_the_whole_text() -> None:
    text = "Once upon a time there was a smith who could mend anything, clocks included, until the evening came."
    whole = VOCABULARY.encode(text)
    for size in (1, 3, 17):
        running = RunningTokens(VOCABULARY, whole[:3])
        rest = text[len(VOCABULARY.decode(whole[:3])) :]
        ids = [i for start in range(0, len(rest), size) for i in running.push(rest[start : start + size])]
        assert len(ids) > len(whole) / 2, "words come out before the end"
        assert (*whole[:3], *ids, *running.flush()) == whole


def test_ids_between_text_go_through_as_they_are() -> None:
    running = RunningTokens(VOCABULARY, ())
    held = running.push("held back")
    assert VOCABULARY.decode((*held, *running.flush())) == "held back"
    running.note((7, 8))
    assert VOCABULARY.decode(running.push(" and then") + running.flush()) == " and then"


@given(TEXTS)
def test_a_prompt_as_text_comes_back_as_the_same_ids(text: str) -> None:
    token_ids = VOCABULARY.encode(text, framed=True)
    sent = VOCABULARY.prompt_text(token_ids)
    assert VOCABULARY.encode(sent, framed=True) == token_ids


def test_no_tokenizer_is_an_error(tmp_path) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        load_vocabulary(str(tmp_path))
