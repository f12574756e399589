"""Each aclnn operator of the emulated CANN in plain torch, by name, as the contract says that its kernel behaves.

A kernel reads the input tensors of its arguments and writes the output tensors in place, all on CPU tensors; what it does
not write keeps what was there.
"""

from collections.abc import Callable
from types import SimpleNamespace

from .kernels_common import Refused, Trap
from .kernels_compress import nsa_compress, nsa_compress_attention, nsa_compress_grad
from .kernels_fusion import batched_attention, batched_attention_grad, flash_attention, flash_attention_grad
from .kernels_select import nsa_select_attention, nsa_select_attention_grad
from .variants import Variants

__all__ = ["KERNELS", "Kernel", "Refused", "Trap", "Variants"]

Kernel = Callable[[SimpleNamespace, Variants, bool], None]

KERNELS: dict[str, Kernel] = {
    "aclnnNsaCompress": nsa_compress,
    "aclnnNsaCompressGrad": nsa_compress_grad,
    "aclnnNsaCompressAttention": nsa_compress_attention,
    "aclnnNsaSelectedAttention": nsa_select_attention,
    "aclnnNsaSelectedAttentionGrad": nsa_select_attention_grad,
    "aclnnFlashAttentionScore": batched_attention,
    "aclnnFlashAttentionScoreGrad": batched_attention_grad,
    "aclnnFlashAttentionVarLenScore": flash_attention,
    "aclnnFlashAttentionUnpaddingScoreGrad": flash_attention_grad,
}
