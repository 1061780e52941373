"""Batches packed for a transformer: what rows begin with alike is read once, and no padding.

The two answers of a preference pair and the answers of a group share their prompt. Source: Wang and Hegde (2024),
Accelerating direct preference optimization with prefix sharing, arXiv 2410.20305.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

LONGEST = 2
"""A packed row is at most so many times as long as the longest given one: attention grows with its square."""
WORTHWHILE = 0.8
"""The share of the tokens, padding included, that packing must come down to."""
TOLERANCE, COARSE = 1e-4, 0.05
"""How far states may lie apart, as a share of their range, with 32 bits and with fewer."""

Cell = tuple[int, int, int, int]
"""A packed token: itself, its position, the number of its block, and of its branch there or 0 for what is shared."""
PADDING: Cell = (0, 0, -1, 0)


@dataclass(frozen=True)
class Block:
    """Rows that begin alike: which they are, in how many tokens, and how many tokens they have without repetition."""

    rows: list[int]
    shared: int
    size: int


@dataclass(frozen=True)
class Packing:
    """Rows (rows, length) packed into fewer or shorter ones (packed, width).

    `tokens` and `positions` are (packed, width), `mask` (packed, 1, width, width) says what sees what, and `places`
    (rows, length) where each given token is among all packed ones; padding is anywhere.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    places: Tensor


@contextmanager
def shared_prefixes() -> Iterator[Callable[[Any], None]]:
    """Let the transformers of causal language models read what the rows of a batch begin with alike only once.

    Gives a function that takes such a model, or anything else, which it leaves alone. Logits and gradients stay what
    they were but for rounding. Sampling, dropout, and batches that would hardly get smaller are left as they are; so
    are models that do not take masks of their own making, or whose attention has windows, with a line in the log.
    At the end all models are as they were.
    """
    hooks: dict[nn.Module, Sequence[RemovableHandle]] = {}

    def share(model: Any) -> None:
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not isinstance(causal, PreTrainedModel) or causal.base_model in hooks:
            return
        transformer: Any = causal.base_model
        reason = _hindrance(transformer)
        if reason:
            logger.info("%s reads shared prompts again with every answer: %s", type(causal).__name__, reason)
            return
        sharing = _Sharing()
        hooks[transformer] = (
            transformer.register_forward_pre_hook(sharing.pack, with_kwargs=True),
            transformer.register_forward_hook(sharing.unpack, with_kwargs=True),
        )

    try:
        yield share
    finally:
        for handles in hooks.values():
            for handle in handles:
                handle.remove()


class _Sharing:
    """What a transformer's hooks do before and after it."""

    def __init__(self) -> None:
        self.places: Tensor | None = None

    def pack(self, module: nn.Module, arguments: Any, settings: dict[str, Any]) -> Any:
        """The arguments of a packed batch; None to leave them."""
        self.places = None
        if not _is_plain(arguments, settings) or _has_dropout(module):
            return None
        tokens, attention = settings["input_ids"], settings["attention_mask"]
        packing = pack_rows(tokens, attention)
        if packing.tokens.numel() > WORTHWHILE * tokens.numel():
            return None
        self.places = packing.places
        given = {"input_ids": packing.tokens, "attention_mask": packing.mask, "position_ids": packing.positions}
        return arguments, settings | given

    def unpack(self, _module: nn.Module, _arguments: Any, _settings: dict[str, Any], output: Any) -> None:
        """Put the states where the given batch has its tokens."""
        if self.places is not None:
            # The gradient of an embedding is summed in one order, that of an index by whichever thread is first.
            output["last_hidden_state"] = embedding(self.places, output.last_hidden_state.flatten(0, 1))
            self.places = None


def _is_plain(arguments: Any, settings: dict[str, Any]) -> bool:
    """Whether a call asks for the last states of whole sequences and for nothing else."""
    attention = settings.get("attention_mask")
    others = ("past_key_values", "inputs_embeds", "output_hidden_states", "output_attentions", "output_router_logits")
    return (
        not arguments
        and settings.get("use_cache") is False
        and isinstance(settings.get("input_ids"), Tensor)
        and isinstance(attention, Tensor)
        and attention.ndim == 2
        and not any(settings.get(name) is not None and settings[name] is not False for name in others)
    )


def _has_dropout(module: nn.Module) -> bool:
    if not module.training:
        return False
    rate = getattr(module.config, "attention_dropout", 0.0)
    return bool(rate) or any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())


def _hindrance(transformer: Any) -> str | None:
    """Why a model cannot read packed batches, or None."""
    config: Any = transformer.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation != "sdpa":
        return f"its attention is {config._attn_implementation}, not sdpa"
    if kinds != {"full_attention"} or (getattr(config, "sliding_window", None) and not hasattr(config, "layer_types")):
        return "its layers do not all see the whole text"
    return None if _reads_alike(transformer) else "it reads a packed batch in another way"


@torch.no_grad()
def _reads_alike(transformer: Any) -> bool:
    """Whether a small batch gives the same states packed and as it is."""
    device = transformer.device
    rows = torch.arange(3, 15, device=device).remainder(transformer.config.vocab_size).repeat(3, 1)
    rows[1, 6:] += 1
    rows[2, 8:] += 2
    attention = torch.ones_like(rows)
    attention[1, 10:] = 0
    packing = pack_rows(rows, attention)
    was_training = transformer.training
    transformer.eval()
    try:
        plain = transformer(input_ids=rows, attention_mask=attention, use_cache=False).last_hidden_state
        packed = transformer(
            input_ids=packing.tokens, attention_mask=packing.mask, position_ids=packing.positions, use_cache=False
        )
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    finally:
        transformer.train(was_training)
    states = embedding(packing.places, packed.last_hidden_state.flatten(0, 1))
    gap = (states - plain)[attention.bool()].abs().max()
    tolerance = TOLERANCE if plain.dtype.itemsize >= 4 else COARSE
    return bool(gap <= tolerance * plain.abs().max())


# packing ------------------------------------------------------------------------------------------


def pack_rows(tokens: Tensor, attention: Tensor) -> Packing:
    """Pack rows (rows, length), padded on either side or both, whose `attention` is 0 on padding.

    Examples
    --------
    >>> tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [3, 4, 0, 0]])
    >>> packing = pack_rows(tokens, (tokens > 0).long())
    >>> packing.tokens
    tensor([[5, 6, 7, 8, 9, 3, 4]])
    >>> packing.positions
    tensor([[0, 1, 2, 3, 2, 0, 1]])
    >>> packing.places
    tensor([[0, 1, 2, 3],
            [0, 1, 4, 0],
            [5, 6, 0, 0]])
    """
    columns = [[column for column, seen in enumerate(row) if seen] for row in attention.tolist()]
    rows = [[row[column] for column in own] for row, own in zip(tokens.tolist(), columns, strict=True)]
    limit = LONGEST * max(map(len, rows))
    bins = _fill_bins(find_blocks(rows, limit), limit)
    width = max(sum(block.size for block in blocks) for blocks in bins)
    places = [[0] * tokens.shape[1] for _ in rows]
    cells: list[list[Cell]] = []
    for number, blocks in enumerate(bins):
        written, own = _write(blocks, rows)
        cells.append(written + [PADDING] * (width - len(written)))
        for row, at in own.items():
            for column, place in zip(columns[row], at, strict=True):
                places[row][column] = number * width + place
    packed, positions, block, branch = torch.tensor(cells, device=tokens.device).unbind(-1)
    order = torch.arange(width, device=tokens.device)
    mask = (order[:, None] >= order) & (block[:, :, None] == block[:, None])
    mask &= (branch[:, None] == 0) | (branch[:, :, None] == branch[:, None])
    return Packing(packed, positions, mask[:, None], torch.tensor(places, device=tokens.device))


def find_blocks(rows: Sequence[list[int]], limit: int) -> list[Block]:
    """The rows in blocks of at most `limit` tokens that begin alike, large ones first.

    In alphabetical order those that begin alike are neighbours; the next one joins where that spares tokens.
    """
    blocks: list[Block] = []
    for row in sorted(range(len(rows)), key=lambda row: rows[row]):
        block = _joined(blocks[-1], row, rows) if blocks else None
        if block and block.size <= limit:
            blocks[-1] = block
        else:
            blocks.append(Block([row], len(rows[row]), len(rows[row])))
    return sorted(blocks, key=lambda block: -block.size)


def _joined(block: Block, row: int, rows: Sequence[list[int]]) -> Block | None:
    """The block with one more row, or None where that spares no tokens."""
    first = rows[block.rows[0]][: block.shared]
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, rows[row], strict=False)))
    count = len(block.rows)
    if shared * count <= block.shared * (count - 1):
        return None
    size = block.size + (block.shared - shared) * (count - 1) + len(rows[row]) - shared
    return Block([*block.rows, row], shared, size)


def _fill_bins(blocks: Sequence[Block], limit: int) -> list[list[Block]]:
    """Blocks, long ones first, each into the first bin that has room for it."""
    bins: list[list[Block]] = []
    rooms: list[int] = []
    for block in blocks:
        place = next((number for number, room in enumerate(rooms) if room >= block.size), None)
        if place is None:
            place = len(bins)
            bins.append([])
            rooms.append(limit)
        bins[place].append(block)
        rooms[place] -= block.size
    return bins


def _write(blocks: Sequence[Block], rows: Sequence[list[int]]) -> tuple[list[Cell], dict[int, list[int]]]:
    """The cells of a packed row, and by given row those of its tokens."""
    cells: list[Cell] = []
    places: dict[int, list[int]] = {}
    for number, block in enumerate(blocks):
        common = range(len(cells), len(cells) + block.shared)
        first = rows[block.rows[0]][: block.shared]
        cells += [(token, position, number, 0) for position, token in enumerate(first)]
        for branch, row in enumerate(block.rows, 1):
            own = rows[row][block.shared :]
            places[row] = [*common, *range(len(cells), len(cells) + len(own))]
            cells += [(token, position, number, branch) for position, token in enumerate(own, block.shared)]
    return cells, places
