"""Custom code of models: it runs only where the caller names the model and the code's digest.

A checkpoint may name Python files (``auto_map``) that transformers would import. Loading one is
running a stranger's program, so that the default is never to do it, and never to ask for it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

from ensemble_rm.errors import CustomCodeError, OptionError

_DIGEST = re.compile(r"[0-9a-f]{64}")
_ANSWERING = RLock()  # the function that is replaced belongs to the whole process


def code_references(folder: Path) -> tuple[str, ...]:
    """Return the classes that a model's JSON files take from custom code, sorted."""
    references: set[str] = set()
    for file in folder.glob("*.json"):
        try:
            content = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue  # not a file of transformers, or one that it will refuse by itself
        if isinstance(content, Mapping) and isinstance(content.get("auto_map"), Mapping):
            for value in content["auto_map"].values():
                # A tokenizer's entry is a pair: the slow class and the fast one, or null.
                values = value if isinstance(value, list) else [value]
                references.update(str(item) for item in values if item is not None)
    return tuple(sorted(references))


def code_digest(folder: Path) -> str:
    """Return the SHA-256 over a model's Python files and over what its JSON files take from them.

    Parameters
    ----------
    folder : Path
        Of the model; files in folders below it count, since code may import them.
    """
    digest = hashlib.sha256()
    for reference in code_references(folder):
        digest.update(f"{reference}\n".encode())
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder).as_posix()}\n".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def allowed_code(name: str | Path, folder: Path, trust_remote_code: Sequence[str]) -> str | None:
    """Return the digest of a model's custom code if the caller allows it; None otherwise.

    Parameters
    ----------
    name : str or Path
        The model, as it was named: Hub id or folder.
    folder : Path
        Where it is.
    trust_remote_code : sequence of str
        Models whose code may run, each as ``MODEL@DIGEST``, the digest as `code_digest` returns it.

    Raises
    ------
    OptionError
        If an entry is not ``MODEL@DIGEST``.
    CustomCodeError
        If the model is named with another digest, or its code is not all in its folder.
    """
    entries = [_split(entry) for entry in trusted_models(trust_remote_code)]
    wanted = [digest for model, digest in entries if _same(model, name)]
    references = code_references(folder)
    if not wanted or not references:
        return None
    # Such code is read from another repository, which the digest does not cover.
    elsewhere = [reference for reference in references if "--" in reference]
    if elsewhere or (folder / "adapter_config.json").exists():
        what = elsewhere[0] if elsewhere else "the base model of adapter_config.json"
        raise CustomCodeError(
            f"{name} takes {what} from another repository, which no digest of this folder covers; "
            "copy the code into the model's folder, and remove the reference"
        )
    digest = code_digest(folder)
    if digest not in wanted:
        raise CustomCodeError(
            f"the custom code of {name} has digest {digest}, not {wanted[0]}; read the Python "
            f"files in {folder} again before you allow them"
        )
    return digest


@contextmanager
def named_custom_code(folder: Path, code: str | None = None) -> Iterator[None]:
    """Raise `CustomCodeError` where transformers refuses a model's custom code.

    A model that transformers also implements loads without its custom code, so that only
    transformers knows whether the code is needed.

    Parameters
    ----------
    folder : Path
    code : str, optional
        Digest of the code that the caller allows; None where none may run.
    """
    try:
        with _never_asks(allowed=code is not None):
            yield
    except ValueError as error:
        if "trust_remote_code" not in str(error) or not (references := code_references(folder)):
            raise
        raise CustomCodeError(
            f"{folder} needs custom code ({', '.join(references)}), which would run as a program "
            "on this machine; read its Python files, then allow it for this model with "
            f"--trust-remote-code MODEL@{code_digest(folder)} (trust_remote_code=[…] in Python)"
        ) from error


@contextmanager
def _never_asks(*, allowed: bool) -> Iterator[None]:
    """Answer for the caller where transformers would ask on standard input.

    Its generic classifiers build their trunk by ``AutoModel.from_config`` without passing on
    ``trust_remote_code``.
    """
    from transformers.models.auto import auto_factory

    factory: Any = auto_factory
    with _ANSWERING:
        resolve = factory.resolve_trust_remote_code

        def answered(trust: bool | None, *args: Any, **options: Any) -> Any:
            return resolve(allowed if trust is None else trust, *args, **options)

        factory.resolve_trust_remote_code = answered
        try:
            yield
        finally:
            factory.resolve_trust_remote_code = resolve


def trusted_models(trust_remote_code: Sequence[str]) -> tuple[str, ...]:
    """Return the entries, of which a single one may be given as text.

    Raises
    ------
    OptionError
        If True or False is given, as to transformers, which trusts every model.
    """
    given: object = trust_remote_code
    if isinstance(given, bool):
        raise OptionError(
            f"trust_remote_code names models, each as MODEL@DIGEST; {given} would trust them all"
        )
    return (given,) if isinstance(given, str) else tuple(trust_remote_code)


def _split(entry: str) -> tuple[str, str]:
    model, _, digest = entry.rpartition("@")
    if not model or not _DIGEST.fullmatch(digest):
        raise OptionError(
            f"trust_remote_code needs MODEL@DIGEST with 64 hexadecimal digits, not {entry!r}; load "
            "the model without it, and the error states the digest of its code"
        )
    return model, digest


def _same(model: str, name: str | Path) -> bool:
    if model == str(name):
        return True
    folder, other = Path(model).expanduser(), Path(name).expanduser()
    return folder.is_dir() and other.is_dir() and folder.resolve() == other.resolve()
