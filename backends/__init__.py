"""Where a program runs: one file or folder per backend, named for it."""
