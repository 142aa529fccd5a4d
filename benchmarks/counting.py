"""What a step does, counted without a GPU: tensors without numbers, for which the code takes its paths for a GPU.

Not a benchmark itself. `pretend_gpu()` is a context in which the tensors that are made have shapes and no numbers
(torch's fake tensors). They are on the CPU, because a build of torch without CUDA computes no gradients of tensors on a
GPU. But this package's own code, and no other, is told that they are on one ("cuda", compute capability 9.0): so it
calls the variable-length kernel, takes the large chunks of prototypes, and makes the calls that it would make there.

Inside it, `Counter` counts the operations that torch dispatches:

- bytes: each operation reads the tensors that it takes and writes those that it returns or changes. Views are free, an
  expanded dimension is read once, an operation on some rows moves those rows, and what is only written (`fill`, `copy`,
  `empty`) is not read. Products, convolution and attention are counted in FLOPs, and their bytes apart.
- launches: operations that are not views. A real operation may launch several kernels, a compiled one a part of one.
- host reads: the times that the host waits for a number of the device, and copies to the device that it waits for.
- collectives: those that `Ranks` makes, by name, and those of sharding, with bytes.
- the peak of the memory of all tensors.
"""

import contextlib
import functools
import os
import sys
import weakref
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import troodon

PACKAGE = f"{Path(troodon.__file__).parent}{os.sep}"
GPU = torch.device("cuda", 0)
LAYOUTS: dict[int, int] = {}  # of offsets, by their storage: the sum of the squares of the lengths

PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_varlen_attn", "_varlen_attn_backward",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_scaled_dot_product_attention_math_for_mps", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_efficient_attention_backward", "mv", "dot", "addmv",
}  # fmt: skip
ATTENTION_BACKWARD = 2.5  # products of the backward pass by those of the forward pass
FREE = {"_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "lift_fresh", "detach", "set_", "resize_"}
WRITTEN_ONLY = {
    "fill_", "zero_", "copy_", "normal_", "uniform_", "bernoulli_", "fill", "_foreach_copy_",
    "zeros_like", "ones_like", "full_like", "new_zeros", "new_full", "new_ones", "scalar_tensor",
}  # fmt: skip
# Read as many numbers of their first tensor as they return.
SOME_ROWS = {"index_select", "index", "gather", "embedding", "take", "norm_rows", "scaled_rows"}
OTHER_ROWS = {"norm_rows_gradient": (2, 1)}  # read as many numbers of a tensor as another has
CHANGED_ROWS = {"index_add_": 3, "index_copy_": 2, "scatter_add_": 3, "index_put_": 2, "scatter_": 2}
READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "is_nonzero")
SIZED_BY_VALUES = ("nonzero", "masked_select", "unique", "argwhere", "count_nonzero")


def _from_package() -> bool:
    """Whether the code that asks a tensor about itself is this package's."""
    return PACKAGE in sys._getframe(2).f_code.co_filename


def _place() -> str:
    """The file of this package that is at work, such as learn/loop.py; empty if none is."""
    frame = sys._getframe(1)
    while frame is not None:
        _, found, file = frame.f_code.co_filename.partition(PACKAGE)
        if found:
            return file
        frame = frame.f_back
    return ""


def _seen_device(x: FakeTensor) -> torch.device:
    if x.fake_mode.in_kernel_invocation:
        return torch.device("meta")
    return GPU if x.fake_device.type == "cpu" and _from_package() and not is_on_host(x) else x.fake_device


def _seen_is_cuda(x: FakeTensor) -> bool:
    return _from_package() and not is_on_host(x)


def is_on_host(x: Any) -> bool:
    """Whether the code would have this tensor in the host's memory."""
    return not isinstance(x, FakeTensor) or getattr(x, "is_read", False)


class _Event:
    """In place of torch.cuda.Event: nothing to wait for."""

    def __init__(self, *_: Any, **__: Any):
        pass

    record = synchronize = wait = __init__


@contextlib.contextmanager
def pretend_gpu() -> Iterator[FakeTensorMode]:
    """Tensors that are made inside have no numbers, and are on a GPU as far as this package can see."""
    from troodon.model import packing

    autocast, layout_of = torch.autocast, functools.lru_cache(packing.layout_of.__wrapped__)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def known_layout(groups: tuple[tuple[int, int], ...], device: torch.device) -> packing.Layout:
        layout = layout_of(groups, device)
        LAYOUTS[layout.offsets.untyped_storage()._cdata] = sum(count * length**2 for count, length in groups)
        return layout

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        stack.callback(LAYOUTS.clear)
        enter(mock.patch.object(packing, "layout_of", known_layout))
        enter(mock.patch.object(FakeTensor, "device", property(_seen_device)))
        enter(mock.patch.object(FakeTensor, "is_cuda", property(_seen_is_cuda), create=True))
        enter(mock.patch.object(FakeTensor, "tolist", Tensor.tolist))  # its own reads one number after another
        enter(mock.patch.object(Tensor, "pin_memory", _pinned))
        enter(mock.patch.object(torch.cuda, "Event", _Event))
        enter(mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)))
        enter(mock.patch.object(torch, "autocast", lambda _, *how, **named: autocast("cpu", *how, **named)))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            of_device = getattr(torch, name)
            enter(mock.patch.object(torch, name, lambda _, of_device=of_device: of_device("cpu")))
        enter(mode)
        yield mode


def _pinned(x: Tensor, *_: Any) -> Tensor:
    x.in_pinned_memory = True
    return x


@dataclass
class Moved:
    """What some operations did."""

    read: float = 0.0  # bytes
    written: float = 0.0
    launches: int = 0

    @property
    def bytes(self) -> float:
        return self.read + self.written


@dataclass
class Counts:
    """What was counted of a step."""

    flops: float = 0.0
    product_bytes: float = 0.0
    products: Tally = field(default_factory=Tally)  # by operation
    launches: int = 0
    by_place: dict[str, Moved] = field(default_factory=lambda: defaultdict(Moved))  # file of the package
    by_operation: dict[str, Moved] = field(default_factory=lambda: defaultdict(Moved))
    host_reads: Tally = field(default_factory=Tally)
    pageable_copies: Tally = field(default_factory=Tally)  # not to be waited for, but from memory that is not pinned
    collectives: Tally = field(default_factory=Tally)
    collective_bytes: float = 0.0
    peak_memory: int = 0

    @property
    def non_product_bytes(self) -> float:
        return sum(moved.bytes for moved in self.by_place.values())


class Counter(contextlib.AbstractContextManager):
    """Counts what is done while it is entered, inside of `pretend_gpu`. `counts` are those since `reset`."""

    def __init__(self, mode: FakeTensorMode):
        self.mode, self.counts = mode, Counts()
        self.live, self.storages = 0, {}
        self.functions, self.operations = _Functions(self), _Operations(self)

    def __enter__(self) -> "Counter":
        self.functions.__enter__()
        self.operations.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.operations.__exit__(*error)
        self.functions.__exit__(*error)

    def reset(self) -> None:
        self.counts = Counts(peak_memory=self.live)

    def remember(self, *values: Any) -> None:
        """Count the memory of these tensors, while they live."""
        for x in tree_leaves(values):
            if not isinstance(x, FakeTensor):
                continue
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self.storages:
                size = storage.nbytes()
                self.live += size
                self.storages[key] = weakref.finalize(storage, self._forget, key, size)
                self.counts.peak_memory = max(self.counts.peak_memory, self.live)

    def _forget(self, key: int, size: int) -> None:
        self.live -= size
        self.storages.pop(key, None)


class _Functions(TorchFunctionMode):
    """Computes on the host what the package computes there, and without numbers what it computes on a GPU.

    A number that the host reads from the device is zero.
    """

    def __init__(self, counter: Counter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name, place = dict(kwargs or {}), getattr(function, "__name__", ""), _place()
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in READS and isinstance(args[0], FakeTensor):
            if not is_on_host(args[0]):
                self.counter.counts.host_reads[place, name] += 1
            return _zeros(args[0], name)
        devices = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)]
        if name in ("to", "cpu", "cuda") and PACKAGE in sys._getframe(1).f_code.co_filename:
            return self._sent(function, name, args, kwargs, devices, place)
        to_device = any(device.type == "cuda" for device in devices)
        if place and all(map(is_on_host, tensors)) and not to_device and not any(d.type == "meta" for d in devices):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if name == "new_tensor" or (name in ("tensor", "as_tensor") and to_device) or name in SIZED_BY_VALUES:
            self.counter.counts.host_reads[place, name] += 1
        return function(*map(_on_cpu, args), **{key: _on_cpu(value) for key, value in kwargs.items()})

    def _sent(self, function, name: str, args: tuple, kwargs: dict, devices: list, place: str) -> Any:
        """A tensor in the memory of another device, or in another dtype."""
        x, counts, waits = args[0], self.counter.counts, not kwargs.get("non_blocking", False)
        device = devices[0].type if devices else {"cpu": "cpu", "cuda": "cuda"}.get(name, "")
        device = next((a.partition(":")[0] for a in args[1:] if isinstance(a, str)), device)
        if device == "cpu" and not is_on_host(x):
            counts.host_reads[place, name] += 1
            read = x.clone()
            read.is_read = True
            return read
        if device == "cuda" and is_on_host(x):
            counts.host_reads[place, name] += waits
            counts.pageable_copies[place] += not waits and not getattr(x, "in_pinned_memory", False)
            x = x.clone() if isinstance(x, FakeTensor) else self.counter.mode.from_tensor(x)
        elif not isinstance(x, FakeTensor):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        others = {key: _on_cpu(value) for key, value in kwargs.items()}
        return function(x, *map(_on_cpu, args[1:]), **others)


def _on_cpu(value: Any) -> Any:
    is_gpu = (isinstance(value, torch.device) and value.type == "cuda") or value in ("cuda", "cuda:0")
    return torch.device("cpu") if is_gpu else value


def _zeros(x: Tensor, name: str) -> Any:
    """What a number or a list of them is, if they are all zero."""
    if name == "tolist":
        with unset_fake_temporarily():
            return torch.zeros(x.shape, dtype=x.dtype).tolist()
    return {"__bool__": False, "is_nonzero": False, "__float__": 0.0}.get(name, 0.0 if x.is_floating_point() else 0)


class _Operations(TorchDispatchMode):
    """Adds up what is dispatched."""

    def __init__(self, counter: Counter):
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        self.counter.remember(result)
        self._count(function, args, kwargs, result)
        return result

    def _count(self, function, args, kwargs, result) -> None:
        counts, name, space = self.counter.counts, function._opname, function.namespace
        taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if space in ("c10d", "_c10d_functional"):
            if name not in ("wait_tensor", "monitored_barrier_"):
                counts.collectives[name] += 1
                counts.collective_bytes += max([*map(size, taken), 0])
            return
        if space == "prim" or name in FREE or _is_view(function):
            return
        counts.launches += 1
        if name in PRODUCTS:
            counts.flops += flops(function, args, kwargs, result)
            made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            counts.product_bytes += sum(map(size, taken)) + sum(map(size, made))
            counts.products[name] += 1
            return
        read, written = moved(function, name, args, kwargs, taken, result)
        for where in (counts.by_place[_place()], counts.by_operation[name]):
            where.read += read
            where.written += written
            where.launches += 1


def moved(function, name: str, args: tuple, kwargs: dict, taken: list[Tensor], result: Any) -> tuple[float, float]:
    """Bytes that an operation reads and writes."""
    made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    if name in SOME_ROWS:
        read = sum(x.numel() for x in made) * taken[0].element_size()
        return read + sum(map(size, taken[1:])), sum(map(size, made))
    if name in CHANGED_ROWS:
        rows = max(map(size, taken[1:]))
        return (CHANGED_ROWS[name] - 1) * rows + min(map(size, taken[1:])), rows
    changed = []
    for argument, value in zip(function._schema.arguments, args):
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    for argument in function._schema.arguments:
        if argument.name in kwargs and argument.alias_info is not None and argument.alias_info.is_write:
            changed += [x for x in tree_leaves(kwargs[argument.name]) if isinstance(x, Tensor)]
    known = {id(x) for x in changed}
    written = sum(map(size, changed)) + sum(size(x) for x in made if id(x) not in known)
    only_written = name in WRITTEN_ONLY or "out" in function._overloadname
    read = sum(size(x) for x in taken if not (only_written and id(x) in known))
    if name in OTHER_ROWS:
        whole, some = (taken[number] for number in OTHER_ROWS[name])
        read -= size(whole) - some.numel() * whole.element_size()
    if name in WRITTEN_ONLY and not changed:
        read = 0.0  # a tensor that only gives its shape
    return read, written


def size(x: Tensor) -> float:
    """Bytes of a tensor; dimensions that are expanded count once."""
    numbers = 1
    for length, stride in zip(x.shape, x.stride()):
        numbers *= length if stride or not length else 1
    return numbers * x.element_size()


def flops(function, args, kwargs, result) -> float:
    if function._opname == "_varlen_attn":
        q_TNH, offsets = args[0], args[3]
        return 4.0 * q_TNH.shape[1] * q_TNH.shape[2] * _squares(offsets, q_TNH, args[5])
    if function._opname == "_varlen_attn_backward":
        q_TNH, offsets = args[1], args[6]
        return ATTENTION_BACKWARD * 4.0 * q_TNH.shape[1] * q_TNH.shape[2] * _squares(offsets, q_TNH, args[8])
    packet = function._overloadpacket
    return float(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0.0


def _squares(offsets: Tensor, q_TNH: Tensor, longest: int) -> float:
    """The sum of the squares of the lengths of the sequences."""
    return LAYOUTS.get(offsets.untyped_storage()._cdata, len(q_TNH) * longest)


def _is_view(function: Any) -> bool:
    """Whether all that an operation returns is another look at what it takes."""
    returned = [each.alias_info for each in function._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


def without_numbers(module: Any, dtype: torch.dtype | None = None) -> Any:
    """The module, made on the meta device, with its parameters and buffers as tensors of the surrounding mode."""
    for part in module.modules():
        for name, x in part.named_parameters(recurse=False):
            part.register_parameter(
                name, torch.nn.Parameter(torch.empty(x.shape, dtype=dtype or x.dtype), x.requires_grad)
            )
        for name, x in part.named_buffers(recurse=False):
            part.register_buffer(
                name, torch.empty(x.shape, dtype=x.dtype), name not in part._non_persistent_buffers_set
            )
    return module
