"""The flags of a small model, for jobs under MindSpeed."""

# A GPT of two layers whose large weights let the losses feel an attention that is a few percent wrong.
MODEL = {
    **{"num-layers": 2, "hidden-size": 64, "num-attention-heads": 4, "kv-channels": 16, "seq-length": 1280},
    **{"max-position-embeddings": 1280, "micro-batch-size": 1, "global-batch-size": 2, "train-iters": 3, "lr": 1e-4},
    **{"lr-decay-style": "constant", "position-embedding-type": "rope", "normalization": "RMSNorm", "init-method-std": 0.3},
    **{"tokenizer-type": "NullTokenizer", "vocab-size": 256, "attention-dropout": 0, "hidden-dropout": 0, "eval-iters": 0},
    **{"log-interval": 1, "split": "100,0,0", "optimizer-selection": "fused_torch_adamw"},
    **dict.fromkeys(("disable-bias-linear", "untie-embeddings-and-output-weights", "log-throughput"), True),
    **dict.fromkeys(("no-gradient-accumulation-fusion", "no-masked-softmax-fusion", "use-cpu-initialization"), True),
}
GQA = {"group-query-attention": True, "num-query-groups": 2}
LATENT = {
    **{"multi-latent-attention": True, "kv-lora-rank": 32, "qk-head-dim": 16, "qk-pos-emb-head-dim": 16, "v-head-dim": 16},
    **{"qk-layernorm": True, "nsa-gate": "query", "nsa-separate-kv": "false"},
}
LOCAL, ENGINE = {"transformer-impl": "local"}, {"transformer-impl": "transformer_engine", "use-flash-attn": True}


def arguments(flags: dict) -> list[str]:
    """Flags as a command line has them; a tuple is several words, False and None leave a flag out."""
    line: list[str] = []
    for name, value in flags.items():
        if value is not None and value is not False:
            values = () if value is True else value if isinstance(value, tuple) else (value,)
            line += [f"--{name}", *map(str, values)]
    return line
