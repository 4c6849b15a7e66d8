"""Storage of members that live elsewhere: one ``member.json``, no weights, and never a token."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from ensemble_rm.errors import StorageError
from ensemble_rm.members.scorer import Scorer

_FILE = "member.json"


class StoredElsewhere(Scorer):
    """A member that other servers run; a kind adds `describe`, `_of` and `_python`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what is saved, and what provenance and reports say of it: no token."""

    @classmethod
    @abstractmethod
    def _of(cls, said: Mapping[str, Any]) -> Self:
        """Make the member that `describe` described."""

    @abstractmethod
    def _python(self) -> str | None:
        """Name what it was made with that is Python code, which no file holds; None without."""

    def save(self, folder: Path) -> None:
        """Write ``member.json``: the address and the options, never the token.

        Raises
        ------
        StorageError
            If it was made with Python code, such as a transport.
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
        backbone: str | Path | None = None,  # noqa: ARG003 - members over a model have one
        device: str | None = None,  # noqa: ARG003
        cache_dir: Path | None = None,  # noqa: ARG003
    ) -> Self:
        """Read what `save` wrote; it has no token, see `with_token`.

        Raises
        ------
        StorageError
            If the folder is incomplete.
        """
        try:
            return cls._of(json.loads((folder / _FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{folder} holds no saved {cls.kind} member: {error!r}") from error
