"""How a server's cache orders its codes, and what the artifact's graph says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from onnx import helper

from gsrq_export.cache.reference import AttentionConfig, attributes
from gsrq_export.cache.rule import CacheRule
from gsrq_export.export.function import DOMAIN, OPERATOR
from gsrq_export.hosting.layers import _config, with_code_order


@pytest.mark.parametrize(
    ("block", "page", "by_head"),
    [(64, 64, True), (8, 16, True), (64, 8, True), (64, 12, False), (4, 16, False), (7, 112, False), (3, 3, False)],
)
def test_by_head_where_tiles_fill_blocks_and_pages(block: int, page: int, by_head: bool) -> None:
    config = AttentionConfig(0.25, CacheRule(2, 5, block), beam=3)
    assert with_code_order(config, page) == replace(config, codes_by_head=by_head)
    if block % 8 == 0:  # whatever the artifact has
        assert with_code_order(replace(config, codes_by_head=True), page) == replace(config, codes_by_head=by_head)


@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig(0.25, CacheRule(2, 5, 4), beam=3),
        AttentionConfig(0.5, CacheRule(0, 0, 8), 1, True, True, 2.0, 9, codes_by_head=True),
    ],
)
def test_a_node_gives_back_its_attributes(config: AttentionConfig) -> None:
    assert _config(helper.make_node(OPERATOR, [], [], domain=DOMAIN, **attributes(config))) == config
