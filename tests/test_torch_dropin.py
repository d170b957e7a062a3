"""`cpunorm.torch`: what accelerate promises of a model, and the functions of tensors."""

import copy
import io
import warnings

import numpy as np
import pytest

with warnings.catch_warnings():  # torch's affair
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")

import cpunorm.torch as ours
from cpunorm.torch import _memory, _modules

nn, F = torch.nn, torch.nn.functional

MODULES = {
    "BatchNorm1d": (lambda **k: nn.BatchNorm1d(6, **k), (5, 6, 7)),
    "BatchNorm1d of rows": (lambda **k: nn.BatchNorm1d(6, **k), (9, 6)),
    "BatchNorm2d": (lambda **k: nn.BatchNorm2d(6, **k), (3, 6, 5, 4)),
    "BatchNorm2d, cumulative": (lambda **k: nn.BatchNorm2d(6, momentum=None, **k), (3, 6, 5, 4)),
    "BatchNorm2d, untracked": (
        lambda **k: nn.BatchNorm2d(6, track_running_stats=False, **k),
        (3, 6, 5, 4),
    ),
    "BatchNorm2d, plain": (lambda **k: nn.BatchNorm2d(6, affine=False, **k), (3, 6, 5, 4)),
    "BatchNorm3d": (lambda **k: nn.BatchNorm3d(6, **k), (2, 6, 3, 4, 5)),
    "InstanceNorm1d": (lambda **k: nn.InstanceNorm1d(6, affine=True, **k), (3, 6, 11)),
    "InstanceNorm2d": (lambda **k: nn.InstanceNorm2d(6, **k), (3, 6, 5, 4)),
    "InstanceNorm2d, tracked": (
        lambda **k: nn.InstanceNorm2d(6, affine=True, track_running_stats=True, **k),
        (3, 6, 5, 4),
    ),
    "InstanceNorm2d, no batch": (lambda **k: nn.InstanceNorm2d(6, **k), (6, 5, 4)),
    "InstanceNorm3d": (lambda **k: nn.InstanceNorm3d(6, affine=True, **k), (2, 6, 3, 4, 5)),
    "GroupNorm": (lambda **k: nn.GroupNorm(3, 6, **k), (2, 6, 5, 4)),
    "GroupNorm, plain": (lambda **k: nn.GroupNorm(3, 6, affine=False, **k), (2, 6, 9)),
    "LayerNorm": (lambda **k: nn.LayerNorm(8, **k), (3, 5, 8)),
    "LayerNorm over two axes": (lambda **k: nn.LayerNorm((5, 8), **k), (3, 5, 8)),
    "LayerNorm without bias": (lambda **k: nn.LayerNorm(8, bias=False, **k), (3, 5, 8)),
    "RMSNorm": (lambda **k: nn.RMSNorm(8, **k), (3, 5, 8)),
    "RMSNorm with eps": (lambda **k: nn.RMSNorm(8, eps=1e-3, **k), (3, 5, 8)),
}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@pytest.fixture(autouse=True)
def every_size_and_every_warning(monkeypatch):
    _modules._said.clear()
    for module in _modules.OURS.values():
        monkeypatch.setattr(module, "least_bytes", (0, 0), raising=False)


def pair(name, dtype=torch.float32, **options):
    """A module of torch, its copy on our kernels, and the shape of its input."""
    make, shape = MODULES[name]
    torch.manual_seed(0)
    theirs = make(dtype=dtype, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    return theirs, ours.accelerate(copy.deepcopy(theirs)), shape


def inputs(shape, dtype=torch.float32, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator) + 1).to(dtype).requires_grad_(**options)


def assert_close(a, b, dtype=torch.float32):
    assert a.dtype == b.dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(a, b, atol=10 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_values_gradients_and_state_are_torchs(name, dtype):
    theirs, mine, shape = pair(name, dtype)
    for training in (True, True, False):
        theirs.train(training), mine.train(training)
        x, x_mine = inputs(shape, dtype), inputs(shape, dtype)
        y, y_mine = theirs(x), mine(x_mine)
        assert_close(y_mine, y, dtype)
        assert y_mine.stride() == y.stride()
        grad_y = inputs(shape, dtype, seed=1).detach()
        y.backward(grad_y), y_mine.backward(grad_y)
        assert_close(x_mine.grad, x.grad, dtype)
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert_close(p.grad, q.grad, dtype)
        state, wanted = mine.state_dict(), theirs.state_dict()
        assert list(state) == list(wanted)
        for key in state:
            assert_close(state[key], wanted[key], dtype)
        with torch.no_grad():
            assert_close(mine(x), theirs(x), dtype)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch of its own RMS norm
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_parameters_in_float32_beside_16_bits(name, dtype):
    theirs, mine, shape = pair(name)
    x, x_mine = inputs(shape, dtype), inputs(shape, dtype)
    y, y_mine = theirs(x), mine(x_mine)
    assert_close(y_mine, y, dtype)
    y.sum().backward(), y_mine.sum().backward()
    assert x_mine.grad.dtype == dtype
    for p in mine.parameters():
        assert p.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["BatchNorm2d", "BatchNorm3d", "GroupNorm", "InstanceNorm2d", "InstanceNorm3d"]
)
def test_channels_last_is_kept(name):
    theirs, mine, shape = pair(name)
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x, x_mine = (inputs(shape).detach().to(memory_format=last).requires_grad_() for _ in range(2))
    y, y_mine = theirs(x), mine(x_mine)
    assert_close(y_mine, y)
    assert y_mine.is_contiguous(memory_format=last)
    grad_y = inputs(shape, seed=1).detach()  # in C order
    y.backward(grad_y), y_mine.backward(grad_y)
    assert_close(x_mine.grad, x.grad)
    assert x_mine.grad.is_contiguous(memory_format=last)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("shape", [(3, 6, 5, 8), (2, 6, 3, 5, 8)])
def test_rms_norm_keeps_channels_last_as_torchs(shape, axes):
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    size = shape[-axes:]
    theirs, weight = nn.RMSNorm(size), inputs(size, seed=2).detach()
    theirs.weight = nn.Parameter(weight)
    mine = ours.accelerate(copy.deepcopy(theirs))
    for call in (mine, lambda x: ours.rms_norm(x, size, mine.weight)):
        x, x_mine = (inputs(shape).detach().to(memory_format=last) for _ in range(2))
        x.requires_grad_(), x_mine.requires_grad_()
        mine.zero_grad(), theirs.zero_grad()
        y, y_mine = theirs(x), call(x_mine)
        assert_close(y_mine, y)
        assert y_mine.stride() == y.stride() == x.stride()
        y.square().sum().backward(), y_mine.square().sum().backward()
        assert_close(x_mine.grad, x.grad)
        assert_close(mine.weight.grad, theirs.weight.grad)


def test_rms_norm_does_not_copy_channels_last(monkeypatch):
    from cpunorm import functional

    seen, original = [], functional.rms_norm
    watched = lambda x, *a, **k: seen.append(x.ctypes.data) or original(x, *a, **k)  # noqa: E731
    monkeypatch.setattr(functional, "rms_norm", watched)
    x = inputs((3, 6, 5, 8)).detach().to(memory_format=torch.channels_last)
    ours.accelerate(nn.RMSNorm(8))(x), ours.rms_norm(x, 8)
    assert seen == [x.data_ptr()] * 2


def test_where_instance_norms_lie_does_not_depend_on_their_size(monkeypatch):
    monkeypatch.setattr(_modules.InstanceNorm2d, "least_bytes", (1024, 1024))
    mine = ours.accelerate(nn.InstanceNorm2d(4))
    for size in (4, 40):
        x = inputs((2, 4, size, size)).detach()
        assert mine(x).is_contiguous()
        assert mine(x[0]).is_contiguous()
        last = x.to(memory_format=torch.channels_last)
        assert mine(last).stride() == last.stride()


@pytest.mark.parametrize("name", ["BatchNorm2d", "GroupNorm", "LayerNorm", "RMSNorm"])
def test_any_strides(name):
    theirs, mine, shape = pair(name)
    for x in (
        inputs((*shape[:-2], shape[-1], shape[-2])).detach().transpose(-1, -2),
        inputs((*shape[:-1], 2 * shape[-1])).detach()[..., ::2],
        inputs((1, *shape[1:])).detach().expand(shape),
    ):
        y, y_mine = theirs(x), mine(x)
        assert_close(y_mine, y)
        assert y_mine.stride() == y.stride()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_gradcheck(name, training):
    """First and second derivatives, with respect to the input and every parameter."""
    _, mine, shape = pair(name, torch.float64)
    mine.train(training)
    names = [n for n, _ in mine.named_parameters()]

    def function(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(mine, given, x)

    arguments = inputs(shape, torch.float64), *mine.parameters()
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


ARRIVALS = {
    "negated when read": lambda g: torch._neg_view(-g),
    "imaginary part of a conjugate": lambda g: torch.complex(g, -g).conj().imag,
    "sparse": lambda g: g.to_sparse(),
    "expanded": lambda g: g[:1, :1].expand(g.shape),
}


@pytest.mark.parametrize("arrival", ARRIVALS)
@pytest.mark.parametrize(
    "name", ["BatchNorm2d", "InstanceNorm2d", "GroupNorm", "LayerNorm", "RMSNorm"]
)
def test_gradients_however_they_arrive(name, arrival):
    theirs, mine, shape = pair(name)
    x, x_mine = inputs(shape), inputs(shape)
    grad_y = ARRIVALS[arrival](inputs(shape, seed=1).detach())
    theirs(x).backward(grad_y.to_dense() if grad_y.is_sparse else grad_y.clone())
    mine(x_mine).backward(grad_y)
    assert_close(x_mine.grad, x.grad)
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert_close(p.grad, q.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_negated_when_read(dtype):
    x, weight = (inputs(s, dtype).detach() for s in ((3, 6, 5), (6,)))
    y = ours.group_norm(torch._neg_view(-x), 3, torch._neg_view(-weight))
    assert torch.equal(y, ours.group_norm(x, 3, weight))
    z = torch.randn(3, 6, dtype=torch.complex64)
    assert torch.equal(ours.layer_norm(z.conj().imag, 6), ours.layer_norm(-z.imag, 6))
    memory = torch.zeros(6, dtype=dtype)
    running = torch._neg_view(memory), torch.ones(6, dtype=dtype)
    with pytest.raises(ValueError, match=r"running statistics .* must not be negated"):
        ours.batch_norm(x, *running, training=True)
    assert not memory.any() and (running[1] == 1).all()
    assert torch.equal(ours.batch_norm(x, *running), ours.batch_norm(x, memory, running[1]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's vmap
def test_batches_of_gradients(name, training):
    """What gradcheck, vectorized Jacobians and `is_grads_batched` pass through a backward."""
    theirs, mine, shape = pair(name, torch.float64)
    theirs.train(training), mine.train(training)
    x, batch = inputs(shape, torch.float64), inputs((3, *shape), torch.float64, seed=1).detach()
    found, wanted = (
        torch.autograd.grad(m(x), (x, *m.parameters()), batch, is_grads_batched=True)
        for m in (mine, theirs)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    jacobians = (torch.autograd.functional.jacobian(m, x, vectorize=True) for m in (mine, theirs))
    torch.testing.assert_close(*jacobians)


@pytest.mark.parametrize("axis", [1, (1,), (1, 3)])
@pytest.mark.parametrize("operation", ["layer_norm", "rms_norm"])
def test_axis(operation, axis):
    x = inputs((2, 4, 3, 5), torch.float64)
    size = (4,) if axis != (1, 3) else (4, 5)
    weight = inputs(size, torch.float64, seed=2)
    function = lambda x, w: getattr(ours, operation)(x, size, w, axis=axis)  # noqa: E731
    last = tuple(range(-len(size), 0))
    axes = (axis,) if axis == 1 else axis
    expected = getattr(F, operation)(x.movedim(axes, last), size, weight).movedim(last, axes)
    y = function(x, weight)
    torch.testing.assert_close(y, expected)
    assert y.stride() == x.stride()
    assert torch.autograd.gradcheck(function, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, weight), fast_mode=True)
    permuted = x.detach().permute(0, 3, 1, 2)[:, :, :, ::2]
    torch.testing.assert_close(
        getattr(ours, operation)(permuted, 4, axis=2),
        getattr(F, operation)(permuted.movedim(2, -1), (4,)).movedim(-1, 2),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_copies(dtype):
    """Array and tensor begin at the same address, either way, whatever the strides."""
    for x in (torch.ones(3, 4, 5), torch.ones(3, 4, 5).permute(2, 0, 1), torch.ones(3, 9)[:, ::2]):
        x = x.to(dtype)
        a = _memory.array(x)
        assert a.ctypes.data == x.data_ptr()
        assert a.shape == tuple(x.shape)
        assert a.strides == tuple(s * x.element_size() for s in x.stride())
        assert str(x.dtype) == f"torch.{a.dtype}"
        back = _memory.tensor(a)
        assert back.data_ptr() == x.data_ptr()
        assert back.dtype == dtype and back.stride() == x.stride()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["BatchNorm2d", "LayerNorm", "GroupNorm"])
def test_kernels_get_and_give_the_tensors_own_memory(name, training, monkeypatch):
    """By pointer: x, weight and running statistics going in, y and the gradients coming out."""
    _, mine, shape = pair(name)
    mine.train(training)
    seen = []
    module = _modules.OPERATIONS[
        {"Ba": "batch_norm", "La": "layer_norm"}.get(name[:2], "group_norm")
    ]
    from cpunorm import functional

    def watched(function):
        def call(*arguments, **options):
            result = function(*arguments, **options)
            for a in (
                *arguments,
                *options.values(),
                *(result if type(result) is tuple else [result]),
            ):
                seen.extend(v for v in (a if isinstance(a, tuple) else [a]))
            return result

        return call

    for attribute in (module.name, f"{module.name}_backward"):
        monkeypatch.setattr(functional, attribute, watched(getattr(functional, attribute)))
    x = inputs(shape)
    y = mine(x)
    y.backward(torch.ones_like(y))
    pointers = {a.ctypes.data for a in seen if isinstance(a, np.ndarray)}
    results = [g for g in seen if type(g).__name__ == "Gradients"]
    pointers |= {a.ctypes.data for g in results for a in g if a is not None}
    for tensor in (x, y, mine.weight, x.grad, *mine.buffers()):
        if tensor.ndim:
            assert tensor.data_ptr() in pointers


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)),
        nn.Flatten(),
        nn.Linear(8 * 5 * 5, 16),
        nn.LayerNorm(16),
        nn.RMSNorm(16),
    )


IMAGES = (4, 3, 9, 9)


def test_parameters_buffers_and_hooks_stay_and_undo_gives_the_modules_back():
    model = small_model()
    called = []
    model[1].register_forward_hook(lambda *_: called.append("forward"))
    model[1].register_full_backward_hook(lambda *_: called.append("backward"))
    modules, parameters, buffers = (
        [*model.modules()], [*model.parameters()], [*model.buffers()],
    )  # fmt: skip
    classes, state = [type(m) for m in modules], copy.deepcopy(model.state_dict())
    assert ours.accelerate(model) is model
    assert ours.accelerate(model) is model  # once more is no harm
    assert sum(type(m).__module__.startswith("cpunorm") for m in model.modules()) == 5
    assert isinstance(model[1], nn.BatchNorm2d)
    for before, after in (
        (modules, model.modules()), (parameters, model.parameters()), (buffers, model.buffers()),
    ):  # fmt: skip
        assert all(a is b for a, b in zip(before, after, strict=True))
    assert list(model.state_dict()) == list(state)
    model(inputs(IMAGES)).sum().backward()
    assert called == ["forward", "backward"]
    assert model.load_state_dict(state) and int(model[1].num_batches_tracked) == 0
    assert ours.undo(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert ours.undo(model) is model


def test_training_takes_the_same_way():
    """Ten steps of SGD end where torch's do."""
    ends = []
    for model in (small_model(), ours.accelerate(small_model())):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for step in range(10):
            optimizer.zero_grad()
            model(inputs(IMAGES, seed=step)).square().mean().sub(0.5).square().backward()
            optimizer.step()
        ends.append(model.eval()(inputs(IMAGES, seed=99)))
    torch.testing.assert_close(*ends, atol=1e-4, rtol=1e-3)


def test_a_model_that_is_a_norm_itself_copies_and_pickles():
    model = ours.accelerate(nn.BatchNorm1d(4))
    x = inputs((8, 4)).detach()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(x), copy.deepcopy(model)(x))


def test_what_is_not_ours_is_left_alone():
    class Mine(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + 1

    patched = nn.LayerNorm(4)
    patched.forward = lambda x: x
    lazy, sync = nn.LazyBatchNorm2d(), nn.SyncBatchNorm(4)
    model = nn.Sequential(Mine(4), patched, lazy, sync, nn.Linear(4, 4))
    classes = [type(m) for m in model.modules()]
    assert [type(m) for m in ours.accelerate(model).modules()] == classes


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: setattr(m[1], "weight", nn.Parameter(torch.ones(7))), r"1: weight .*\(7,\)"),
        (lambda m: setattr(m[1], "running_var", torch.ones(3)), r"1: running_var .*\(3,\)"),
        (
            lambda m: setattr(m[1], "running_var", None),
            r"1: running_mean and running_var must both",
        ),
        (
            lambda m: setattr(m[1], "running_mean", None),
            r"1: running_mean and running_var must both",
        ),
        (lambda m: setattr(m[3][1], "num_groups", 3), r"3\.1: num_groups .*3"),
        (lambda m: setattr(m[7], "weight", nn.Parameter(torch.ones(2))), r"7: weight .*\(2,\)"),
    ],
)
def test_a_module_that_does_not_fit_is_named_and_nothing_is_swapped(spoil, message):
    model = small_model()
    spoil(model)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        ours.accelerate(model)
    assert [type(m) for m in model.modules()] == classes


def test_a_module_parametrized_since_is_not_undone():
    from torch.nn.utils import parametrizations, parametrize

    model = ours.accelerate(small_model())
    parametrizations.weight_norm(model[6], dim=None)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="6: it has been parametrized since accelerate"):
        ours.undo(model)
    assert [type(m) for m in model.modules()] == classes
    parametrize.remove_parametrizations(model[6], "weight")
    assert type(ours.undo(model)[6]) is nn.LayerNorm


@pytest.mark.parametrize("call", [ours.accelerate, ours.undo])
def test_not_a_module(call):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        call({})


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("module", "x", "told"),
    [
        (nn.LayerNorm(4), torch.ones(2, 4).as_subclass(Subclass), "is a Subclass"),
        (nn.LayerNorm(4, device="meta"), torch.ones(2, 4, device="meta"), "is on meta"),
        (nn.BatchNorm1d(4).double(), torch.ones(2, 4), r"a Parameter of torch\.float64"),
        (nn.RMSNorm(4, dtype=torch.complex64), torch.ones(2, 4) + 1j, r"dtype torch\.complex64"),
    ],
)
def test_fallbacks_say_so_once(module, x, told):
    expected, failure = outcome(copy.deepcopy(module), x)
    ours.accelerate(module)
    with pytest.warns(UserWarning, match=f"{type(module).__name__} falls back .*{told}"):
        y, mine = outcome(module, x)
    assert type(mine) is type(failure)
    if failure is None:
        assert type(y) is type(expected) and y.device == expected.device
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        outcome(module, x)


def outcome(module, x):
    """What a call returns, or the error it raises."""
    try:
        return module(x), None
    except RuntimeError as error:
        return None, error


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_torch_looks_into_is_left_to_torch():
    """Tracing, transforms, modes and forward derivatives see torch's own operators."""
    theirs, mine, shape = pair("LayerNorm")
    x = inputs(shape).detach()
    traced = torch.jit.trace(mine, x)
    torch.testing.assert_close(traced(2 * x), theirs(2 * x))
    per_row = torch.func.vmap(torch.func.grad(lambda x: mine(x).square().sum()))
    torch.testing.assert_close(
        per_row(x), torch.func.vmap(torch.func.grad(lambda x: theirs(x).square().sum()))(x)
    )
    _, derivative = torch.func.jvp(mine, (x,), (x,))
    torch.testing.assert_close(derivative, torch.func.jvp(theirs, (x,), (x,))[1])
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), mine))
    assert graph(x).shape == x.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert mine(x).dtype == theirs(x).dtype


def test_inference_mode_and_frozen_parameters():
    theirs, mine, shape = pair("BatchNorm2d")
    with torch.inference_mode():
        assert_close(mine(inputs(shape)), theirs(inputs(shape)))
    for module in (theirs.eval(), mine.eval()):
        module.requires_grad_(False)
    x, x_mine = inputs(shape), inputs(shape)
    theirs(x).sum().backward(), mine(x_mine).sum().backward()
    assert_close(x_mine.grad, x.grad)
    assert mine.weight.grad is None
    assert not mine(x.detach()).requires_grad


def test_what_autograd_keeps_is_guarded():
    model = ours.accelerate(nn.LayerNorm(4))
    x = inputs((2, 4))
    z = x * 1
    y = model(z)
    z += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    running = ours.accelerate(nn.BatchNorm1d(4))
    version = running.running_mean._version
    running(inputs((3, 4)))
    assert running.running_mean._version > version


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_a_model(backend):
    torch._dynamo.reset()
    expected_model, model = small_model(), ours.accelerate(small_model())
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x, x_mine = inputs(IMAGES), inputs(IMAGES)
    y, expected = compiled(x_mine), expected_model(x)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    y.square().sum().backward(), expected.square().sum().backward()
    torch.testing.assert_close(x_mine.grad, x.grad, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(model[1].running_mean, expected_model[1].running_mean)
    assert int(model[1].num_batches_tracked) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiling_says_so():
    torch._dynamo.reset()
    compiled = torch.compile(ours.accelerate(nn.LayerNorm(4)), backend="eager")
    with pytest.warns(UserWarning, match="LayerNorm falls back .* compiles"):
        compiled(torch.ones(2, 4))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_export_a_model():
    model = ours.accelerate(small_model()).eval()
    x = inputs(IMAGES).detach()
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x), atol=1e-5, rtol=1e-4)
    # What leaves the process does not need us.
    assert "cpunorm" not in str(exported.graph)


class ByFunctions(nn.Module):
    """All five functions, called by a model's own code."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        x = ours.layer_norm(x, 4, self.weight, self.bias, axis=1)
        x = ours.batch_norm(x, self.mean, self.var, self.weight, self.bias, self.training)
        x = ours.instance_norm(x, None, None, self.weight)
        x = ours.group_norm(x, 2, None, self.bias)
        return ours.rms_norm(x, x.shape[-1:])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_functions_in_compiled_and_exported_code(training, channels_last):
    """They are custom operators there, forward and backward, with the same bits."""
    torch._dynamo.reset()
    plain = ByFunctions().train(training)
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    x = inputs((3, 4, 6, 5)).detach()
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x, x_other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, y_other = plain(x), compiled(x_other)
    assert torch.equal(y, y_other) and y.stride() == y_other.stride()
    y.square().sum().backward(), y_other.square().sum().backward()
    assert torch.equal(x.grad, x_other.grad)
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(plain.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)
    if not training:
        exported = torch.export.export(plain, (x.detach(),))
        assert "cpunorm.layer_norm" in str(exported.graph)
        assert torch.equal(exported.module()(x.detach()), y)


OPERATORS = {
    "batch_norm": lambda x, w, r, o: (x, w, w, r.clone(), r.clone() + 1, o, 0.1, 1e-5),
    "instance_norm": lambda x, w, r, o: (x, w, None, r.clone(), r.clone() + 1, o, 0.1, 1e-5),
    "group_norm": lambda x, w, r, o: (x, w, w if o else None, 2, 1e-5),
    "layer_norm": lambda x, w, r, o: (x, w, w, [4], [1] if o else [-3], 1e-5),
    "rms_norm": lambda x, w, r, o: (x, w, None, [4], [1], None if o else 1e-5),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("option", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_pass_torchs_own_check(name, option):
    """`torch.library.opcheck`: schema, fake implementation, autograd registration, AOT dispatch."""
    x, weight = inputs((2, 4, 3, 5)), inputs((4,), seed=1)
    arguments = OPERATORS[name](x, weight, torch.zeros(4), option)
    torch.library.opcheck(getattr(torch.ops.cpunorm, name).default, arguments)


def test_wrong_arguments_of_functions():
    x = torch.ones(2, 4)
    with pytest.raises(TypeError, match="x must have dtype"):
        ours.layer_norm(x.int(), 4)
    with pytest.raises(ValueError, match="weight must have shape"):
        ours.layer_norm(x, 4, torch.ones(3))
    with pytest.raises(TypeError, match="weight must have dtype"):
        ours.group_norm(x, 2, torch.ones(4).double())


CALLS = {
    "batch_norm": lambda f, x, w: f.batch_norm(x, None, None, w, training=True),
    "batch_norm, frozen": lambda f, x, w: f.batch_norm(x, w.detach(), w.detach().square(), w),
    "instance_norm": lambda f, x, w: f.instance_norm(x, None, None, w),
    "group_norm": lambda f, x, w: f.group_norm(x, 2, w),
    "layer_norm": lambda f, x, w: f.layer_norm(x, (4, 5), w[:, None].expand(4, 5)),
    "rms_norm": lambda f, x, w: f.rms_norm(x, (5,), None, 1e-3),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CALLS)
def test_functions_under_transforms_are_torchs(name):
    """`torch.func` and forward derivatives see torch's own operators."""
    x, weight = (inputs(s, torch.float64).detach() for s in ((3, 4, 5), (4,)))
    mine, theirs = (lambda x, w, f=f: CALLS[name](f, x, w) for f in (ours, F))

    def forward(function):
        with torch.autograd.forward_ad.dual_level():
            x_dual = torch.autograd.forward_ad.make_dual(x, x.square())
            return torch.autograd.forward_ad.unpack_dual(function(x_dual, weight)).tangent

    for transformed in (
        lambda f: torch.func.grad(lambda x: f(x, weight).pow(3).sum())(x),
        lambda f: torch.func.grad(lambda w: f(x, w).pow(3).sum())(weight),
        lambda f: torch.func.jacrev(lambda x: f(x, weight))(x),
        lambda f: torch.func.jvp(lambda x: f(x, weight), (x,), (x.square(),)),
        lambda f: torch.func.vmap(lambda x: f(x, weight))(torch.stack([x, 2 * x])),
        forward,
    ):
        torch.testing.assert_close(transformed(mine), transformed(theirs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_functions_under_compiled_transforms():
    torch._dynamo.reset()
    x = inputs((3, 4)).detach()
    gradient = torch.func.grad(lambda x: ours.layer_norm(x, 4).pow(3).sum())
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), gradient(x))


def test_running_statistics_move_under_transforms():
    x = inputs((3, 4)).detach()
    mine, theirs = ((torch.zeros(4), torch.ones(4)) for _ in range(2))
    for f, running in ((ours, mine), (F, theirs)):
        torch.func.grad(lambda x, f=f, r=running: f.batch_norm(x, *r, training=True).sum())(x)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("value", [np.ones((2, 4), "float32"), [1.0] * 4, 1.0], ids=type)
@pytest.mark.parametrize("name", ["x", "weight", "bias", "running_mean", "running_var"])
def test_what_is_no_tensor_is_named(name, value):
    given = {"x": torch.ones(2, 4), "running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    with pytest.raises(TypeError, match=rf"^{name} must be a torch\.Tensor, got"):
        ours.batch_norm(**{**given, name: value}, training=True)
    assert not given["running_mean"].any()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["x", "weight"])
@pytest.mark.parametrize("function", ["layer_norm", "rms_norm", "group_norm"])
def test_what_is_not_dense_is_named(function, name):
    given = {"x": torch.ones(2, 4), "weight": torch.ones(4)}
    given[name] = given[name].to_sparse()
    size = {"num_groups": 2} if function == "group_norm" else {"normalized_shape": 4}
    with pytest.raises(TypeError, match=rf"^{name} must be a dense tensor, got .*sparse_coo"):
        getattr(ours, function)(**given, **size)
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)])
    with pytest.raises(TypeError, match="x must be a dense tensor, got a nested one"):
        ours.layer_norm(nested, 4)


@pytest.mark.parametrize("function", [ours.batch_norm, ours.instance_norm])
def test_running_statistics_come_together(function):
    x = torch.ones(2, 4, 3)
    for running in ((None, torch.ones(4)), (torch.zeros(4), None)):
        with pytest.raises(ValueError, match="running_mean and running_var must be given together"):
            function(x, *running)


def test_small_inputs_are_torchs_without_a_word(monkeypatch):
    monkeypatch.setattr(_modules.LayerNorm, "least_bytes", (1024, 2048))
    calls = []
    eager = _modules.eager
    monkeypatch.setattr(_modules, "eager", lambda *a: calls.append(a[2].shape) or eager(*a))
    model = ours.accelerate(nn.LayerNorm(16))
    model(torch.ones(31, 16)), model(torch.ones(32, 16))
    with torch.no_grad():
        model(torch.ones(15, 16)), model(torch.ones(16, 16))
    assert calls == [(32, 16), (16, 16)]


def test_torchs_number_of_threads_is_ours():
    """One OpenMP runtime serves both, so that torch's limit holds for our kernels too."""
    from cpunorm import _openmp, _threads

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert _openmp.max_threads() == 1
        assert _threads.take_threads(1 << 24) == 1
    finally:
        _threads.give_back()
        torch.set_num_threads(before)
