"""The command line: one file per verb, wired in ``app``. Importing it does not import torch."""
