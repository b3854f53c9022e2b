"""Jinja's sandbox with a limit of time and of length: a chat template is foreign code, and may be a bomb."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from math import prod
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

SECONDS = 10.0
LENGTH = 1 << 26
"""Characters or items of a value that a template makes: more than any model's context."""
_LARGEST_CALL = 1 << 30
"""Product of the sizes of a call's arguments, which bounds what it makes of them."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Renders one template: the clock runs from when this is made.

    Every turn of a loop looks at the clock; every call, filter and operator looks at it and at its values, too. Where
    a limit is passed, ``SecurityError`` is raised.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.deadline = time.monotonic() + SECONDS
        self.code_generator_class = _Guarded
        self.filters = {name: self._guarded(function) for name, function in self.filters.items()}
        self.filters["guarded_loop"] = self._loop
        self.concat = self._concat

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """As the sandbox calls it, within the limits."""
        owner = getattr(function, "__self__", None)
        self._before([owner, *args, *kwargs.values()])
        return self._after(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """As Python computes it, within the limits."""
        self._before([left, right])
        longest = _size(left) * _size(right)
        if operator == "*" and not isinstance(left, float) and not isinstance(right, float) and longest > LENGTH:
            raise SecurityError(f"it makes a value of more than {LENGTH} characters")
        if operator == "**" and _size(right) > 64:
            raise SecurityError("it raises a number to a power above 64")
        return self._after(super().call_binop(context, operator, left, right))

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def within(*args: Any, **kwargs: Any) -> Any:
            self._before([*args, *kwargs.values()])
            return self._after(function(*args, **kwargs))

        return within

    def _loop(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._look()
            yield item

    def _concat(self, pieces: Iterable[str]) -> str:
        parts = list(pieces)
        if sum(map(len, parts)) > LENGTH:
            raise SecurityError(f"it makes a text of more than {LENGTH} characters")
        return "".join(parts)

    def _before(self, values: list[Any]) -> None:
        self._look()
        sizes = [_size(value) for value in values]
        numbers = [size for size, value in zip(sizes, values, strict=True) if isinstance(value, int)]
        if max(numbers, default=0) > LENGTH or prod(sizes) > _LARGEST_CALL:
            raise SecurityError(f"it makes a value of more than {LENGTH} characters")

    def _after(self, value: Any) -> Any:
        if _size(value) > LENGTH:
            raise SecurityError(f"it makes a value of more than {LENGTH} characters")
        return value

    def _look(self) -> None:
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it takes more than {SECONDS:g} seconds")


def _size(value: Any) -> int:
    """Of a text or a collection its length, of a whole number itself: what a repetition would multiply by."""
    if isinstance(value, str | bytes | list | tuple | dict | set):
        return max(len(value), 1)
    return max(abs(value), 1) if isinstance(value, int) else 1


class _Guarded(CodeGenerator):
    """Compiles what ``_Guards`` makes of a template."""

    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:  # noqa: N802 (as Jinja names them)
        super().visit_Template(_Guards().visit(node), frame)


class _Guards(NodeTransformer):
    """Loops go through a filter that looks at the clock, and ``~`` through ``join``, whose result is looked at."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "guarded_loop", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "join", [nodes.Const("")], [], None, None, lineno=node.lineno)
