"""`python -m troodon` is `troodon`."""

from troodon.cli import main

if __name__ == "__main__":
    main()
