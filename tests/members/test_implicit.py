"""DPO's implicit reward: against the definition, against TRL's log-probabilities, in ensembles."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemble_rm import (
    Message,
    Preference,
    Preferences,
    RewardEnsemble,
    Sample,
    TrunkOptions,
    combine,
)
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.errors import ModelError, OptionError
from ensemble_rm.members import HeadScorer, ImplicitScorer

CHATML = (
    "{% for m in messages %}[unused0] {{ m.role }} : {{ m.content }} [SEP]\n{% endfor %}"
    "{% if add_generation_prompt %}[unused0] assistant :{% endif %}"
)
OPTIONS = TrunkOptions(max_length=48, device="cpu")
TALK = (Message("user", "What is it?"),)
SAMPLES = [
    Sample(TALK, "It is a small dog."),
    Sample(TALK, "No."),
    Sample("Say a longer thing, please, of many words.", "A thing."),
    Sample("Hi", "A much longer answer than any of the others, with some words to spare."),
]


def write_model(folder: Path, minilm: Path, *, seed: int, chat: bool) -> Path:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
    if chat:
        tokenizer.chat_template = CHATML
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 16}
    shape |= {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(**shape, pad_token_id=0, eos_token_id=102, initializer_range=0.3)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["chat", "plain"])
def folders(
    request: pytest.FixtureRequest, minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    base, chat = tmp_path_factory.mktemp("policies"), request.param == "chat"
    return (
        write_model(base / "policy", minilm_folder, seed=1, chat=chat),
        write_model(base / "reference", minilm_folder, seed=2, chat=chat),
    )


@pytest.fixture
def options(folders: tuple[Path, Path]) -> TrunkOptions:
    chat = "chat_template" in "".join(p.name for p in folders[0].iterdir())
    return TrunkOptions("chat" if chat else "plain", 48, device="cpu")


def slow_log_prob(folder: Path, ids: list[int], start: int) -> float:
    """One token after the other, in float64, from the whole sequence's logits."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    total = 0.0
    for position in range(max(start, 1), len(ids)):
        row = logits[position - 1].tolist()
        total += row[ids[position]] - math.log(sum(math.exp(x) for x in row))
    return total


def test_it_is_its_definition(folders: tuple[Path, Path], options: TrunkOptions) -> None:
    scorer = ImplicitScorer.from_names(*folders, options, beta=0.3)
    encoded = scorer._make_encoder().encode(SAMPLES)
    wanted = [
        0.3
        * (slow_log_prob(folders[0], e.ids, e.start) - slow_log_prob(folders[1], e.ids, e.start))
        for e in encoded
    ]
    np.testing.assert_allclose(scorer.score(SAMPLES)[:, 0], wanted, atol=1e-4)


def test_neighbours_and_batches_change_nothing(
    folders: tuple[Path, Path], options: TrunkOptions
) -> None:
    whole = ImplicitScorer.from_names(*folders, options).score(SAMPLES)
    one = TrunkOptions(options.template, 48, device="cpu", token_budget=1)
    alone = ImplicitScorer.from_names(*folders, one)
    np.testing.assert_allclose(alone.score(SAMPLES), whole, atol=1e-5)
    np.testing.assert_allclose(alone.score(SAMPLES[::-1]), whole[::-1], atol=1e-5)


def test_a_head_is_given_states_without_gaps(folders: tuple[Path, Path]) -> None:
    """In bfloat16 on a CPU a product of a slice with gaps takes a hundred times as long."""
    import torch
    from transformers import AutoModelForCausalLM

    from ensemble_rm.members.encoding import Encoded
    from ensemble_rm.members.forward.batching import batches
    from ensemble_rm.members.implicit import token_log_probs

    model = AutoModelForCausalLM.from_pretrained(folders[0]).eval()
    head, given = model.get_output_embeddings(), []
    head.register_forward_hook(lambda _, states, __: given.append(states[0]))
    encoded = [Encoded([101, 7, 8, 9, 10, 11], 4), Encoded([101, 9, 8, 7, 6], 3)]
    (batch,) = batches(encoded, token_budget=64, device=torch.device("cpu"))
    with torch.no_grad():
        token_log_probs(model, batch)
    (states,) = given
    assert states.shape[1] < batch.ids.shape[1] and states.is_contiguous()
    assert not head._forward_pre_hooks  # the model is left as it was


def test_a_policy_that_is_its_reference_says_nothing(
    folders: tuple[Path, Path], options: TrunkOptions
) -> None:
    same = ImplicitScorer.from_names(folders[0], folders[0], options, name="same")
    assert (same.score(SAMPLES) == 0).all() and same.names == ("same",)
    there, back = (ImplicitScorer.from_names(*pair, options) for pair in (folders, folders[::-1]))
    np.testing.assert_allclose(there.score(SAMPLES), -back.score(SAMPLES), atol=1e-6)


def test_the_prompts_own_probability_does_not_count(
    folders: tuple[Path, Path], options: TrunkOptions
) -> None:
    if options.template == "chat":
        pytest.skip("in a chat an empty completion ends its turn, which has a probability")
    scorer = ImplicitScorer.from_names(*folders, options)
    assert scorer.score([Sample("Any prompt at all", "")]).tolist() == [[0.0]]


def test_saved_and_mixed_with_others(
    folders: tuple[Path, Path],
    options: TrunkOptions,
    two_heads: Callable[..., HeadScorer],
    tmp_path: Path,
) -> None:
    scorer = ImplicitScorer.from_names(*folders, options, beta=0.2)
    words = ["yes", "no it is", "a dog", "why not this", "so be it"]
    rows = [Preference(f"Ask {i}", words[i % 5], words[(i + 1) % 5]) for i in range(10)]
    heads = RewardEnsemble((two_heads(),), Normaliser.identity(2), mean())
    ensemble = combine({"policy": scorer, "heads": heads}, Preferences(tuple(rows)))
    assert len(ensemble.names) == 3 and ensemble.names[0] == "policy"
    back = RewardEnsemble.from_pretrained(ensemble.save_pretrained(tmp_path / "run"), device="cpu")
    np.testing.assert_array_equal(back.score(SAMPLES).raw, ensemble.score(SAMPLES).raw)
    held = back.with_max_loaded_models(1)
    np.testing.assert_allclose(held.score(SAMPLES).raw, ensemble.score(SAMPLES).raw, atol=1e-6)


def test_another_reference_is_another_member(
    folders: tuple[Path, Path], options: TrunkOptions, tmp_path: Path, minilm_folder: Path
) -> None:
    first = ImplicitScorer.from_names(*folders, options)
    assert first.digest == ImplicitScorer.from_names(*folders, options, name="other").digest
    assert first.digest != ImplicitScorer.from_names(*folders, options, beta=0.5).digest
    assert first.digest != ImplicitScorer.from_names(*folders[::-1], options).digest
    folder = RewardEnsemble((first,), Normaliser.identity(1), mean()).save_pretrained(
        tmp_path / "r"
    )
    chat = options.template == "chat"
    write_model(folders[1], minilm_folder, seed=9, chat=chat)
    try:
        with pytest.raises(ModelError, match=r"the backbone in .* changed after it was saved"):
            RewardEnsemble.from_pretrained(folder, device="cpu")
    finally:
        write_model(folders[1], minilm_folder, seed=2, chat=chat)


def test_what_cannot_be_is_named(
    folders: tuple[Path, Path], minilm_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="beta"):
        ImplicitScorer.from_names(*folders, OPTIONS, beta=0.0)
    with pytest.raises(OptionError, match="'pair'"):
        ImplicitScorer.from_names(*folders, TrunkOptions("pair", 48, device="cpu"))
    from transformers import AutoTokenizer

    other = write_model(tmp_path / "other", minilm_folder, seed=3, chat=True)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ModelError, match="vocabularies"):
        ImplicitScorer.from_names(folders[0], other, OPTIONS)


@pytest.mark.slow
def test_trls_own_log_probabilities(minilm_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    policy = write_model(tmp_path / "policy", minilm_folder, seed=1, chat=True)
    reference = write_model(tmp_path / "reference", minilm_folder, seed=2, chat=True)
    prompt = [{"role": "user", "content": "What is it?"}]
    sides = {"chosen": ["It is a small dog.", "Yes"], "rejected": ["No.", "A thing of many words."]}
    rows = {
        "prompt": [prompt] * 2,
        **{
            side: [[{"role": "assistant", "content": text}] for text in texts]
            for side, texts in sides.items()
        },
    }
    config = DPOConfig(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        disable_tqdm=True,
        beta=0.3,
    )
    trainer = DPOTrainer(
        model=str(policy),
        ref_model=AutoModelForCausalLM.from_pretrained(reference),
        args=config,
        train_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    theirs = [
        np.concatenate([part.numpy() for part in trainer.compute_ref_log_probs(model, batch)])
        for model in (trainer.model, trainer.ref_model)
    ]
    scorer = ImplicitScorer.from_names(policy, reference, OPTIONS, beta=0.3)
    talk = (Message("user", "What is it?"),)
    ours = scorer.score([Sample(talk, text) for side in sides.values() for text in side])
    np.testing.assert_allclose(ours[:, 0], 0.3 * (theirs[0] - theirs[1]), atol=1e-4)
