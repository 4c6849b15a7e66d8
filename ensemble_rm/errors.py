"""Every error that the library raises on purpose.

Catch a family, such as `CalibrationError`, or one of its subclasses. A subclass exists only where
callers handle it differently from its family: another remedy, another HTTP status, another row of a
report. Everything else is in the message.

To add one: subclass its family, state in one line what is wrong (the server sends this line instead
of the message), and raise it with a message that names the offending value and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class EnsembleRMError(Exception):
    """Base of every error that the library raises on purpose."""


class OptionError(EnsembleRMError, ValueError):
    """An option has a value that cannot be used."""


class RemoteNotAllowedError(OptionError):
    """A saved ensemble has a member on a server that the caller has not allowed."""


class MissingExtraError(EnsembleRMError, ImportError):
    """An optional package is not installed; the message names the extra to install."""


class DataError(EnsembleRMError):
    """The user's data cannot be read or used."""


@dataclass(frozen=True, slots=True)
class RowProblem:
    """One bad row: file, line number and what is wrong with it."""

    source: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason}"


class BadRowsError(DataError):
    """Some rows are bad.

    Attributes
    ----------
    problems : tuple of RowProblem
        Every bad row, in the order of the file.
    """

    def __init__(self, message: str, problems: Sequence[RowProblem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class JudgmentConflictError(DataError):
    """A judgment has the id of a stored one, or corrects one that already has a correction."""


class ModelError(EnsembleRMError):
    """A model cannot be loaded or used."""


class CustomCodeError(ModelError):
    """A model needs custom code, which the caller has not allowed for it."""


class TemplateError(ModelError):
    """The chat template refuses a sample, or hides where its completion begins."""


class ScoringError(EnsembleRMError):
    """Scores cannot be computed or combined."""


class NonFiniteScoreError(ScoringError):
    """A score is NaN or infinite where a finite one is needed."""


class OneMemberError(ScoringError):
    """Disagreement needs at least two members, and the ensemble has one."""


class BaselineError(ScoringError):
    """A prompt has no reference completion, which the normaliser needs."""


class CalibrationError(EnsembleRMError):
    """A calibration cannot be fitted or used."""


class NotCalibratedError(CalibrationError):
    """A probability needs a calibration, and the ensemble has none."""


class AggregatorMismatchError(CalibrationError):
    """The calibration was fitted with another aggregator."""


class TooFewJudgmentsError(CalibrationError):
    """There are too few judgments for a fit."""


class SeparableError(CalibrationError):
    """Every judgment agrees with its margin, so the likelihood pulls T to 0."""


class NoPositiveTemperatureError(CalibrationError):
    """The margins contradict the judgments or are all 0: no finite positive T fits."""


class ClockError(CalibrationError):
    """The clock is far ahead of the last run and of the newest judgment."""


class TrainingError(EnsembleRMError):
    """A training run cannot continue."""


class LoopError(EnsembleRMError):
    """An RL loop and the ensemble do not fit together."""


class PinnedVersionError(LoopError):
    """A saved ensemble changed during the run that uses it."""


class RawTextError(LoopError):
    """A member cannot use text that is rendered in the policy's template."""


class RemoteError(EnsembleRMError):
    """The server of a remote member or judge failed."""


class RemoteUnavailableError(RemoteError):
    """A server did not respond before the deadline, or its connections were closed."""


class RemoteRefusalError(RemoteError):
    """A server refused the request: its address, the token or the model is wrong."""


class RemoteAnswerError(RemoteError):
    """A server's response does not have the expected form."""


class RemoteActivationError(RemoteError):
    """A server's scores are not raw logits: a sigmoid, a softmax, or one score for all samples."""


class RemoteActivationWarning(UserWarning):
    """A server's scores do not look like raw logits."""


class RemoteFailureWarning(UserWarning):
    """A remote member did not score some samples; their score is NaN."""


class ServerError(EnsembleRMError):
    """The reward server cannot serve, or refuses a request."""


class RequestError(ServerError):
    """A request is refused; the message quotes none of its text.

    Attributes
    ----------
    status : int
        HTTP status of the response.
    retry_after : int, optional
        Seconds after which to retry.
    """

    status = 400
    retry_after: int | None = None


class BadRequestError(RequestError):
    """A request's body is not valid JSON."""


class UnauthorisedError(RequestError):
    """A request has no token, or a wrong one."""

    status = 401


class ForbiddenError(RequestError):
    """A server without a token is addressed by another name, or from a web page of another site."""

    status = 403


class SlowRequestError(RequestError):
    """A request's body did not arrive in time."""

    status = 408


class TooLargeError(RequestError):
    """A request's body, a sample in it or their number exceeds a limit."""

    status = 413


class MediaTypeError(RequestError):
    """A request's body is declared as compressed, or as something other than JSON."""

    status = 415


class UnprocessableError(RequestError):
    """A request's body has another shape, or samples that cannot be scored."""

    status = 422


class QueueFullError(RequestError):
    """The queue of samples is full."""

    status = 429

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotReadyError(RequestError):
    """The ensemble is not loaded yet, or the server is shutting down."""

    status = 503
    retry_after = 1


class StorageError(EnsembleRMError):
    """A saved directory or a cache cannot be read or written."""


class SchemaError(StorageError):
    """A saved JSON file has a value that does not belong there.

    Attributes
    ----------
    problem : str
        What is wrong with the value.
    field : str
        Where it is in the file, such as ``calibration.fit.temperature``; empty for all of it.
    file : Path, optional
        The file, where it is known.
    """

    def __init__(
        self, problem: str, *, field: str = "", file: Path | None = None, remedy: str = ""
    ) -> None:
        place = ": ".join(str(part) for part in (file, field) if part)
        message = f"{place}: {problem}" if place else problem
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self.problem, self.field, self.file = problem, field, file


class DigestMismatchError(StorageError, ModelError):
    """A file is not the one that was saved: its digest differs."""


class UnverifiedWarning(UserWarning):
    """A saved ensemble has no digests of its files, so that changes to them go unnoticed."""


class StoreIntegrityError(StorageError):
    """A judgment store lost or changed judgments, or is not the store of the last run."""


class LockedError(StorageError):
    """Another process is working on the folder."""


class VersionError(StorageError):
    """A version does not exist, or may not be moved or replaced."""


class UnknownVersionsError(VersionError):
    """Folders of versions exist that ``current.json`` does not know."""
