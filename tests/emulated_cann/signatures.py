"""The aclnn operators that are emulated, as torch_npu calls them: the one source for the generated C and for decoding it."""

from typing import NamedTuple

C_TYPES = {"t": "void *", "I": "void *", "i": "int64_t", "s": "const char *", "d": "double"}


class Parameter(NamedTuple):
    """One argument of an aclnn operator.

    Attributes:
        kind: `t` tensor, `I` array of integers, `i` integer, `s` string, `d` double.
        name: what kernels call it.
        output: whether the operator writes it.
    """

    kind: str
    name: str
    output: bool


def _parameters(text: str) -> tuple[Parameter, ...]:
    pairs = (part.split() for part in text.split(","))
    return tuple(Parameter(kind.lstrip(">"), name, kind.startswith(">")) for kind, name in pairs)


# Order of the C arguments of `<name>GetWorkspaceSize`, before the workspace size and the executor. `>` marks outputs.
SIGNATURES = {
    "aclnnNsaCompress": _parameters(
        "t input, t weight, I actual_seq_len, s layout, i compress_block_size, i compress_stride, i actual_seq_len_type,"
        ">t output"
    ),
    "aclnnNsaCompressGrad": _parameters(
        "t grad, t input, t weight, I actual_seq_len, i compress_block_size, i compress_stride, i actual_seq_len_type,"
        "s layout, >t input_grad, >t weight_grad"
    ),
    "aclnnNsaCompressAttention": _parameters(
        "t query, t key, t value, t atten_mask, t topk_mask, I actual_seq_qlen, I actual_cmp_seq_kvlen, I actual_sel_seq_kvlen,"
        "d scale, i head_num, s layout, i sparse_mode, i compress_block_size, i compress_stride, i select_block_size,"
        "i select_block_count, >t softmax_max, >t softmax_sum, >t attention, >t topk_indices"
    ),
    "aclnnNsaSelectedAttention": _parameters(
        "t query, t key, t value, t topk_indices, t atten_mask, I actual_seq_qlen, I actual_seq_kvlen, d scale, i head_num,"
        "s layout, i sparse_mode, i select_block_size, i select_block_count, >t softmax_max, >t softmax_sum, >t attention"
    ),
    "aclnnNsaSelectedAttentionGrad": _parameters(
        "t query, t key, t value, t attention, t grad, t softmax_max, t softmax_sum, t topk_indices, I actual_seq_qlen,"
        "I actual_seq_kvlen, t atten_mask, d scale, i select_block_size, i select_block_count, i head_num, s layout,"
        "i sparse_mode, >t query_grad, >t key_grad, >t value_grad"
    ),
    "aclnnFlashAttentionScore": _parameters(
        "t query, t key, t value, t pse, t drop_mask, t padding_mask, t atten_mask, I prefix, d scale, d keep_prob,"
        "i pre_tokens, i next_tokens, i head_num, s layout, i inner_precise, i sparse_mode, >t softmax_max, >t softmax_sum,"
        ">t softmax_out, >t attention"
    ),
    "aclnnFlashAttentionScoreGrad": _parameters(
        "t query, t key, t value, t grad, t pse, t drop_mask, t padding_mask, t atten_mask, t softmax_max, t softmax_sum,"
        "t softmax_in, t attention, I prefix, d scale, d keep_prob, i pre_tokens, i next_tokens, i head_num, s layout,"
        "i inner_precise, i sparse_mode, >t query_grad, >t key_grad, >t value_grad, >t pse_grad"
    ),
    "aclnnFlashAttentionVarLenScore": _parameters(
        "t query, t key, t value, t pse, t drop_mask, t padding_mask, t atten_mask, I prefix, I actual_seq_qlen,"
        "I actual_seq_kvlen, d scale, d keep_prob, i pre_tokens, i next_tokens, i head_num, s layout, i inner_precise,"
        "i sparse_mode, >t softmax_max, >t softmax_sum, >t softmax_out, >t attention"
    ),
    "aclnnFlashAttentionUnpaddingScoreGrad": _parameters(
        "t query, t key, t value, t grad, t pse, t drop_mask, t padding_mask, t atten_mask, t softmax_max, t softmax_sum,"
        "t softmax_in, t attention, I prefix, I actual_seq_qlen, I actual_seq_kvlen, d scale, d keep_prob, i pre_tokens,"
        "i next_tokens, i head_num, s layout, i inner_precise, i sparse_mode, >t query_grad, >t key_grad, >t value_grad,"
        ">t pse_grad"
    ),
}
