"""The command line for tests whose models are small: every block is gathered by itself, as in a large model."""

from quintic.__main__ import main
from quintic.engine import shard

if __name__ == "__main__":
    shard.TOGETHER = 0
    main()
