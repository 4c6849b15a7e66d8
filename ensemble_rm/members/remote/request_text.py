"""Renders samples for a server: as a text, a pair of texts, messages, or the sample itself.

The template is always the user's choice, since a server does not say which template its model was
trained with. Must not know protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ensemble_rm.data.samples import Message, Prompt, Sample
from ensemble_rm.errors import ModelError, OptionError
from ensemble_rm.members.encoding import flatten, render_chat

TextTemplate: TypeAlias = "str | Callable[[Sample], str]"
"""``"chat"``, ``"plain"``, ``"pair"``, ``"messages"``, ``"sample"``,
or a function from a sample to a text."""

FORMS = {
    "chat": "text",
    "plain": "text",
    "pair": "pair",
    "messages": "messages",
    "sample": "sample",
}
"""The form of a rendered sample, by template."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A sample as it is sent; exactly one of `text`, `pair`, `messages` and `sample` is set.

    Attributes
    ----------
    text : str, optional
        Prompt and completion as one text.
    pair : tuple of str, optional
        Prompt and completion as two texts.
    messages : list of dict, optional
        The conversation with the completion as its last turn.
    sample : Sample, optional
        The sample itself.
    prompt_text : str
        The part of `text` that is the prompt; empty if unknown.
    """

    text: str | None = None
    pair: tuple[str, str] | None = None
    messages: list[dict[str, str]] | None = None
    sample: Sample | None = None
    prompt_text: str = ""


class Renderer:
    """Renders samples by one template.

    Parameters
    ----------
    template : str or callable
        See `TextTemplate`; ``"chat"`` is the chat template of `tokenizer`, ``"plain"`` the prompt's
        text followed by the completion's.
    tokenizer : str or Path, optional
        Folder or Hub id of the tokenizer whose chat template is used; loaded at the first sample.
    strips_bos : bool
        Remove the chat template's BOS token if the tokenizer adds one itself. For servers that add
        special tokens to every text: the model would read two BOS tokens.

    Raises
    ------
    OptionError
        If the template is unknown, ``"chat"`` lacks a tokenizer, or another template has one.
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
                "template 'chat' needs `tokenizer`, and no other template uses one; got template "
                f"{template!r} and tokenizer {tokenizer!r}"
            )
        self.template, self.tokenizer, self.strips_bos = template, tokenizer, strips_bos
        self._loaded: Any = None
        self._bos = ""

    @property
    def form(self) -> str:
        """Form of the rendered samples: ``"text"``, ``"pair"``, ``"messages"`` or ``"sample"``."""
        return FORMS[self.template] if isinstance(self.template, str) else "text"

    def render(self, samples: Sequence[Sample]) -> list[Rendered]:
        """Render samples, in their order."""
        return [self._render(sample) for sample in samples]

    def _render(self, sample: Sample) -> Rendered:
        prompt = flatten(sample.prompt, cue=self.template != "pair")
        if self.form == "sample":
            return Rendered(sample=sample)
        if self.form == "pair":
            return Rendered(pair=(prompt, sample.completion))
        if self.form == "messages":
            return Rendered(messages=conversation(sample))
        if not isinstance(self.template, str):
            text = self.template(sample)
        elif self.template == "chat":
            text = self._chat(conversation(sample), cue=False)
            prompt = self._chat(turns(sample.prompt), cue=True)
        else:
            text = prompt + sample.completion
        # OpenRLHF's server expects the prompt exactly as the text begins.
        return Rendered(text=text, prompt_text=prompt if text.startswith(prompt) else "")

    def _chat(self, messages: list[dict[str, str]], *, cue: bool) -> str:
        if self._loaded is None:
            self._load()
        text = render_chat(self._loaded, messages, cue=cue)
        return text.removeprefix(self._bos) if self._bos else text

    def _load(self) -> None:
        from transformers import AutoTokenizer

        try:
            # Never its custom code, and never transformers' question whether to run it.
            tokenizer = AutoTokenizer.from_pretrained(str(self.tokenizer), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot load the tokenizer {self.tokenizer}: {error}") from error
        if not tokenizer.chat_template:
            raise OptionError(f"the tokenizer {self.tokenizer} has no chat template")
        if self.strips_bos and tokenizer.bos_token is not None:
            ids = tokenizer("").input_ids  # only the special tokens
            if ids and ids[0] == tokenizer.bos_token_id:
                self._bos = tokenizer.bos_token
        self._loaded = tokenizer


def turns(prompt: Prompt) -> list[dict[str, str]]:
    """Return a prompt as messages; a text becomes one user message."""
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return [{"role": message.role, "content": message.content} for message in messages]


def conversation(sample: Sample) -> list[dict[str, str]]:
    """Return a sample as messages; the completion is the last, by the assistant."""
    return [*turns(sample.prompt), {"role": "assistant", "content": sample.completion}]
