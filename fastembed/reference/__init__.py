"""Plain PyTorch, one file per kernel family: the definition of each op, and the truth that the tests compare with."""
