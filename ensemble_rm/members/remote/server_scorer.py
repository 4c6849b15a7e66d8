"""Base class of members on other servers: storage without a token, warnings without texts."""

from __future__ import annotations

import json
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeGuard

from ensemble_rm.errors import RemoteAnswerError, RemoteFailureWarning, StorageError
from ensemble_rm.file_digests import FileCheck
from ensemble_rm.members.scorer import MemberScores, Scorer
from ensemble_rm.saved_json import as_object, at, read_json, reading

_FILE = "member.json"
_VARIABLE = "token_variable"  # in files of version 0.1


class ServerScorer(Scorer):
    """A member on another server; a kind implements `describe`, `_of` and `_python`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what is saved and reported, without the token."""

    @classmethod
    @abstractmethod
    def _of(cls, stored: Mapping[str, Any]) -> Self:
        """Return the member from the result of `describe`."""

    @abstractmethod
    def _python(self) -> str | None:
        """Name the constructor's Python code, which cannot be saved; None without any."""

    def save(self, folder: Path) -> None:
        """Write ``member.json``: the address and the options, never the token.

        Raises
        ------
        StorageError
            If the member uses Python code, such as a transport.
        """
        if (code := self._python()) is not None:
            raise StorageError(
                f"member {self.names[0]!r} has {code} that is Python code, which cannot be saved; "
                "add the member again after loading"
            )
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.describe(), indent=1, ensure_ascii=False)
        (folder / _FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        backbone: str | Path | None = None,  # noqa: ARG003 - no model in this process
        device: str | None = None,  # noqa: ARG003
        cache_dir: Path | None = None,  # noqa: ARG003
        check: FileCheck | None = None,  # noqa: ARG003
        trust_remote_code: Sequence[str] = (),  # noqa: ARG003
    ) -> Self:
        """Read what `save` wrote; the member has no token, see `with_token`.

        Raises
        ------
        StorageError
            If the folder is incomplete.
        """
        path = folder / _FILE
        try:
            with reading(path), at():
                return cls._of(_without_variable(as_object(read_json(path)), folder))
        except StorageError as error:
            raise StorageError(f"{folder} contains no saved {cls.kind} member: {error}") from error

    def _warn_of_failures(self, result: MemberScores, *, what: str, unreadable: str) -> None:
        """Warn of samples without a score: their number, and the kind of the first error.

        The warning quotes no server and no judge. They may quote a sample, and warnings end up in
        logs.

        Parameters
        ----------
        result : MemberScores
        what : str
            What the samples lack: a score or a rating.
        unreadable : str
            What the warning says of a response that arrived and is not a score.
        """
        if not result.errors:
            return
        first = failure_kind(next(iter(result.errors.values())), unreadable)
        warnings.warn(
            f"{len(result.errors)} of {len(result.scores)} samples have no {what} of "
            f"{self.names[0]!r} at {self.address}; the first: {first}",
            RemoteFailureWarning,
            stacklevel=5,  # the caller of `score`, or of the pending result
        )


def _without_variable(stored: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a saved member without the environment variable that older versions saved.

    A stranger's file could name any variable, and so send it to the address in the same file.
    """
    parts = {
        name: {k: v for k, v in part.items() if k != _VARIABLE}
        if isinstance(part, Mapping)
        else part
        for name, part in stored.items()
        if name != _VARIABLE
    }
    named = [stored.get(_VARIABLE), *(p.get(_VARIABLE) for p in stored.values() if _is_map(p))]
    if any(variable is not None for variable in named):
        warnings.warn(
            f"{folder / _FILE} names an environment variable for its token, which is ignored; bind "
            "the token to the server with --token HOST=ENV (tokens={HOST: token} in Python)",
            UserWarning,
            stacklevel=2,
        )
    return parts


def _is_map(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def failure_kind(error: Exception, unreadable: str) -> str:
    """Return what a log may say about an error: never its text, which may quote a sample.

    Parameters
    ----------
    error : Exception
    unreadable : str
        Returned for a response that arrived and is not a score.

    Returns
    -------
    str
        The status of a rejected request, `unreadable`, or the error's class.
    """
    if isinstance(error, RemoteAnswerError):
        return unreadable
    return str(getattr(error, "kind", type(error).__name__))
