"""Numbers for people: 7.0B parameters, 1.4T tokens, 64.7k GPU-hours, lr 3.49e-3."""

from __future__ import annotations

SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def human(value: float) -> str:
    """Formats a count with two or three significant digits and a suffix.

    Args:
        value: A count, for example of parameters, tokens or hours.

    Returns:
        The number with `k`, `M`, `B` or `T`; whole below ten thousand, an exponent from 1e15 on.

    Example:
        >>> human(7e9), human(1.4e12), human(64_700), human(131_072), human(4096), human(12)
        ('7.0B', '1.4T', '64.7k', '131k', '4,096', '12')
    """
    if abs(value) >= 1e15:  # FLOPs of a training run
        return f"{value:.3g}"
    if 999.5 <= abs(value) < 10_000:  # a batch size of 4,096 tokens
        return f"{value:,.0f}"
    for size, suffix in SUFFIXES:
        if abs(value) >= 0.9995 * size:  # 999,600 rounds up to the next suffix
            scaled = value / size
            return f"{scaled:.1f}{suffix}" if abs(scaled) < 99.95 else f"{scaled:.0f}{suffix}"
    return f"{value:g}"


def scientific(value: float, digits: int = 3) -> str:
    """Formats a learning rate or a FLOP count with few digits.

    Args:
        value: The number.
        digits: Significant digits.

    Returns:
        Scientific notation below 0.1 and from ten thousand on, a plain number between.

    Example:
        >>> scientific(0.003488), scientific(0.25), scientific(2.719e15, 2)
        ('3.49e-3', '0.25', '2.7e15')
    """
    if value == 0 or 0.1 <= abs(value) < 1e4:
        return f"{value:.{digits}g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"
