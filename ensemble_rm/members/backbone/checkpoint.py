"""Locates and loads a backbone: folder, digest, tokenizer, model.

A backbone is a Hub id, a local folder, or a folder with one GGUF file. GGUF weights are converted
to safetensors once and cached, since dequantising takes longer than the rest of loading. Must not
know samples or heads.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ensemble_rm.errors import DigestMismatchError, MissingExtraError, ModelError, OptionError
from ensemble_rm.file_digests import FileCheck, FileDigests, Stamp, stamp
from ensemble_rm.file_modes import follow_umask
from ensemble_rm.members.backbone.cache_folder import DEFAULT_CACHE
from ensemble_rm.members.backbone.custom_code import allowed_code, named_custom_code
from ensemble_rm.saved_json import as_object, get, read_json, reading

_log = logging.getLogger(__name__)
_SHOWN = 3  # weights that a message names

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Suffixes of the files that decide how text becomes tokens, and of the config.
_READING = {".jinja", ".json", ".model", ".spm", ".tiktoken", ".txt"}
# Of those, the ones that scores depend on: no licence, no log of a training. A new file of such a
# name counts as a change, too, because transformers would read it.
_SCORE_FILES = re.compile(
    r"config\.json|.*safetensors\.index\.json|.*\.(jinja|model|spm|tiktoken)"
    r"|.*(token|vocab|merges|special|sentencepiece|template|processor|adapter|bpe).*\.(json|txt)"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Backbone:
    """A pretrained model on the local disk.

    Attributes
    ----------
    name : str
        As the user gave it: Hub id or folder.
    folder : Path
        Folder of config, tokenizer and weights.
    digest : str
        SHA-256 over the weight files; checked when a saved ensemble is loaded.
    files : mapping of str to FileDigest
        Digests of the weights, the config, the tokenizer and the chat template, checked as well.
    revision : str, optional
        Commit of a Hub model, from which a saved ensemble loads it again.
    stamps : mapping of str to tuple
        What `require_unchanged` compares before the model is loaded.
    code : str, optional
        Digest of the custom code that the caller allows to run; None where none may run.
    """

    name: str
    folder: Path
    digest: str
    files: FileDigests = field(default_factory=dict, compare=False, repr=False)
    revision: str | None = field(default=None, compare=False)
    stamps: Mapping[str, Stamp] = field(default_factory=dict, compare=False, repr=False)
    code: str | None = None


def read_shape(backbone: Backbone) -> tuple[int, int]:
    """Return a backbone's number of blocks and hidden size, from its config."""
    from transformers import AutoConfig

    with named_custom_code(backbone.folder, backbone.code):
        config: Any = AutoConfig.from_pretrained(
            str(backbone.folder), trust_remote_code=backbone.code is not None
        )
    text = config.get_text_config()
    return int(text.num_hidden_layers), int(text.hidden_size)


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a name such as ``"bfloat16"``.

    Raises
    ------
    OptionError
        If the name is unknown.
    """
    if name not in DTYPES:
        raise OptionError(f"dtype must be one of {sorted(DTYPES)}, not {name!r}")
    return DTYPES[name]


def pick_device(name: str | None) -> torch.device:
    """Return the named device; without a name, cuda, mps or cpu, the first that is available."""
    if name is not None:
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def empty_cache(device: torch.device) -> None:
    """Return the memory that a device's allocator caches to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def locate(
    name: str | Path,
    *,
    cache_dir: Path | None = DEFAULT_CACHE,
    trust_remote_code: Sequence[str] = (),
) -> Backbone:
    """Return a backbone; a name that is not a folder is downloaded from the Hub.

    Parameters
    ----------
    name : str or Path
    cache_dir : Path, optional
        For converted GGUF weights.
    trust_remote_code : sequence of str
        Models whose custom code may run, each as ``MODEL@DIGEST``.

    Raises
    ------
    ModelError
        If there is no such folder or Hub model, or the folder contains no model.
    CustomCodeError
        If the model's custom code is allowed at another digest.
    """
    folder = _find(name, cache_dir, revision=None)
    code = allowed_code(name, folder, trust_remote_code)
    return replace(open_folder(folder, name=str(name)), code=code)


def _find(name: str | Path, cache_dir: Path | None, *, revision: str | None) -> Path:
    """Return the folder of a model; a Hub model is downloaded, a GGUF file converted."""
    folder = Path(name).expanduser()
    if "\0" in str(name):
        raise ModelError(f"no folder or Hub model is named {str(name)!r}")
    if folder.is_dir():
        gguf = sorted(folder.glob("*.gguf"))
        if gguf and not (folder / "config.json").exists():
            if len(gguf) > 1:
                raise ModelError(
                    f"{folder} contains {len(gguf)} GGUF files; keep one file per folder"
                )
            return convert_gguf(gguf[0], cache_dir=cache_dir)
    elif str(name).count("/") > 1 or str(name).startswith((".", "/", "~")):
        raise ModelError(f"no such folder: {name}")
    else:
        folder = _download(str(name), revision)
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} contains no model: config.json is missing")
    return folder


def open_folder(folder: Path, *, name: str | None = None) -> Backbone:
    """Return the backbone in a folder of this disk, after hashing its files; none of its code runs.

    Parameters
    ----------
    folder : Path
        With a config and safetensors.
    name : str, optional
        As the user gave it (default: the folder).


    Raises
    ------
    ModelError
        If there are no safetensors.
    """
    names = score_files(folder)
    stamps = {file: stamp(folder / file) for file in names}
    files = FileCheck().digests(folder, names)
    digest = _weights_digest(folder, files)
    return Backbone(
        name or str(folder),
        folder,
        digest,
        files=files,
        revision=_commit(folder),
        stamps=stamps,
    )


def _commit(folder: Path) -> str | None:
    """Return the commit of a snapshot in the Hub's cache; None for any other folder."""
    snapshot = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if snapshot else None


def locate_same(
    name: str | Path,
    digest: str,
    *,
    files: FileDigests | None = None,
    revision: str | None = None,
    check: FileCheck | None = None,
    cache_dir: Path | None = DEFAULT_CACHE,
    trust_remote_code: Sequence[str] = (),
) -> Backbone:
    """Return a backbone after checking that it is the one of a saved ensemble.

    Parameters
    ----------
    name : str or Path
        Folder or Hub id.
    digest : str
        Recorded digest of the weights.
    files : mapping of str to FileDigest, optional
        Recorded digests of all files that scores depend on; None in older ensembles, whose
        weights alone are compared.
    revision : str, optional
        Commit of a Hub model.
    check : FileCheck, optional
        Whether files are hashed (default: all are).
    cache_dir : Path, optional
        Folder for converted GGUF weights.
    trust_remote_code : sequence of str
        Models whose custom code may run, each as ``MODEL@DIGEST``.

    Raises
    ------
    DigestMismatchError
        If a file differs.
    CustomCodeError
        If the model's custom code is allowed at another digest.
    """
    folder = _find(name, cache_dir, revision=revision)
    code = allowed_code(name, folder, trust_remote_code)
    if not files:
        backbone = replace(open_folder(folder, name=str(name)), code=code)
        if backbone.digest != digest:
            raise DigestMismatchError(
                f"the weights of {backbone.name} (SHA-256 {backbone.digest[:12]}…) are not those "
                f"of the saved ensemble ({digest[:12]}…); {_OTHER_FOLDER}"
            )
        return backbone
    present = score_files(folder)
    stamps = {file: stamp(folder / file) for file in present}
    try:
        (check or FileCheck()).compare(folder, files, what="the backbone", unexpected=present)
    except DigestMismatchError as error:
        raise DigestMismatchError(f"{error}, or {_OTHER_FOLDER}") from error
    return Backbone(
        str(name),
        folder,
        digest,
        code=code,
        files=files,
        revision=revision or _commit(folder),
        stamps=stamps,
    )


_OTHER_FOLDER = "name the folder of the right backbone with backbone=… or --backbone"


def require_unchanged(backbone: Backbone) -> None:
    """Check, before a model is loaded, that its files are those that were checked.

    An ensemble loads its models at the first score, which may be hours after the check.

    Raises
    ------
    DigestMismatchError
        If a file was changed since.
    """
    changed = {
        name: backbone.files[name]
        for name, old in backbone.stamps.items()
        if name in backbone.files
        and (not (backbone.folder / name).exists() or stamp(backbone.folder / name) != old)
    }
    if changed:
        FileCheck().compare(backbone.folder, changed, what="the backbone")


def score_files(folder: Path) -> list[str]:
    """Return the names of a model's files that scores depend on: weights, config, tokenizer."""
    return sorted(
        file.name
        for file in folder.iterdir()
        if file.is_file() and (file.suffix == ".safetensors" or _SCORE_FILES.fullmatch(file.name))
    )


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                ignore_patterns=["*.bin", "*.h5", "*.msgpack", "*.onnx"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{name!r} is neither a local folder nor an available Hub model ({reason})"
        ) from error


def _weights_digest(folder: Path, files: FileDigests) -> str:
    """Return the SHA-256 over the names and digests of a folder's weight files.

    Raises
    ------
    ModelError
        If there is no safetensors file; other formats are pickles, which can run code.
    """
    weights = sorted(name for name in files if name.endswith(".safetensors"))
    if not weights:
        raise ModelError(
            f"{folder} contains no .safetensors weights; convert the model with "
            "save_pretrained(safe_serialization=True) first"
        )
    digest = hashlib.sha256()
    for name in weights:
        digest.update(name.encode())
        digest.update(bytes.fromhex(files[name].sha256))
    return digest.hexdigest()


def reading_digest(folder: Path) -> str:
    """Return the SHA-256 over a model's config, tokenizer and chat template."""
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.iterdir() if f.suffix in _READING and f.is_file()):
        digest.update(file.name.encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def convert_gguf(path: Path, *, cache_dir: Path | None) -> Path:
    """Convert a GGUF file to a folder of safetensors, tokenizer and config; return the folder.

    A file that was converted before is not converted again.

    Raises
    ------
    MissingExtraError
        If the package ``gguf`` is not installed.
    OptionError
        If there is no cache folder.
    """
    if cache_dir is None:
        raise OptionError(
            f"{path} must be converted to safetensors; pass a cache_dir for the result"
        )
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    target = cache_dir.expanduser() / "gguf" / digest[:32]
    if (target / "config.json").exists():
        return target
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"reading {path.name} needs the package `gguf`: pip install 'ensemble-rm[gguf]'"
        ) from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(
        str(path.parent), gguf_file=path.name, trust_remote_code=False
    )
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    # transformers refuses to save a model with a quantisation config: copy the weights to a new
    # model.
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        fresh.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        follow_umask(scratch)
        try:
            scratch.rename(target)
        except OSError:  # another process has converted it in the meantime
            if not (target / "config.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def load_tokenizer(folder: Path, *, code: str | None = None) -> Any:
    """Load the folder's fast tokenizer.

    Parameters
    ----------
    folder : Path
    code : str, optional
        `Backbone.code`: without it, custom code is an error.

    Raises
    ------
    CustomCodeError
        If it needs custom code that is not allowed.
    """
    from transformers import AutoTokenizer

    with named_custom_code(folder, code):
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=code is not None)


def load_trunk(folder: Path, *, dtype: str, code: str | None = None) -> torch.nn.Module:
    """Load the transformer without a head, in evaluation mode, on the CPU.

    Raises
    ------
    CustomCodeError
        If it needs custom code that is not allowed.
    ModelError
        If weights of the trunk are missing, or the checkpoint has blocks that the config lacks.
    """
    from transformers import AutoModel

    with named_custom_code(folder, code):
        model, info = AutoModel.from_pretrained(
            str(folder),
            dtype=torch_dtype(dtype),
            trust_remote_code=code is not None,
            key_mapping=_former_names(folder),
            output_loading_info=True,
        )
    _require_whole(model, info, folder)
    loaded: torch.nn.Module = model.eval().requires_grad_(requires_grad=False)
    return loaded


# What torch.compile, DataParallel and peft write before the names of a model's weights.
_PREFIXES = ("_orig_mod.", "module.", "base_model.model.")


def _former_names(folder: Path) -> dict[str, str] | None:
    """Return what turns a checkpoint's names of weights into the model's own; None for most."""
    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                names += tensors.keys()
        except SafetensorError as error:
            raise ModelError(
                f"{file} is no readable safetensors file: {error}. Download it again; a file of "
                "about 130 bytes is a Git LFS pointer"
            ) from error
    found = ""
    while prefix := next((p for p in _PREFIXES if _all_begin(names, found + p)), None):
        found += prefix
    if not found:
        return None
    _log.warning("%s: the weights' names begin with %r, which is left out", folder, found)
    return {"^" + re.escape(found): ""}


def _all_begin(names: Sequence[str], prefix: str) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)


def _require_whole(model: Any, info: Mapping[str, Any], folder: Path) -> None:
    """Check that a checkpoint has every weight of the trunk, and no further blocks.

    transformers fills weights that are missing with random numbers and drops those that it does
    not expect; its own lists of what may be absent are left out of both already.
    """
    # The hidden states are read before any pooler.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    missing += sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the model's weights, which would be random numbers: "
            f"{', '.join(missing[:_SHOWN])}{' …' if len(missing) > _SHOWN else ''}. Save the model "
            "again with save_pretrained, or correct its config.json"
        )
    lists = [name for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)]
    own = [f"{model.base_model_prefix}.{name}." for name in lists] + [f"{n}." for n in lists]
    further = sorted(key for key in info["unexpected_keys"] if key.startswith(tuple(own)))
    if further:
        raise ModelError(
            f"{folder} has weights in the model's blocks that its config.json does not expect: "
            f"{', '.join(further[:_SHOWN])}{' …' if len(further) > _SHOWN else ''}. Correct "
            "num_hidden_layers and the other sizes in config.json"
        )


def load_causal(folder: Path, *, dtype: str, code: str | None = None) -> Any:
    """Load a causal language model, in evaluation mode, on the CPU.

    Raises
    ------
    ModelError
        If the checkpoint lacks weights that transformers would initialise at random.
    CustomCodeError
        If it needs custom code that is not allowed.
    OptionError
        If the model is not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch_dtype(dtype), "output_loading_info": True}
    try:
        with named_custom_code(folder, code):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                trust_remote_code=code is not None,
                key_mapping=_former_names(folder),
                **options,
            )
    except ValueError as error:
        raise OptionError(f"{folder} contains no causal language model: {error}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{folder} lacks the weights {missing}; name a trained policy")
    return model.eval().requires_grad_(requires_grad=False)


def load_classifier(
    folder: Path, *, dtype: str, new_head: bool = False, code: str | None = None
) -> Any:
    """Load a sequence-classification model with one output.

    Parameters
    ----------
    folder : Path
    dtype : str
    new_head : bool
        Whether to initialise a new head, for training. Otherwise a missing head is an error.
    code : str, optional
        `Backbone.code`: without it, custom code is an error.

    Raises
    ------
    CustomCodeError
        If it needs custom code that is not allowed.
    ModelError
        If the checkpoint lacks weights that transformers would initialise at random.
        If the model has more than one output.
    """
    from transformers import AutoModelForSequenceClassification

    options: dict[str, Any] = {"dtype": torch_dtype(dtype), "output_loading_info": True}
    if new_head:
        options["num_labels"] = 1
    elif (outputs := _outputs(folder)) != 1:
        raise ModelError(f"{folder} has {outputs} outputs; a reward model has one (num_labels=1)")
    with named_custom_code(folder, code):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            str(folder),
            trust_remote_code=code is not None,
            key_mapping=_former_names(folder),
            **options,
        )
    if new_head:
        # The head is new, and so is a pooler that belongs to it; the trunk must not be.
        trunk = f"{model.base_model_prefix}."
        inner = [key for key in info["missing_keys"] if key.startswith(trunk)]
        inner_info = {**info, "missing_keys": inner, "mismatched_keys": []}
        _require_whole(model.base_model, inner_info, folder)
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing and not new_head:
        raise ModelError(
            f"{folder} lacks the weights {missing}, which would be random numbers; "
            "name a trained reward model, or train a head with ensemble_rm.train"
        )
    return model


def _outputs(folder: Path) -> int:
    path = folder / "config.json"
    with reading(path):
        config = as_object(read_json(path))
        if "num_labels" in config:
            return int(get(config, "num_labels", int))
        labels = get(config, "id2label", Mapping[str, Any] | None, None)
    return len(labels) if labels else 2  # the default of transformers
