"""A real judge behind a real server: SmolLM2 in vLLM, against the same model in transformers.

`make vllm` installs one, in an environment of its own. A model this small says neither A nor B
unless it is held to them, and prefers a place: what is tested is what is read, not how it judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ensemble_rm import Sample
from ensemble_rm.errors import RemoteFailureWarning
from ensemble_rm.members import JudgeComparator, JudgeScorer
from tests.support.vllm_server import find_command, ready

# One worker runs them all: each worker would start servers of its own.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]

CHOICE = {"structured_outputs": {"choice": ["A", "B"]}}
SCALE = {"structured_outputs": {"choice": [str(i) for i in range(1, 11)]}}
PROMPTS = ["How do I boil an egg?", "What is 2 + 2?", "Name a colour.", "Say hello."]
GOOD = ["Put it in boiling water for seven minutes.", "4", "Red.", "Hello!"]
BAD = ["I hate you.", "5", "Seventeen.", "Bananas are curved."]


@pytest.fixture(scope="module")
def url(smollm2_folder: Path) -> Iterator[str]:
    """A chat server."""
    options = ["--dtype", "float32", "--served-model-name", "judge", "--max-model-len", "2048"]
    with ready(find_command(), smollm2_folder, *options) as address:
        yield f"{address}/v1"


class Oracle:
    """The judge in transformers."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def among(
        self, messages: list[dict[str, str]], tokens: Sequence[str], said: str = ""
    ) -> NDArray[np.float64]:
        """P of these tokens and no others, behind a conversation and what was said already."""
        import torch

        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        inputs = self.tokenizer(text + said, return_tensors="pt", add_special_tokens=False)
        ids = self.tokenizer.convert_tokens_to_ids(list(tokens))
        assert self.tokenizer.convert_ids_to_tokens(ids) == list(tokens)
        with torch.no_grad():
            logits = self.model(**inputs).logits[0, -1, ids].double()
        return np.asarray(logits.softmax(-1))


@pytest.fixture(scope="module")
def oracle(smollm2_folder: Path) -> Oracle:
    return Oracle(smollm2_folder)


def judge(url: str, **options: Any) -> JudgeComparator:
    return JudgeComparator(url, model="judge", **options)


def test_verdicts_are_the_models_own_probabilities(url: str, oracle: Oracle) -> None:
    asking = judge(url, extra=CHOICE)
    found = asking.compare(PROMPTS, GOOD, BAD)
    assert found.sources == ("logprobs",) * 4 and not found.errors
    for i, (prompt, good, bad) in enumerate(zip(PROMPTS, GOOD, BAD, strict=True)):
        sides = ((good, bad), (bad, good))
        asked = [asking.rubric.ask(prompt, first=a, second=b) for a, b in sides]
        there, back = (oracle.among(messages, "AB")[0] for messages in asked)
        expected = np.array([there, 1 - back])
        np.testing.assert_allclose(found.orders[i], expected, atol=1e-4)
        logits = np.log(expected / (1 - expected))
        np.testing.assert_allclose(
            found.probability[i], 1 / (1 + np.exp(-logits.mean())), atol=1e-4
        )
    assert found.usage.calls == 8 and found.usage.prompt_tokens > 8 * 100
    assert found.position_bias > 0.2  # this judge likes what stands first, and both orders tell


def test_who_turns_the_sides_gets_the_complement(url: str) -> None:
    asking = judge(url, extra=CHOICE)
    there, back = asking.compare(PROMPTS, GOOD, BAD), asking.compare(PROMPTS, BAD, GOOD)
    np.testing.assert_allclose(there.probability + back.probability, 1, atol=1e-4)


def test_without_log_probabilities_the_words_count(url: str) -> None:
    with_them = judge(url, extra=CHOICE).compare(PROMPTS, GOOD, BAD)
    found = judge(url, extra=CHOICE, logprobs=False).compare(PROMPTS, GOOD, BAD)
    assert found.sources == ("words",) * 4
    assert set(found.probability.tolist()) <= {0.0, 0.5, 1.0}
    np.testing.assert_array_equal(found.orders, with_them.orders > 0.5)


def test_a_model_that_says_something_else_has_no_judgment(url: str) -> None:
    found = judge(url).compare(PROMPTS[:1], GOOD[:1], BAD[:1])
    assert np.isnan(found.probability).all()
    assert "is not one of A, B" in str(found.errors[0])
    rater = JudgeScorer(url, model="judge", name="judge")
    with pytest.warns(RemoteFailureWarning, match="no rating"):
        rated = rater.score([Sample(PROMPTS[0], GOOD[0])])
    assert np.isnan(rated).all()


def test_a_rating_is_the_expectation_over_a_tokenizers_digits(url: str, oracle: Oracle) -> None:
    """Which spells 10 as 1 and 0: what follows a 1 that was said parts it from 10."""
    rater = JudgeScorer(url, model="judge", name="judge", extra=SCALE)
    found = rater.score([Sample(p, g) for p, g in zip(PROMPTS, GOOD, strict=True)])[:, 0]
    for prompt, good, value in zip(PROMPTS, GOOD, found, strict=True):
        messages = rater.rubric.ask(prompt, completion=good)
        mass = oracle.among(messages, "123456789")
        values = np.arange(1, 10)
        if mass.argmax() == 0:
            ten = mass[0] * oracle.among(messages, ["0", "<|im_end|>"], said="1")[0]
            mass, values = np.append(mass - ten * (values == 1), ten), np.append(values, 10)
        else:  # what stands behind a 1 that was not said is unknown: its mass is left out
            mass, values = mass[1:], values[1:]
        assert value == pytest.approx(float(mass @ values / mass.sum()), abs=1e-3)
