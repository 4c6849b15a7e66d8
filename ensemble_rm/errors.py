"""Every error that the library raises, in one tree.

::

    EnsembleRMError
    ├── OptionError                   an option has a value that cannot be used (also a ValueError)
    ├── MissingExtraError             an optional package is not installed (also an ImportError)
    ├── DataError                     the user's data cannot be read or used
    │   ├── BadRowsError              some rows are bad; all of them are listed
    │   ├── EmptyDataError            nothing usable is left
    │   ├── SplitError                the data cannot be split as asked
    │   ├── JudgmentConflictError     a judgment contradicts one that is stored
    │   ├── UnknownJudgmentError      a correction names a judgment that is not stored
    │   └── TooFewSamplesError        too few samples or prompts for a statistic of them
    ├── ModelError                    a model cannot be loaded or used
    │   ├── BackboneError             the folder, hub id or digest is not what was expected
    │   ├── MissingHeadError          the reward head's weights are absent from the checkpoint
    │   ├── TemplateError             prompt and completion cannot be told apart in the template
    │   └── MergeError                the members' weights have no common mean
    ├── ScoringError                  scores cannot be computed or combined
    │   ├── NonFiniteScoreError       a NaN or an infinity where a finite score is needed
    │   ├── OneMemberError            disagreement was asked of a single member
    │   ├── NoFeaturesError           distances were asked of an ensemble without features
    │   └── BaselineError             a prompt's reference completion is missing
    ├── CalibrationError              a calibration cannot be fitted or used
    │   ├── NotCalibratedError        a probability was asked of an ensemble without calibration
    │   ├── AggregatorMismatchError   the calibration belongs to another aggregator
    │   ├── TooFewJudgmentsError      the judgments do not suffice
    │   ├── SeparableError            every judgment agrees with its margin: T would go to 0
    │   ├── NoPositiveTemperatureError   the margins point the wrong way: no finite positive T
    │   └── NoTiesError               a tie model needs judgments with ties, and others
    ├── TrainingError                 a training run cannot go on
    │   ├── NonFiniteLossError        the loss became NaN or infinite
    │   └── ResumeError               a checkpoint belongs to another recipe or data set
    ├── LoopError                     an RL loop and the ensemble do not fit together
    │   ├── PinnedVersionError        a saved ensemble changed under the run that uses it
    │   ├── RawTextError              a member cannot use text in the policy's template
    │   └── NoPenaltyError            a KL penalty was to be raised in a run that has none
    ├── RemoteError                   a server that a member or a judge lives on fails its part
    │   ├── RemoteUnavailableError    no answer before the deadline
    │   ├── RemoteRefusalError        the server refuses the request: its address, token or model
    │   ├── RemoteAnswerError         an answer cannot be read as what was asked
    │   └── RemoteActivationError     its scores are no raw logits
    ├── ServerError                   the reward server cannot serve, or refuses a request
    │   ├── BindError                 an address that others reach was asked for without a token
    │   └── RequestError              a request is refused; `status` is the answer's
    │       ├── BadRequestError       the body is no JSON
    │       ├── UnauthorisedError     no token, or a wrong one
    │       ├── SlowRequestError      the body did not arrive in time
    │       ├── TooLargeError         the body, a sample or their number is over a limit
    │       ├── MediaTypeError        the body is declared as other than JSON, or as compressed
    │       ├── UnprocessableError    the body is JSON of another shape, or cannot be scored
    │       ├── QueueFullError        as much waits as may; come again after `retry_after`
    │       └── NotReadyError         the ensemble is not loaded yet, or the server shuts down
    └── StorageError                  a saved directory or a cache cannot be read or written
        ├── CacheLimitError           a cache would outgrow its stated limit
        ├── LockedError               another process works on the folder
        ├── VersionError              a version is not there, or may not be moved or replaced
        └── SchemaVersionError        a store's schema is not the library's

This module knows nothing of what the errors are about; messages are written where they are raised,
and name the offending value and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class EnsembleRMError(Exception):
    """Base of every error that the library raises on purpose."""


class OptionError(EnsembleRMError, ValueError):
    """An option has a value that cannot be used."""


class MissingExtraError(EnsembleRMError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class DataError(EnsembleRMError):
    """The user's data cannot be read or used."""


@dataclass(frozen=True, slots=True)
class RowProblem:
    """One bad row: where it stands and what is wrong with it."""

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


class EmptyDataError(DataError):
    """Nothing usable is left of the data."""


class SplitError(DataError):
    """The data cannot be split as asked."""


class JudgmentConflictError(DataError):
    """A judgment contradicts one that is stored: its name or its correction is taken."""


class UnknownJudgmentError(DataError):
    """A correction names a judgment that is not stored."""


class TooFewSamplesError(DataError):
    """Too few samples or prompts for a statistic of them."""


class ModelError(EnsembleRMError):
    """A model cannot be loaded or used."""


class BackboneError(ModelError):
    """The folder, hub id or digest of a backbone is not what was expected."""


class MissingHeadError(ModelError):
    """The reward head's weights are absent from the checkpoint."""


class TemplateError(ModelError):
    """Prompt and completion cannot be told apart in the rendered template."""


class MergeError(ModelError):
    """The members' weights have no common mean: other kinds, starts, shapes or readings."""


class ScoringError(EnsembleRMError):
    """Scores cannot be computed or combined."""


class NonFiniteScoreError(ScoringError):
    """A NaN or an infinity stands where a finite score is needed."""


class OneMemberError(ScoringError):
    """Disagreement among members was asked of a single member."""


class NoFeaturesError(ScoringError):
    """Distances to the training inputs were asked of an ensemble that has no features of them."""


class BaselineError(ScoringError):
    """A prompt's reference completion is needed and missing."""


class CalibrationError(EnsembleRMError):
    """A calibration cannot be fitted or used."""


class NotCalibratedError(CalibrationError):
    """A probability was asked of an ensemble that has no calibration."""


class AggregatorMismatchError(CalibrationError):
    """The calibration was fitted with another aggregator."""


class TooFewJudgmentsError(CalibrationError):
    """The judgments do not suffice for a fit."""


class SeparableError(CalibrationError):
    """Every judgment agrees with its margin: the likelihood pulls T to 0."""


class NoPositiveTemperatureError(CalibrationError):
    """The margins point the wrong way or are all zero: no finite positive T fits."""


class NoTiesError(CalibrationError):
    """No judgment is a tie, or every one is: no tie model can be fitted."""


class TrainingError(EnsembleRMError):
    """A training run cannot go on."""


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite."""


class ResumeError(TrainingError):
    """A checkpoint belongs to another recipe or data set."""


class LoopError(EnsembleRMError):
    """An RL loop and the ensemble do not fit together."""


class PinnedVersionError(LoopError):
    """A saved ensemble changed under the run that uses it."""


class RawTextError(LoopError):
    """A member cannot use text that is in the policy's own template already."""


class NoPenaltyError(LoopError):
    """A KL penalty was to be raised in a run that has none."""


class RemoteError(EnsembleRMError):
    """A server that a member or a judge lives on fails its part."""


class RemoteUnavailableError(RemoteError):
    """A server gave no answer before the deadline, or before its connections were closed."""


class RemoteRefusalError(RemoteError):
    """A server refuses the request: its address, the token or the model is not right."""


class RemoteAnswerError(RemoteError):
    """A server's answer cannot be read as what was asked."""


class RemoteActivationError(RemoteError):
    """A server's scores are no raw logits: a sigmoid, a softmax, or one score for everything."""


class RemoteActivationWarning(UserWarning):
    """A server's scores look as if they were no raw logits."""


class RemoteFailureWarning(UserWarning):
    """Some samples have no score of a remote member, and NaN in its place."""


class ServerError(EnsembleRMError):
    """The reward server cannot serve, or refuses a request."""


class BindError(ServerError):
    """An address that other machines reach needs a token."""


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


class SlowRequestError(RequestError):
    """A request's body did not arrive in time."""

    status = 408


class TooLargeError(RequestError):
    """A request's body, a sample in it or their number exceeds a limit."""

    status = 413


class MediaTypeError(RequestError):
    """A request's body is declared as something other than JSON, or as compressed."""

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


class CacheLimitError(StorageError):
    """A cache would outgrow its stated limit."""


class LockedError(StorageError):
    """Another process works on the folder."""


class VersionError(StorageError):
    """A version is not there, or may not be moved or replaced."""


class SchemaVersionError(StorageError):
    """A store's schema is newer than the library, or older where nothing may be written."""
