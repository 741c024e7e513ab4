"""``python -m longrope`` is the same program, so that torchrun can start it."""

from longrope.cli import main

main()
