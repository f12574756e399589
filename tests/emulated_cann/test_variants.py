"""The names of the variants."""

import pytest

from .variants import Variants


def test_parse():
    assert Variants.parse("") == Variants()
    assert Variants.parse("ties_reversed, forward_ignores_mask") == Variants(forward_ignores_mask=True, ties_reversed=True)
    with pytest.raises(ValueError, match=r"'ties'.*allowed: forward_ignores_mask,"):
        Variants.parse("ties")
