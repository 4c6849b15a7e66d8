"""What one version says of itself, and which of them is current.

Knows JSON; knows nothing of files, fits or gates.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, TypeAlias

from ensemble_rm.calibration.calibration import Calibration
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.errors import StorageError

FORMAT = 1
Kind: TypeAlias = Literal["ensemble", "calibration"]
LIBRARIES = ("ensemble-rm", "numpy", "scipy", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Version:
    """A published ensemble or calibration.

    Attributes
    ----------
    number : int
        1, 2, …: later ones have higher numbers, whatever the clock said.
    kind : str
        ``"ensemble"``: members, normaliser, aggregator and perhaps a calibration;
        ``"calibration"``: one for an ensemble that has a number of its own.
    ensemble : int
        The version that holds the members: the number itself, or that of the ensemble.
    parent : int, optional
        What was current when it was published.
    created_at : str
        By the publisher's clock, ISO 8601 in UTC.
    members : str
        Digest of the members and the normaliser: equal where normalised scores are.
    calibration : dict, optional
        Aggregator, temperature, interval, slices and digest of the judgments, as
        `Calibration.to_json` writes them.
    run : str
        Name of the run that published it, which the audit log holds, too.
    provenance : dict
        Judgments (digest, dates, numbers), options, the gate's verdict, metrics before and after.
    libraries : dict
        Versions of what computed it.
    """

    number: int
    kind: Kind
    ensemble: int
    parent: int | None
    created_at: str
    members: str
    calibration: Mapping[str, Any] | None = None
    run: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)

    def read_calibration(self, *, evidence: ScoredPairs | None = None) -> Calibration | None:
        """Return the calibration; None where there is none."""
        if self.calibration is None:
            return None
        return Calibration.from_json(self.calibration, evidence=evidence)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads."""
        return {"format": FORMAT} | asdict(self)

    @classmethod
    def from_json(cls, said: Any) -> Version:
        """Read what `to_json` wrote.

        Raises
        ------
        StorageError
            If it is of another format, or damaged.
        """
        try:
            fields = dict(said)
            found = fields.pop("format")
            if found != FORMAT:
                raise StorageError(f"a version of format {found!r}; this library reads {FORMAT}")
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"a version's description is damaged: {error!r}") from error


@dataclass(frozen=True, slots=True)
class Pointer:
    """Which version is current.

    Attributes
    ----------
    version : int
        The current one.
    newest : int
        The highest number that was ever current; what lies above was never published.
    pinned : bool
        Whether nothing may move it but `unpin`, `pin` and no job.
    """

    version: int
    newest: int
    pinned: bool = False

    @classmethod
    def from_json(cls, said: Any) -> Pointer:
        """Read it; what is damaged raises `StorageError`."""
        try:
            return cls(int(said["version"]), int(said["newest"]), bool(said["pinned"]))
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"the pointer to what is current is damaged: {error!r}") from None


def library_versions() -> dict[str, str]:
    """Say which versions of the libraries, and of Python, are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
