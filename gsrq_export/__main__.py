"""`python -m gsrq_export`, which `torchrun -m gsrq_export` needs, is the same program as `gsrq`."""

from gsrq_export.commands.app import main

if __name__ == "__main__":
    main()
