"""A loop's prompts and completions, plain or conversational, as samples.

Knows the shapes that trainers hand over; knows nothing of scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ensemble_rm.data.samples import Message, Prompt, Sample, as_prompt
from ensemble_rm.errors import DataError, OptionError, RawTextError


def read_completion(prompt: object, completion: object) -> tuple[Prompt, str]:
    """Return the prompt and the text that answers it.

    Parameters
    ----------
    prompt : str or sequence of messages
    completion : str or sequence of messages
        Of several messages, as after calls of tools, the last one is scored, and those before it
        are part of its prompt.

    Raises
    ------
    DataError
        If either is something else, or the last message is not text by the assistant.
    """
    asked = as_prompt(prompt)
    if isinstance(completion, str):
        return asked, completion
    if not isinstance(completion, Sequence) or not completion:
        raise DataError(f"a completion must be text or messages, not {completion!r}")
    last = completion[-1]
    content = last.get("content") if isinstance(last, Mapping) else None
    if not isinstance(content, str) or last.get("role") != "assistant":
        raise DataError(f"a completion must end in text by the assistant, not in {last!r}")
    if len(completion) == 1:
        return asked, content
    turns = as_prompt(completion[:-1])
    before = (Message("user", asked),) if isinstance(asked, str) else asked
    assert isinstance(turns, tuple)
    return (*before, *turns), content


def to_samples(
    prompts: Sequence[object],
    completions: Sequence[object],
    references: Sequence[object] | None = None,
) -> list[Sample | Exception]:
    """Return a sample for each completion; where one cannot be read, the error in its place.

    Parameters
    ----------
    prompts, completions : sequence
        One prompt a completion, as trainers repeat them.
    references : sequence, optional
        Reference completion of each prompt, text or messages; None where there is none.

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
            "references"
        )
    found: list[Sample | Exception] = []
    for prompt, completion, reference in zip(prompts, completions, references, strict=True):
        try:
            asked, text = read_completion(prompt, completion)
            below = None if reference is None else read_completion(prompt, reference)[1]
            found.append(Sample(asked, text, below))
        except DataError as error:
            found.append(error)
    return found


def read_query(
    query: str, prompt: str, label: object, *, stop: Sequence[str], refusing: Sequence[str]
) -> Sample:
    """Return the sample of one query.

    Raises
    ------
    RawTextError
        If the label holds no messages and a member does not take raw text.
    DataError
        If the query does not begin with its prompt, or the label's prompt cannot be read.
    """
    if not query.startswith(prompt):
        raise DataError(
            "a query does not begin with its prompt, so that the completion cannot be told; "
            "OpenRLHF cuts prompts over its length: allow for longer ones. The query begins with "
            f"{query[:60]!r}, the prompt with {prompt[:60]!r}"
        )
    asked, reference = read_label(label)
    if asked is None:
        if refusing:
            raise RawTextError(
                f"a label holds no messages, and members {', '.join(refusing)} cannot read text in "
                "the policy's template; put the messages into `labels` as JSON, or declare the "
                "members that take raw text"
            )
        asked = prompt
    return Sample(asked, without_stops(query[len(prompt) :], stop).strip(), reference)


def without_stops(text: str, stop: Sequence[str]) -> str:
    """Return a text without the ends of turns, and the white space about them, at its end."""
    words = sorted(filter(None, stop), key=len, reverse=True)
    end = len(text)
    while True:
        while end and text[end - 1].isspace():
            end -= 1
        word = next((word for word in words if text.endswith(word, 0, end)), None)
        if word is None:
            return text[:end]
        end -= len(word)


def read_label(label: object) -> tuple[Prompt | None, str | None]:
    """Return the prompt and the reference that a label holds; None for what it does not.

    Raises
    ------
    DataError
        If a list has a turn with a role, or there is a ``"prompt"``, and it cannot be read.
    """
    said = label
    if isinstance(label, str):
        try:
            said = json.loads(label)
        except (ValueError, RecursionError):
            return None, None
    if isinstance(said, list):  # a right answer may be a list, too: of no turns
        turns = any(isinstance(turn, dict) and "role" in turn for turn in said)
        return (as_prompt(said) if turns else None), None
    if not isinstance(said, dict) or "prompt" not in said:
        return None, None
    reference = said.get("reference")
    if reference is not None and not isinstance(reference, str):
        raise DataError(f"a label's reference must be text, not {reference!r}")
    return as_prompt(said["prompt"]), reference
