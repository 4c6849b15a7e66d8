"""A loop's prompts and completions, plain or conversational, as samples.

Knows the shapes that trainers hand over; knows nothing of scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ensemble_rm.data.samples import Message, Prompt, Sample, as_prompt
from ensemble_rm.errors import DataError, OptionError


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


def read_samples(
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
