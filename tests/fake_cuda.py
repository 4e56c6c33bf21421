"""A CUDA device that is not there: tensors that say they are on it and compute on the CPU, and refuse the company of others.

What mixes devices fails on a real one, and is silent on a machine without any. Here it fails there too.
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
EITHER = {
    "aten::index.Tensor",
    "aten::index_put_",
    "aten::index_put",
    "aten::_index_put_impl_",
}  # indices may be elsewhere
COPIES = {"aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense"}


class OnDevice(torch.Tensor):
    """Wraps a CPU tensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",  # a real one needs its drivers
            requires_grad=False,
        )

    def __init__(self, inner):
        self.inner = inner

    @property
    def device(self):
        return CUDA

    @property
    def is_cuda(self):
        return True

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func, args, kwargs):
    name = func.name().split(".")[0] if func.name() not in EITHER else func.name()
    flat = tree_flatten((args, kwargs))[0]
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, OnDevice)]
    asked = kwargs.get("device")
    if name not in COPIES and func.name() not in EITHER and ours:
        others = [x for x in tensors if not isinstance(x, OnDevice) and x.ndim > 0]
        if others:
            raise RuntimeError(
                f"{func.name()}: tensors of shapes {[tuple(x.shape) for x in others]} are on the CPU, others on cuda:0"
            )
    to_cuda = torch.device(asked).type != "cpu" if asked is not None else bool(ours)
    if name == "aten::copy_":
        to_cuda = isinstance(args[0], OnDevice)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs))
    out = func(*args, **kwargs)
    if not to_cuda:
        return out
    mutated = [x for x in ours if any(x.inner is y for y in tree_flatten(out)[0])]

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        same = next((y for y in mutated if y.inner is x), None)
        return OnDevice(x) if same is None else same

    return tree_map(wrap, out)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class _Send(torch.autograd.Function):
    """From the CPU to the device, and gradients back."""

    @staticmethod
    def forward(ctx, x):
        return OnDevice(x.detach().clone())

    @staticmethod
    def backward(ctx, slope):
        return slope.inner if isinstance(slope, OnDevice) else slope


def _moved(x, *where, device=None, dtype=None, **more):
    """`x.to(...)`, in all the ways in which it is called."""
    for item in where:
        if isinstance(item, torch.Tensor):
            device, dtype = item.device, item.dtype
        elif isinstance(item, torch.dtype):
            dtype = item
        elif item is not None:
            device = item
    x = x if dtype is None or x.dtype == dtype else x.to(dtype=dtype) if not isinstance(x, OnDevice) else x.type(dtype)
    if device is None:
        return x
    if torch.device(device).type == "cpu":
        return x.cpu() if isinstance(x, OnDevice) else x
    return x if isinstance(x, OnDevice) else _Send.apply(x)


class _Made(TorchFunctionMode):
    """Tensors from data, which torch makes on the CPU and sends to a device by itself."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            return _moved(args[0], *args[1:], **kwargs)
        if func in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None)
            if func is torch.as_tensor and isinstance(args[0], torch.Tensor):
                made = args[0] if kwargs.get("dtype") is None else args[0].to(kwargs["dtype"])
                return made if device is None else _moved(made, device)
            made = func(*args, **kwargs)
            return made if device is None else _moved(made, device)
        if func is torch.Tensor.new_tensor and isinstance(args[0], OnDevice):
            return _moved(torch.tensor(args[1], **{"dtype": args[0].dtype, **kwargs}), CUDA)
        return func(*args, **kwargs)


@contextmanager
def fake_cuda():
    """Inside, there is one CUDA device."""
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "device_count", return_value=1),
        mock.patch.object(torch.cuda, "mem_get_info", return_value=(2**33, 2**33)),
        mock.patch.object(torch.cuda, "synchronize", return_value=None),
        mock.patch.object(torch.cuda, "_lazy_init", return_value=None),
        _Made(),
        _Mode(),
    ):
        yield CUDA
