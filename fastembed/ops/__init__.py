"""The ops: one file per kernel family, each with its checks, schema, fake kernel, autograd and backend choice."""
