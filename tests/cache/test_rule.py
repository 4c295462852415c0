"""The cache rule against its definition, token by token."""

import pytest
import torch

from gsrq_export.cache.rule import CacheRule

RULES = [CacheRule(3, 5, 4), CacheRule(0, 0, 1), CacheRule(4, 64, 64), CacheRule(1, 0, 7), CacheRule(0, 9, 2)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_slots_hold_the_newest_tokens(rule: CacheRule) -> None:
    for length in range(3 * rule.exact_slots):
        expected = [-1] * rule.exact_slots
        for token in range(length):
            expected[int(rule.slot(torch.tensor(token)))] = token
        assert rule.slot_tokens(torch.tensor([length]))[0].tolist() == expected


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_token_is_coded_or_in_an_exact_slot(rule: CacheRule) -> None:
    for length in range(3 * rule.exact_slots):
        coded = rule.coded(length)
        assert coded == int(rule.coded(torch.tensor(length)))
        assert coded % rule.block == 0
        exact = set(rule.slot_tokens(torch.tensor([length]))[0].tolist())
        for token in range(length):
            assert rule.sinks <= token < rule.sinks + coded or token in exact
        recent = length - rule.sinks - coded
        if coded:
            assert rule.window <= recent < rule.window + rule.block


def test_impossible_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="block >= 1"):
        CacheRule(4, 64, 0)
