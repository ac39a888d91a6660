"""A table of constants in a module: a buffer that follows from sizes, so that no checkpoint holds it.

It has to be there whenever the weights are. A model made on the meta device gets its weights after the constructor, and
by ways that know nothing of such a table: ``to_empty`` hands out memory with anything in it, and
``load_state_dict(assign=True)`` leaves on the meta device what is not saved.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

__all__ = ["ModuleWithTable"]


class ModuleWithTable(nn.Module):
    """A module with one table, which is computed anew where the module leaves the meta device.

    A cast of the module casts a real table, but never a complex one: ``to(dtype)`` would drop the imaginary parts.
    """

    table_name: ClassVar[str]
    """Attribute that holds it."""

    @abstractmethod
    def compute_table(self) -> Tensor:
        """The table, from sizes alone."""

    def register_table(self) -> None:
        """Make the table, where the weights are; the last thing that a constructor does before it fills these."""
        self.register_buffer(self.table_name, None, persistent=False)
        self._make(next(self.parameters()).device)
        self.register_load_state_dict_post_hook(_after_load)

    def _make(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        with torch.device("cpu"):  # the same bits everywhere, whatever the device of a context
            table = self.compute_table()
        self._put(table, device, dtype or table.dtype)

    def _put(self, table: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        setattr(self, self.table_name, table.to(device, table.dtype if table.is_complex() else dtype))

    def _apply(self, fn, recurse=True):
        before: Tensor = getattr(self, self.table_name)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Casting complex values to real")
            super()._apply(fn, recurse)
        after: Tensor = getattr(self, self.table_name)
        if before.is_meta and not after.is_meta:
            self._make(after.device, after.dtype)
        else:  # not the values of ``fn``: to_empty has none
            self._put(before, after.device, after.dtype)
        return self


def _after_load(module: ModuleWithTable, incompatible_keys: object) -> None:
    weight = next(module.parameters())
    if getattr(module, module.table_name).is_meta and not weight.is_meta:
        module._make(weight.device, weight.dtype)
