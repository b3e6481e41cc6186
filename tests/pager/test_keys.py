from __future__ import annotations

import pytest

from kvtier import KVLayout, Pager, PagerConfig
from kvtier.pager.config import check_namespace
from kvtier.pager.keys import KEY_BYTES, KeyChain, salted, unsalted


def chain(fingerprint: str = "m", namespace: str = "n", secret: bytes = b"", size: int = 4) -> KeyChain:
    return KeyChain(fingerprint, namespace, secret, size)


def keys_of(c: KeyChain, tokens: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    c.extend(keys, tokens)
    return keys


def test_only_full_blocks_have_keys():
    assert len(keys_of(chain(), list(range(11)))) == 2
    assert all(len(key) == KEY_BYTES for key in keys_of(chain(), list(range(11))))


def test_extending_step_by_step_gives_the_same_keys():
    keys: list[bytes] = []
    for end in range(20):
        chain().extend(keys, list(range(end)))
    assert keys == keys_of(chain(), list(range(19)))


def test_a_key_depends_on_every_earlier_token():
    a, b = keys_of(chain(), [1, 2, 3, 4, 5, 6, 7, 8]), keys_of(chain(), [9, 2, 3, 4, 5, 6, 7, 8])
    assert a[0] != b[0] and a[1] != b[1]


@pytest.mark.parametrize("other", [chain("x"), chain(namespace="x"), chain(secret=b"s"), chain(size=8)])
def test_model_namespace_secret_and_block_size_separate_keys(other):
    tokens = list(range(8))
    assert not set(keys_of(chain(), tokens)) & set(keys_of(other, tokens))


def test_sealed_tails_differ_from_full_blocks_and_from_each_other():
    c = chain()
    full = keys_of(c, [1, 2, 3, 4])[0]
    tails = {c.seal(None, [1, 2, 3, 4][:n]) for n in range(1, 5)}
    assert len(tails) == 4 and full not in tails
    assert c.seal(full, [5]) != c.seal(None, [5])


def test_too_long_a_secret_is_refused():
    with pytest.raises(ValueError, match="65 bytes"):
        chain(secret=b"x" * 65)


def test_a_salted_namespace_has_other_keys_and_the_same_owner():
    name = salted("n", "a salt")
    assert unsalted(name) == "n" and check_namespace(name) == name and salted("n", "another") != name
    assert not set(keys_of(chain(), list(range(8)))) & set(keys_of(chain(namespace=name), list(range(8))))
    assert chain(namespace=name).owner == chain().owner != chain(namespace="m").owner
    assert unsalted("--") == "--"


def test_clients_that_choose_salts_do_not_fill_the_memory():
    layout = KVLayout(1, 1, 8, block_size=16, dtype="float32")
    with Pager.open(layout, PagerConfig(device_bytes=8 * layout.block_bytes, backend="cpu", staging_bytes=0)) as pager:
        for i in range(5000):
            pager.release(pager.begin(salted("n", str(i))))
        assert len(pager._core._chains) <= 4096
