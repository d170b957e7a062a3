"""Every numba option of the package, and how a kernel is compiled and launched.

A kernel is a sequence of stages, functions `stage(task, arguments)` that do one task of several. It
is compiled once, with a callback that a loop over the tasks of a stage calls by address, and all
kernels share two such loops: a serial one and a prange. Were the loop part of the kernel, it would
be compiled twice, which takes three times as long, and the two would not always round alike.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.core.compiler import Compiler
from numba.extending import intrinsic

from .halves import as_bits, open_arrays
from .streams import fence

Array = np.ndarray[Any, Any]

# Neither `nnan` nor `ninf`: NaN and Inf must survive, and stay in the statistic they belong to. Nor
# `contract`: a loop that stores is compiled twice, vectorised and, for arrays that overlap, scalar;
# the two would fuse different products.
_STRICT = {"nsz", "arcp"}
OPTIONS = {"error_model": "numpy", "fastmath": _STRICT, "boundscheck": False}
# No array of a sweep overlaps another, so there is one loop.
_SWEEP_OPTIONS = {**OPTIONS, "fastmath": {*_STRICT, "contract"}}
# A sum over a whole loop is not vectorised in the order it is written. Such a loop stores nothing,
# so there is only one of it.
_SUM_OPTIONS = {**OPTIONS, "fastmath": {*_STRICT, "contract", "reassoc"}}

# What only kernels call needs neither a wrapper for Python nor a place in the cache: it is linked
# into them. That halves the time to compile.
_LINKED = {"nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
jit = numba.njit(**_LINKED, **OPTIONS)
jit_sum = numba.njit(**_LINKED, **_SUM_OPTIONS)
_inlined = numba.njit(inline="always", **_LINKED, **OPTIONS)


class _Restricted(Compiler):
    """What `restrict` says in C: what is written through one argument is read through no other."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.state.flags.noalias = True


# For loops that store: without, each begins by looking whether any two of its arrays overlap, which
# takes longer than a short row.
sweep = numba.njit(pipeline_class=_Restricted, **_LINKED, **_SWEEP_OPTIONS)


_FREE: AbstractContextManager[Any] = nullcontext()


@lru_cache
def _one_launch() -> AbstractContextManager[Any]:
    """Held while threads work: numba's `workqueue` layer dies of two launches at once."""
    return threading.Lock() if numba.threading_layer() == "workqueue" else _FREE


def _digest() -> str:
    """numba's cache only watches the file of the function itself; this watches the package."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return blake2b(b"".join(map(Path.read_bytes, sources)), digest_size=6).hexdigest()


_DIGEST = _digest()


def _with_cache(decorator: Any, function: FunctionType, *arguments: Any, **options: Any) -> Any:
    """A compiled function; cached, where there is a place for it: elsewhere numba would raise."""
    try:
        return decorator(*arguments, cache=True, **options, **OPTIONS)(function)
    except RuntimeError:
        return decorator(*arguments, **options, **OPTIONS)(function)


def once(function: FunctionType, **options: Any) -> Any:
    """For what is not linked into others, but called from Python or at its address."""
    function.__qualname__ += f"_{_DIGEST}"
    return _with_cache(numba.njit, function, nogil=True, **options)


_callbacks: dict[Any, Any] = {}


def address_of(function: FunctionType, signature: Any) -> int:
    """Where the function is once compiled for a signature, for others to call it there."""
    key = function, signature
    if key not in _callbacks:
        # Should two threads come here at once, both get the one that is kept alive.
        _callbacks.setdefault(key, _with_cache(numba.cfunc, function, signature))
    return _callbacks[key].address


@intrinsic
def call_address(typing_context, address, first, second):
    """Call the function void(intp, intp) at an address."""

    def generate(context, builder, signature, values):
        address, *arguments = values
        function = ir.FunctionType(ir.VoidType(), (cgutils.intp_t, cgutils.intp_t))
        builder.call(builder.inttoptr(address, function.as_pointer()), arguments)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def _launch(typing_context, loop, tasks, threads, stage, plan, arguments):
    """In an entry: call loop(callback, tasks, address, threads); callback(i, address) is task i."""
    argument_types = (types.intp, types.intp, plan, arguments)
    intp = cgutils.intp_t

    def generate(context, builder, signature, values):
        loop, tasks, threads, *packed = values
        slot = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, packed))

        name = builder.module.get_unique_name("callback")
        callback = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), (intp, intp)), name)
        callback.linkage = "internal"
        body = ir.IRBuilder(callback.append_basic_block())
        task, address = callback.args
        stage, *rest = cgutils.unpack_tuple(body, body.load(body.inttoptr(address, slot.type)))
        single = stage, task, *rest
        # Its status is not asked for: all a kernel can fail at is a few kilobytes of scratch.
        context.call_conv.call_function(body, builder.function, types.none, argument_types, single)
        body.ret_void()

        loop_type = ir.FunctionType(ir.VoidType(), (intp, intp, intp, intp))
        builder.call(
            builder.inttoptr(loop, loop_type.as_pointer()),
            (builder.ptrtoint(callback, intp), tasks, builder.ptrtoint(slot, intp), threads),
        )
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp, plan, arguments), generate


_ALL = -1
_STAGES, _ORDER = None, ()  # every entry has its own among its globals


def _entry(stage, task, plan, arguments):
    """One task of a stage; or all tasks of all of them, with the threads and counts of `plan`."""
    if stage == _ALL:
        serial_loop, parallel_loop, most = plan[:3]
        counts = plan[3:]
        for stage in range(len(counts)):
            threads = min(most, abs(counts[stage]))
            loop = serial_loop if threads <= 1 else parallel_loop
            _launch(loop, counts[stage], threads, _ORDER[stage], plan, arguments)
    else:
        _STAGES(stage, task, open_arrays(arguments))
        fence()


def _in_turn(first, *others):
    """One function stage(number, task, arguments) of several."""
    first = _inlined(first)
    if not others:
        return _inlined(lambda stage, task, arguments: first(task, arguments))
    rest = _in_turn(*others)

    @_inlined
    def choose(stage, task, arguments):
        if stage == 0:
            first(task, arguments)
        else:
            rest(stage - 1, task, arguments)

    return choose


@jit
def _share(callback, tasks, address, part, parts):
    """Do one of `parts` shares of the tasks; fewer than none stands for that many, last first."""
    count = abs(tasks)
    first = count * part // parts
    stop = count * (part + 1) // parts
    for i in range(first, stop):
        call_address(callback, i if tasks > 0 else ~(first + stop - 1 - i), address)


def _serial_loop(callback, tasks, address, threads):
    _share(callback, tasks, address, 0, 1)


def _prange(callback, tasks, address, threads):
    for part in prange(threads):
        _share(callback, tasks, address, part, threads)


_compiled_prange = once(_prange, parallel=True)


@intrinsic
def _swap_num_threads(typing_context, number):
    """Set numba's number of threads and return what it was; numba's own cannot be cached."""

    def generate(context, builder, signature, values):
        (number,) = values
        get = ir.FunctionType(cgutils.int32_t, ())
        get = cgutils.get_or_insert_function(builder.module, get, "get_num_threads")
        set_ = ir.FunctionType(ir.VoidType(), (cgutils.int32_t,))
        set_ = cgutils.get_or_insert_function(builder.module, set_, "set_num_threads")
        before = builder.call(get, ())
        builder.call(set_, (builder.trunc(number, cgutils.int32_t),))
        return builder.sext(before, cgutils.intp_t)

    return types.intp(types.intp), generate


def _parallel_loop(callback, tasks, address, threads):
    before = _swap_num_threads(threads)
    _compiled_prange(callback, tasks, address, threads)
    _swap_num_threads(before)


@lru_cache
def _loop_address(function: FunctionType) -> int:
    return address_of(function, types.void(types.intp, types.intp, types.intp, types.intp))


@lru_cache
def _parallel_loop_address() -> int:
    numba.get_num_threads()  # starts what the loop is linked with
    return _loop_address(_parallel_loop)


def kernel(*stages: FunctionType) -> Callable[..., None]:
    """Compile stages, `stage(i, arguments)`; return a function that runs each for every i in turn.

    That function takes the largest number of threads and how many tasks each stage has, then the
    arguments. Where the number is negative, the tasks are ~i, and a thread does its own in the
    opposite order: on the way back it meets first what it left in its cache. One thread touches no
    thread pool, which is what makes it safe in a forked child.
    """
    # numba puts the cache beside the file that it takes the code to be from.
    last = stages[-1].__code__
    code = _entry.__code__.replace(co_filename=last.co_filename, co_firstlineno=last.co_firstlineno)
    name = "".join(stage.__name__ for stage in stages)
    different = list(dict.fromkeys(stages))
    own = {"_STAGES": _in_turn(*different), "_ORDER": tuple(map(different.index, stages))}
    entry = FunctionType(code, globals() | own, name)
    entry.__module__ = stages[-1].__module__
    entry = once(entry)

    def launch(threads: int, counts: tuple[int, ...], *arguments: Any) -> None:
        serial = _loop_address(_serial_loop)
        if threads == 1:
            entry(_ALL, 0, (serial, serial, 1, *counts), arguments)
            return
        parallel = _parallel_loop_address()
        threads = min(threads, numba.config.NUMBA_NUM_THREADS)
        with _one_launch():
            entry(_ALL, 0, (serial, parallel, threads, *counts), arguments)

    return launch


class _Unlocked:
    def __init__(self, array: Array) -> None:
        self.base = array
        data = array.ctypes.data, False
        self.__array_interface__ = {**array.__array_interface__, "data": data}


def _as_plain(array: Array) -> Array:
    if array.itemsize == 2:
        array = as_bits(array)
    return (array if array.flags.writeable else np.asarray(_Unlocked(array))).ravel()


@lru_cache
def _nothing(dtype: np.dtype[Any]) -> Array:
    return _as_plain(np.empty(0, dtype))


def flat(like: Array, *arrays: Array | None) -> tuple[Array, ...]:
    """Arrays in one dimension; None becomes an empty array of the dtype of `like`.

    So that no argument asks for a compilation of its own: neither None nor a read-only array, which
    numba takes for a type apart. Floats of 16 bits become integers.
    """
    # All in one expression for the usual kind: this is a good part of a short call.
    nothing = _nothing(like.dtype)
    return tuple([
        nothing if a is None
        else a.ravel() if a.itemsize > 2 and a.flags.writeable
        else _as_plain(a)
        for a in arrays
    ])  # fmt: skip
