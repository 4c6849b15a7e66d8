"""Text in the policy's template: taken apart only where that is certain."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from ensemble_rm import Message, Sample
from ensemble_rm.errors import OptionError, UnprocessableError
from ensemble_rm.server.wire.raw_text import KNOWN, RawText, TurnTemplate

CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
ASKED = (Message("user", "Hi"),)
words = st.text(st.characters(codec="utf-8", exclude_characters="<>|"), max_size=20).map(str.strip)


@pytest.mark.parametrize("name", KNOWN)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=3), words)
def test_what_a_template_wrote_is_read_back(
    name: str, turns: list[tuple[str, str]], last: str
) -> None:
    messages = [Message("system", "Be kind.")]
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    messages[-1] = Message("assistant", last)
    write = KNOWN[name]
    text = "\n".join(write.format(role=m.role, content=m.content) for m in messages)
    assert TurnTemplate(name).read(text) == (tuple(messages[:-1]), last)


@pytest.mark.parametrize("tail", ["", "<|im_end|>", "<|im_end|>\n", "<|im_end|><|endoftext|>"])
@pytest.mark.parametrize("head", ["", "<|begin_of_text|>", "<s>"])
def test_ends_may_be_missing_and_special_tokens_stand_around(head: str, tail: str) -> None:
    assert TurnTemplate("chatml").read(f"{head}{CHAT}Hello{tail}") == (ASKED, "Hello")


def test_gemmas_model_is_the_assistant() -> None:
    text = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
    assert TurnTemplate("gemma").read(text) == (ASKED, "Hello")


@pytest.mark.parametrize(
    "text",
    [
        "Hello",
        "Hi there <|im_start|>user\nHi<|im_end|>",
        CHAT.replace("<|im_end|>", ""),
        f"{CHAT}Hello<|im_end|>and more",
        "<|im_start|>user\nHi<|im_end|>",
        "<|im_start|>assistant\nHello<|im_end|>",
        "<|im_start|>user Hi<|im_end|>\n<|im_start|>assistant\nHello",
        "<|im_start|>a b\nHi<|im_end|>\n<|im_start|>assistant\nHello",
        f"{CHAT}Hello<|im_end|>\n<|im_start|>user\nBye<|im_end|>",
    ],
)
def test_what_is_not_certain_is_refused_without_quoting_it(text: str) -> None:
    with pytest.raises(UnprocessableError) as refused:
        RawText(policy_template="chatml").whole(text, ["a"])
    assert "Hello" not in str(refused.value) and "Hi" not in str(refused.value)


@pytest.mark.parametrize(
    "turn",
    ["", "chat", "{content}<e>", "<s>{content}{role}<e>", "<s>{role}{content}<e>", "<s>{role}:"],
)
def test_a_template_is_checked(turn: str) -> None:
    with pytest.raises(OptionError, match="each between other text"):
        TurnTemplate(turn)


def test_members_that_read_the_template_score_it_as_it_is() -> None:
    raw = RawText(raw_text_members=("a",))
    assert raw.whole("any text", ["a"]) == Sample("", "any text")
    with pytest.raises(UnprocessableError, match="members b cannot read"):
        raw.whole("any text", ["a", "b"])
    with pytest.raises(OptionError, match="no member 'a'"):
        raw.check(["b"])
    # With a template, what it fits is still taken apart.
    both = RawText(policy_template="chatml", raw_text_members=("a",))
    assert both.whole(f"{CHAT}Hello", ["a"]) == Sample(ASKED, "Hello")
    assert both.whole("any text", ["a"]) == Sample("", "any text")


def test_a_prompt_that_is_sent_apart_is_cut_off_with_what_ends_the_turn() -> None:
    label = [{"role": "user", "content": "Hi"}]
    query = f"{CHAT}Hello<|im_end|>\n"
    for raw in (RawText(policy_template="chatml"), RawText(stop=("<|im_end|>",))):
        assert raw.split(query, CHAT, label, ["a"]) == Sample(ASKED, "Hello")
    # Without messages the template tells; without either nobody does.
    assert RawText(policy_template="chatml").split(query, CHAT, "4", ["a"]) == Sample(
        ASKED, "Hello"
    )
    stopped = RawText(stop=("<|im_end|>",))
    for raw, what in ((RawText(), "ends with a special token"), (stopped, "cannot read")):
        with pytest.raises(UnprocessableError, match=what):
            raw.split(query, CHAT, "4", ["a"])
    with pytest.raises(UnprocessableError, match="does not begin with its prompt") as refused:
        RawText(stop=("<|im_end|>",)).split("Secret text", CHAT, label, ["a"])
    assert "Secret" not in str(refused.value)
