"""How the heads of the folded block are divided, by the CUDA and the Triton kernels alike."""

# Blocks that a launch should have, where dividing the heads can bring them.
PROGRAMS_WANTED = 264


def heads_each(tokens: int, heads: int, rows: int) -> int:
    """Heads that a program of `rows` tokens adds up: as many as leave enough programs to occupy a GPU."""
    wanted = -(-PROGRAMS_WANTED // -(-max(1, tokens) // rows))
    return -(-heads // min(wanted, heads))
