"""Which view each member reads, for each kind of member."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ensemble_rm.errors import OptionError
from ensemble_rm.members.backbone.checkpoint import Backbone
from ensemble_rm.members.backbone.trunk import View, default_views

DEFAULT_BLOCKS = 2  # that a branch copies


def read_shape(backbone: Backbone) -> tuple[int, int]:
    """Return a backbone's number of blocks and the width of its states, from its config."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(str(backbone.folder))
    text = config.get_text_config()
    return int(text.num_hidden_layers), int(text.hidden_size)


def resolve_views(
    views: Sequence[View | str] | None,
    members: int,
    backbone: Backbone,
    *,
    kind: str,
    blocks: int | None,
) -> tuple[tuple[View, ...], int]:
    """Return one view a member, none for full members; and the number of blocks.

    Parameters
    ----------
    views : sequence of View or str, optional
        As the user lists them: one for all, or one a member.
    members : int
    backbone : Backbone
    kind : {"head", "branch", "lora", "full"}
    blocks : int, optional
        How many blocks a branch copies, or an adapter changes: the upper 2 of a branch, all for
        adapters where not given.

    Raises
    ------
    OptionError
        If a view or `blocks` does not fit the backbone or the kind.
    """
    depth, _ = read_shape(backbone)
    if kind == "full":
        if views is not None:
            raise OptionError("full members have no views; they are read by their own model's rule")
        return (), 0
    count = _check_blocks(blocks, depth, backbone.name, kind=kind)
    if views is None:
        whole = View(depth, "both")
        return default_views(depth, members) if kind == "head" else (whole,) * members, count
    given = tuple(View.parse(view) if isinstance(view, str) else view for view in views)
    if len(given) == 1:
        given *= members
    if len(given) != members:
        raise OptionError(f"{len(given)} views for {members} members; give one, or one a member")
    for view in given:
        if not 1 <= view.layer <= depth:
            raise OptionError(f"view {view}: {backbone.name} has layers 1 to {depth}")
        if kind != "head" and view.layer != depth:
            raise OptionError(
                f"view {view}: a {kind} member is read after its last block, {depth}:{view.pooling}"
            )
    return given, count


def _check_blocks(blocks: int | None, depth: int, name: str, *, kind: str) -> int:
    """Return how many top blocks each member has of its own."""
    if kind == "head":
        return 0
    most = depth if kind == "lora" else depth - 1
    count = (depth if kind == "lora" else DEFAULT_BLOCKS) if blocks is None else blocks
    if not 1 <= count <= most:
        more = "" if kind == "lora" else "; kind 'full' copies them all"
        raise OptionError(f"blocks must lie between 1 and {most} for {name}, not {count}{more}")
    return count
