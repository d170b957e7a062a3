"""16-bit floats in memory, float32 in a kernel.

numba has neither float16 nor bfloat16 on a CPU. Here they are storage: a kernel sees `Halves`, an
array whose items it reads and writes as float32, with float32 as its dtype, and is the same code
for every type of x. Each read converts exactly, each write rounds once, to nearest even, and LLVM
vectorises both with the loop around them.

Outside of kernels such an array is one of 16-bit integers, of a type that tells the format.
"""

import operator

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import NumbaTypeError
from numba.extending import intrinsic, lower_builtin, models, register_model

_FORMATS = {types.uint16: "float16", types.int16: "bfloat16"}

_i16, _i32, _half, _single = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()


def as_bits(array):
    """An array of 16-bit floats as numba can be given it."""
    return array.view(np.uint16 if array.dtype == np.float16 else np.int16)


class Halves(types.Array):
    """A flat array of 16-bit floats, indexed by integers that are not negative and nothing else."""

    def __init__(self, format):
        self.format = format
        super().__init__(types.float32, 1, "C", name=f"halves({format})")

    @property
    def key(self):
        return self.format

    def copy(self, **changes):
        # What numba would make of a slice, for one.
        raise NumbaTypeError(f"there is no view of {self}")


register_model(Halves)(models.ArrayModel)


def _opened_type(given):
    if isinstance(given, types.BaseTuple):
        return types.Tuple([_opened_type(item) for item in given])
    if isinstance(given, types.Array) and given.dtype in _FORMATS:
        return Halves(_FORMATS[given.dtype])
    return given


def _opened(context, builder, given, wanted, value):
    if isinstance(given, types.BaseTuple):
        items = cgutils.unpack_tuple(builder, value)
        opened = map(lambda *item: _opened(context, builder, *item), given, wanted, items)
        return context.make_tuple(builder, wanted, opened)
    if not isinstance(given, types.Array):
        return value
    source = context.make_array(given)(context, builder, value)
    array = context.make_array(wanted)(context, builder)
    for name in ("nitems", "itemsize", "shape", "strides"):
        setattr(array, name, getattr(source, name))
    for name in ("meminfo", "parent"):
        setattr(array, name, cgutils.get_null_value(getattr(source, name).type))
    array.data = builder.bitcast(source.data, array.data.type)
    return array._getvalue()


@intrinsic
def open_arrays(typing_context, arguments):
    """A kernel's arguments, with the arrays of 16-bit integers among them as `Halves`.

    The arrays are borrowed: their references are not counted, which would have the threads wait for
    one another.
    """
    opened = _opened_type(arguments)

    def generate(context, builder, signature, values):
        return _opened(context, builder, arguments, opened, values[0])

    return opened(arguments), generate


def _in_hardware(context):
    """Whether the processor converts float16; where not, LLVM would call a function of nobody's."""
    triple, _, features = context.codegen().magic_tuple()
    return "+f16c" in features or triple.startswith(("aarch64", "arm64"))


def _read_float16(context, builder, bits):
    if _in_hardware(context):
        return builder.fpext(builder.bitcast(bits, _half), _single)
    bits = builder.zext(bits, _i32)
    sign = builder.shl(builder.and_(bits, _i32(0x8000)), _i32(16))
    shifted = builder.shl(builder.and_(bits, _i32(0x7FFF)), _i32(13))
    # The exponent as float32 has it: a product, which makes subnormals right too.
    product = builder.fmul(builder.bitcast(shifted, _single), _single(2.0**112))
    beyond = builder.icmp_unsigned(">=", shifted, _i32(0x7C00 << 13))
    infinite = builder.or_(shifted, _i32(0x7F800000))
    magnitude = builder.select(beyond, infinite, builder.bitcast(product, _i32))
    return builder.bitcast(builder.or_(magnitude, sign), _single)


def _write_float16(context, builder, value):
    if _in_hardware(context):
        return builder.bitcast(builder.fptrunc(value, _half), _i16)
    bits = builder.bitcast(value, _i32)
    sign = builder.and_(builder.lshr(bits, _i32(16)), _i32(0x8000))
    magnitude = builder.and_(bits, _i32(0x7FFFFFFF))
    # What overflows becomes infinite, without harm to the rest.
    large = builder.fmul(builder.bitcast(magnitude, _single), _single(2.0**112))
    scaled = builder.fmul(large, _single(2.0**-110))
    # Rounded by the addition of a power of two whose last place is that of the result.
    exponent = builder.and_(magnitude, _i32(0x7F800000))
    least = builder.icmp_unsigned("<", exponent, _i32(0x38800000))
    exponent = builder.select(least, _i32(0x38800000), exponent)
    power = builder.bitcast(builder.add(exponent, _i32(0x07800000)), _single)
    rounded = builder.bitcast(builder.fadd(power, scaled), _i32)
    kept = builder.and_(builder.lshr(rounded, _i32(13)), _i32(0x7C00))
    finite = builder.add(kept, builder.and_(rounded, _i32(0xFFF)))
    is_nan = builder.fcmp_unordered("uno", value, value)
    result = builder.select(is_nan, _i32(0x7E00), finite)
    return builder.trunc(builder.or_(result, sign), _i16)


def _read_bfloat16(context, builder, bits):
    return builder.bitcast(builder.shl(builder.zext(bits, _i32), _i32(16)), _single)


def _write_bfloat16(context, builder, value):
    bits = builder.bitcast(value, _i32)
    high = builder.lshr(bits, _i32(16))
    below_half = builder.add(_i32(0x7FFF), builder.and_(high, _i32(1)))
    rounded = builder.lshr(builder.add(bits, below_half), _i32(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, _i32(0x7FC0), rounded), _i16)


_READ = {"float16": _read_float16, "bfloat16": _read_bfloat16}
_WRITE = {"float16": _write_float16, "bfloat16": _write_bfloat16}


def _item(context, builder, halves, array, index):
    data = context.make_array(halves)(context, builder, array).data
    return builder.gep(builder.bitcast(data, _i16.as_pointer()), [index])


@lower_builtin(operator.getitem, Halves, types.Integer)
def _read(context, builder, signature, values):
    halves = signature.args[0]
    item = _item(context, builder, halves, *values)
    return _READ[halves.format](context, builder, builder.load(item))


@lower_builtin(operator.setitem, Halves, types.Integer, types.Any)
def _write(context, builder, signature, values):
    halves, _, number = signature.args
    *place, value = values
    single = context.cast(builder, value, number, types.float32)
    item = _item(context, builder, halves, *place)
    builder.store(_WRITE[halves.format](context, builder, single), item)
