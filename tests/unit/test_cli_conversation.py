import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.cli.conversation import Conversation
from tokenmill.errors import CapacityError


def encode(messages):
    """A token for each character, and two for each message."""
    return [0] * sum(len(message["content"]) + 2 for message in messages)


def make_conversation(*contents, system=None):
    conversation = Conversation(system)
    for index, content in enumerate(contents):
        conversation.say("assistant" if index % 2 else "user", content)
    return conversation


def contents(conversation):
    return [message["content"] for message in conversation.messages]


def test_a_conversation_that_fits_stays_whole():
    conversation = make_conversation("aa", "bb", "cc", system="ss")
    assert len(conversation.encode(encode, 16)) == 16
    assert contents(conversation) == ["aa", "bb", "cc"]


def test_the_oldest_exchange_goes_first_and_the_system_message_stays():
    conversation = make_conversation("aa", "bb", "cc", "dd", "ee", system="ss")
    assert len(conversation.encode(encode, 16)) == 16
    assert contents(conversation) == ["cc", "dd", "ee"]
    assert conversation.system == "ss"


def test_a_message_that_alone_is_too_long_is_refused():
    conversation = make_conversation("aa", "bb", "c" * 20)
    with pytest.raises(CapacityError, match="has 22 tokens and the context has room for 16"):
        conversation.encode(encode, 16)


def test_reset_keeps_the_system_message():
    conversation = make_conversation("aa", system="ss")
    conversation.reset()
    conversation.say("user", "x")
    assert len(conversation.encode(encode, 99)) == 7


@given(st.lists(st.text(max_size=20), min_size=1), st.integers(1, 100))
def test_what_is_kept_fits_and_begins_with_the_user(texts, limit):
    texts = texts if len(texts) % 2 else texts[:-1] or ["x"]
    conversation = make_conversation(*texts)
    try:
        ids = conversation.encode(encode, limit)
    except CapacityError:
        assert len(texts[-1]) + 2 > limit
        return
    assert len(ids) <= limit
    assert conversation.messages[0]["role"] == "user"
    assert contents(conversation) == texts[len(texts) - len(conversation.messages) :]
