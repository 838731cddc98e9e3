"""Incremental text against its naive twin: decode everything, cut at the stop string that is complete first."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from spotserve.gateway.template import ChatTemplate
from spotserve.gateway.text import ChoiceText, StopScanner, TextRules
from spotserve.gateway.tokenizer import Tokenizer

TEXTS = st.text(alphabet="ab Ω🙂é\n", max_size=40)
STOPS = st.lists(st.text(alphabet="ab Ω🙂", min_size=1, max_size=5), max_size=4)


def cut_naively(text: str, stops: list[str], *, include: bool = False) -> tuple[str, str | None]:
    """The text up to the stop string whose last character comes first; of two, the longer."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end if include else end - len(stop)], stop


def read_all(text: ChoiceText, token_ids: list[int]) -> str:
    said = ""
    for token_id in token_ids:
        said += text.push(token_id)
        if text.stopped is not None:
            return said
    return said + text.finish()


@given(pieces=st.lists(TEXTS, max_size=8), stops=STOPS, include=st.booleans())
def test_the_scanner_cuts_where_the_naive_twin_does(pieces, stops, include):
    scanner = StopScanner(stops, include=include)
    said = ""
    for piece in pieces:
        said += scanner.push(piece, armed=True)
        if scanner.matched is not None:
            break
    said += "" if scanner.matched is not None else scanner.flush()
    assert (said, scanner.matched) == cut_naively("".join(pieces), stops, include=include)


@given(text=TEXTS, stops=STOPS)
def test_the_scanner_holds_back_no_more_than_it_must(text, stops):
    scanner = StopScanner(stops, include=False)
    said = scanner.push(text, armed=True)
    if scanner.matched is None:
        held = text[len(said) :]
        possible = [n for n in range(len(text) + 1) if any(stop.startswith(text[len(text) - n :]) for stop in stops)]
        assert said + held == text and len(held) == max(possible, default=0)


@given(data=st.data())
def test_any_tokens_say_what_decoding_them_all_says(data, tokenizer):
    ids = st.integers(0, tokenizer.vocabulary_size - 1)
    token_ids = data.draw(st.lists(ids, max_size=30))
    show = data.draw(st.booleans())
    text = ChoiceText(tokenizer.detokenizer(show_special_tokens=show), TextRules())
    assert read_all(text, token_ids) == tokenizer.decode(token_ids, show_special_tokens=show)


@given(text=TEXTS, stops=STOPS, include=st.booleans())
def test_stop_strings_over_token_and_character_borders(text, stops, include, tokenizer):
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    choice = ChoiceText(tokenizer.detokenizer(), TextRules(stop=tuple(stops), include_stop=include))
    assert (read_all(choice, token_ids), choice.stopped) == cut_naively(text, stops, include=include)


@given(text=TEXTS.filter(bool), cut=st.integers(0, 200))
def test_no_replacement_character_before_the_end(text, cut, tokenizer):
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    choice = ChoiceText(tokenizer.detokenizer(), TextRules())
    said = "".join(choice.push(token_id) for token_id in token_ids[:cut])
    assert text.startswith(said)


def test_a_stop_string_counts_only_from_min_tokens_on(tokenizer):
    token_ids = tokenizer.encode("xxSxxSxx", add_special_tokens=False)
    first = next(k for k in range(99) if "S" in tokenizer.decode(token_ids[:k]))
    for min_tokens, expected in [(0, "xx"), (first, "xx"), (first + 1, "xxSxx")]:
        choice = ChoiceText(tokenizer.detokenizer(), TextRules(stop=("S",), min_tokens=min_tokens))
        assert read_all(choice, token_ids) == expected


def test_a_stop_string_that_did_not_count_may_overlap_one_that_does():
    scanner = StopScanner(["aba"], include=False)
    assert scanner.push("aba", armed=False) == "ab"
    assert scanner.push("ba", armed=True) == "" and scanner.matched == "aba"


def test_tokens_after_the_stop_are_not_counted(tokenizer):
    token_ids = tokenizer.encode("one two three", add_special_tokens=False)
    choice = ChoiceText(tokenizer.detokenizer(), TextRules(stop=("one",)))
    read_all(choice, token_ids)
    assert choice.tokens < len(token_ids)


@pytest.fixture(scope="module")
def sentence_pieces() -> Tokenizer:
    """A tokenizer of the other family: spaces as U+2581, bytes as <0xNN>, the first space stripped."""
    pieces = ["<unk>", "▁", "▁hello", "▁world", "lo", "he", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    fast = FastTokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    strip = decoders.Strip(content=" ", left=1, right=0)
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return Tokenizer(fast, {}, None)


WHOLE_CHARACTERS = st.lists(
    st.one_of(st.sampled_from([[1], [2], [3], [4], [5], [6]]), st.sampled_from("🙂Ω漢").map(lambda c: [7 + b for b in c.encode()])),
    max_size=20,
)


@given(groups=WHOLE_CHARACTERS)
def test_a_window_says_what_decoding_them_all_says(groups, sentence_pieces):
    token_ids = [token_id for group in groups for token_id in group]
    text = ChoiceText(sentence_pieces.detokenizer(), TextRules())
    assert read_all(text, token_ids) == sentence_pieces.decode(token_ids)


@given(values=st.lists(st.integers(0, 255), max_size=60))
def test_broken_bytes_do_not_pile_up_in_the_window(values, sentence_pieces):
    detokenizer = sentence_pieces.detokenizer()
    for value in values:
        detokenizer.push(7 + value)
        assert len(detokenizer._window) <= 16
    detokenizer.flush()


def test_templates_run_as_their_authors_expect():
    source = "{%- for m in messages %}\n    {%- if loop.first %}{% continue %}{% endif %}\n{{ m | tojson }}"
    source += "\n   {% if true %}\n{% endif %}{% generation %}!{% endgeneration %}{% endfor %}"
    rendered = ChatTemplate(source).render([{"role": "user"}, {"role": "user", "content": "<é>"}], {})
    assert rendered.removeprefix("\n") == json.dumps({"role": "user", "content": "<é>"}, ensure_ascii=False) + "\n!"
