"""Checks 29 to 54 of the battery: what happens to a layer between its construction and its deployment."""

import copy
import io
import pickle
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from _battery_contestants import Contestant, Refused, clear, free_of, gaussian
from _battery_ranks import on_two_ranks
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, stack_module_state, vmap
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

N = 8
VIEWS = {"aten.t.default", "aten.detach.default", "aten.alias.default", "aten.view.default", "aten.transpose.int"}


def moved(subject: Contestant, seed: int = 0, **kwargs: Any) -> Any:
    """A layer that has been trained for three steps."""
    layer = subject.layer(N, seed=seed, **kwargs)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        x = gaussian(4, N, dtype=free_of(layer).dtype)
        layer(x).square().sum().backward()
        optimizer.step()
    return layer


def equal(found: Tensor, expected: Tensor, what: str) -> None:
    if not torch.equal(found, expected):
        raise Refused(f"{what} differs by {(found - expected).abs().max():.0e}")


def close(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
        raise Refused(f"{what} differs")


def snapshot(layer: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def unchanged(layer: Any, before: dict[str, Tensor], what: str) -> None:
    after = layer.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    if changed or after.keys() != before.keys():
        raise Refused(f"{what} changed {', '.join(changed) or 'the names'}")


def _reloaded(subject: Contestant, layer: Any, state: dict[str, Tensor], what: str) -> None:
    other = subject.layer(N, seed=9)
    other.load_state_dict(state)
    equal(other.eval().weight, layer.eval().weight, f"the weight after {what}")


def state_dict_bitwise(subject: Contestant) -> None:
    """A trained layer's state dict, loaded into a fresh layer, gives the same weight bit for bit."""
    layer = moved(subject)
    _reloaded(subject, layer, snapshot(layer), "loading")


def deep_copy(subject: Contestant) -> None:
    """A deep copy has the same weight, is independent, and survives removal of the constraint from the original."""
    layer = moved(subject)
    twin = copy.deepcopy(layer)
    weight = layer.eval().weight.detach().clone()
    equal(twin.eval().weight, weight, "the weight of the copy")
    with torch.no_grad():
        free_of(twin).add_(gaussian(*free_of(twin).shape))
    equal(layer.eval().weight, weight, "the original's weight after the copy moved")
    parametrize.remove_parametrizations(layer, "weight")
    subject.check(twin, "copy after removal from the original")
    twin(torch.ones(2, N))


def pickled(subject: Contestant) -> None:
    """``pickle`` of the trained module gives the same weight bit for bit."""
    layer = moved(subject)
    twin = pickle.loads(pickle.dumps(layer))
    equal(twin.eval().weight, layer.eval().weight, "the weight")


def _saved(state: dict[str, Any]) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def weights_only(subject: Contestant) -> None:
    """``torch.load(weights_only=True)`` reads the state dict; NaN or a wrong shape is refused, the weight kept."""
    layer = moved(subject)
    _reloaded(subject, layer, torch.load(_saved(layer.state_dict()), weights_only=True), "weights_only")
    key = next(name for name, value in layer.state_dict().items() if value.data_ptr() == free_of(layer).data_ptr())
    good = snapshot(layer)
    bad = {
        "NaN": torch.full_like(good[key], torch.nan),
        "a 50,000 x 50,000 tensor of one number": torch.zeros(1).expand(50_000, 50_000),
    }
    for what, tensor in bad.items():
        state = torch.load(_saved({**good, key: tensor}), weights_only=True)
        try:
            layer.load_state_dict(state)
        except Exception as error:
            if not clear(error):
                raise
            unchanged(layer, good, f"refusing {what}")
        else:
            raise Refused(f"{what} was loaded without a word")


def safetensors(subject: Contestant) -> None:
    """The state dict goes through a safetensors file, bit for bit."""
    from safetensors.torch import load_file, save_file

    layer = moved(subject)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        save_file({name: value.contiguous().clone() for name, value in layer.state_dict().items()}, path)
        _reloaded(subject, layer, load_file(path), "safetensors")


def removal(subject: Contestant) -> None:
    """``remove_parametrizations`` leaves a plain layer with the same output bit for bit."""
    layer = moved(subject).eval()
    x = gaussian(4, N)
    before = layer(x).detach()
    parametrize.remove_parametrizations(layer, "weight")
    equal(layer(x), before, "the output")


def eval_unchanged(subject: Contestant) -> None:
    """Three forward passes in evaluation mode give the same bits and leave the state dict as it was."""
    layer = moved(subject).eval()
    before, x = snapshot(layer), gaussian(4, N)
    first = layer(x)
    for _ in range(2):
        equal(layer(x), first, "the output")
    unchanged(layer, before, "a forward pass in evaluation mode")


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _operations(layer: Any) -> list[str]:
    x = gaussian(4, N)
    with torch.no_grad():
        layer(x)
        with _Counting() as counting:
            layer(x)
    return [name for name in counting.names if name not in VIEWS]


def eval_cached(subject: Contestant) -> None:
    """A second forward pass in evaluation mode runs the operations of a plain ``nn.Linear`` (views aside)."""
    found, plain = _operations(moved(subject).eval()), _operations(nn.Linear(N, N))
    if found != plain:
        raise Refused(f"{len(found)} operations, a plain layer has {len(plain)}")


def raw_edit(subject: Contestant) -> None:
    """An in-place change of the free tensor in evaluation mode shows in the next output."""
    layer = moved(subject).eval()
    with torch.no_grad():
        x = gaussian(4, N)
        before = layer(x).clone()
        free_of(layer).add_(gaussian(*free_of(layer).shape, seed=3))
        fresh = subject.layer(N, seed=9)
        fresh.load_state_dict(snapshot(layer))
        found = layer(x)
        if torch.allclose(found, before, atol=1e-3):
            raise Refused("the old weight is used")
        close(found, fresh.eval()(x), "the output", 1e-4)


def stateless_training(subject: Contestant) -> None:
    """A forward pass in training mode changes no entry of the state dict, or the documentation says that it does."""
    layer = moved(subject)
    before = snapshot(layer)
    layer(gaussian(4, N))
    if not subject.documents_state:
        unchanged(layer, before, "a forward pass in training mode")


def compile_eval(subject: Contestant) -> None:
    """``torch.compile(fullgraph=True)`` in evaluation mode gives the eager output, also once the weight has moved."""
    layer = moved(subject).eval()
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), gaussian(4, N)
    with torch.no_grad():
        close(compiled(x), layer(x), "the output")
        free_of(layer).mul_(0.5).add_(gaussian(*free_of(layer).shape, seed=3))
        layer.train().eval()
        close(compiled(x), layer(x), "the output after a change")


def compile_train(subject: Contestant) -> None:
    """Five compiled training steps with ``fullgraph=True`` follow the eager ones."""
    layers = [subject.layer(N), subject.layer(N)]
    layers[1].load_state_dict(layers[0].state_dict())
    compiled = torch.compile(layers[1], fullgraph=True, backend="aot_eager")
    for layer, call in ((layers[0], layers[0]), (layers[1], compiled)):
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (call(gaussian(4, N)) - 1).square().mean().backward()
            optimizer.step()
    close(layers[1].eval().weight, layers[0].eval().weight, "the trained weight", 1e-4)


def fsdp2(subject: Contestant) -> None:
    """Three steps under ``fully_shard`` on two gloo ranks give the free tensor of the same steps in one process."""
    on_two_ranks(subject, "fsdp2")


def ddp(subject: Contestant) -> None:
    """Three steps under ``DistributedDataParallel`` on two gloo ranks give the free tensor of one process."""
    on_two_ranks(subject, "ddp")


def export(subject: Contestant) -> None:
    """``torch.export.export`` of the layer in evaluation mode gives a program with the same output."""
    layer, x = moved(subject).eval(), gaussian(4, N)
    program = torch.export.export(layer, (x,))
    close(program.module()(x), layer(x), "the output")


def _through_onnx(layer: nn.Module, expected: Tensor, x: Tensor) -> None:
    import onnxruntime

    file = io.BytesIO()
    program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    close(torch.from_numpy(found), expected, "the output of onnxruntime")


def onnx(subject: Contestant) -> None:
    """The layer, by the library's own export function where it has one, runs in onnxruntime with the same output."""
    layer, x = moved(subject).eval(), gaussian(4, N)
    _through_onnx(subject.exported(layer).eval(), layer(x).detach(), x)


def onnx_after_removal(subject: Contestant) -> None:
    """Likewise once the parametrization has been removed."""
    layer, x = moved(subject).eval(), gaussian(4, N)
    expected = layer(x).detach()
    parametrize.remove_parametrizations(layer, "weight")
    _through_onnx(layer, expected, x)


def autocast(subject: Contestant) -> None:
    """Under bfloat16 autocast the weight is the one without (to 1e-4), and a training step has finite gradients."""
    layer = moved(subject)
    plain = layer.eval().weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        free_of(layer).data.add_(0)
        layer.train().eval()
        close(layer.weight.detach().float(), plain, "the weight", 1e-4)
        output = layer.train()(gaussian(4, N))
    output.float().square().sum().backward()
    if output.dtype != torch.bfloat16:
        raise Refused(f"output in {output.dtype}")
    gradient = free_of(layer).grad
    if gradient is None or not gradient.isfinite().all():
        raise Refused("no finite gradient")


def functional(subject: Contestant) -> None:
    """``functional_call`` with another layer's tensors gives that layer's output and leaves the first as it was."""
    layer, other, x = moved(subject).eval(), moved(subject, seed=4).eval(), gaussian(4, N)
    expected, before = layer(x), snapshot(layer)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    close(functional_call(layer, tensors, (x,)), other(x), "the output")
    equal(layer(x), expected, "the output afterwards")
    unchanged(layer, before, "functional_call")


def vmap_ensemble(subject: Contestant) -> None:
    """Three networks of one layer in training mode, by ``stack_module_state`` and ``vmap``, give their outputs."""
    layers, x = [nn.Sequential(moved(subject, seed=seed)) for seed in range(3)], gaussian(4, N)
    parameters, buffers = stack_module_state(layers)
    found = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    for output, layer in zip(found, layers, strict=True):
        close(output, layer(x), "an output", 1e-4)


def _of_free(layer: Any, scalar: bool = False) -> tuple[Any, Tensor]:
    """The output (or its mean square) as a function of the free tensor."""
    name = next(name for name, value in layer.named_parameters() if value is free_of(layer))
    x = gaussian(3, layer.in_features, dtype=free_of(layer).dtype)

    def output(free: Tensor) -> Tensor:
        result = functional_call(layer, {name: free}, (x,))
        return (result - 1).square().mean() if scalar else result

    return output, free_of(layer).detach().clone()


def jacrev_and_hvp(subject: Contestant) -> None:
    """In training mode ``jacrev`` matches autograd, and a Hessian-vector product the Hessian."""
    layer = subject.layer(4, dtype=torch.float64)
    output, free = _of_free(layer)
    reference = torch.autograd.functional.jacobian(output, free)
    close(jacrev(output)(free), reference, "the Jacobian", 1e-6)
    loss, free = _of_free(layer, scalar=True)
    direction = gaussian(*free.shape, dtype=torch.float64, seed=4)
    leaf = free.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (product,) = torch.autograd.grad((gradient * direction).sum(), leaf)
    step = 1e-5
    ends = [torch.autograd.functional.jacobian(loss, free + sign * step * direction) for sign in (1, -1)]
    close(product, (ends[0] - ends[1]) / (2 * step), "the Hessian-vector product", 1e-5)
    full = hessian(loss)(free)
    close((full * direction).sum(dim=(-2, -1)), product, "the product by torch.func", 1e-5)


def gradcheck(subject: Contestant) -> None:
    """``gradcheck`` in float64, in evaluation mode."""
    output, free = _of_free(subject.layer(4, dtype=torch.float64).eval())
    torch.autograd.gradcheck(output, free.requires_grad_())


def gradgradcheck(subject: Contestant) -> None:
    """``gradgradcheck`` in float64, in evaluation mode."""
    output, free = _of_free(subject.layer(4, dtype=torch.float64).eval())
    torch.autograd.gradgradcheck(output, free.requires_grad_())


def checkpointing(subject: Contestant) -> None:
    """Activation checkpointing, of both kinds, gives the gradient without it."""
    gradients = []
    for mode in (None, False, True):
        layer = subject.layer(N)
        x = gaussian(4, N).requires_grad_()
        output = layer(x) if mode is None else checkpoint(layer, x, use_reentrant=mode)
        output.square().mean().backward()
        gradients.append(free_of(layer).grad)
    for found in gradients[1:]:
        if found is None:
            raise Refused("no gradient")
        close(found, gradients[0], "the gradient", 1e-4)


def threads(subject: Contestant) -> None:
    """Eight threads share one layer: in evaluation the bits of one thread, in training its gradients."""
    layer, x = moved(subject).eval(), gaussian(4, N)
    with torch.no_grad():
        expected = layer(x)
    _in_threads(lambda: equal(layer(x).detach(), expected, "an output"), before=layer.eval)
    layer.train()
    (reference,) = torch.autograd.grad(layer(x).square().mean(), free_of(layer))

    def step() -> None:
        (found,) = torch.autograd.grad(layer(x).square().mean(), free_of(layer))
        close(found, reference, "a gradient", 1e-3)

    _in_threads(step)


def _in_threads(action: Any, before: Any = None, count: int = 8, repeats: int = 25) -> None:
    errors: list[Exception] = []
    barrier = threading.Barrier(count, action=before)

    def work() -> None:
        try:
            for _ in range(repeats):
                barrier.wait(30)  # all at once, each time from an empty cache
                action()
        except threading.BrokenBarrierError:
            return
        except Exception as error:
            errors.append(error)
            barrier.abort()

    workers = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


def state_dict_version(subject: Contestant) -> None:
    """The state dict says in which format it is, and one of a later format is refused in words."""
    layer = moved(subject)
    for bump in (_bumped_extra, _bumped_metadata):
        state = bump(copy.deepcopy(layer.state_dict()))
        if state is None:
            continue
        try:
            subject.layer(N).load_state_dict(state)
        except Exception as error:
            if clear(error):
                return
            raise
    raise Refused("a state dict of format 99 is loaded without a word")


def _bumped_extra(state: Any) -> Any:
    """Format 99 where an entry of the state dict carries the format: its hundreds in ``_extra_state``."""
    keys = [key for key in state if key.endswith("_extra_state")]
    for key in keys:
        state[key] = state[key] % 100 + 9900
    return state if keys else None


def _bumped_metadata(state: Any) -> Any:
    for entry in state._metadata.values():
        entry["version"] = 99
    return state


CHECKS = [
    ("state dict bitwise", state_dict_bitwise),
    ("deepcopy", deep_copy),
    ("pickle", pickled),
    ("weights_only", weights_only),
    ("safetensors", safetensors),
    ("removal identical", removal),
    ("eval unchanged", eval_unchanged),
    ("eval cached", eval_cached),
    ("raw edit in eval", raw_edit),
    ("training stateless", stateless_training),
    ("compile eval", compile_eval),
    ("compile train", compile_train),
    ("FSDP2, two ranks", fsdp2),
    ("DDP, two ranks", ddp),
    ("torch.export", export),
    ("ONNX", onnx),
    ("ONNX after removal", onnx_after_removal),
    ("autocast", autocast),
    ("functional_call", functional),
    ("vmap ensemble", vmap_ensemble),
    ("jacrev and hvp", jacrev_and_hvp),
    ("gradcheck", gradcheck),
    ("gradgradcheck", gradgradcheck),
    ("checkpointing", checkpointing),
    ("threads", threads),
    ("state-dict version", state_dict_version),
]
