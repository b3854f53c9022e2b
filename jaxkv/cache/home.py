"""Where a KV lives."""

from enum import IntEnum


class Home(IntEnum):
    """In the order of decline: of two homes the worse is the larger, and ``LeanKV`` takes the maximum of two.

    The first two are also the tiers of the quantised store's tables.
    """

    HIGH = 0
    """Quantised, in the tier of more bits."""
    LOW = 1
    """Quantised, in the tier of fewer."""
    RAW = 2
    """Unquantised."""
    GONE = 3
    """Nowhere: evicted, or past its head's end."""


HIGH, LOW, RAW, GONE = Home
