"""Native Sparse Attention (arXiv 2502.11089): compressed tokens, selected blocks and a sliding window, mixed by gates.

T: packed tokens, N1: query heads, N2: key/value heads, D1, D2: dims of query/key and of value.
"""

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor, nn

from . import selection, shared_groups
from .compression import Compression
from .config import NSAConfig
from .ops import library
from .ops.backends import attends_whole, resolve, selects_own_block
from .ops.contract import SELECT_DIMS
from .ops.reference import Compressed
from .samples import Part, Samples

BRANCHES = ("compress", "select", "window")
Branches = tuple[Tensor, Tensor, Tensor]


class NativeSparseAttention(nn.Module):
    """The attention core of a layer: what stands between its projections. It knows of no host framework.

    Args:
        config: sizes and choices.
        head_num: query heads held here, N1.
        kv_head_num: key/value heads held here, N2.
        qk_head_dim: dim of queries and keys, D1.
        v_head_dim: dim of values, D2.
        scale: factor of the logits; default `qk_head_dim ** -0.5`.
        score_group: ranks that hold other query heads of the same key/value heads; they choose blocks together.

    Raises:
        ValueError: the heads do not divide, or `config.strict` and the Ascend operators take no such heads.
    """

    def __init__(
        self,
        config: NSAConfig,
        head_num: int,
        kv_head_num: int,
        qk_head_dim: int,
        v_head_dim: int,
        *,
        scale: float | None = None,
        score_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_heads(config, head_num, kv_head_num, qk_head_dim, v_head_dim)
        self.config, self.head_num, self.kv_head_num = config, head_num, kv_head_num
        self.qk_head_dim, self.v_head_dim = qk_head_dim, v_head_dim
        self.scale = qk_head_dim**-0.5 if scale is None else scale
        self.score_group = score_group
        self.compress_key = Compression(config, kv_head_num, qk_head_dim, of_keys=True)
        self.compress_value = Compression(config, kv_head_num, v_head_dim, of_keys=False)
        self.collect_statistics = False
        self.statistics: dict[str, float] = {}

    def forward(
        self,
        query: Tensor,
        key: Tensor | Branches,
        value: Tensor | Branches,
        gate: Tensor,
        actual_seq_len: Sequence[int] | None = None,
        query_spans: Sequence[tuple[int, int]] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [T, N1, D1]; with `query_spans` [T1, N1, D1].
            key: [T, N2, D1], or one for each branch: (compress, select, window).
            value: [T, N2, D2], or one for each branch.
            gate: logits [T, N1, 3], in the order of the branches; with `query_spans` [T1, N1, 3].
            actual_seq_len: prefix sums of the sample lengths, without a leading 0; None: one sample.
            query_spans: the tokens that have a query here, as the first and the last + 1 of each run of them; None: all.

        Returns:
            As query, with dim D2.

        Raises:
            ValueError: a shape, a type or the prefix sums do not fit.
        """
        keys, values = ((x,) * 3 if isinstance(x, Tensor) else tuple(x) for x in (key, value))
        tokens = query.shape[0] if query_spans is None else keys[0].shape[0]
        samples = Samples.of(actual_seq_len, tokens)
        parts = [samples.whole] if query_spans is None else [samples.part(*span) for span in query_spans]
        sizes = [part.q_len[-1] for part in parts]
        self._check_inputs(query, keys, values, gate, sum(sizes), tokens)
        backend = resolve(self.config.backend)
        settings = [self.settings(part, backend, query.device) for part in parts]
        pooled = self.compress_key(keys[0], samples, backend), self.compress_value(values[0], samples, backend)
        branches = (pooled, (keys[1], values[1]), (keys[2], values[2]))
        done = [
            self._attend(queries, gates, self._visible(branches, part), part, at, backend)
            for part, at, queries, gates in zip(parts, settings, _cut(query, sizes), _cut(gate, sizes), strict=True)
        ]
        attention, topk_indices = ([each[i] for each in done] for i in range(2))
        if self.collect_statistics:
            self._note(gate, torch.cat(topk_indices), parts, settings[0])
        return attention[0] if len(attention) == 1 else torch.cat(attention)

    def _visible(self, branches: Sequence[tuple[Tensor, Tensor]], part: Part) -> list[tuple[Tensor, Tensor]]:
        """Key and value of each branch, as far as the queries of a part see them."""
        windows = part.windows(self.config.compress_block_size, self.config.compress_stride)
        return [
            (_within(key, seen), _within(value, seen))
            for (key, value), seen in zip(branches, (windows, part.keys, part.keys), strict=True)
        ]

    def _attend(
        self, query: Tensor, gate: Tensor, branches: Sequence[tuple[Tensor, Tensor]], part: Part, at: Compressed, backend: str
    ) -> tuple[Tensor, Tensor]:
        """The queries of a part: their attention [T1, N1, D2], and their blocks [T1, N2, select_block_count]."""
        compress, select, window = branches
        if self.score_group is None and attends_whole(backend, query.device.type, query.dtype, gate.dtype):
            operands = query, *compress, *select, *window, gate
            return library.sparse_attention(*operands, *at, self.config.window_size, part.samples.ends, backend)[:2]
        compressed, topk_indices = self._compress(query, *compress, at, backend)
        lists = (part.q_len, part.samples.ends, part.q_offset, backend)
        selected = library.select_attention(
            query, *select, topk_indices, self.scale, self.config.select_block_size, True, True, *lists
        )[0]
        windowed = library.window_attention(query, *window, self.scale, self.config.window_size, *lists)[0]
        return library.gated_sum(gate, compressed, selected, windowed, backend), topk_indices

    def _compress(self, query: Tensor, key: Tensor, value: Tensor, at: Compressed, backend: str) -> tuple[Tensor, Tensor]:
        """The compressed branch [T1, N1, D2], and the blocks for the selected one [T1, N2, select_block_count]."""
        if self.score_group is None:
            attention, ids = library.compress_attention(query, key, value, None, None, *at, backend)[:2]
        else:
            attention, ids = shared_groups.compress_attention(query, key, value, at, self.score_group, backend)
        return attention, selection.in_order(ids)

    def settings(self, part: Part, backend: str, device: torch.device) -> Compressed:
        """What the compressed branch is called with."""
        config = self.config
        own_block = config.select_own_block
        if own_block == "auto":
            own_block = selects_own_block(backend, device.type, self.head_num // self.kv_head_num)
        return Compressed(
            scale=self.scale,
            compress_block_size=config.compress_block_size,
            compress_stride=config.compress_stride,
            select_block_size=config.select_block_size,
            select_block_count=config.select_block_count,
            causal=True,
            init_blocks=config.init_blocks,
            local_blocks=config.local_blocks,
            own_block=own_block,
            importance=config.importance,
            q_len=part.q_len,
            cmp_len=part.samples.windows(config.compress_block_size, config.compress_stride),
            sel_len=part.samples.blocks(config.select_block_size),
            q_offset=part.q_offset,
        )

    def _note(self, gate: Tensor, topk_indices: Tensor, parts: Sequence[Part], at: Compressed) -> None:
        """Keep what `patches.megatron_core.nsa_statistics` reports."""
        gates = gate.to(torch.promote_types(gate.dtype, torch.float32)).sigmoid().mean(dim=(0, 1))
        position = torch.cat([part.positions(gate.device) for part in parts])
        self.statistics = {f"gate_{name}": mean for name, mean in zip(BRANCHES, gates.tolist(), strict=True)}
        self.statistics |= selection.statistics(topk_indices, position, at)

    def _check_inputs(
        self, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], gate: Tensor, queries: int, tokens: int
    ) -> None:
        expected = {
            "query": ((query,), (queries, self.head_num, self.qk_head_dim)),
            "key": (keys, (tokens, self.kv_head_num, self.qk_head_dim)),
            "value": (values, (tokens, self.kv_head_num, self.v_head_dim)),
            "gate": ((gate,), (queries, self.head_num, 3)),
        }
        for name, (tensors, shape) in expected.items():
            if name in ("key", "value") and len(tensors) != len(BRANCHES):
                raise ValueError(f"{name} has {len(tensors)} tensors; allowed: one, or one for each of {', '.join(BRANCHES)}")
            for tensor in tensors:
                if tuple(tensor.shape) != shape:
                    raise ValueError(f"{name} is {list(tensor.shape)}; allowed: {list(shape)}")
                if not tensor.is_floating_point() or (name != "gate" and tensor.dtype != query.dtype):
                    raise ValueError(f"{name} is {tensor.dtype}; allowed: one floating point type for query, key and value")


def _cut(tensor: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """Rows in runs of `sizes`; a single one is the tensor itself, whose gradient is then not put together."""
    return [tensor] if len(sizes) == 1 else tensor.split(sizes)


def _within(tensor: Tensor, rows: slice) -> Tensor:
    """Rows of a tensor; all of them are the tensor itself, whose gradient is then not copied."""
    return tensor if (rows.start, rows.stop) == (0, tensor.shape[0]) else tensor[rows]


def _check_heads(config: NSAConfig, head_num: int, kv_head_num: int, qk_head_dim: int, v_head_dim: int) -> None:
    if kv_head_num < 1 or head_num % kv_head_num:
        raise ValueError(f"head_num {head_num} is not a multiple of kv_head_num {kv_head_num}")
    if not config.strict:
        return
    advice = "; `strict: false` allows it on other backends"
    group = head_num // kv_head_num
    if group > 32 or 128 % group:
        raise ValueError(f"{group} query heads a key/value head; the Ascend operators take 1, 2, 4, 8, 16 or 32{advice}")
    if qk_head_dim > SELECT_DIMS[0] or v_head_dim > SELECT_DIMS[1]:
        raise ValueError(
            f"head dims {qk_head_dim} (query, key) and {v_head_dim} (value); the Ascend operators take up to "
            f"{SELECT_DIMS[0]} and {SELECT_DIMS[1]}{advice}"
        )
