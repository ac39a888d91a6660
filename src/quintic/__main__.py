"""``python -m quintic``, the same as the ``quintic`` command."""

from quintic.cli.app import main

if __name__ == "__main__":
    main()
