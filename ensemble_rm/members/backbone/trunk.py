"""One pretrained transformer, run once: pooled states of any layer.

Works on any architecture whose blocks stand in one ModuleList, encoder or decoder. Blocks above
the highest layer that is read are dropped at loading. Knows nothing of heads or ensembles.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ensemble_rm.errors import ModelError, OptionError
from ensemble_rm.members.backbone import checkpoint as bb
from ensemble_rm.members.backbone.options import TrunkOptions
from ensemble_rm.members.encoding import Encoded, TextEncoder
from ensemble_rm.members.forward.batching import Batch, passes, pick_token_budget
from ensemble_rm.members.forward.prefix_cache import Prefix, read_prefix, splits_attention
from ensemble_rm.progress import Progress, silent

if TYPE_CHECKING:
    from ensemble_rm.members.backbone.feature_cache import FeatureCache

_log = logging.getLogger(__name__)

_CHUNK = 256  # texts read at once: what memory holds, and what an interruption can cost


Rule: TypeAlias = Literal["last", "mean"]
Pooling: TypeAlias = Literal["last", "mean", "both"]
RULES: tuple[Rule, ...] = ("last", "mean")
POOLINGS: tuple[Pooling, ...] = ("last", "mean", "both")
"""``both`` is last and mean, one after the other."""


@dataclass(frozen=True, slots=True, order=True)
class View:
    """What one head reads of the trunk.

    Attributes
    ----------
    layer : int
        The states after this block, 1 … depth; the deepest's are read after the final norm, as
        transformers returns them.
    pooling : {"last", "mean", "both"}
        The last attended token, the mean of the completion, or the one after the other.
    """

    layer: int
    pooling: Pooling

    def __str__(self) -> str:
        return f"{self.layer}:{self.pooling}"

    @classmethod
    def parse(cls, text: str) -> View:
        """Read ``"16:mean"``."""
        layer, _, pooling = text.partition(":")
        rule = next((rule for rule in POOLINGS if rule == pooling.strip()), None)
        if not layer.strip().isdigit() or rule is None:
            raise OptionError(f"a view is LAYER:POOLING with pooling in {POOLINGS}, not {text!r}")
        return cls(int(layer), rule)

    def parts(self) -> tuple[tuple[int, Rule], ...]:
        """Return the (layer, rule) pairs that it is made of, in their order."""
        return tuple((self.layer, r) for r in RULES if self.pooling in (r, "both"))


def default_views(depth: int, members: int) -> tuple[View, ...]:
    """Spread views over the upper half of the layers, each with both poolings.

    What lies below reads worse and helps an ensemble less (benchmarks/LOG.md). Where there are
    more members than layers, a layer's next readers take one pooling, then the other; members
    beyond that take the first views again.
    """
    lowest = max(1, depth // 2)
    layers = np.linspace(lowest, depth, members).round().astype(int) if members > 1 else [depth]
    taken: list[View] = []
    for layer in layers:
        candidates = [View(int(layer), rule) for rule in ("both", "mean", "last")]
        # Views must differ, since linear heads of one view have the same optimum.
        taken.append(next((v for v in candidates if v not in taken), candidates[0]))
    return tuple(taken)


def views_per_member(
    views: Sequence[View | str], members: int, *, depth: int, name: str
) -> tuple[View, ...]:
    """Return one view per member, from one for all or one per member.

    Parameters
    ----------
    views : sequence of View or str
    members : int
    depth : int
        Number of the backbone's blocks.
    name : str
        The backbone's name, for messages.

    Raises
    ------
    OptionError
        If a view cannot be read, has a layer that the backbone lacks, or their number is neither
        1 nor `members`.
    """
    parsed = tuple(View.parse(view) if isinstance(view, str) else view for view in views)
    if len(parsed) == 1:
        parsed *= members
    if len(parsed) != members:
        raise OptionError(f"{len(parsed)} views for {members} members; give one, or one per member")
    for view in parsed:
        if not 1 <= view.layer <= depth:
            raise OptionError(f"view {view}: {name} has layers 1 to {depth}")
    return parsed


def pool(
    states: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, rule: Rule
) -> torch.Tensor:
    """Pool right-padded token states to float32 vectors.

    Parameters
    ----------
    states : torch.Tensor
        (B, T, D).
    starts, lengths : torch.Tensor
        (B,) first token of the completion, number of attended tokens.
    rule : {"last", "mean"}
        The last attended token, or the mean over the completion's tokens.

    Returns
    -------
    torch.Tensor
        (B, D) float32.
    """
    if rule == "last":
        # Right padding: the last token of row i is at lengths[i] − 1.
        return states[torch.arange(len(states), device=states.device), lengths - 1].float()
    positions = torch.arange(states.shape[1], device=states.device)  # (T,)
    inside = (positions >= starts[:, None]) & (positions < lengths[:, None])  # (B, T)
    # Mean over the completion's tokens alone; the prompt is the same on both sides.
    weights = inside.float() / inside.sum(1, keepdim=True)
    return torch.einsum("bt,btd->bd", weights, states.float())


def find_blocks(model: torch.nn.Module) -> tuple[tuple[str, ...], torch.nn.ModuleList]:
    """Return the path to the list of the transformer's blocks, attribute by attribute, and it.

    Raises
    ------
    ModelError
        If no ModuleList is as long as the config says the model is deep.
    """
    config: Any = model.config
    # The text model's depth: a multimodal config counts its towers apart.
    text = config.get_text_config()
    depth = text.num_hidden_layers
    modules = list(model.named_modules())
    # Below the text model first: another tower may be as deep, and never runs on text.
    towers = [
        f"{name}." if name else ""
        for name, module in modules
        if isinstance(module, PreTrainedModel) and type(module.config) is type(text)
    ]
    for tower in [*towers, ""]:
        for name, module in modules:
            is_list = isinstance(module, torch.nn.ModuleList) and len(module) == depth
            if is_list and name.startswith(tower):
                return tuple(name.split(".")), cast("torch.nn.ModuleList", module)
    raise ModelError(
        f"{type(model).__name__} has no list of {depth} blocks; only kind='full' can train it"
    )


def first_output(output: Any) -> torch.Tensor:
    """Return a block's hidden states, whether it returns them alone or in a tuple."""
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states


@torch.inference_mode()
def keeps_a_cache(model: torch.nn.Module, device: torch.device) -> bool:
    """Return whether a model is causal and fills a cache of keys and values on two tokens.

    Only then can completions of one prompt share it.
    """
    # Two tokens: the shortest input that fills a cache.
    ids = torch.ones(1, 2, dtype=torch.int64, device=device)
    out = model(input_ids=ids, attention_mask=ids, use_cache=True)
    cache = getattr(out, "past_key_values", None)
    layers = getattr(cache, "layers", [])
    # Other classes of layer, such as quantised or recurrent ones, cannot be copied per completion.
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    shared = any(layer.is_initialized for layer in layers) and all(
        type(layer) in known for layer in layers
    )
    if not shared:
        _log.debug("%s keeps no cache of keys and values: no prefix is shared", type(model))
    return shared and is_causal(model, device)


@torch.inference_mode()
def is_causal(model: torch.nn.Module, device: torch.device) -> bool:
    """Return whether the first token's states are the same whatever follows it.

    By trying: some decoders attend in both directions (``is_causal=False``, Gemma 3's
    ``use_bidirectional_attention``), and fill a cache all the same.
    """
    config: Any = model.config
    size = config.get_text_config().vocab_size
    # Two texts of nine tokens, of which only the first is the same.
    following = (torch.arange(16, device=device).view(2, 8) * 7919 + 101) % size
    ids = torch.cat([torch.ones(2, 1, dtype=torch.int64, device=device), following], dim=1)
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    first, second = out.last_hidden_state[:, 0].float()
    near = 1e-4 if out.last_hidden_state.dtype == torch.float32 else 1e-2
    return bool((first - second).norm() <= near * first.norm())


class Trunk:
    """A backbone up to block `top`, frozen.

    Parameters
    ----------
    backbone : Backbone
    options : TrunkOptions
    top : int, optional
        Highest layer that will be read; all layers where it is not given. 0 is the embeddings
        alone, under branches that hold every block.
    whole : bool
        Whether to keep the blocks above `top`, for branches, in `rest`.

    Attributes
    ----------
    depth, width : int
        Blocks of the whole backbone, and width of their states.
    token_budget : int
        Padded tokens in a batch: what the options say, or what was found.
    path : tuple of str
        Of attributes from the model to the list of its blocks.
    blocks : ModuleList
        Those up to `top`.
    causal : bool
        Whether the model looks at earlier tokens alone: it keeps their keys and values.
    rest : ModuleList
        Those above it, of which branches are copies; empty once `forget_rest` was called.
    """

    def __init__(
        self,
        backbone: bb.Backbone,
        options: TrunkOptions,
        *,
        top: int | None = None,
        whole: bool = True,
    ) -> None:
        self.backbone = backbone
        self.options = options
        self.device = bb.pick_device(options.device)
        self.encoder = TextEncoder(
            # The tokenizer before the weights: bad options fail in milliseconds.
            bb.load_tokenizer(backbone.folder, code=backbone.code),
            template=options.template,
            max_length=options.max_length,
        )
        bb.require_unchanged(backbone)
        model = bb.load_trunk(backbone.folder, dtype=options.dtype, code=backbone.code)
        self.path, blocks = find_blocks(model)
        self.depth = len(blocks)
        self.top = self.depth if top is None else top
        if not 0 <= self.top <= self.depth:
            raise OptionError(f"layer must be between 0 and {self.depth}, not {self.top}")
        self.blocks = torch.nn.ModuleList(list(blocks)[: self.top])
        self.rest = torch.nn.ModuleList(list(blocks)[self.top :] if whole else [])
        # The model itself then runs only the blocks up to `top`.
        setattr(model.get_submodule(".".join(self.path[:-1])), self.path[-1], self.blocks)
        self.model: Any = model.to(self.device)
        if self.device.type == "cpu":
            from ensemble_rm.members.forward.cpu.kernels import use_cpu_kernels

            use_cpu_kernels(self.model, self.rest)
        model_config: Any = self.model.config
        # By trying: configs do not tell whether a model fills a cache.
        self.causal = keeps_a_cache(self.model, self.device)
        self.width: int = model_config.get_text_config().hidden_size
        self.token_budget = pick_token_budget(
            options.token_budget,
            self.blocks,
            self.rest,
            width=self.width,
            depth=self.depth,
            device=self.device,
        )

    @cached_property
    def shares(self) -> bool:
        """Whether the completions of a prompt share its pass."""
        return self.options.share_prefix and self.causal

    @cached_property
    def splits(self) -> bool:
        """Whether attention to a shared prompt can be computed apart."""
        return self.shares and splits_attention(self.model, self.device)

    def passes(self, encoded: Sequence[Encoded], *, states: bool = False) -> Iterator[Batch]:
        """Yield every sample once, in batches that share their prompts where that is possible.

        Parameters
        ----------
        encoded : sequence of Encoded
        states : bool
            Whether branches will read the prompts' states, too.
        """
        # The probe runs the model, whose hooks would otherwise record it.
        splits = self.splits  # asked before anyone listens

        def read(prompts: list[list[int]]) -> Prefix:
            found: list[torch.Tensor] = []
            listen = {self.top} if states else set()
            with self._listening(listen, lambda _, out: found.append(out)):
                prefix = read_prefix(self.model, prompts, self.device, splits=splits, whole=states)
            return replace(prefix, states=found[0]) if states else prefix

        return passes(
            encoded,
            token_budget=self.token_budget,
            device=self.device,
            read=read if self.shares else None,
            splits=splits,
        )

    @torch.inference_mode()
    def pool_batch(self, batch: Batch, parts: Sequence[tuple[int, Rule]]) -> torch.Tensor:
        """Return (B, n_parts, width) float32 for one batch, in one pass."""
        # By layer: one hook serves all parts that read it.
        wanted: dict[int, list[int]] = {}
        for i, (layer, _) in enumerate(parts):
            wanted.setdefault(layer, []).append(i)
        # NaN where nothing is written, which later checks refuse; never uninitialised memory.
        shape = (len(batch.rows), len(parts), self.width)
        out = torch.full(shape, torch.nan, device=self.device)

        # Pooled inside the hook, so that states of all layers are never in memory at once.
        def keep(layer: int, states: torch.Tensor) -> None:
            for i in wanted.get(layer, ()):
                out[:, i] = pool(states, batch.starts, batch.lengths, parts[i][1])

        # The deepest layer is read after the final norm, as transformers returns it.
        with self._listening({layer for layer in wanted if layer < self.depth}, keep):
            last = self.model(**self.inputs(batch)).last_hidden_state
        if self.top == self.depth:
            keep(self.depth, last)
        return out

    @torch.inference_mode()
    def states(self, batch: Batch) -> torch.Tensor:
        """Return the token states after block `top`, before any final norm: (B, T, width)."""
        found: list[torch.Tensor] = []
        with self._listening({self.top}, lambda _, states: found.append(states)):
            self.model(**self.inputs(batch))
        return found[0]

    def inputs(self, batch: Batch, *, causal: bool | None = None) -> dict[str, Any]:
        """Return the keyword arguments of one forward pass that keeps no cache.

        `causal` defaults to the trunk's own.
        """
        causal = self.causal if causal is None else causal
        inputs = replace(batch, causal=causal).model_inputs()
        # Encoders take no such argument.
        if batch.prefix is None and getattr(self.model.config, "is_decoder", True):
            inputs["use_cache"] = False
        return inputs

    def forget_rest(self) -> Trunk:
        """Free the blocks above `top`; return the trunk."""
        self.rest = torch.nn.ModuleList()
        return self

    @contextmanager
    def _listening(
        self, layers: set[int], keep: Callable[[int, torch.Tensor], None]
    ) -> Iterator[None]:
        silent_layers = set(layers)

        def hear(layer: int, output: Any) -> None:
            silent_layers.discard(layer)
            keep(layer, first_output(output))

        # Hooks of one pass only: a later pass must not append to this one's lists.
        handles = [
            self.blocks[layer - 1].register_forward_hook(
                lambda _m, _i, output, layer=layer: hear(layer, output)
            )
            for layer in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if silent_layers:
            raise ModelError(
                f"blocks {sorted(silent_layers)} of {'.'.join(self.path)} did not run in a forward "
                f"pass of {type(self.model).__name__}; use kind 'full' with this backbone"
            )


# What views read ---------------------------------------------------------------------------------


def features(
    trunk: Trunk,
    encoded: Sequence[Encoded],
    views: Sequence[View],
    *,
    cache: FeatureCache | None = None,
    progress: Progress = silent,
) -> NDArray[np.float32]:
    """Return what each view reads of each sample: `features_in_parts` in one array.

    Returns
    -------
    ndarray, shape (n_samples, n_views, width)
        float32.
    """
    out = np.empty((len(encoded), len(views), _width(trunk, views)), dtype=np.float32)
    for rows, part in features_in_parts(trunk, encoded, views, cache=cache, progress=progress):
        out[rows] = part
    return out


def features_in_parts(
    trunk: Trunk,
    encoded: Sequence[Encoded],
    views: Sequence[View],
    *,
    cache: FeatureCache | None = None,
    progress: Progress = silent,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield what each view reads, some samples at a time; equal texts are read once.

    Parameters
    ----------
    trunk : Trunk
    encoded : sequence of Encoded
    views : sequence of View
    cache : FeatureCache, optional
        Read before the trunk runs, and filled as it runs.
    progress : callable
        Called with ("reading", done, total), in distinct texts.

    Yields
    ------
    rows : ndarray of int
        Of these samples; each comes once.
    features : ndarray, shape (len(rows), n_views, width)
        float32; twice the trunk's width where a view reads both poolings, and then views of one
        pooling end in zeros.
    """
    # A layer and pooling that several views read is pooled once.
    parts = tuple(dict.fromkeys(part for view in views for part in view.parts()))
    # Equal texts (chosen and rejected that repeat across pairs) are read once.
    equal: dict[Any, list[int]] = {}
    for row, e in enumerate(encoded):
        equal.setdefault((e.start, tuple(e.ids), tuple(e.types or ())), []).append(row)
    rows_of = {rows[0]: rows for rows in equal.values()}
    model = f"{trunk.backbone.digest}|{trunk.options.dtype}"
    known: dict[int, NDArray[np.float32]] = {}
    if cache is not None:
        known = cache.find(model, {row: encoded[row] for row in rows_of}, parts, trunk.width)
    if known:
        yield _spread(trunk, views, parts, [rows_of[row] for row in known], list(known.values()))
    # Only what the cache lacks goes through the model.
    missing, done = [row for row in rows_of if row not in known], 0
    for chosen in _chunks(encoded, missing):
        texts = [encoded[row] for row in chosen]
        pooled = np.empty((len(texts), len(parts), trunk.width), dtype=np.float32)
        for batch in trunk.passes(texts):
            # To float32 on the CPU batch by batch, which bounds the accelerator's memory.
            pooled[batch.rows] = trunk.pool_batch(batch, parts).cpu().numpy()
            done += len(batch.rows)
            progress("reading", done, len(missing))
        if cache is not None:
            cache.add(model, texts, parts, pooled)
        yield _spread(trunk, views, parts, [rows_of[row] for row in chosen], pooled)


def _width(trunk: Trunk, views: Sequence[View]) -> int:
    return trunk.width * max(len(view.parts()) for view in views)


def _chunks(encoded: Sequence[Encoded], rows: Sequence[int]) -> Iterator[list[int]]:
    """Cut rows into lists of one to two `_CHUNK`, longest first, that part few prompts' rows."""
    # Rows of one prompt stay in one chunk, so that its prefix is read once.
    prompts: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        e = encoded[row]
        prompts.setdefault(tuple(e.ids[: e.start]), []).append(row)
    chunk: list[int] = []
    # Longest first: memory runs out at the start of a long run or not at all.
    for own in sorted(prompts.values(), key=lambda own: -max(len(encoded[row].ids) for row in own)):
        for i in range(0, len(own), _CHUNK):
            chunk += own[i : i + _CHUNK]
            if len(chunk) >= _CHUNK:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


def _spread(
    trunk: Trunk,
    views: Sequence[View],
    parts: Sequence[tuple[int, Rule]],
    rows: Sequence[Sequence[int]],
    pooled: Sequence[NDArray[np.float32]] | NDArray[np.float32],
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return all rows of each text, and what each view reads of them."""
    read = np.asarray(pooled)  # (n_texts, n_parts, width)
    # Zeros: a view of one pooling leaves the second half of the width unused.
    out = np.zeros((len(read), len(views), _width(trunk, views)), dtype=np.float32)
    for i, view in enumerate(views):
        columns = [read[:, parts.index(part)] for part in view.parts()]
        out[:, i, : trunk.width * len(columns)] = np.concatenate(columns, axis=1)
    counts = [len(own) for own in rows]
    return np.concatenate([np.asarray(own) for own in rows]), np.repeat(out, counts, axis=0)
