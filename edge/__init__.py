"""The gateway."""

# What a birth, the ledger and `--version` say.
SOFTWARE = "tundish 0.1.0"
