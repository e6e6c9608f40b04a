"""``python -m dynadapter.cli`` does what ``dynadapter`` does."""

from dynadapter.cli import main

if __name__ == "__main__":
    main()
