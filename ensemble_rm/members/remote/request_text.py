"""Sample → what a server reads: a text, a pair of texts, messages, or the sample itself.

The template is always the user's choice: a server that takes texts cannot say which its model was
trained with. Knows tokenizers' templates; knows nothing of protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ensemble_rm.data.samples import Message, Prompt, Sample
from ensemble_rm.errors import ModelError, OptionError
from ensemble_rm.members.encoding import flatten

TextTemplate: TypeAlias = "str | Callable[[Sample], str]"
"""``"chat"``, ``"plain"``, ``"pair"``, ``"messages"``, ``"sample"``, or a function to a text."""

FORMS = {
    "chat": "text",
    "plain": "text",
    "pair": "pair",
    "messages": "messages",
    "sample": "sample",
}
"""The form that each template makes."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A sample as a server reads it; one of `text`, `pair`, `messages` and `sample` is set.

    Attributes
    ----------
    text : str, optional
        Prompt and completion, whole.
    pair : tuple of str, optional
        Prompt and completion, apart.
    messages : list of dict, optional
        The conversation with the completion as its last turn.
    sample : Sample, optional
        As it is.
    prompt_text : str
        The part of `text` that is the prompt; empty where it is not known.
    """

    text: str | None = None
    pair: tuple[str, str] | None = None
    messages: list[dict[str, str]] | None = None
    sample: Sample | None = None
    prompt_text: str = ""


class Renderer:
    """Renders samples in one template.

    Parameters
    ----------
    template : str or callable
        See `TextTemplate`; ``"chat"`` is the chat template of `tokenizer`, ``"plain"`` the prompt's
        text followed by the completion's.
    tokenizer : str or Path, optional
        Folder or Hub id of the tokenizer whose chat template is used; read at the first sample.
    strips_bos : bool
        Leave out the chat template's BOS where the tokenizer itself adds one: for servers that add
        special tokens to every text, so that there are not two.

    Raises
    ------
    OptionError
        If the template is unknown, or it and `tokenizer` do not go together.
    """

    def __init__(
        self, template: TextTemplate, *, tokenizer: str | Path | None, strips_bos: bool
    ) -> None:
        if isinstance(template, str) and template not in FORMS:
            raise OptionError(
                f"template must be a function or one of {', '.join(FORMS)}, not {template!r}"
            )
        if (template == "chat") != (tokenizer is not None):
            raise OptionError(
                "template 'chat' needs `tokenizer`, whose chat template it is, and no other "
                f"template takes one; got template {template!r} and tokenizer {tokenizer!r}"
            )
        self.template, self.tokenizer, self.strips_bos = template, tokenizer, strips_bos
        self._loaded: Any = None
        self._bos = ""

    @property
    def form(self) -> str:
        """What it makes: ``"text"``, ``"pair"``, ``"messages"`` or ``"sample"``."""
        return FORMS[self.template] if isinstance(self.template, str) else "text"

    def render(self, samples: Sequence[Sample]) -> list[Rendered]:
        """Render samples, in their order."""
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> Rendered:
        asked = flatten(sample.prompt, cue=self.template != "pair")
        if self.form == "sample":
            return Rendered(sample=sample)
        if self.form == "pair":
            return Rendered(pair=(asked, sample.completion))
        if self.form == "messages":
            return Rendered(messages=conversation(sample))
        if not isinstance(self.template, str):
            text = self.template(sample)
        elif self.template == "chat":
            text = self._chat(conversation(sample), cue=False)
            asked = self._chat(turns(sample.prompt), cue=True)
        else:
            text = asked + sample.completion
        # OpenRLHF's own clients send the prompt as it begins the text.
        return Rendered(text=text, prompt_text=asked if text.startswith(asked) else "")

    def _chat(self, messages: list[dict[str, str]], *, cue: bool) -> str:
        if self._loaded is None:
            self._load()
        text = str(
            self._loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=cue)
        )
        return text.removeprefix(self._bos) if self._bos else text

    def _load(self) -> None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self.tokenizer))
        except (OSError, ValueError) as error:
            raise ModelError(f"no tokenizer {self.tokenizer}: {error}") from error
        if not tokenizer.chat_template:
            raise OptionError(f"the tokenizer {self.tokenizer} has no chat template")
        if self.strips_bos and tokenizer.bos_token is not None:
            ids = tokenizer("").input_ids
            if ids and ids[0] == tokenizer.bos_token_id:
                self._bos = tokenizer.bos_token
        self._loaded = tokenizer


def turns(prompt: Prompt) -> list[dict[str, str]]:
    """Return a prompt as messages; a text is the user's turn."""
    told = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return [{"role": turn.role, "content": turn.content} for turn in told]


def conversation(sample: Sample) -> list[dict[str, str]]:
    """Return a sample as messages, its completion the assistant's last turn."""
    return [*turns(sample.prompt), {"role": "assistant", "content": sample.completion}]
