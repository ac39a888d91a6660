"""``quintic train`` whose main process finds the disk full when it makes the run folder."""

import errno
import os
import sys

from quintic.cli.app import main
from quintic.engine import Run


def full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "initial.safetensors")


if __name__ == "__main__":
    Run.create = full
    sys.exit(main(["train", *sys.argv[1:]]))
