"""How the results of an op lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a map of x's shape, in its dtype unless another is given: channels-last where the channels of x lie
    together, else contiguous.

    ``csrc/feature_map.h`` has the same rule, so that the fake kernels' strides are those of every provider.
    """
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        return torch.empty_like(x, dtype=dtype)
    if x.dim() > 2 and x.stride(1) == 1:
        return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1]), dtype=dtype).movedim(-1, 1)
    return x.new_empty(x.shape, dtype=dtype)


def over_rows(maps: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator, with which a pass over contiguous rows (R, C) takes maps (..., C) and vectors of any strides.

    ``maps``: how many of its arguments, the first, are maps. Results with rows get the shape of the maps.
    """

    def decorate(of_rows: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(of_rows)
        def function(*arguments: Any) -> Any:
            given = [each.contiguous() if isinstance(each, Tensor) else each for each in arguments]
            shape = given[0].shape
            if len(shape) == 2:
                return of_rows(*given)
            for place in range(maps):
                if given[place] is not None:
                    given[place] = given[place].view(-1, shape[-1])
            made = of_rows(*given)
            for each in made if isinstance(made, tuple) else (made,):
                if each.dim() == 2:  # in place, for what is a view may not be changed where autograd's node is our own
                    each.resize_(shape)
            return made

        return function

    return decorate
