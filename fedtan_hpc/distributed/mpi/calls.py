"""The ways in which torch and its users call a method of a process group.

torch.distributed passes lists of tensors and an object of options.  Users may also pass bare
tensors, and in place of options what these hold.  ``mpi.process_group`` declares its methods here.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_c10d: Any = torch._C._distributed_c10d
_FIELDS = {"op": "reduceOp", "root": "rootRank", "timeout": "timeout"}
"""Names of arguments, and of the fields of torch's options that hold them."""


def collective(kind: str, tensors: int, *names: str, listed: bool = True) -> Callable[..., Any]:
    """Returns a decorator for a method of ``tensors`` arguments, then options of one ``kind``.

    ``names`` are those of ``_FIELDS`` that may be passed instead of options, in this order.  With
    ``listed`` the method takes lists, and gets lists of one where bare tensors are passed.
    """
    options_type = getattr(_c10d, kind)

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(group: Any, *arguments: Any, **keywords: Any) -> Any:
            if type(arguments[-1] if arguments else None) is options_type:
                return method(group, *arguments)  # the usual way must be fast
            given, rest = arguments[:tensors], arguments[tensors:]
            if listed and any(isinstance(each, Tensor) for each in given):
                given = tuple([each] for each in given)
            options = keywords.pop("opts", None) or options_type()
            for name, value in (*zip(names, rest, strict=False), *keywords.items()):
                if isinstance(value, options_type):
                    options = value
                elif value is not None:
                    setattr(options, _FIELDS[name], value)
            return method(group, *given, options)

        return call

    return decorate
