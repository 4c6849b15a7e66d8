"""Base class of members with a model in this process.

The model is loaded at the first score and used by one thread at a time.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import wraps
from pathlib import Path
from threading import RLock
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import DigestMismatchError, ModelError, StorageError
from ensemble_rm.file_digests import FileCheck, FileDigest, digests_json
from ensemble_rm.members.backbone import checkpoint as bb
from ensemble_rm.members.backbone.cache_folder import DEFAULT_CACHE
from ensemble_rm.members.backbone.options import TrunkOptions
from ensemble_rm.members.scorer import MemberScores, Scorer
from ensemble_rm.progress import Progress, silent
from ensemble_rm.saved_json import as_object, at, get, read_json, reading

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="ModelScorer")


def in_turn(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Let one thread at a time run a scorer's method: models and tokenizers are not thread-safe."""

    @wraps(method)
    def alone(self: S, /, *args: P.args, **options: P.kwargs) -> T:
        with self._lock:
            return method(self, *args, **options)

    return alone


class ModelScorer(Scorer):
    """A scorer that loads a model at its first score and is saved as JSON and safetensors.

    A subclass implements `score_detailed` and the storage of its other constructor arguments.

    Parameters
    ----------
    backbone : Backbone
    options : TrunkOptions
    names : sequence of str
        One per column.
    """

    options: TrunkOptions
    has_model = True

    def __init__(self, backbone: bb.Backbone, options: TrunkOptions, names: Sequence[str]) -> None:
        self.backbone, self.options, self.names = backbone, options, tuple(names)
        self._lock = RLock()

    @property
    def trained_from(self) -> str | None:
        """Digest of the pretrained weights that the members were trained on."""
        return self.backbone.digest

    def score(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """Return (n_samples, n_members) raw scores, in the order of the samples."""
        return self.score_detailed(samples).scores

    @abstractmethod
    def score_detailed(
        self, samples: Sequence[Sample], *, features: bool = False, progress: Progress = silent
    ) -> MemberScores:
        """Return the scores, which samples were truncated and, if requested, the features."""

    @in_turn
    def unload(self) -> None:
        """Free the model until the next score."""
        self._drop_model()
        bb.empty_cache(bb.pick_device(self.options.device))

    @abstractmethod
    def _drop_model(self) -> None:
        """Delete every reference to the model."""

    def unloaded(self) -> Self:
        """Return the same members with no model in memory yet."""
        return self.with_options(self.options)

    def with_options(self, options: TrunkOptions) -> Self:
        """Return the same members with other options; the model is loaded at the first score."""
        return type(self)(self.backbone, options, **self._parts())

    @abstractmethod
    def _parts(self) -> dict[str, Any]:
        """Return the constructor's keyword arguments after `backbone` and `options`."""

    def describe(self) -> dict[str, Any]:
        """Return what provenance and reports record, as JSON values."""
        return {
            "kind": self.kind,
            "backbone": self.backbone.name,
            "digest": self.backbone.digest,
            "options": asdict(self.options),
        } | self._settings()

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Return what a kind adds to `describe`."""

    def save(self, folder: Path) -> None:
        """Write ``member.json`` and the members' own weights."""
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            "files": digests_json(self.backbone.files),
            "revision": self.backbone.revision,
        }
        saved = self.describe() | files | self._write(folder)
        (folder / "member.json").write_text(json.dumps(saved, indent=1) + "\n")

    @abstractmethod
    def _write(self, folder: Path) -> dict[str, Any]:
        """Write the weights; return the fields in which ``member.json`` differs from `describe`."""

    @classmethod
    def average(cls, scorers: Sequence[Self], folder: Path | None) -> Self:  # noqa: ARG003
        """Return one member whose weights are the mean of these members' weights.

        Parameters
        ----------
        scorers : sequence of ModelScorer
            All of this class.
        folder : Path, optional
            New folder to write to, for a kind whose weights are a whole model.

        Raises
        ------
        ModelError
            If weights of this kind, or of these members, cannot be averaged.
        """
        raise ModelError(
            f"weights of {cls.__name__} cannot be averaged; only those of branches and of full "
            "members can"
        )

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        backbone: str | Path | None = None,
        device: str | None = None,
        cache_dir: Path | None = DEFAULT_CACHE,
        check: FileCheck | None = None,
        trust_remote_code: Sequence[str] = (),
    ) -> Self:
        """Read what `save` wrote.

        Parameters
        ----------
        folder : Path
        backbone : str or Path, optional
            Where the backbone is now, if it has moved since training. A whole model as a
            member has no backbone.
        device : str, optional
            Device of the model (default: the best available).
        cache_dir : Path, optional
            Folder for converted GGUF weights.
        check : FileCheck, optional
            How the backbone's files are compared with their digests (default: all are hashed).
        trust_remote_code : sequence of str
            Models whose custom code may run, each as ``MODEL@DIGEST``.

        Raises
        ------
        DigestMismatchError
            If the backbone's files differ from those at saving.
        MissingExtraError
            If a package that the kind needs is not installed.
        StorageError
            If the folder is incomplete.
        """
        path = folder / "member.json"
        try:
            with reading(path):
                saved = as_object(read_json(path))
                options = get(saved, "options", TrunkOptions)
                digest = get(saved, "digest", str)
                # Not in ensembles that were saved before they were recorded.
                files = get(saved, "files", Mapping[str, FileDigest] | None, None)
                revision = get(saved, "revision", str | None, None)
                with at():
                    parts = cls._read(folder, saved, check or FileCheck(), trust_remote_code)
                    name = cls._model_name(folder, saved, backbone)
        except DigestMismatchError:
            raise
        except (OSError, SafetensorError, StorageError) as error:
            raise StorageError(f"{folder} contains no saved {cls.kind} member: {error}") from error
        located = bb.locate_same(
            name,
            digest,
            files=files,
            revision=revision,
            check=check,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
        )
        return cls(located, replace(options, device=device), **parts)

    @classmethod
    @abstractmethod
    def _read(
        cls,
        folder: Path,
        saved: Mapping[str, Any],
        check: FileCheck,
        trust_remote_code: Sequence[str],
    ) -> dict[str, Any]:
        """Return the `_parts` of a saved member."""

    @classmethod
    def _model_name(
        cls,
        folder: Path,  # noqa: ARG003 - for kinds that save the model itself
        saved: Mapping[str, Any],
        backbone: str | Path | None,
    ) -> str | Path:
        """Return the model's folder or Hub id."""
        return backbone or get(saved, "backbone", str)
