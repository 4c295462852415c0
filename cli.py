"""`python cli.py` is the same program as the console script `gsrq`."""

from gsrq_export.commands.app import main

if __name__ == "__main__":
    main()
