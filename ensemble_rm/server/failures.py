"""The response to a failure: its HTTP status, and a body that never looks like a reward.

An error's message may quote a request. So only messages of `RequestError`, which never do, are
sent; for other errors, the class name and the first line of its docstring.
"""

from __future__ import annotations

from ensemble_rm.errors import (
    AggregatorMismatchError,
    BaselineError,
    DataError,
    EnsembleRMError,
    NotCalibratedError,
    RemoteError,
    RemoteNotAllowedError,
    RemoteUnavailableError,
    RequestError,
    TemplateError,
)

_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (BaselineError, 422),
    (DataError, 422),
    (TemplateError, 422),
    (NotCalibratedError, 409),
    (AggregatorMismatchError, 409),
    (RemoteNotAllowedError, 409),
    (
        RemoteUnavailableError,
        503,
    ),  # of members on other servers; a retry may succeed
    (RemoteError, 502),
)


class SampleError(Exception):
    """A sample of a request cannot be scored; the reason is its cause.

    Attributes
    ----------
    row : int
        Position of the sample in the request.
    cause : Exception
    """

    def __init__(self, row: int, cause: Exception) -> None:
        super().__init__(f"sample {row}: {type(cause).__name__}")
        self.row, self.cause, self.__cause__ = row, cause, cause


def describe_error(error: Exception) -> str:
    """Describe an error by its name and what the name means, without its message."""
    name = type(error).__name__
    # An unexpected error's docstring says nothing to a client; its name alone is passed on.
    if not isinstance(error, EnsembleRMError):
        return name
    meaning = (type(error).__doc__ or "").strip().splitlines()
    return f"{name}: {meaning[0]}" if meaning else name


def error_status(error: Exception) -> int:
    """Return the HTTP status of an error; 500 for an unexpected one."""
    if isinstance(error, SampleError):
        error = error.cause
    if isinstance(error, RequestError):
        return error.status
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def error_body(error: Exception) -> dict[str, object]:
    """Return the body of an error's response, in the format of OpenAI and vLLM."""
    cause = error.cause if isinstance(error, SampleError) else error
    # Messages of other errors may quote a sample's text, which must not leave the server.
    message = str(cause) if isinstance(cause, RequestError) else describe_error(cause)
    if isinstance(error, SampleError):
        message = f"sample {error.row}: {message}"
    return {"error": error_detail(message, type(cause).__name__, error_status(error))}


def error_detail(message: str, kind: str, status: int) -> dict[str, object]:
    """Return the inner object of an error's body."""
    return {"message": message, "type": kind, "param": None, "code": status}


def error_headers(error: Exception) -> dict[str, str]:
    """Return the headers of an error's response."""
    headers = {}
    if isinstance(error, RequestError):
        if error.retry_after is not None:
            headers["retry-after"] = str(error.retry_after)
        if error.status in (403, 408, 413):
            headers["connection"] = "close"  # the rest of the body is not read
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
    return headers


def locate_error(error: Exception) -> str:
    """Describe an error for the log: its name and where it was raised."""
    cause = error.cause if isinstance(error, SampleError) else error
    trace = cause.__traceback__
    # The innermost frame: where it was raised.
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    kind = "" if isinstance(cause, EnsembleRMError) else "unexpected "
    return f"{kind}{type(cause).__name__}{where}"
