"""Text that a caller may see: stop strings and what may become one."""

import pytest

from tokenmill.engine.text_stream import TextStream


class Plain:
    """A decoder whose ids are code points."""

    def push(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def finish(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("stop", "pieces", "shown", "matched"),
    [
        (["END"], ["a", "E", "N", "x"], ["a", "", "", "ENx"], None),
        (["END"], ["aE", "ND tail"], ["a", ""], "END"),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], "aab"),
        (["bc", "b"], ["abc"], ["a"], "b"),
        (["xyz", "y"], ["ax", "y"], ["a", "x"], "y"),
        ([], ["a", "b"], ["a", "b"], None),
    ],
)
def test_stop_strings(
    stop: list[str], pieces: list[str], shown: list[str], matched: str | None
) -> None:
    text = TextStream(Plain(), vocab_size=2**21, stop=stop)
    assert [text.push([ord(c) for c in piece]) for piece in pieces] == shown
    assert text.matched == matched
    assert text.finish() == ""


def test_held_text_comes_out_at_the_end() -> None:
    text = TextStream(Plain(), vocab_size=2**21, stop=["END"])
    assert text.push([ord(c) for c in "aEN"]) == "a"
    assert text.finish() == "EN"


def test_a_stop_string_may_be_left_in() -> None:
    text = TextStream(Plain(), vocab_size=2**21, stop=["END"], includes_stop=True)
    assert text.push([ord(c) for c in "aENDtail"]) == "aEND"
    assert text.matched == "END"


def test_a_stop_string_that_cannot_stop_yet_is_plain_text() -> None:
    text = TextStream(Plain(), vocab_size=2**21, stop=["END"])
    assert text.push([ord(c) for c in "aEND"], can_stop=False) == "aEND"
    assert text.push([ord(c) for c in "bEND"]) == "b"
