"""Triton's interpreter without what it works out again at each operation: a quarter of the time is left.

Importing it patches the interpreter, which has to be loaded with TRITON_INTERPRET=1. No number changes.
"""

import dataclasses
import functools
import math

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

# The language is patched anew at each call of a function inside a kernel. These patches are never taken back (a
# launch's own are): once for each function is enough.
_patch_lang_once = functools.cache(interpreter._patch_lang)


def _call_device_function(self, *args, **kwargs):
    _patch_lang_once(self.fn)
    return self.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call_device_function

# Of each sum and product of integers it is worked out whether it overflows, and asserted where kernels are debugged,
# which is nowhere.
_builder = interpreter.interpreter_builder
_builder.options = dataclasses.replace(_builder.options, sanitize_overflow=False)

# A type of blocks, a tensor's sizes and NumPy's name of a type are always the same for the same shape and elements.
_block_types: dict[tuple, dict] = {}
_numpy_types: dict[str, object] = {}
_make_block_type, _find_numpy_type = tl.block_type.__init__, interpreter._get_np_dtype


def _init_block_type(self, element_ty, shape):
    shape = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
    key = element_ty.name, shape
    if key not in _block_types:
        _make_block_type(self, element_ty, list(shape))
        _block_types[key] = vars(self)
    self.__dict__ = _block_types[key].copy()


@functools.cache
def _sizes(shape: tuple[int, ...]) -> tuple[tl.constexpr, tl.tuple]:
    return tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(size) for size in shape])


def _init_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _sizes(tuple(type.shape.values) if type.is_block() else ())


def _get_numpy_type(tt_dtype):
    if (found := _numpy_types.get(tt_dtype.name)) is None:
        found = _numpy_types[tt_dtype.name] = _find_numpy_type(tt_dtype)
    return found


tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype = _init_block_type, _init_tensor, _get_numpy_type

# What is the same needs no closer look.
_equal_types, _broadcast = tl.dtype.__eq__, TritonSemantic.broadcast_impl_value


def _broadcast_unequal(self, lhs, rhs):
    if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values:
        return lhs, rhs
    return _broadcast(self, lhs, rhs)


tl.dtype.__eq__ = lambda self, other: self is other or _equal_types(self, other)
TritonSemantic.broadcast_impl_value = _broadcast_unequal
