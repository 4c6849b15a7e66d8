"""Storage of members on servers: one ``member.json`` without weights and without a token."""

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
    """A member on another server; a kind implements `describe`, `_of` and `_python`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what is saved and reported, without the token."""

    @classmethod
    @abstractmethod
    def _of(cls, stored: Mapping[str, Any]) -> Self:
        """Return the member from what `describe` returned."""

    @abstractmethod
    def _python(self) -> str | None:
        """Name the constructor's Python code, which cannot be saved; None without any."""

    def save(self, folder: Path) -> None:
        """Write ``member.json``: the address and the options, never the token.

        Raises
        ------
        StorageError
            If it uses Python code, such as a transport.
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
