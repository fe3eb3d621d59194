"""Names of blocks, the units of local update."""

SHARED_BLOCK = "shared"


def predictor_block(index: int) -> str:
    """The name of predictor ``index``'s block: p0, p1, ..."""
    return f"p{index}"


def predictor_index(block: str) -> int | None:
    """The predictor of a block; None for the shared block and for stages of the backbone."""
    number = block.removeprefix("p")
    return int(number) if number != block and number.isdigit() else None
