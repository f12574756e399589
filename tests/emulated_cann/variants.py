"""Where releases of CANN may differ: what the kernels' source leaves open, as switches of the emulation."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Variants:
    """How an installed CANN may differ from the kernels as read; by default in nothing. Sections are the contract's.

    Attributes:
        forward_ignores_mask: the forward of select sees everything, mask or none (section 9, question 1).
        forward_reads_mask: the forward of select reads its mask, as the 2048 x 2048 causal triangle; another mask is a
            trap (sections 6.4 and 9, question 1).
        backward_compares_ids: the backward of select masks by block id, like the forward, in any order of the list
            (section 9, question 2).
        ties_reversed: of blocks with equal scores the one with the larger id comes first (section 9, question 3).
        refuses_unequal_dims: fusion attention takes no value whose dim differs from the key's (section 9, question 5).
        refuses_shortest_keys: select wants more than `select_block_size * select_block_count` keys in a sample, exactly
            that many are refused (section 9, question 8).
    """

    forward_ignores_mask: bool = False
    forward_reads_mask: bool = False
    backward_compares_ids: bool = False
    ties_reversed: bool = False
    refuses_unequal_dims: bool = False
    refuses_shortest_keys: bool = False

    @classmethod
    def parse(cls, names: str) -> "Variants":
        """Switch on the variants in a comma-separated list.

        Raises:
            ValueError: there is no variant of a name.
        """
        chosen = [name.strip() for name in names.split(",") if name.strip()]
        known = [field.name for field in fields(cls)]
        for name in chosen:
            if name not in known:
                raise ValueError(f"no variant {name!r} of the emulated CANN; allowed: {', '.join(known)}")
        return cls(**dict.fromkeys(chosen, True))
