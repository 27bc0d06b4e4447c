"""What a weighting says of a field that it cannot take."""


def expect(holds: bool, field: str, value: object, expected: str) -> None:
    """Refuse a value, by name and with what was expected; a comparison with NaN does not hold.

    Raises:
        ValueError: `holds` is false.
    """
    if not holds:
        raise ValueError(f"{field} is {value!r}; expected {expected}")
