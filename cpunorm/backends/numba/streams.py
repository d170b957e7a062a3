"""The way of a large result past the caches: stores that do not read a line before they write it.

They take whole lines of memory, so what goes there was put together in L1 first. Only the types
that numba has are stored like this; 16-bit floats are not.

Where such stores are under way, nothing may be counted: a reference count is changed by an atomic
instruction, which waits until memory has taken all of them. Hence a room that nobody owns.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LINE = 64  # bytes, and a multiple of every vector
BLOCK = 2048  # elements that are swept several times from L1


@intrinsic
def room(typing_context, like, wanted):
    """Room for a block in the type `like` is read as, or for nothing: on the stack of a kernel."""
    array_type = types.Array(like.dtype, 1, "C")

    def generate(context, builder, signature, values):
        element = context.get_value_type(array_type.dtype)
        size = context.get_constant(types.intp, context.get_abi_sizeof(element))
        block, nothing = (context.get_constant(types.intp, n) for n in (BLOCK, 0))
        array = context.make_array(array_type)(context, builder)
        place = cgutils.alloca_once(builder, element, block)
        place.align = LINE  # or every vector would lie in two lines
        context.populate_array(
            array,
            data=place,
            shape=[builder.select(values[1], block, nothing)],
            strides=[size],
            itemsize=size,
            meminfo=None,
        )
        return array._getvalue()

    return array_type(like, types.boolean), generate


@intrinsic
def store_lines(typing_context, z, first, y, start, count):
    """Copy the whole lines among `count` elements of z to y, where a line begins at `start`.

    Return how many elements that were.
    """

    def generate(context, builder, signature, values):
        z_value, first, y_value, start, count = values
        if type(y) is not types.Array:
            return cgutils.intp_t(0)
        element = context.get_value_type(y.dtype)
        size = context.get_abi_sizeof(element)
        width = cgutils.intp_t(LINE // size)
        vector = ir.VectorType(element, LINE // size).as_pointer()
        past = builder.module.add_metadata([ir.IntType(32)(1)])

        def place(array, value, index):
            data = context.make_array(array)(context, builder, value).data
            return builder.bitcast(builder.gep(data, [index]), vector)

        lines = builder.udiv(count, width)
        with cgutils.for_range(builder, lines) as loop:
            offset = builder.mul(loop.index, width)
            source = place(z, z_value, builder.add(first, offset))
            target = place(y, y_value, builder.add(start, offset))
            store = builder.store(builder.load(source, align=size), target, align=LINE)
            store.set_metadata("nontemporal", past)
        return builder.mul(lines, width)

    return types.intp(z, types.intp, y, types.intp, types.intp), generate


@intrinsic
def fence(typing_context):
    """See to it that other threads see what was stored, which these stores alone do not."""

    def generate(context, builder, signature, values):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate
