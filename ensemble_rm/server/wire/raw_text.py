"""Text in the policy's chat template → a sample, without guessing.

Most wire formats carry one string: prompt and completion rendered by the policy's chat template.
Members have templates of their own, so the string must be split into turns again. The operator
states how the template writes a turn, and text in another format is refused. Members that read the
policy's template can be declared; they score the text unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ensemble_rm.data.samples import Message, Sample
from ensemble_rm.errors import DataError, OptionError, RawTextError, UnprocessableError
from ensemble_rm.rl.chat import read_query

KNOWN = {
    "chatml": "<|im_start|>{role}\n{content}<|im_end|>",
    "llama3": "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
    "gemma": "<start_of_turn>{role}\n{content}<end_of_turn>",
}
"""How common chat templates write a turn."""
EXAMPLE_PROMPT = "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
EXAMPLE = f"{EXAMPLE_PROMPT}Fine, thank you.<|im_end|>"
"""Text in a policy's chat template, for the descriptions of the wire formats."""
_SPECIAL = re.compile(r"(?:<\|[^|<>]{1,40}\|>|</s>|<eos>|<end_of_turn>)\s*$")
_ROLES = {"model": "assistant", "human": "user"}


class TurnTemplate:
    r"""How a policy's chat template writes one turn, to split text into turns.

    Parameters
    ----------
    turn : str
        A name in `KNOWN`, or text with ``{role}`` and ``{content}``, such as
        ``<|im_start|>{role}\n{content}<|im_end|>``. It must begin with text that occurs in no
        content.

    Raises
    ------
    OptionError
        If it does not have these two, in this order, each between other text.
    """

    def __init__(self, turn: str) -> None:
        text = KNOWN.get(turn, turn)
        parts = re.split(r"\{role\}|\{content\}", text)
        ordered = text.find("{role}") < text.find("{content}")
        if (
            len(parts) != 3
            or not ordered
            or not all(part.strip() for part in (parts[0], parts[2]))
            or not parts[1]
        ):
            raise OptionError(
                f"a turn's template must be one of {', '.join(KNOWN)}, or text with {{role}} and "
                f"then {{content}}, each between other text; not {turn!r}"
            )
        self.text = text
        self._open, self._middle, self._close = parts

    @property
    def end(self) -> str:
        """The text that ends a turn."""
        return self._close.strip()

    def read(self, text: str) -> tuple[tuple[Message, ...], str]:
        """Return the turns before the last one, and the content of the last, by the assistant.

        Special tokens before the first turn are skipped; the last turn may have no end.

        Raises
        ------
        UnprocessableError
            If the text does not consist of such turns, or does not end in one by the assistant.
        """
        turns = [self._turn(piece) for piece in self._pieces(text)]
        if len(turns) < 2 or turns[-1].role != "assistant":
            raise UnprocessableError(
                "a text in the policy's template must end with a turn by the assistant after others"
            )
        return tuple(turns[:-1]), turns[-1].content

    def _pieces(self, text: str) -> list[str]:
        before, *pieces = text.split(self._open)
        # A template may begin with a token of its own, such as <|begin_of_text|>.
        if not pieces or re.fullmatch(r"\s*(?:<[^<>\s]{1,40}>\s*)?", before) is None:
            raise UnprocessableError(
                "a text is not in the policy template that this server was started with"
            )
        for piece in pieces[:-1]:
            if not piece.rstrip().endswith(self.end):
                raise UnprocessableError(
                    "a turn in a text does not end as the policy template does"
                )
        return pieces

    def _turn(self, piece: str) -> Message:
        role, middle, content = piece.partition(self._middle)
        if not middle or re.fullmatch(r"\w{1,32}", role.strip()) is None:
            raise UnprocessableError(
                "a turn in a text does not have its role where the policy template has it"
            )
        content, _, after = content.partition(self.end)
        if re.fullmatch(r"\s*(?:<[^<>\s]{1,40}>\s*)*", after) is None:
            raise UnprocessableError("a text has something between its turns")
        role = role.strip()
        return Message(_ROLES.get(role, role), content.strip())


@dataclass(frozen=True, kw_only=True)
class RawText:
    """How text in the policy's chat template is read.

    Attributes
    ----------
    policy_template : str, optional
        How the policy's template writes a turn; see `TurnTemplate`. Without it, text is not split
        into turns.
    stop : tuple of str
        Tokens that end a turn, removed from the end of a completion whose prompt is sent
        separately.
    raw_text_members : tuple of str
        Members that read text in the policy's template as it is.

    Raises
    ------
    OptionError
        If `policy_template` is not a turn's template.
    """

    policy_template: str | None = field(
        default=None,
        metadata={
            "help": "how the policy's template writes a turn: chatml, llama3, gemma, or text with "
            "{role} and {content}"
        },
    )
    stop: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "token that ends a turn, removed from the end of a completion, such as "
            "'<|im_end|>'; may be repeated"
        },
    )
    raw_text_members: tuple[str, ...] = field(
        default=(),
        metadata={"help": "members that read text in the policy's template as it is"},
    )

    def __post_init__(self) -> None:
        _ = self.template  # a wrong template is an error here, not at the first request

    @cached_property
    def template(self) -> TurnTemplate | None:
        """The policy's turn template."""
        return None if self.policy_template is None else TurnTemplate(self.policy_template)

    @property
    def stops(self) -> tuple[str, ...]:
        """Tokens that end a turn: `stop`, and the end of the policy's template."""
        return self.stop + (() if self.template is None else (self.template.end,))

    def check(self, names: Sequence[str]) -> None:
        """Raise `OptionError` where `raw_text_members` names an unknown member."""
        if unknown := sorted(set(self.raw_text_members) - set(names)):
            raise OptionError(
                f"raw_text_members: no member {unknown[0]!r}; the members are {', '.join(names)}"
            )

    def refusing(self, names: Sequence[str]) -> list[str]:
        """Return the members that cannot read the policy's template."""
        return [name for name in names if name not in self.raw_text_members]

    def whole(self, text: str, names: Sequence[str]) -> Sample:
        """Return the sample of one text with prompt and completion.

        Raises
        ------
        UnprocessableError
            If it cannot be split into turns and a member does not read it as it is.
        """
        if not text.strip():
            raise UnprocessableError("a text is empty")
        refusing = self.refusing(names)
        if self.template is not None:
            try:
                return Sample(*self.template.read(text))
            except UnprocessableError:
                if refusing:
                    raise
        if refusing:
            raise UnprocessableError(
                f"RawTextError: members {', '.join(refusing)} cannot read text in the policy's "
                "template; start the server with --policy-template or --raw-text-members, or send "
                "messages"
            )
        return Sample("", text)

    def split(self, query: str, prompt: str | None, label: object, names: Sequence[str]) -> Sample:
        """Return the sample of a text whose prompt, or messages, may be sent separately.

        Raises
        ------
        UnprocessableError
            If there is neither and the text cannot be split, or they do not fit the text.
        """
        if prompt is None:
            return self.whole(query, names)
        refusing = self.refusing(names)
        if not self.stops and _SPECIAL.search(query):
            raise UnprocessableError(
                "a query ends with a special token, which no member should read; start the server "
                "with --stop or --policy-template"
            )
        try:
            return read_query(query, prompt, label, stop=self.stops, refusing=refusing)
        except RawTextError:
            return self.whole(query, names)
        except DataError:  # the original message quotes the query, which responses must not
            raise UnprocessableError(
                "a query does not begin with its prompt, or its label's messages cannot be read"
            ) from None
