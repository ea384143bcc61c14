"""Every change to somebody else's module: one file per target, with its ledger in README.md."""
