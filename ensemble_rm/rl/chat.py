"""Prompts and completions as trainers pass them, plain or conversational, as samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ensemble_rm.data.samples import Message, Prompt, Sample, as_prompt
from ensemble_rm.errors import DataError, OptionError, RawTextError


def read_completion(prompt: object, completion: object) -> tuple[Prompt, str]:
    """Return the prompt and the text of its completion.

    Parameters
    ----------
    prompt : str or sequence of messages
    completion : str or sequence of messages
        If it has several messages, as after tool calls, the last one is scored and the earlier ones
        become part of the prompt.

    Raises
    ------
    DataError
        If either is of another type, or the last message is not text by the assistant.
    """
    turns = as_prompt(prompt)
    if isinstance(completion, str):
        return turns, completion
    if not isinstance(completion, Sequence) or not completion:
        raise DataError(f"a completion must be text or messages, not {completion!r}")
    last = completion[-1]
    content = last.get("content") if isinstance(last, Mapping) else None
    if not isinstance(content, str) or last.get("role") != "assistant":
        raise DataError(f"a completion must end with text by the assistant, not with {last!r}")
    if len(completion) == 1:
        return turns, content
    # A rollout of several turns: tool calls and results become part of the prompt.
    calls = as_prompt(completion[:-1])
    # A text prompt is one user message, as templates render it.
    before = (Message("user", turns),) if isinstance(turns, str) else turns
    assert isinstance(calls, tuple)
    return (*before, *calls), content


def to_samples(
    prompts: Sequence[object],
    completions: Sequence[object],
    references: Sequence[object] | None = None,
) -> list[Sample | Exception]:
    """Return a sample per completion, or the error of one that cannot be read.

    Parameters
    ----------
    prompts, completions : sequence
        One prompt per completion, as trainers repeat them.
    references : sequence, optional
        Reference completion of each prompt, text or messages, or None.

    Raises
    ------
    OptionError
        If the lists differ in length.
    """
    if references is None:
        references = [None] * len(prompts)
    if not len(prompts) == len(completions) == len(references):
        raise OptionError(
            f"{len(prompts)} prompts, {len(completions)} completions and {len(references)} "
            "references; the numbers must be equal"
        )
    samples: list[Sample | Exception] = []
    for prompt, completion, reference in zip(prompts, completions, references, strict=True):
        try:
            turns, text = read_completion(prompt, completion)
            baseline = None if reference is None else read_completion(prompt, reference)[1]
            samples.append(Sample(turns, text, baseline))
        except DataError as error:
            samples.append(error)
    return samples


def read_query(
    query: str, prompt: str, label: object, *, stop: Sequence[str], refusing: Sequence[str]
) -> Sample:
    """Return the sample of one query.

    Raises
    ------
    RawTextError
        If the label has no messages and a member does not take raw text.
    DataError
        If the query does not begin with its prompt, or the label's prompt cannot be read.
    """
    # Without the exact prompt nobody can tell where the completion begins.
    if not query.startswith(prompt):
        raise DataError(
            f"a query must begin with its prompt; it begins with {query[:60]!r}, the prompt with "
            f"{prompt[:60]!r}. OpenRLHF truncates long prompts: raise its prompt length"
        )
    turns, reference = read_label(label)
    if turns is None:
        if refusing:
            raise RawTextError(
                f"a label has no messages, and members {', '.join(refusing)} cannot read text "
                "in the policy's template; put the messages in `labels` as JSON, or declare the "
                "members that take raw text"
            )
        # The policy's template is then part of the prompt, which raw-text members accept.
        turns = prompt
    return Sample(turns, without_stops(query[len(prompt) :], stop).strip(), reference)


def without_stops(text: str, stop: Sequence[str]) -> str:
    """Return a text without the tokens that end turns, and white space, at its end."""
    # Longest first: a shorter stop may be the end of a longer one.
    words = sorted(filter(None, stop), key=len, reverse=True)
    end = len(text)
    while True:
        while end and text[end - 1].isspace():
            end -= 1
        # endswith with an end: no copy of the text for each word that is removed.
        word = next((word for word in words if text.endswith(word, 0, end)), None)
        if word is None:
            return text[:end]
        end -= len(word)


def read_label(label: object) -> tuple[Prompt | None, str | None]:
    """Return the prompt and the reference of a label, each None if it has none.

    Raises
    ------
    DataError
        If a list has a turn with a role, or there is a ``"prompt"``, and it cannot be read.
    """
    content = label
    if isinstance(label, str):
        try:
            content = json.loads(label)
        # Deeply nested JSON raises RecursionError; a label is anything the data set's author put
        # there.
        except (ValueError, RecursionError):
            return None, None
    if isinstance(content, list):  # a right answer may be a list too, without turns
        has_turns = any(isinstance(turn, dict) and "role" in turn for turn in content)
        return (as_prompt(content) if has_turns else None), None
    if not isinstance(content, dict) or "prompt" not in content:
        return None, None
    reference = content.get("reference")
    if reference is not None and not isinstance(reference, str):
        raise DataError(f"a label's reference must be text, not {reference!r}")
    return as_prompt(content["prompt"]), reference
