"""The files that `ensemble-rm init-reward` writes: one per trainer, to be read and edited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ensemble_rm.aggregation.aggregator import Aggregator

_HEAD = '''\
"""{title}

{use}
"""

{imports}

ENSEMBLE = PinnedEnsemble(
    {folder!r},
    digest={digest!r},  # a changed folder is an error
    device={device!r},  # "cpu", "cuda" (the process's current GPU) or "cuda:1"
    aggregator={aggregator},  # None: the ensemble's own
)
'''

_TRL = """
reward = trl_reward(
    ENSEMBLE,
    on_failure="none",  # a sample that cannot be scored has no reward; "raise" ends the run
    asynchronous=False,
)
"""

_OPENRLHF = """
reward_func = openrlhf_reward(
    ENSEMBLE,
    # Tokens that end a turn in the policy's template, removed from completions.
    stop=["<|im_end|>", "<|eot_id|>", "<|endoftext|>", "</s>"],
    # Members that may score a prompt in the policy's template, if `labels` has no messages.
    raw_text_members=[],
)
"""

_VERL = '''
_score = verl_reward(ENSEMBLE)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """Return the same keys for every sample; the reward is `score`."""
    return _score(data_source, solution_str, ground_truth, extra_info, **kwargs)
'''


@dataclass(frozen=True)
class Template:
    """The file of one trainer.

    Attributes
    ----------
    title, use : str
        Its first line, and how to give it to the trainer, with ``{name}`` and ``{module}`` for the
        file.
    factory : str
        The function of `ensemble_rm.rl` that it calls.
    body : str
        What follows the pinned ensemble.
    """

    title: str
    use: str
    factory: str
    body: str


TEMPLATES = {
    "trl": Template(
        "The reward of a TRL run: GRPOTrainer(reward_funcs=reward), or on the command line.",
        "trl grpo --reward_funcs {module}.reward …, in this file's folder. Nothing is loaded\n"
        "before the first call. If the data set has a column `reference`, the probability of\n"
        "being preferred to it is logged.",
        "trl_reward",
        _TRL,
    ),
    "openrlhf": Template(
        "The reward of an OpenRLHF run.",
        "--reward.remote_url {name} (older: --remote_rm_url). OpenRLHF sends text in the policy's\n"
        "template; put the messages in `labels` as JSON: a list of messages, or\n"
        '{{"prompt": …, "reference": …}}.',
        "openrlhf_reward",
        _OPENRLHF,
    ),
    "verl": Template(
        "The reward of a veRL run.",
        "reward.custom_reward_function.path={name}\n"
        "reward.custom_reward_function.name=compute_score\n"
        "veRL sends the response alone; put the prompt, text or messages, in each row's\n"
        "extra_info['prompt'].",
        "verl_reward",
        _VERL,
    ),
}


def render(
    loop: str,
    *,
    folder: str,
    digest: str,
    device: str,
    aggregator: Aggregator | None,
    file_name: str,
) -> str:
    """Return the Python source of a trainer's reward file.

    Parameters
    ----------
    loop : str
        A key of `TEMPLATES`.
    folder, digest : str
        The saved ensemble and its version.
    device : str
        Device of its members.
    aggregator : Aggregator, optional
        Aggregator of the reward (default: the ensemble's).
    file_name : str
        Name of the file.
    """
    template = TEMPLATES[loop]
    maker, call = "", "None"
    if aggregator is not None:
        maker = "from ensemble_rm.aggregation import make_aggregator\n"
        given: dict[str, object] = dict(aggregator.parameters)
        # Defaults are left out, so that the file shows what was chosen.
        given |= {} if aggregator.nan == "raise" else {"nan": aggregator.nan}
        given |= {} if aggregator.min_members == 1 else {"min_members": aggregator.min_members}
        given |= {"weights": dict(aggregator.weights)} if aggregator.weights else {}
        words = "".join(f", {key}={value!r}" for key, value in given.items())
        call = f"make_aggregator({aggregator.name!r}{words})"
    names = ", ".join(sorted(["PinnedEnsemble", template.factory]))
    head = _HEAD.format(
        title=template.title,
        use=template.use.format(name=file_name, module=file_name.removesuffix(".py")),
        imports=f"{maker}from ensemble_rm.rl import {names}",
        folder=folder,
        digest=digest,
        device=device,
        aggregator=call,
    )
    return head + template.body
