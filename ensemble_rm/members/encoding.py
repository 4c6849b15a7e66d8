"""Sample → tokens: templates, truncation, and where the completion begins.

Knows tokenizers; knows nothing of models or of batches. The attention mask is made from lengths,
never from token ids, so a pad token that is also the end-of-sequence token does no harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from ensemble_rm.data.samples import Message, Prompt, Sample, check_unicode
from ensemble_rm.errors import OptionError, TemplateError
from ensemble_rm.members.backbone.options import Template
from ensemble_rm.members.scorer import Truncation

_TOKENISED = 512  # samples at once: a tokenizer returns more per token than is kept
TEMPLATES = get_args(Template)
THINKING_ENDS = "</think>"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as tokens.

    Attributes
    ----------
    ids : list of int
        Token ids, special tokens included, no padding.
    start : int
        Index of the completion's first token; the completion reaches to the end.
    types : list of int, optional
        Token type ids, where the model takes them.
    cut_prompt, cut_completion : int
        Tokens that truncation took from the prompt's beginning and the completion's end.
    """

    ids: list[int]
    start: int
    types: list[int] | None = None
    cut_prompt: int = 0
    cut_completion: int = 0


def count_truncation(encoded: Sequence[Encoded]) -> Truncation:
    """Say what truncation took away."""
    return Truncation(
        np.array([e.cut_prompt > 0 for e in encoded], dtype=np.bool_),
        np.array([e.cut_completion > 0 for e in encoded], dtype=np.bool_),
    )


class TextEncoder:
    """Renders samples in one model's template and tokenises them.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        A fast one (it can map characters to tokens).
    template : {"auto", "chat", "pair", "plain"}
        ``chat`` is the tokenizer's chat template; ``pair`` is prompt and completion as an
        encoder's two segments; ``plain`` is the prompt's text followed by the completion's.
        ``auto`` takes the first that the tokenizer supports, in this order.
    max_length : int
        Longest sequence in tokens. The prompt is cut first, from its beginning (a leading BOS
        stays); the completion is cut, at its end, only where it alone is longer.

    Raises
    ------
    OptionError
        If the template is unknown or the tokenizer does not support it, or `max_length` < 8.
    """

    def __init__(self, tokenizer: Any, *, template: Template = "auto", max_length: int) -> None:
        if template not in TEMPLATES:
            raise OptionError(f"template must be one of {TEMPLATES}, not {template!r}")
        # Less than this holds special tokens alone.
        if max_length < 8:
            raise OptionError(f"max_length must be at least 8 tokens, not {max_length}")
        # Slow tokenizers give no offsets, by which the completion's first token is found.
        if not tokenizer.is_fast:
            raise OptionError(
                f"{type(tokenizer).__name__} cannot map characters to tokens; load the fast "
                "tokenizer of this model (use_fast=True)"
            )
        self.tokenizer = tokenizer
        self.template = _choose(tokenizer) if template == "auto" else template
        self.max_length = max_length
        if self.template == "chat" and not tokenizer.chat_template:
            raise OptionError(
                "template 'chat' needs a tokenizer with a chat template; this has none"
            )

    def encode(self, samples: Sequence[Sample]) -> list[Encoded]:
        """Encode samples, in their order.

        Raises
        ------
        TemplateError
            If the chat template refuses a sample, or hides where its completion begins.
        DataError
            If a text holds a lone surrogate.
        """
        for sample in samples:
            check_unicode(sample.prompt, completion=sample.completion)
        encode = self._encode_pairs if self.template == "pair" else self._encode_texts
        cuts = range(0, len(samples), _TOKENISED)
        return [e for i in cuts for e in encode(samples[i : i + _TOKENISED])]

    def _encode_texts(self, samples: Sequence[Sample]) -> list[Encoded]:
        texts, starts = self._render(samples)
        batch = self.tokenizer(
            texts,
            add_special_tokens=self.template == "plain",
            # A chat template writes its own special tokens.
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a text that is too long is cut here, and counted
        )
        return [
            self._truncate(ids, self._first_token(batch, i, start, len(texts[i]), len(ids)))
            for i, (ids, start) in enumerate(zip(batch["input_ids"], starts, strict=True))
        ]

    # Rendering -------------------------------------------------------------------------------

    def _render(self, samples: Sequence[Sample]) -> tuple[list[str], list[int]]:
        """Return each sample's whole text and the character at which its completion begins."""
        # The prompt is rendered once for all its completions.
        prefixes: dict[Prompt, str] = {}
        texts, starts = [], []
        for sample in samples:
            prefix = prefixes.get(sample.prompt)
            if prefix is None:
                prefix = prefixes[sample.prompt] = self._prefix(sample.prompt)
            if self.template == "plain":
                text, start = prefix + sample.completion, len(prefix)
            else:
                text, start = self._chat(sample, prefix)
            texts.append(text)
            starts.append(start)
        return texts, starts

    def _prefix(self, prompt: Prompt) -> str:
        if self.template == "plain":
            return flatten(prompt, cue=True)
        return render_chat(self.tokenizer, _turns(prompt), cue=True)

    def _chat(self, sample: Sample, prefix: str) -> tuple[str, int]:
        turns = [*_turns(sample.prompt), {"role": "assistant", "content": sample.completion}]
        text = render_chat(self.tokenizer, turns, cue=False)
        if text.startswith(prefix):
            # Some templates change earlier turns once the answer follows, such as stripped
            # thinking.
            return text, len(prefix)
        completion = sample.completion.strip()
        start = text.rfind(completion)
        if start < 0:
            # DeepSeek-R1's template keeps only what follows the thinking.
            completion = completion.rpartition(THINKING_ENDS)[2].strip()
            start = text.rfind(completion)
        if start < 0 or not completion:
            raise TemplateError(
                "the chat template changes what comes before the completion, and the completion "
                f"{sample.completion[:60]!r} is not found in it; pass template='plain'"
            )
        return text, start

    @staticmethod
    def _first_token(batch: Any, row: int, start: int, end: int, length: int) -> int:
        """Token that holds character `start`; the last one where the completion is empty."""
        # Characters such as joined spaces may belong to no token; 64 of them are looked at.
        for position in range(start, min(end, start + 64)):
            token = batch.char_to_token(row, position)
            if token is not None:
                return int(token)
        return max(length - 1, 0)

    def _truncate(self, ids: list[int], start: int) -> Encoded:
        # The prompt loses its beginning first: its end and the completion matter most.
        over = len(ids) - self.max_length
        if over <= 0:
            return Encoded(ids, min(start, len(ids) - 1))
        keep = int(start > 0 and ids[0] == self.tokenizer.bos_token_id)
        # Never more than the prompt has; a leading BOS token stays.
        cut = min(over, max(start - keep, 0))
        kept = ids[:keep] + ids[keep + cut :]
        return Encoded(
            # A completion that is too long by itself loses its end.
            kept[: self.max_length],
            max(start - cut, 0),
            cut_prompt=cut,
            cut_completion=len(kept) - min(len(kept), self.max_length),
        )

    # Two segments ----------------------------------------------------------------------------

    def _encode_pairs(self, samples: Sequence[Sample]) -> list[Encoded]:
        before, between, after, types = self._layout()
        # The layout's tokens always fit.
        room = self.max_length - len(before) - len(between) - len(after)
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        prompts = self.tokenizer([flatten(s.prompt, cue=False) for s in samples], **options)
        completions = self.tokenizer([s.completion for s in samples], **options)
        found = []
        for a, b in zip(prompts["input_ids"], completions["input_ids"], strict=True):
            # The completion keeps its beginning, the prompt its end.
            cut_b = max(len(b) - room, 0)
            b = b[: len(b) - cut_b]
            cut_a = max(len(a) + len(b) - room, 0)
            a = a[cut_a:]
            head = [*before, *a, *between]
            kinds = None
            if types is not None:
                kinds = [types[0]] * len(head) + [types[1]] * (len(b) + len(after))
            found.append(Encoded([*head, *b, *after], len(head), kinds, cut_a, cut_b))
        return found

    def _layout(self) -> tuple[list[int], list[int], list[int], tuple[int, int] | None]:
        """Return the special tokens around two segments, and the segments' types."""
        # By example: tokenizers do not say where they put special tokens.
        probe = self.tokenizer("a", "b")
        segments = probe.sequence_ids(0)
        ids = probe["input_ids"]
        first, second = segments.index(0), segments.index(1)
        last_a = len(segments) - 1 - segments[::-1].index(0)
        last_b = len(segments) - 1 - segments[::-1].index(1)
        types = probe.get("token_type_ids")
        kinds = None if types is None else (types[first], types[second])
        return ids[:first], ids[last_a + 1 : second], ids[last_b + 1 :], kinds


def _choose(tokenizer: Any) -> Template:
    if tokenizer.chat_template:
        return "chat"
    if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
        return "pair"
    return "plain"


def _turns(prompt: Prompt) -> list[dict[str, str]]:
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def render_chat(tokenizer: Any, turns: list[dict[str, str]], *, cue: bool) -> str:
    """Render a conversation in a tokenizer's chat template.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    turns : list of dict
        Messages with role and content.
    cue : bool
        End with the header of the assistant's turn.

    Raises
    ------
    TemplateError
        If the template refuses the conversation, such as a system role that it does not know.
    """
    from jinja2.exceptions import TemplateError as Refusal, TemplateSyntaxError

    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=cue))
    except TemplateSyntaxError:
        # The template is broken for every sample, not refused for one.
        raise
    except Refusal as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise TemplateError(
            f"the chat template refuses a conversation of {roles} that begins with "
            f"{turns[0]['content'][:60]!r}: {error}; change or leave out the sample, or pass "
            "template='plain'"
            if turns
            else f"the chat template refuses a conversation without messages: {error}"
        ) from error


def flatten(prompt: Prompt, *, cue: bool) -> str:
    """Return a conversation as plain text; a text prompt stays as it is.

    Parameters
    ----------
    prompt : str or tuple of Message
    cue : bool
        End a conversation with the assistant's name, so that the completion can follow.
    """
    if isinstance(prompt, str):
        return prompt
    lines = [f"{turn.role.capitalize()}: {turn.content}" for turn in prompt]
    return "\n\n".join([*lines, "Assistant: "] if cue else lines)
