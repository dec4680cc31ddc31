"""Defers the import of torch's compiler: transformers imports it, and zeroinf never calls it.

`transformers.masking_utils` takes one class out of the package `torch._dynamo`, and decorators of that package mark
functions for it. Without this module Python would execute all of TorchDynamo and parts of Inductor, a fifth of a
start's CPU time. After `defer_dynamo` the package can be imported, and is executed only when something of it is used.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType
from typing import Any

Function = Callable[..., Any]

_PACKAGE = "torch._dynamo"
# These modules import nothing else of the package.
_ALONE = frozenset({f"{_PACKAGE}._trace_wrapped_higher_order_op", f"{_PACKAGE}.config"})
# These decorators note something about a function, and return it.
_MARKS = frozenset({"allow_in_graph", "assume_constant_result"})


def defer_dynamo() -> None:
    """Let `import torch._dynamo` execute nothing until an attribute of it, or a module that needs it, is asked for.

    The module is torch's own and stays the same object, so that whoever needs the compiler gets all of it, late.
    Without effect once the package has been imported. Relies on these, as of torch 2.11: two modules of the package do
    without its others, two decorators return the function that they are given, and `disable` changes nothing as long as
    nothing is compiled.
    """
    if _PACKAGE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the package, and sees to it that it is executed before any of its modules that need it."""

    def __init__(self) -> None:
        self._package: _Late | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == _PACKAGE:
            spec = PathFinder.find_spec(fullname, path)
            if spec is not None and spec.loader is not None:
                self._package = spec.loader = _Late(spec.loader)
            return spec
        if self._package is None or self._package.executed:
            return None
        if not fullname.startswith(f"{_PACKAGE}.") or fullname in _ALONE:
            return None
        self._package.execute()
        found = sys.modules.get(fullname)  # the package may have imported it
        return None if found is None else _present(found)


def _present(module: ModuleType) -> ModuleSpec:
    """A spec that hands out `module`, so that it is not executed twice.

    Where a module has appeared during the search for it, Python takes the module's own spec instead of the one found.
    """
    module.__spec__ = ModuleSpec(module.__name__, _Present(module), is_package=hasattr(module, "__path__"))
    return module.__spec__


class _Late(Loader):
    """Makes the package's module, and executes it when it is used."""

    def __init__(self, loader: Loader) -> None:
        self.executed = False
        self._loader = loader
        self._lock = threading.RLock()  # other threads wait for the end of an execution
        self._package = _Deferred(_PACKAGE)
        self._package.__dict__["__late__"] = self
        self._marked: list[tuple[str, Function]] = []
        self._disabled: weakref.WeakSet[_Disabled] = weakref.WeakSet()

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._package

    def exec_module(self, module: ModuleType) -> None:
        """Nothing yet."""

    def execute(self) -> None:
        """Execute the package as its import would have done, then hand over what decorators have noted."""
        with self._lock:
            if self.executed:
                return
            self.executed = True
            try:
                self._loader.exec_module(self._package)
            except BaseException:
                self.executed = False
                raise
            self._package.__class__ = ModuleType  # type: ignore[assignment]
            for name, function in self._marked:
                getattr(self._package, name)(function)
            for one in tuple(self._disabled):
                one.function = one.real()

    def attribute(self, name: str) -> Any:
        """An attribute that the module lacks so far."""
        with self._lock:
            if not self.executed:
                if name in _MARKS:
                    return functools.partial(self._mark, name)
                if name == "disable":
                    return self._disable
                self.execute()
            if name in self._package.__dict__:
                return self._package.__dict__[name]
        raise AttributeError(f"module {_PACKAGE!r} has no attribute {name!r}")

    def _mark(self, name: str, function: Function) -> Function:
        if self.executed:
            marked: Function = getattr(self._package, name)(function)
            return marked
        self._marked.append((name, function))
        return function

    def _disable(self, fn: Function | None = None, *arguments: Any, **named: Any) -> Any:
        """Does the job of `torch._dynamo.disable`; the function it returns calls `fn` itself until something could
        compile it."""
        if fn is None:
            return lambda late: self._disable(late, *arguments, **named)
        if self.executed or not isinstance(fn, FunctionType):
            self.execute()
            return self._package.disable(fn, *arguments, **named)
        disabled = _Disabled(fn, lambda: self._package.disable(fn, *arguments, **named))

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            return disabled.function(*args, **kwargs)

        call._disabled = disabled  # type: ignore[attr-defined]  # it lives as long as what calls it
        self._disabled.add(disabled)
        return call


@dataclass(eq=False)
class _Disabled:
    """A function that is not to be compiled: itself, until `real` can make what says so to the compiler."""

    function: Function
    real: Callable[[], Function]


class _Deferred(ModuleType):
    """The package before its execution."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # of the import system and of inspection, which use nothing
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return self.__dict__["__late__"].attribute(name)


class _Present(Loader):
    """Hands out a module that is there already."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """It has been executed; it keeps its own spec."""
        module.__spec__ = self._spec
