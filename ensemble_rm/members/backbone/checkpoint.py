"""Locates and loads a backbone: folder, digest, tokenizer, model.

A backbone is a Hub id, a local folder, or a folder with one GGUF file. GGUF weights are converted
to safetensors once and cached, since dequantising takes longer than the rest of loading. Must not
know samples or heads.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ensemble_rm.errors import MissingExtraError, ModelError, OptionError
from ensemble_rm.members.backbone.cache_folder import DEFAULT_CACHE
from ensemble_rm.members.backbone.custom_code import allowed_code, named_custom_code

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Suffixes of the files that decide how text becomes tokens, and of the config.
_READING = {".jinja", ".json", ".model", ".spm", ".tiktoken", ".txt"}


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
    code : str, optional
        Digest of the custom code that the caller allows to run; None where none may run.
    """

    name: str
    folder: Path
    digest: str
    code: str | None = None


def read_shape(backbone: Backbone) -> tuple[int, int]:
    """Return a backbone's number of blocks and hidden size, from its config."""
    from transformers import AutoConfig

    with named_custom_code(backbone.folder):
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
    folder = Path(name).expanduser()
    if folder.is_dir():
        gguf = sorted(folder.glob("*.gguf"))
        if gguf and not (folder / "config.json").exists():
            if len(gguf) > 1:
                raise ModelError(
                    f"{folder} contains {len(gguf)} GGUF files; keep one file per folder"
                )
            converted = convert_gguf(gguf[0], cache_dir=cache_dir)
            return Backbone(str(name), converted, weights_digest(converted))
    elif str(name).count("/") > 1 or str(name).startswith((".", "/", "~")):
        raise ModelError(f"no such folder: {name}")
    else:
        folder = _download(str(name))
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} contains no model: config.json is missing")
    code = allowed_code(name, folder, trust_remote_code)
    return Backbone(str(name), folder, weights_digest(folder), code)


def locate_same(
    name: str | Path,
    digest: str,
    *,
    cache_dir: Path | None = DEFAULT_CACHE,
    trust_remote_code: Sequence[str] = (),
) -> Backbone:
    """Return a backbone, as `locate` does, after checking that its weights have the saved digest.

    Raises
    ------
    ModelError
        If the weights differ.
    """
    backbone = locate(name, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    if backbone.digest != digest:
        raise ModelError(
            f"the weights of {backbone.name} (SHA-256 {backbone.digest[:12]}…) are not those of "
            f"the saved ensemble ({digest[:12]}…); name the right folder with backbone=… or "
            "--backbone"
        )
    return backbone


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, ignore_patterns=["*.bin", "*.h5", "*.msgpack", "*.onnx"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{name!r} is neither a local folder nor an available Hub model ({reason})"
        ) from error


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 over the names and contents of a folder's weight files.

    Raises
    ------
    ModelError
        If there is no safetensors file; other formats are pickles, which can run code.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder} contains no .safetensors weights; convert the model with "
            "save_pretrained(safe_serialization=True) first"
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
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

    with named_custom_code(folder):
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=code is not None)


def load_trunk(folder: Path, *, dtype: str, code: str | None = None) -> torch.nn.Module:
    """Load the transformer without a head, in evaluation mode, on the CPU.

    Raises
    ------
    CustomCodeError
        If it needs custom code that is not allowed.
    """
    from transformers import AutoModel

    with named_custom_code(folder):
        model: torch.nn.Module = AutoModel.from_pretrained(
            str(folder), dtype=torch_dtype(dtype), trust_remote_code=code is not None
        )
    return model.eval().requires_grad_(requires_grad=False)


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
        with named_custom_code(folder):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder), trust_remote_code=code is not None, **options
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
    with named_custom_code(folder):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            str(folder), trust_remote_code=code is not None, **options
        )
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing and not new_head:
        raise ModelError(
            f"{folder} lacks the weights {missing}, which would be random numbers; "
            "name a trained reward model, or train a head with ensemble_rm.train"
        )
    return model


def _outputs(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    if "num_labels" in config:
        return int(config["num_labels"])
    labels = config.get("id2label")
    return len(labels) if labels else 2  # the default of transformers
