"""A device that computes on the CPU and counts what would make a program wait for a GPU.

Tensors on it are wrappers of CPU tensors. `Watched` runs every operator on what is wrapped, so the values are real. It counts
copies to and from the device that a GPU's program waits for, and operators whose output's shape or value the host reads. A
process that has called `install` has an accelerator: only a child process may.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

NAME = "standin"
# Operators whose kernels for GPUs read a value back to the host.
READS = {
    "_local_scalar_dense", "bincount", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2",
    "unique_dim", "unique_consecutive", "repeat_interleave",
}  # fmt: skip
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class Wrapped(torch.Tensor):
    """A tensor on the stand-in device. held: the CPU tensor."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(NAME, 0), requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the stand-in device outside of `Watched`")


def _is_held(x: Any) -> bool:
    """Returns whether a tensor is on the device. A parameter may have been given another class (`NoDecay`)."""
    return isinstance(x, torch.Tensor) and hasattr(x, "held")


class _Made(TorchFunctionMode):
    """Makes tensors of Python numbers on the CPU and copies them, as torch does out of sight of a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if (
            func in (torch.tensor, torch.as_tensor)
            and device is not None
            and torch.device(device).type == NAME
        ):
            del kwargs["device"]
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


class Watched(TorchDispatchMode):
    """Runs operators of the stand-in device, and counts by name those that a program would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.counting = False

    def _count(self, what: str) -> None:
        if self.counting:
            self.counts[what] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors: list[torch.Tensor] = []
        tree_map(lambda x: tensors.append(x) if isinstance(x, torch.Tensor) else None, (args, kwargs))
        on_device = any(_is_held(x) for x in tensors)
        device = kwargs.get("device")
        to_device = device is not None and torch.device(device).type == NAME
        wrapped = on_device or to_device
        if not wrapped:
            return func(*args, **kwargs)
        if (
            name == "_to_copy"
            and device is not None
            and to_device != on_device
            and not kwargs.get("non_blocking")
        ):
            self._count("copy to the device" if to_device else "copy to the host")
        elif name == "copy_" and _is_held(args[0]) != _is_held(args[1]):
            if not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking"):
                self._count("copy to the device" if _is_held(args[0]) else "copy to the host")
        elif name in READS:
            self._count(name)
        elif name in INDEXED and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            self._count(f"{name} by bool")
        leaves = name == "_to_copy" and device is not None and not to_device
        self._same_device(name, tensors, args)
        given = tree_map(lambda x: x.held if _is_held(x) else x, (args, kwargs))
        if device is not None:
            given[1]["device"] = torch.device("cpu")
        found = func(*given[0], **given[1])
        if name == "_to_copy" and any(found is x for x in given[0]):
            found = found.clone()
        if leaves or name == "_local_scalar_dense":
            return found
        back = {id(x.held): x for x in tensors if _is_held(x)}
        return tree_map(lambda x: back.get(id(x), Wrapped(x)) if isinstance(x, torch.Tensor) else x, found)

    def _same_device(self, name: str, tensors: list, args: Any) -> None:
        """A GPU's operators take tensors of the CPU as scalars and as positions only."""
        for x in tensors:
            if not _is_held(x) and x.dim() and name not in ("_to_copy", "copy_"):
                if name in INDEXED:
                    self._count(f"{name} by positions on the host")
                else:
                    raise RuntimeError(
                        f"{name}: a tensor of the CPU among those of the device: {tuple(x.shape)}"
                    )

    def __enter__(self) -> "Watched":
        self._made = _Made()
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *given: Any) -> None:
        super().__exit__(*given)
        self._made.__exit__(*given)

    @contextmanager
    def counted(self) -> Iterator[Counter]:
        """Counts inside the context."""
        self.counts, self.counting = Counter(), True
        try:
            yield self.counts
        finally:
            self.counting = False


def install() -> torch.device:
    """Makes the device known to torch, for the rest of this process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    module: Any = torch.get_device_module(NAME)
    module.manual_seed = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return torch.device(NAME, 0)
