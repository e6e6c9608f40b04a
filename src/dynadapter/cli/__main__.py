"""Run ``dynadapter`` by ``python -m dynadapter.cli``."""

from dynadapter.cli import main

if __name__ == "__main__":
    main()
