"""Words and their n-grams: pytest tests/unit/test_ngrams.py"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from selectmoe.ngrams import WORD, row_words, windows, word_codes, words


def test_case_punctuation_and_compatibility_forms_make_no_difference() -> None:
    assert words("Hello,  WORLD! it's 3.5") == ["hello", "world", "it", "s", "3", "5"]
    assert words("ﬁne Ｆｕｌｌ Straße") == words("fine full strasse")
    assert words("cafe\u0301") == words("café") == ["café"]


def test_scripts_without_blanks_give_a_word_per_character_and_marks_stay_in_their_word() -> None:
    assert words("你好world再见") == ["你", "好", "world", "再", "见"]
    assert words("한국 ไทย") == ["한", "국", "ไ", "ท", "ย"]
    assert words("हिन्दी भाषा।") == ["हिन्दी", "भाषा"]
    assert words("العَرَبِيَّة") == ["العَرَبِيَّة"]


@given(st.text(st.characters(max_codepoint=127)))
def test_the_quick_way_for_ascii_gives_the_same(text: str) -> None:
    assert words(text) == WORD.findall(text.casefold())


@given(st.text())
def test_any_text_has_words_and_they_have_codes(text: str) -> None:
    found = words(text)
    assert len(word_codes(found)) == len(found)


def test_a_row_s_words_are_those_of_its_messages_in_order() -> None:
    assert row_words([{"role": "user", "content": "A b."}, {"role": "assistant", "content": "c"}]) == ["a", "b", "c"]


def test_hashes_of_ngrams_depend_on_the_words_and_their_order_only() -> None:
    codes = word_codes(list("abcabc"))
    hashes = windows(codes, 3)
    assert len(hashes) == 4
    assert hashes[0] == hashes[3]
    assert len(set(hashes.tolist())) == 3
    assert windows(codes[[1, 0, 2]], 3)[0] != hashes[0]


def test_hashes_are_the_same_in_every_process() -> None:
    code = "from selectmoe.ngrams import *; print(windows(word_codes(words('one two three four')), 2).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(windows(word_codes(words("one two three four")), 2).tolist())
    assert np.uint64(windows(word_codes(["a"]), 1)[0]) != 0
