"""`python -m pipelines`: the `cascade` command."""

from pipelines.command.cli import main

if __name__ == "__main__":
    main()
