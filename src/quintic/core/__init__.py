"""Ground floor: errors, parameter roles, hardware facts, counter-based random bits, atomic files.

Importing this package does not import torch; ``quintic.core.machine`` does, and is imported by name.
"""

from quintic.core.errors import (
    CheckpointError,
    CodecError,
    ConfigError,
    DataError,
    MissingExtraError,
    QuinticError,
    SamplingError,
    UserError,
    suggest,
)
from quintic.core.roles import Role, declare

__all__ = [
    "CheckpointError",
    "CodecError",
    "ConfigError",
    "DataError",
    "MissingExtraError",
    "QuinticError",
    "Role",
    "SamplingError",
    "UserError",
    "declare",
    "suggest",
]
