"""Templates and truncation on a small vocabulary: chat, plain, what cannot be told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ensemble_rm import Message, Sample
from ensemble_rm.errors import DataError, OptionError, TemplateError
from ensemble_rm.members.backbone.checkpoint import load_tokenizer
from ensemble_rm.members.encoding import Encoded, TextEncoder, flatten

CHAT = (
    "[CLS]{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}[SEP]{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = (Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "Who are you?"))


@pytest.fixture
def tokenizer(minilm_folder: Path) -> Any:
    found = load_tokenizer(minilm_folder)
    found.add_special_tokens({"bos_token": "[CLS]"})
    return found


def words(tokenizer: Any, encoded: Encoded) -> tuple[str, str]:
    """What stands before the completion, and the rest."""
    parts = encoded.ids[: encoded.start], encoded.ids[encoded.start :]
    one, two = (tokenizer.decode(ids) for ids in parts)
    return one, two


@pytest.mark.parametrize("completion", ["a fox", "  a fox ", "hi"])
def test_a_chat_is_rendered_once_with_one_bos(tokenizer: Any, completion: str) -> None:
    tokenizer.chat_template = CHAT
    encoder = TextEncoder(tokenizer, max_length=64)
    assert encoder.template == "chat"
    (encoded,) = encoder.encode([Sample(TALK, completion)])
    assert encoded.ids.count(tokenizer.bos_token_id) == 1
    before, after = words(tokenizer, encoded)
    assert before.endswith("assistant :") and before.count("hi") == 1
    assert after == f"{completion.strip()} [SEP]"


def test_an_empty_completion_is_what_the_template_adds(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    (encoded,) = TextEncoder(tokenizer, max_length=64).encode([Sample("Hi", "")])
    assert words(tokenizer, encoded)[1] == "[SEP]"
    (plain,) = TextEncoder(tokenizer, template="plain", max_length=64).encode([Sample("Hi", "")])
    assert plain.start == len(plain.ids) - 1


def test_a_template_that_rewrites_the_prompt_is_searched_or_refused(tokenizer: Any) -> None:
    counting = "{{ messages | length }} turns" + CHAT
    tokenizer.chat_template = counting
    encoder = TextEncoder(tokenizer, max_length=64)
    (encoded,) = encoder.encode([Sample("a fox?", "a fox")])  # the last one is the completion
    before, after = words(tokenizer, encoded)
    assert before.count("fox") == 1 and after.startswith("a fox")
    with pytest.raises(TemplateError, match="plain"):
        encoder.encode([Sample("Hi", " ")])
    tokenizer.chat_template = "{{ messages | length }} turns"
    with pytest.raises(TemplateError, match="not found"):
        TextEncoder(tokenizer, max_length=64).encode([Sample("Hi", "a fox")])


REFUSES = (
    "{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('Role ' + m['role'] + ' not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((Message("system", "Be brief."), Message("user", "Hi")), "Role system not supported"),
        ((Message("user", "Hi"), Message("tool", "4")), "Role tool not supported"),
        ((Message("user", "Hi"), Message("user", "Who?")), "Roles must alternate"),
    ],
)
def test_a_templates_refusal_names_itself_and_the_sample(
    tokenizer: Any, prompt: tuple[Message, ...], message: str
) -> None:
    tokenizer.chat_template = REFUSES + CHAT
    encoder = TextEncoder(tokenizer, max_length=64)
    with pytest.raises(TemplateError, match=message) as caught:
        encoder.encode([Sample(TALK, "fine"), Sample(prompt, "a fox")])
    assert repr(prompt[0].content) in str(caught.value)
    assert len(encoder.encode([Sample(TALK, "fine")])) == 1


@pytest.mark.parametrize("template", ["chat", "plain", "pair"])
@pytest.mark.parametrize(
    "sample",
    [
        Sample("\ud800", "a"),
        Sample("p", "a\udfff"),
        Sample((Message("user", "x\ud83d"),), "a"),
    ],
)
def test_half_a_character_is_an_error_of_its_sample(
    tokenizer: Any, template: Any, sample: Sample
) -> None:
    tokenizer.chat_template = CHAT
    with pytest.raises(DataError, match="lone surrogate"):
        TextEncoder(tokenizer, template=template, max_length=64).encode([sample])


def test_thinking_that_the_template_strips_is_not_a_refusal(tokenizer: Any) -> None:
    # As DeepSeek-R1's: the header opens the thinking, and a turn keeps only what follows it.
    tokenizer.chat_template = (
        "[CLS]{% for m in messages %}{{ m['role'] }}: {{ m['content'].split('</think>')[-1] }}"
        "[SEP]{% endfor %}{% if add_generation_prompt %}assistant: think {% endif %}"
    )
    encoder = TextEncoder(tokenizer, max_length=64)
    with_thinking, answer = encoder.encode(
        [Sample("Hi", "a cat, then </think> a fox"), Sample("Hi", " a fox")]
    )
    assert with_thinking == answer
    assert words(tokenizer, with_thinking)[1] == "a fox [SEP]"
    with pytest.raises(TemplateError, match="not found"):
        encoder.encode([Sample("Hi", "a cat</think> ")])


@pytest.mark.parametrize("template", ["chat", "plain", "pair"])
@pytest.mark.parametrize(("prompt", "completion"), [(40, 5), (3, 40), (40, 40), (3, 5)])
def test_the_prompt_loses_its_beginning_first_and_a_bos_stays(
    tokenizer: Any, template: Any, prompt: int, completion: int
) -> None:
    tokenizer.chat_template = CHAT
    encoder = TextEncoder(tokenizer, template=template, max_length=24)
    free = TextEncoder(tokenizer, template=template, max_length=512)
    sample = Sample("old " * prompt, "new " * completion)
    (cut,), (whole,) = encoder.encode([sample]), free.encode([sample])
    assert len(cut.ids) == min(24, len(whole.ids))
    assert cut.cut_prompt + cut.cut_completion == len(whole.ids) - len(cut.ids)
    assert cut.ids[0] == tokenizer.bos_token_id
    if cut.cut_completion:
        assert "old" not in words(tokenizer, cut)[0]
    else:
        assert cut.ids[cut.start :] == whole.ids[whole.start :]


def test_a_conversation_as_plain_text() -> None:
    assert flatten("Hi", cue=True) == "Hi"
    assert flatten(TALK[:2], cue=False) == "User: Hi\n\nAssistant: Hello."
    assert flatten(TALK[:1], cue=True) == "User: Hi\n\nAssistant: "


def test_auto_takes_what_the_tokenizer_supports(tokenizer: Any) -> None:
    assert TextEncoder(tokenizer, max_length=8).template == "pair"
    tokenizer.sep_token = None
    assert TextEncoder(tokenizer, max_length=8).template == "plain"
    tokenizer.chat_template = CHAT
    assert TextEncoder(tokenizer, max_length=8).template == "chat"


def test_bad_options(tokenizer: Any) -> None:
    for options, message in (
        ({"template": "poem", "max_length": 64}, "'poem'"),
        ({"max_length": 7}, "at least 8 tokens, not 7"),
        ({"template": "chat", "max_length": 64}, "this has none"),
    ):
        with pytest.raises(OptionError, match=message):
            TextEncoder(tokenizer, **options)
