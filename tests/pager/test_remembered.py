"""Prompts that were hashed before: the same keys, without hashing, to nobody else, within a bound."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier import KVLayout, Pager, PagerConfig
from kvtier.pager.keys import KeyChain, token_bytes
from kvtier.pager.lease import Span
from kvtier.pager.remembered import RUN_TOKENS, Remembered

SIZE = 16
RUN = RUN_TOKENS // SIZE


def keys_of(chain: KeyChain, tokens: list[int], keys: list[bytes] | None = None) -> list[bytes]:
    keys = [] if keys is None else keys
    chain.extend(keys, tokens)
    return keys


def chain(remembered: Remembered | None, namespace: str = "n", secret: bytes = b"s") -> KeyChain:
    return KeyChain("m", namespace, secret, SIZE, remembered)


def test_keys_are_the_same_with_and_without_memory_however_a_prompt_grows():
    remembered, tokens = Remembered(), [i * 7919 % 50021 for i in range(5 * RUN_TOKENS + 37)]
    plain = keys_of(chain(None), tokens)
    for step in (len(tokens), 100, RUN_TOKENS, RUN_TOKENS - SIZE, 3000):
        keys: list[bytes] = []
        for end in (*range(step, len(tokens), step), len(tokens)):
            keys_of(chain(remembered), tokens[:end], keys)
        assert keys == plain
    assert len(remembered) == 5


def test_a_known_prefix_is_not_hashed_again_and_what_is_new_behind_it_is():
    remembered, tokens = Remembered(), list(range(3 * RUN_TOKENS))
    before = keys_of(chain(remembered), tokens)
    for keys in remembered._runs.values():
        keys[0] = b"remembered".ljust(32)  # nobody looks at it but who believes it
    after = keys_of(chain(remembered), [*tokens, *range(RUN_TOKENS)])
    assert [i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b] == [0, RUN, 2 * RUN]
    assert len(after) == 4 * RUN and len(remembered) == 4


def test_nobody_is_told_the_keys_of_another_namespace_secret_or_branch():
    remembered, tokens = Remembered(), list(range(2 * RUN_TOKENS))
    ours = chain(remembered)
    told = [
        keys_of(one, tokens)
        for one in (
            ours,
            chain(remembered, namespace="o"),
            chain(remembered, secret=b"t"),
            ours.branched(0, "a"),
            ours.branched(0, "b"),
        )
    ]
    assert len({key for keys in told for key in keys}) == 5 * 2 * RUN
    late = keys_of(ours.branched(RUN_TOKENS, "c"), tokens)
    assert late[:RUN] == told[0][:RUN] and not set(late[RUN:]) & {key for keys in told for key in keys}
    assert late == keys_of(chain(None).branched(RUN_TOKENS, "c"), tokens)


def test_memory_is_bounded_and_keeps_what_is_asked_for():
    one = RUN_TOKENS * 4 + 100 * RUN
    remembered = Remembered(max_bytes=4 * one)
    kept = list(range(RUN_TOKENS))
    keys_of(chain(remembered), kept)
    for start in range(20):
        keys_of(chain(remembered), list(range(start * 9999 + 1, start * 9999 + 1 + RUN_TOKENS)))
        keys_of(chain(remembered), kept)
        assert remembered.nbytes == len(remembered) * one <= 4 * one
    assert remembered.find(chain(None).root, token_bytes(kept)) is not None


def test_whoever_stops_early_has_hashed_little():
    remembered, tokens = Remembered(), list(range(8 * RUN_TOKENS))
    keys: list[bytes] = []
    chain(remembered).extend(keys, tokens, lambda key: len(remembered) < 3)
    assert len(keys) == 3 * RUN and keys == keys_of(chain(None), tokens)[: 3 * RUN]


@pytest.mark.parametrize("tokens", [[-1] * SIZE, [1 << 32] * SIZE])
def test_what_is_no_token_id_is_refused(tokens):
    with pytest.raises(OverflowError):
        keys_of(chain(None), tokens)


def test_lists_tuples_and_arrays_have_the_same_bytes():
    tokens = [0, 1, 1 << 31, (1 << 32) - 1]
    for same in (tuple(tokens), np.array(tokens), np.array(tokens, ">u4"), [np.int64(token) for token in tokens]):
        assert token_bytes(same) == token_bytes(tokens) == np.array(tokens, "<u4").tobytes()


def test_a_look_up_hashes_no_further_than_what_is_held_or_was():
    layout, tokens = KVLayout(1, 1, 8, block_size=SIZE, dtype="float32"), list(range(6 * RUN_TOKENS))
    config = PagerConfig(
        device_bytes=4 * RUN * layout.block_bytes, host_bytes=0, backend="cpu", staging_bytes=0, policy="lru"
    )
    with Pager.open(layout, config) as pager:

        def compute(prompt: list[int]) -> None:
            seq = pager.begin()
            pager.append(seq, prompt)
            with pager.lease([Span(seq, 0, len(prompt))]) as lease:
                lease.commit()
            pager.finish(seq)

        def forget() -> Remembered:
            core = pager._core
            core._chains.clear()
            core.remembered = Remembered()
            return core.remembered

        remembered = forget()
        assert pager.match(tokens).tokens == 0 and len(remembered) == 1
        compute(tokens[: 3 * RUN_TOKENS])
        remembered = forget()
        assert pager.match(tokens).tokens == 3 * RUN_TOKENS and len(remembered) == 4
        compute(list(range(90_000, 90_000 + 4 * RUN_TOKENS)))  # all else has to go
        remembered = forget()
        match = pager.match(tokens)
        assert (match.tokens, match.ghost_tokens) == (0, 3 * RUN_TOKENS) and len(remembered) == 4
