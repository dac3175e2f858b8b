"""Two devices on a machine that has one: CPU tensors that say where they are, and must not mix.

The problem: whether a tensor is put on the right device shows only where there are several. Under
:class:`Devices` a tensor moved to ``cuda:1`` keeps its values on the CPU and a note of its place;
an operation on tensors of two places is refused with torch's own words, as is reading one as NumPy
without moving it first. What this cannot show: memory, speed, and the kernels of a real GPU.
"""

from contextlib import contextmanager
from functools import partial, update_wrapper
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
FREE_BYTES = 2**30  # on each device, as asked for by memory plans
_READING = (Tensor.device.__get__, Tensor.is_cuda.__get__, Tensor.grad.__get__)
_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
_ANYWHERE = (Tensor.copy_, torch.autograd.grad, torch.autograd.backward, Tensor.backward)
_TO_NUMPY = (Tensor.numpy, Tensor.__array__)
_HOOKS = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook)


def place_of(tensor):
    """Where a tensor says it is."""
    return vars(tensor).get("_place", CPU)


def put(found, place):
    """Note the place of every tensor in a nested result."""
    if isinstance(found, Tensor):
        found._place = place
    elif isinstance(found, tuple | list):
        for item in found:
            put(item, place)
    return found


def tensors_of(value):
    """The tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_of(item)


def common_place(tensors):
    """Where tensors are, all in one place; scalars on the CPU go with any."""
    places = {place_of(t) for t in tensors if t.ndim or place_of(t) != CPU}
    if len(places) > 1:
        names = " and ".join(sorted(map(str, places)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {names}")
    return places.pop() if places else CPU


def as_device(value):
    """The device that an argument names, if it does."""
    if isinstance(value, Tensor):
        return place_of(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return torch.device("cuda", value)
    return torch.device(value) if isinstance(value, str | torch.device) else None


class Devices(TorchFunctionMode):
    """Makes ``cuda:0``, ``cuda:1`` ... of the CPU for what runs inside."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _READING:
            return self._read(func, args[0])
        if func in (Tensor.to, Tensor.cpu):
            return self._move(func, args, kwargs)
        if func == Tensor.data.__set__:
            func(*args)
            put(args[0], place_of(args[1]))
            return None
        if func in _HOOKS:
            return func(args[0], partial(self._called_back, args[0], args[1]))
        if func in _TO_NUMPY and place_of(args[0]) != CPU:
            raise TypeError(f"can't convert {place_of(args[0])} device type tensor to numpy")
        if func is torch.autograd.grad:
            found = func(*args, **kwargs)
            for gradient, owner in zip(found, args[1], strict=True):
                put(gradient, place_of(owner))
            return found
        return self._compute(func, args, kwargs)

    def _called_back(self, owner, hook, given):
        """Backward passes run their hooks without the mode."""
        with Devices():
            return hook(put(given, place_of(owner)))

    def _read(self, func, tensor):
        if func == Tensor.device.__get__:
            own = func(tensor)
            return own if own.type == "meta" else place_of(tensor)
        if func == Tensor.is_cuda.__get__:
            return place_of(tensor).type == "cuda"
        return put(func(tensor), place_of(tensor))

    def _move(self, func, args, kwargs):
        tensor, rest = args[0], [a for a in args[1:] if as_device(a) is None]
        named = [a for a in (*args[1:], kwargs.pop("device", None)) if as_device(a) is not None]
        if func is Tensor.cpu:
            named = [CPU]
        place = as_device(named[0]) if named else place_of(tensor)
        if place.type == "meta":
            return func(tensor, place, *rest, **kwargs)
        rest += [a.dtype for a in named if isinstance(a, Tensor)]
        found = tensor.to(*rest, **kwargs) if rest or "dtype" in kwargs else tensor
        if found is tensor and (place != place_of(tensor) or kwargs.get("copy")):
            found = tensor.clone()
        return put(found, place)

    def _compute(self, func, args, kwargs):
        if func.__name__.startswith("_foreach"):  # torch groups their tensors by device itself
            return self._each(func, args, kwargs)
        given = list(tensors_of([args, kwargs]))
        wanted = as_device(kwargs.get("device"))
        if wanted is not None and wanted.type == "cuda":
            kwargs["device"] = CPU
        place = None
        if func in _INDEXING and place_of(args[0]) != CPU:  # an index may come from the CPU
            given = [t for t in given if t is args[0] or place_of(t) != CPU]
        if func not in _ANYWHERE:
            place = common_place(given)
        elif given:
            place = place_of(given[0])
        found = func(*args, **kwargs)
        found = list(found) if func is Tensor.__iter__ else found
        found = put(found, wanted or place or CPU)
        return iter(found) if func is Tensor.__iter__ else found

    def _each(self, func, args, kwargs):
        for tensors in zip(*(a for a in args if isinstance(a, tuple | list)), strict=True):
            common_place(list(tensors_of(tensors)))
        found = func(*args, **kwargs)
        for made, given in zip(found or (), args[0], strict=bool(found)):
            put(made, place_of(given))
        return found


def put_module(module, place):
    """Move a module's own tensors and those of its parts."""
    for tensor in (*module.parameters(), *module.buffers()):
        put(tensor, torch.device(place))


def _moved(value, place):
    if isinstance(value, Tensor):
        return value.to(place)
    if isinstance(value, dict):
        return {key: _moved(item, place) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, place) for item in value)
    return value


def _aligned(module, forward, place, back, *args, **kwargs):
    came_from = next((place_of(t) for t in tensors_of([args, kwargs])), CPU)
    found = forward(*_moved(args, place), **_moved(kwargs, place))
    return type(found)(_moved(dict(found), came_from)) if back else found


def _align(module, place, *, back=False):
    """As accelerate does it: the instance's forward brings its inputs along."""
    own = module.forward
    module.forward = update_wrapper(partial(_aligned, module, own, place, back), own)


@contextmanager
def several_devices():
    """Inside, devices are told apart, and each says how much of it is free."""
    with patch("torch.cuda.mem_get_info", lambda device: (FREE_BYTES, FREE_BYTES)), Devices():
        yield


@contextmanager
def spread(model: nn.Module, places: dict[str, str]):
    """A model whose parts lie on several devices, dispatched as accelerate does it.

    Args:
        model: Of transformers.
        places: Devices by the name of a part; the whole model's outputs go back to the device of
            its inputs.
    """
    with several_devices():
        for name, place in places.items():
            part = model.get_submodule(name)
            put_module(part, place)
            for module in part.modules():
                _align(module, place)
        _align(model, next(iter(places.values())), back=True)
        yield model
