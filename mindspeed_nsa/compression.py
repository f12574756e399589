"""The learned pooling of key and value windows (paper, equation 7)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import NSAConfig
from .ops import library
from .samples import Samples


class Compression(nn.Module):
    """Pools every `compress_block_size` tokens, one window each `compress_stride` tokens, into one compressed token.

    Args:
        config: `compression`, the window sizes and `intra_block_position` are read.
        kv_head_num: key/value heads held here, N2.
        head_dim: dim of the keys or the values, D.
        of_keys: whether keys are pooled. Pooled linearly, a position would add one vector to every compressed key, which no
            softmax sees; so keys have positions with `mlp` alone.

    Attributes:
        weight: `linear`: [compress_block_size, N2], one weight for each token of a window and head. It starts near the mean,
            normal around 1 / compress_block_size with a tenth of that as deviation.
        position: [compress_block_size, N2, D], added to the tokens of a window by their place in it, with
            `intra_block_position`. It starts normal with deviation 0.02.
        up, down: `mlp`: [D, compress_block_size * D] and [D, D], shared by the heads; the paper gives no width. They start
            normal with the deviation that keeps the scale of their input.
    """

    def __init__(self, config: NSAConfig, kv_head_num: int, head_dim: int, *, of_keys: bool) -> None:
        super().__init__()
        self.kind, self.block_size, self.stride = config.compression, config.compress_block_size, config.compress_stride
        self.weight: nn.Parameter | None = None
        self.position: nn.Parameter | None = None
        if self.kind == "linear":
            self.weight = nn.Parameter(torch.empty(self.block_size, kv_head_num))
            nn.init.normal_(self.weight, mean=1 / self.block_size, std=0.1 / self.block_size)
        if config.intra_block_position and (self.kind == "mlp" or not of_keys):
            self.position = nn.Parameter(torch.empty(self.block_size, kv_head_num, head_dim))
            nn.init.normal_(self.position, std=0.02)
        if self.kind == "mlp":
            self.up = nn.Parameter(torch.empty(head_dim, self.block_size * head_dim))
            self.down = nn.Parameter(torch.empty(head_dim, head_dim))
            for matrix in (self.up, self.down):
                nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5)

    def forward(self, tokens: Tensor, samples: Samples, backend: str) -> Tensor:
        """[T, N2, D] to [windows, N2, D]; no window crosses samples, a tail that fills none is dropped."""
        return self._network(tokens, samples) if self.kind == "mlp" else self._pool(tokens, samples, backend)

    def _pool(self, tokens: Tensor, samples: Samples, backend: str) -> Tensor:
        if self.weight is None:
            weight = tokens.new_full((self.block_size, tokens.shape[1]), 1 / self.block_size)
        else:
            weight = self.weight.to(tokens.dtype)
        pooled = library.compress(tokens, weight, self.block_size, self.stride, samples.ends, backend)
        if self.position is None:
            return pooled
        # Pooling is linear, so positions pool apart from the tokens, once for all windows.
        return pooled + torch.einsum("jn,jnd->nd", weight, self.position.to(tokens.dtype))

    def _network(self, tokens: Tensor, samples: Samples) -> Tensor:
        windows = tokens[samples.window_tokens(self.block_size, self.stride, tokens.device)]  # [windows, l, N2, D]
        if self.position is not None:
            windows = windows + self.position.to(tokens.dtype)
        hidden = F.linear(windows.transpose(1, 2).flatten(2), self.up.to(tokens.dtype))
        return F.linear(F.gelu(hidden), self.down.to(tokens.dtype))
