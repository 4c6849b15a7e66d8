"""The files that `ensemble-rm init-reward` writes: one a loop, to be read and changed.

Knows the loops' command lines; every formula stays in the library.
"""

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

# The version that this run is rewarded by; another one in its folder is an error.
ENSEMBLE = {folder!r}
DIGEST = {digest!r}
# Where the members run: "cpu", "cuda" (the process's current GPU) or "cuda:1".
DEVICE = {device!r}
# Of the reward, in normalised units; None is the ensemble's own.
AGGREGATOR = {aggregator}
'''

_TRL = """
reward = trl_reward(
    ENSEMBLE,
    aggregator=AGGREGATOR,
    device=DEVICE,
    digest=DIGEST,
    on_failure="none",  # a sample that cannot be scored has no reward; "raise" ends the run
    asynchronous=False,
)
"""

_OPENRLHF = """
# What ends a turn in the policy's template: cut, for no member should read it.
STOP = ["<|im_end|>", "<|eot_id|>", "<|endoftext|>", "</s>"]
# Members that may score a prompt in the policy's own template, where `labels` hold no messages.
RAW_TEXT_MEMBERS = []

reward_func = openrlhf_reward(
    ENSEMBLE,
    stop=STOP,
    raw_text_members=RAW_TEXT_MEMBERS,
    aggregator=AGGREGATOR,
    device=DEVICE,
    digest=DIGEST,
)
"""

_VERL = '''
_score = verl_reward(ENSEMBLE, aggregator=AGGREGATOR, device=DEVICE, digest=DIGEST)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """Return the same keys for every sample; the reward is `score`."""
    return _score(data_source, solution_str, ground_truth, extra_info, **kwargs)
'''


@dataclass(frozen=True)
class Template:
    """One loop's file.

    Attributes
    ----------
    title, use : str
        Its first line, and how the loop is told of it; ``{name}`` and ``{module}`` stand for the
        file.
    factory : str
        The library's function that it calls.
    body : str
        What follows the settings.
    """

    title: str
    use: str
    factory: str
    body: str


TEMPLATES = {
    "trl": Template(
        "The reward of a TRL run: GRPOTrainer(reward_funcs=reward), or on the command line.",
        "trl grpo --reward_funcs {module}.reward …, in this file's folder. Nothing is loaded\n"
        "before the first call. A column `reference` of the data set brings the probability of\n"
        "beating it.",
        "trl_reward",
        _TRL,
    ),
    "openrlhf": Template(
        "The reward of an OpenRLHF run.",
        "--reward.remote_url {name} (older: --remote_rm_url). OpenRLHF sends text in the policy's\n"
        "template; put the messages into `labels` as JSON: a list of messages, or\n"
        '{{"prompt": …, "reference": …}}.',
        "openrlhf_reward",
        _OPENRLHF,
    ),
    "verl": Template(
        "The reward of a veRL run.",
        "reward.custom_reward_function.path={name}\n"
        "reward.custom_reward_function.name=compute_score\n"
        "veRL sends the response alone; put the prompt, text or messages, into each row's\n"
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
    """Return the text of a loop's reward file.

    Parameters
    ----------
    loop : str
        A key of `TEMPLATES`.
    folder, digest : str
        The saved ensemble and its version.
    device : str
        Where its members run.
    aggregator : Aggregator, optional
        Of the reward; the ensemble's own where not given.
    file_name : str
        What the file will be called.

    Returns
    -------
    str
        Python.
    """
    template = TEMPLATES[loop]
    maker, call = "", "None"
    if aggregator is not None:
        maker = "from ensemble_rm.aggregation import make_aggregator\n"
        given: dict[str, object] = dict(aggregator.parameters)
        given |= {} if aggregator.nan == "raise" else {"nan": aggregator.nan}
        given |= {} if aggregator.min_members == 1 else {"min_members": aggregator.min_members}
        given |= {"weights": dict(aggregator.weights)} if aggregator.weights else {}
        words = "".join(f", {key}={value!r}" for key, value in given.items())
        call = f"make_aggregator({aggregator.name!r}{words})"
    head = _HEAD.format(
        title=template.title,
        use=template.use.format(name=file_name, module=file_name.removesuffix(".py")),
        imports=f"{maker}from ensemble_rm.rl import {template.factory}",
        folder=folder,
        digest=digest,
        device=device,
        aggregator=call,
    )
    return head + template.body
