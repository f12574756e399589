"""Native Sparse Attention for MindSpeed and Megatron-core."""

from . import autoload as autoload  # first: it imports torch

# isort: split
from . import ops
from .attention import NativeSparseAttention
from .config import NSAConfig

__all__ = ["NSAConfig", "NativeSparseAttention", "ops"]
