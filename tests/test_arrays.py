"""Arrays of other libraries are read where they lie, and answered as NumPy's."""

import ctypes

import ml_dtypes
import numpy as np
import pytest

import cpunorm
from cpunorm import _dispatch

from .support import assert_same_bits

SHAPE = (2, 6, 5, 3)


def x_of(dtype="float32"):
    return np.random.default_rng(0).normal(2, 3, SHAPE).astype(dtype)


class DLPack:
    """An array of some other library, which exports its memory by DLPack alone."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.device = array, device

    def __dlpack__(self, **options):
        if self.array.dtype != ml_dtypes.bfloat16:
            return self.array.__dlpack__(**options)
        capsule = self.array.view("uint16").__dlpack__()
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        ctypes.c_uint8.from_address(get(capsule, b"dltensor") + 20).value = 4  # code of bfloat
        return capsule

    def __dlpack_device__(self):
        return self.device


class Interface:
    """One that exports it by NumPy's array interface alone."""

    def __init__(self, array):
        self.array = array

    @property
    def __array_interface__(self):
        return self.array.__array_interface__


class Refuses:
    def __dlpack__(self, **options):
        raise BufferError("it is being watched")

    def __dlpack_device__(self):
        return 1, 0


def torchs(array):
    torch = pytest.importorskip("torch")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def jaxs(array):
    return pytest.importorskip("jax").numpy.asarray(array)


def arrows(array):
    return pytest.importorskip("pyarrow").Tensor.from_numpy(array)


def address(a):
    """Where the memory of someone else's array lies."""
    if hasattr(a, "data_ptr"):
        return a.data_ptr()
    if hasattr(a, "unsafe_buffer_pointer"):
        return a.unsafe_buffer_pointer()
    array = getattr(a, "array", a)
    return np.asarray(array).ctypes.data


@pytest.fixture
def addresses(monkeypatch):
    """Where the arrays lie that kernels are given."""
    seen = []
    original = _dispatch.kernel

    def watched(*call):
        kernel = original(*call)

        def around(*arguments):
            seen.extend(a.ctypes.data for a in arguments if isinstance(a, np.ndarray))
            kernel(*arguments)

        return around

    monkeypatch.setattr(_dispatch, "kernel", watched)
    return seen


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("source", [DLPack, Interface, torchs, jaxs, arrows])
def test_read_without_a_copy(source, dtype, addresses, backend):
    if dtype == "bfloat16" and source in (Interface, arrows):
        pytest.skip("it has no bfloat16")
    if dtype == "float64" and source is jaxs:
        pytest.skip("it has no float64 unless told so")
    x = x_of(dtype)
    foreign = source(x)
    y = cpunorm.group_norm(foreign, 2, backend=backend)
    assert type(y) is np.ndarray
    assert address(foreign) in addresses
    assert_same_bits(y, cpunorm.group_norm(x, 2, backend=backend))


@pytest.mark.parametrize("source", [DLPack, Interface, torchs, jaxs, arrows])
def test_every_argument(source):
    x, (weight, bias) = x_of(), np.random.default_rng(1).normal(1, 1, (2, 6)).astype("float32")
    mask = np.random.default_rng(2).random((2, 5, 3)) < 0.7
    plain = cpunorm.group_norm(x, 2, weight, bias, residual=x, mask=mask)
    foreign_mask = mask if source is arrows else source(mask)  # Arrow's tensors have no bool
    given = (source(a) for a in (x, weight, bias, x))
    x_, weight_, bias_, residual = given
    y = cpunorm.group_norm(x_, 2, weight_, bias_, residual=residual, mask=foreign_mask)
    assert_same_bits(y, plain)
    _, stats = cpunorm.group_norm(x, 2, weight, return_stats=True)
    lent = cpunorm.Stats(*map(source, stats))
    gradients = cpunorm.group_norm_backward(source(x), source(x), 2, lent, source(weight))
    assert_same_bits(tuple(gradients), tuple(cpunorm.group_norm_backward(x, x, 2, stats, weight)))


def test_channels_last_tensors_keep_their_strides():
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(x_of()).to(memory_format=torch.channels_last)
    assert cpunorm.group_norm(x, 2).strides == tuple(4 * s for s in x.stride())


@pytest.mark.parametrize("source", [DLPack, Interface, torchs])
def test_running_statistics_are_updated_in_their_memory(source):
    ours, lent = (np.zeros(6, "f4"), np.ones(6, "f4")), (np.zeros(6, "f4"), np.ones(6, "f4"))
    cpunorm.batch_norm(x_of(), *ours, training=True)
    cpunorm.batch_norm(x_of(), *map(source, lent), training=True)
    assert_same_bits(lent, ours)


def test_what_may_not_be_written_is_not():
    jax = pytest.importorskip("jax")
    statistics = jax.numpy.zeros(6), jax.numpy.ones(6)
    with pytest.raises(ValueError, match="running_mean must be writeable"):
        cpunorm.batch_norm(x_of(), *statistics, training=True)


def test_layers_take_them(source=DLPack):
    x = x_of()
    layer, other = cpunorm.BatchNorm(6), cpunorm.BatchNorm(6)
    assert_same_bits(layer(source(x)), other(x))
    assert_same_bits(layer.backward(source(x)), other.backward(x))
    layer(source(x[:0]))
    assert layer.num_batches_tracked == 1


def test_a_memmap_is_plain_memory(tmp_path, addresses):
    x = x_of()
    np.save(tmp_path / "x.npy", x)
    lying = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert_same_bits(
        cpunorm.group_norm(lying, 2, backend="numpy"), cpunorm.group_norm(x, 2, backend="numpy")
    )
    assert lying.ctypes.data in addresses


def test_a_memmap_to_write_to_is_what_comes_back(tmp_path, backend):
    x = x_of()
    given, sum_given = (
        np.memmap(tmp_path / name, x.dtype, "w+", shape=x.shape) for name in ("y", "sum")
    )
    options = {"backend": backend}
    assert cpunorm.group_norm(x, 2, out=given, **options) is given
    assert_same_bits(np.asarray(given), cpunorm.group_norm(x, 2, **options))
    y, total = cpunorm.add_rms_norm(
        x, x, x.shape[-1], out=given, sum_out=sum_given, backend=backend
    )
    assert y is given
    assert total is sum_given
    assert_same_bits(np.asarray(total), x + x)


# --- What is refused -----------------------------------------------------------------------------


class Subclass(np.ndarray):
    """An array that may mean something else by its data."""


class OnlyConverts:
    """What NumPy would convert, who knows how."""

    def __array__(self, dtype=None, copy=None):
        return x_of()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.ma.masked_array(x_of()), "MaskedArray"),
        (np.ones((4, 6), "float32").view(np.matrix), "numpy.matrix"),
        (x_of().view(Subclass), "Subclass"),
        (OnlyConverts(), "OnlyConverts"),
        (x_of().tolist(), "builtins.list"),
        (DLPack(x_of(), device=(2, 0)), "DLPack: it does not lie in the memory of the CPU"),
        (DLPack(x_of("complex64")), "dtype"),
        (Refuses(), "Refuses: it is being watched"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("name", ["x", "residual", "weight"])
def test_refused_by_name(name, value, text):
    arrays = {"x": x_of(), "residual": x_of(), "weight": np.ones(6, "float32"), name: value}
    with pytest.raises(TypeError, match=f"{name} must .*{text}"):
        cpunorm.group_norm(num_groups=2, **arrays)


def test_torch_says_why():
    torch = pytest.importorskip("torch")
    for tensor, text in (
        (torch.ones(SHAPE, requires_grad=True), "detach"),
        (torch.ones(SHAPE, device="meta"), "meta"),
        (torch.ones(SHAPE).to_sparse(), "strided"),
        (torch.complex(torch.ones(SHAPE), torch.ones(SHAPE)).conj().imag, "resolve_neg"),
    ):
        with pytest.raises(TypeError, match=f"x must .*torch.Tensor: .*{text}"):
            cpunorm.group_norm(tensor, 2)


@pytest.mark.parametrize("source", [DLPack, Interface, torchs])
def test_out_is_numpys(source):
    """As for NumPy's own functions: what is returned is out, and what is returned is NumPy's."""
    out = np.zeros(SHAPE, "float32")
    with pytest.raises(TypeError, match=r"out must be a numpy\.ndarray, got"):
        cpunorm.group_norm(x_of(), 2, out=source(out))
    assert not out.any()
