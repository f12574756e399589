"""Native Sparse Attention (arXiv 2502.11089): compressed tokens, selected blocks and a sliding window, mixed by gates.

T: packed tokens, N1: query heads, N2: key/value heads, D1, D2: dims of query/key and of value.
"""

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor, nn

from . import selection
from .compression import Compression
from .config import NSAConfig
from .ops import library
from .ops.backends import resolve, selects_own_block
from .ops.contract import SELECT_DIMS
from .ops.reference import Compressed
from .samples import Samples

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
    ) -> Tensor:
        """Attend.

        Args:
            query: [T, N1, D1].
            key: [T, N2, D1], or one for each branch: (compress, select, window).
            value: [T, N2, D2], or one for each branch.
            gate: logits [T, N1, 3], in the order of the branches.
            actual_seq_len: prefix sums of the sample lengths, without a leading 0; None: one sample.

        Returns:
            [T, N1, D2].

        Raises:
            ValueError: a shape, a type or the prefix sums do not fit.
        """
        keys, values = ((x,) * 3 if isinstance(x, Tensor) else tuple(x) for x in (key, value))
        self._check_inputs(query, keys, values, gate)
        samples = Samples.of(actual_seq_len, query.shape[0])
        backend = resolve(self.config.backend)
        compressed, topk_indices = self._compress(query, keys[0], values[0], samples, backend)
        selected = library.select_attention(
            *(query, keys[1], values[1], topk_indices),
            *(self.scale, self.config.select_block_size, True, True, samples.ends, samples.ends, samples.q_offset, backend),
        )[0]
        window = library.window_attention(
            *(query, keys[2], values[2]),
            *(self.scale, self.config.window_size, samples.ends, samples.ends, samples.q_offset, backend),
        )[0]
        if self.collect_statistics:
            means = gate.float().sigmoid().mean(dim=(0, 1))
            self.statistics |= {f"gate_{name}": mean.item() for name, mean in zip(BRANCHES, means, strict=True)}
        return library.gated_sum(gate, compressed, selected, window, backend)

    def _compress(self, query: Tensor, key: Tensor, value: Tensor, samples: Samples, backend: str) -> tuple[Tensor, Tensor]:
        """The compressed branch [T, N1, D2], and the blocks for the selected one [T, N2, select_block_count]."""
        key = self.compress_key(key, samples, backend)
        value = self.compress_value(value, samples, backend)
        at = self.settings(samples, backend, query.device)
        together = self.score_group is not None
        here = at._replace(select_block_count=0) if together else at
        attention, ids, row_max, row_sum = library.compress_attention(query, key, value, None, None, *here, backend)
        if self.score_group is not None:
            ids = selection.choose_together(query, key, row_max, row_sum, at, samples, self.score_group, backend)
        ids = selection.in_order(ids)
        if self.collect_statistics:
            self.statistics |= selection.statistics(ids, at, samples)
        return attention, ids

    def settings(self, samples: Samples, backend: str, device: torch.device) -> Compressed:
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
            q_len=samples.ends,
            cmp_len=samples.windows(config.compress_block_size, config.compress_stride),
            sel_len=samples.blocks(config.select_block_size),
            q_offset=samples.q_offset,
        )

    def _check_inputs(self, query: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], gate: Tensor) -> None:
        tokens = query.shape[0]
        expected = {
            "query": ((query,), (tokens, self.head_num, self.qk_head_dim)),
            "key": (keys, (tokens, self.kv_head_num, self.qk_head_dim)),
            "value": (values, (tokens, self.kv_head_num, self.v_head_dim)),
            "gate": ((gate,), (tokens, self.head_num, 3)),
        }
        for name, (tensors, shape) in expected.items():
            if name in ("key", "value") and len(tensors) != len(BRANCHES):
                raise ValueError(f"{name} has {len(tensors)} tensors; allowed: one, or one for each of {', '.join(BRANCHES)}")
            for tensor in tensors:
                if tuple(tensor.shape) != shape:
                    raise ValueError(f"{name} is {list(tensor.shape)}; allowed: {list(shape)}")
                if not tensor.is_floating_point() or (name != "gate" and tensor.dtype != query.dtype):
                    raise ValueError(f"{name} is {tensor.dtype}; allowed: one floating point type for query, key and value")


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
