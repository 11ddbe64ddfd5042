"""Objects with tensors inside, carried through Ray's object store without copies.

Tensors travel as numpy arrays, which Ray maps into every worker's memory instead of copying
them. What comes out is read-only: a model has to be cloned before it is changed.
"""

from __future__ import annotations

import io
import pickle
import sys
import warnings
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Packed:
    """An object taken apart.

    Attributes:
        skeleton: The object without its tensors.
        arrays: The tensors, in the order of their first use.
    """

    skeleton: bytes
    arrays: list[np.ndarray]


def pack(value: Any) -> Packed:
    """Takes an object apart; shared tensors stay shared."""
    buffer = io.BytesIO()
    packer = _Packer(buffer)
    packer.dump(value)
    return Packed(buffer.getvalue(), packer.arrays)


def unpack(packed: Packed) -> Any:
    """Puts an object together again, over the very memory of the arrays."""
    return _Unpacker(io.BytesIO(packed.skeleton), packed.arrays).load()


class _Packer(cloudpickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.arrays: list[np.ndarray] = []
        self._seen: dict[int, tuple[Any, ...]] = {}
        self._alive: list[Tensor] = []

    def persistent_id(self, value: Any) -> Any:
        if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_quantized:
            return None
        if id(value) not in self._seen:
            data = value.detach().cpu().contiguous()
            dtype = str(data.dtype).removeprefix("torch.")
            # numpy has no bfloat16: bytes carry every type alike.
            array = data.reshape(-1).view(torch.uint8).numpy() if data.numel() else np.zeros(0, np.uint8)
            self._seen[id(value)] = (
                len(self.arrays),
                dtype,
                tuple(value.shape),
                isinstance(value, nn.Parameter),
                value.requires_grad,
            )
            self.arrays.append(array)
            self._alive.append(value)
        return self._seen[id(value)]

    def reducer_override(self, value: Any) -> Any:
        # transformers' hooks read a context variable of its own, which only the module that holds it can give again.
        if isinstance(value, ContextVar) or type(value).__name__ == "CompileableContextVar":
            for module in list(sys.modules.values()):
                for name, found in list(getattr(module, "__dict__", {}).items()):
                    if found is value:
                        return getattr, (module, name)
        return super().reducer_override(value)


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, arrays: list[np.ndarray]) -> None:
        super().__init__(file)
        self._arrays = arrays
        self._made: dict[int, Tensor] = {}

    def persistent_load(self, identity: Any) -> Tensor:
        index, dtype, shape, is_parameter, requires_grad = identity
        if index not in self._made:
            with warnings.catch_warnings():
                # torch warns that the array is read-only; nothing writes to it before cloning.
                warnings.simplefilter("ignore", UserWarning)
                tensor = (
                    torch.frombuffer(self._arrays[index], dtype=getattr(torch, dtype))
                    if self._arrays[index].size
                    else torch.empty(0, dtype=getattr(torch, dtype))
                )
                tensor = tensor.reshape(shape)
            if is_parameter:
                tensor = nn.Parameter(tensor, requires_grad=requires_grad)
            self._made[index] = tensor
        return self._made[index]
