"""Samples to score, preferences to learn from, and splits by prompt.

Knows nothing of files, tokenizers, templates or models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.errors import DataError, OptionError


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes
    ----------
    role : str
        The speaker: ``"user"``, ``"assistant"`` or ``"system"``.
    content : str
        The text.
    """

    role: str
    content: str


Prompt: TypeAlias = str | tuple[Message, ...]
"""What the policy was asked: plain text, or the turns that came before the completion."""


def as_prompt(value: object, *, field: str = "prompt") -> Prompt:
    """Read a prompt as files store it: text, or a list of mappings with role and content.

    Parameters
    ----------
    value : object
    field : str
        Name of the row's field, for error messages.

    Raises
    ------
    DataError
        If `value` is neither, or a turn lacks its role or content.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return tuple(_as_message(turn, i) for i, turn in enumerate(value))
    raise DataError(f"`{field}` must be text or a list of messages, not {type(value).__name__}")


def _as_message(turn: object, position: int) -> Message:
    if isinstance(turn, Message):
        return turn
    if not isinstance(turn, Mapping):
        raise DataError(f"message {position} must be an object, not {type(turn).__name__}")
    for key in ("role", "content"):
        # null content (a tool call) is refused here, since no template could render it.
        if not isinstance(turn.get(key), str):
            raise DataError(f"message {position} needs text under {key!r}, not {turn.get(key)!r}")
    return Message(turn["role"], turn["content"])


def check_unicode(prompt: Prompt, **texts: str | None) -> None:
    """Raise `DataError`, which names the field, if a text holds a lone surrogate.

    Parameters
    ----------
    prompt : str or tuple of Message
    **texts : str, optional
        Other texts of the row by the name of their field.
    """
    fields = [("prompt", prompt)] if isinstance(prompt, str) else []
    if not isinstance(prompt, str):
        fields = [("prompt", text) for turn in prompt for text in (turn.role, turn.content)]
    for name, text in (*fields, *texts.items()):
        try:
            # JSON can spell half of a character ("\ud800"), which tokenizers and files refuse.
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"`{name}` is not valid Unicode at character {error.start}; replace the lone "
                "surrogate"
            ) from None


def prompt_json(prompt: Prompt) -> str | list[dict[str, str]]:
    """Return the prompt as it is written to JSON."""
    return prompt if isinstance(prompt, str) else [asdict(turn) for turn in prompt]


def prompt_key(prompt: Prompt) -> str:
    """Digest of a prompt: equal for equal prompts, the cluster that splits keep together.

    A text and a conversation of that single user turn are the same prompt.
    """
    # A text prompt and a single user message of it are one prompt: splits keep them together.
    if isinstance(prompt, tuple) and len(prompt) == 1 and prompt[0].role == "user":
        prompt = prompt[0].content
    text = json.dumps(prompt_json(prompt), ensure_ascii=False, sort_keys=True)
    # 128 bits: enough against accidents, and half the length in every stored row.
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and a completion: what a scorer scores.

    Attributes
    ----------
    prompt : str or tuple of Message
        What was asked. A list of messages, also as mappings with role and content, becomes a tuple.
    completion : str
        One answer to it.
    reference : str, optional
        The prompt's reference completion, which a baseline subtracts.

    Raises
    ------
    DataError
        If the prompt is neither text nor messages.
    """

    prompt: Prompt
    completion: str
    reference: str | None = None

    def __post_init__(self) -> None:
        # A list of mappings, as files and trainers hold messages, has no hash to group samples by.
        if not isinstance(self.prompt, str):
            object.__setattr__(self, "prompt", as_prompt(self.prompt))


@dataclass(frozen=True, slots=True)
class Preference:
    """A human's verdict between two completions of one prompt.

    Attributes
    ----------
    prompt : str or tuple of Message
        What was asked.
    chosen, rejected : str
        The two completions. Where `tie` is set or `votes` are split, the order is a label only.
    margin : float
        Target margin of the training loss, in score units (TRL's ``margin`` column); 0 is none.
    weight : float
        How much the verdict counts, > 0.
    votes : tuple of float, optional
        Votes for chosen and for rejected; a voter's tie counts half on each side.
    tie : bool
        Neither was preferred.
    subset : str, optional
        The slice that the pair belongs to.
    id : str, optional
        The user's own name of the pair.
    reference : str, optional
        The prompt's reference completion, which a baseline subtracts.
    tie_votes : float
        How many of the votes were ties, which count half in each of `votes` already.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float = 0.0
    weight: float = 1.0
    votes: tuple[float, float] | None = None
    tie: bool = False
    subset: str | None = None
    id: str | None = None
    reference: str | None = None
    tie_votes: float = 0.0

    @property
    def target(self) -> float:
        """P(chosen is preferred) that the verdict states: 1, ½ for a tie, or the share of votes."""
        if self.votes is not None:
            # Votes win over the tie flag: they carry how many of them were ties.
            return self.votes[0] / (self.votes[0] + self.votes[1])
        return 0.5 if self.tie else 1.0

    @property
    def tie_share(self) -> float:
        """Share of the verdict that is a tie: 1, 0, or that of the votes."""
        if self.votes is not None:
            return self.tie_votes / (self.votes[0] + self.votes[1])
        return 1.0 if self.tie else 0.0

    def swap(self) -> Preference:
        """Return the same verdict with the sides exchanged; its target is 1 − target.

        A hard verdict becomes votes (0, 1), so that nothing is lost.
        """
        # Without votes the target is kept as votes that sum to 1.
        first, second = self.votes if self.votes is not None else (self.target, 1.0 - self.target)
        return replace(
            self,
            chosen=self.rejected,
            rejected=self.chosen,
            votes=(second, first),
            margin=-self.margin,
            tie_votes=self.tie_share * (first + second),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the row that `load_preferences` reads back to an equal preference."""
        row: dict[str, Any] = {
            "prompt": prompt_json(self.prompt),
            "chosen": self.chosen,
            "rejected": self.rejected,
        }
        optional = {
            "margin": (self.margin, 0.0),
            "weight": (self.weight, 1.0),
            "votes": (self.votes and list(self.votes), None),
            "tie": (self.tie, False),
            "subset": (self.subset, None),
            "id": (self.id, None),
            "reference": (self.reference, None),
            "tie_votes": (self.tie_votes, 0.0),
        }
        # Defaults are left out, so that files of plain pairs stay plain.
        row.update({k: value for k, (value, default) in optional.items() if value != default})
        return row


@dataclass(frozen=True)
class Preferences(Sequence[Preference]):
    """Preference pairs in the order of their source. Immutable.

    Parameters
    ----------
    pairs : tuple of Preference
    source : str
        Where they came from, for messages and provenance.
    """

    pairs: tuple[Preference, ...]
    source: str = "memory"

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", tuple(self.pairs))

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Preference]:
        return iter(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Preference: ...
    @overload
    def __getitem__(self, index: slice) -> Preferences: ...
    def __getitem__(self, index: int | slice) -> Preference | Preferences:
        if isinstance(index, slice):
            return Preferences(self.pairs[index], self.source)
        return self.pairs[index]

    def take(self, indices: Iterable[int]) -> Preferences:
        """Return the pairs at `indices`, in that order."""
        return Preferences(tuple(self.pairs[int(i)] for i in indices), self.source)

    @property
    def targets(self) -> NDArray[np.float64]:
        """P(chosen is preferred) of each pair, shape (n_pairs,)."""
        return np.array([pair.target for pair in self.pairs], dtype=np.float64)

    @property
    def tie_shares(self) -> NDArray[np.float64]:
        """Share of each pair's verdict that is a tie, shape (n_pairs,)."""
        return np.array([pair.tie_share for pair in self.pairs], dtype=np.float64)

    @property
    def weights(self) -> NDArray[np.float64]:
        """Weight of each pair, shape (n_pairs,)."""
        return np.array([pair.weight for pair in self.pairs], dtype=np.float64)

    @property
    def margins(self) -> NDArray[np.float64]:
        """Target margin of each pair, shape (n_pairs,)."""
        return np.array([pair.margin for pair in self.pairs], dtype=np.float64)

    @property
    def prompt_keys(self) -> frozenset[str]:
        """Digests of the prompts."""
        return frozenset(prompt_key(pair.prompt) for pair in self.pairs)

    @property
    def groups(self) -> NDArray[np.int64]:
        """Number of each pair's prompt in order of appearance, shape (n_pairs,)."""
        numbers: dict[str, int] = {}
        keys = (prompt_key(pair.prompt) for pair in self.pairs)
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)

    @property
    def subsets(self) -> tuple[str | None, ...]:
        """Subset of each pair."""
        return tuple(pair.subset for pair in self.pairs)

    @property
    def digest(self) -> str:
        """SHA-256 of the pairs in their order, for provenance."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            # sort_keys: the digest must not depend on the order in which fields were written.
            digest.update(json.dumps(pair.to_json(), sort_keys=True, ensure_ascii=False).encode())
            digest.update(b"\n")
        return digest.hexdigest()

    def samples(self) -> list[Sample]:
        """Return 2·n_pairs samples: every chosen one, then every rejected one."""
        return [Sample(p.prompt, p.chosen, p.reference) for p in self.pairs] + [
            Sample(p.prompt, p.rejected, p.reference) for p in self.pairs
        ]

    def sample_groups(self) -> NDArray[np.int64]:
        """Prompt number of each of `samples()`, shape (2·n_pairs,)."""
        return np.concatenate([self.groups, self.groups])

    def shuffled_sides(self, *, seed: int) -> Preferences:
        """Return the pairs with their sides swapped at random, with probability ½ each.

        Pairs stored chosen-first carry their label in their order; a model that sees the order
        can read it.
        """
        coins = np.random.default_rng(seed).random(len(self)) < 0.5
        pairs = (p.swap() if coin else p for p, coin in zip(self.pairs, coins, strict=True))
        return Preferences(tuple(pairs), self.source)

    def split(self, *fractions: float, seed: int) -> tuple[Preferences, ...]:
        """Split by prompt into parts of about the given fractions.

        Pairs of one prompt stay together. Prompts are dealt in a seeded random order to the part
        that lacks most; within a part the order of the source is kept.

        Parameters
        ----------
        *fractions : float
            Positive, with a sum of at most 1; the rest of the pairs is left out. The usual four
            parts are train, validation, calibration, test.
        seed : int
            The same seed deals the same prompts.

        Raises
        ------
        DataError
            If a part would be empty.
        OptionError
            If the fractions are not positive or sum to more than 1.
        """
        # 1e-9: .7 + .2 + .1 is above 1 in floating point.
        if not fractions or min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
            raise OptionError(f"split fractions {fractions} must be positive and sum to at most 1")
        groups = self.groups
        sizes = np.bincount(groups, minlength=1)
        rest = max(0.0, 1.0 - sum(fractions))
        # The last part collects what no fraction asks for, and is dropped.
        wanted = np.array([*fractions, rest]) * len(self)
        dealt = np.zeros(len(wanted))
        part_of = np.empty(len(sizes), dtype=np.int64)
        # Whole prompts: pairs of one prompt in two parts would leak.
        for group in np.random.default_rng(seed).permutation(len(sizes)):
            # The part that lacks the largest share of what it should hold.
            # Relative lack: an absolute one would fill the large part first and starve the small
            # one.
            lack = np.where(wanted > 0.5, (wanted - dealt) / np.maximum(wanted, 1.0), -np.inf)
            part_of[group] = int(np.argmax(lack))
            dealt[part_of[group]] += sizes[group]
        parts = part_of[groups]
        split = tuple(self.take(np.flatnonzero(parts == i)) for i in range(len(fractions)))
        for i, part in enumerate(split):
            if not part:
                raise DataError(
                    f"part {i} of the split {fractions} is empty: {len(self)} pairs over "
                    f"{len(sizes)} prompts are too few; give more prompts or a larger fraction"
                )
        return split

    def folds(self, k: int, *, seed: int) -> list[NDArray[np.int64]]:
        """Deal the prompts into `k` folds; return the pair indices of each fold."""
        if not 2 <= k <= len(self):
            raise OptionError(f"folds must lie between 2 and the number of pairs, not {k}")
        groups = self.groups
        sizes = np.bincount(groups)
        dealt, fold_of = np.zeros(k), np.empty(len(sizes), dtype=np.int64)
        # The smallest fold takes the next prompt, which keeps the folds level.
        for group in np.random.default_rng(seed).permutation(len(sizes)):
            fold_of[group] = int(np.argmin(dealt))
            dealt[fold_of[group]] += sizes[group]
        return [np.flatnonzero(fold_of[groups] == i) for i in range(k)]


def require_pairs(pairs: Preferences, purpose: str) -> None:
    """Raise `DataError` if there is no pair for `purpose`."""
    if len(pairs) == 0:
        raise DataError(f"{purpose} needs at least one preference pair; {pairs.source} has 0")


def grouped_samples(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    references: Sequence[str | None] | None = None,
) -> list[Sample]:
    """Return the samples of each prompt's completions, prompt by prompt.

    Raises
    ------
    OptionError
        If the lists differ in length.
    """
    if references is None:
        references = [None] * len(prompts)
    if not len(prompts) == len(completions) == len(references):
        raise OptionError(
            f"{len(prompts)} prompts, {len(completions)} lists of completions and "
            f"{len(references)} references"
        )
    groups = zip(map(as_prompt, prompts), completions, references, strict=True)
    return [Sample(prompt, text, ref) for prompt, texts, ref in groups for text in texts]
