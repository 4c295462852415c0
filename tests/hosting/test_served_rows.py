"""Rows of a server that cannot be are refused before anything is written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_calls import TILE_CASES, by_head, layer_of_case
from served_rows import NAN, Pool, step_of

from gsrq_export import GsrqError
from gsrq_export.hosting.rows import attend_rows


def test_rows_that_cannot_be_are_refused() -> None:
    case = by_head(TILE_CASES[0])
    data = case.data()
    pool = Pool(case, layer_of_case(case, data))
    (query, key, value), rows, output = step_of(case, data, [0, 0, 0], [3, 2, 1], torch.float16, "cpu", 0)

    def refused(message: str, **changes: object) -> None:
        given = {"tokens": (query, key, value), "rows": rows, "out": output, **changes}
        with pytest.raises(GsrqError, match=message):
            pool.attend(attend_rows, **given)  # type: ignore[arg-type]

    refused(r"query is torch.float16 \[10, 64\]", tokens=(query.flatten(1), key, value))
    refused("key has 2 tokens, query 10", tokens=(query, key[:2], value))
    refused(r"value has shape \[0, 1, 16\], not \[0, 2, 16\]", tokens=(query, key, value[:, :1]))
    refused("key is torch.float32", tokens=(query, key.float(), value))
    refused("output has strides", out=output.transpose(0, 1).contiguous().transpose(0, 1))
    refused("starts is torch.int32", rows=rows._replace(starts=rows.starts.int()))
    refused(r"past has shape \[2\], not \[3\]", rows=rows._replace(past=rows.past[:2]))
    exact, table = pool.case.exact_dtype, pool.exact_table
    pool.exact_table = table[:, :1].contiguous()
    refused("1 pages of .* and .* bytes for .* bytes of exact vectors")
    pool.exact_table = table.long()
    refused("exact.table is torch.int64")
    pool.exact_table, pool.case = table, replace(case, exact_dtype=torch.float64)
    refused("exact vectors are torch.float64")
    pool.case = replace(case, exact_dtype=exact)
    assert output.isnan().all()
    assert all((part == NAN).all() for part in pool.parts)
    pool.attend(attend_rows, (query, key, value), rows, output)
    assert int(output.isfinite().all((1, 2)).sum()) == 6
