"""The CUDA backend: the contract of every backend on each way of submitting a copy, and a chat on a real device."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvtier import Engine, PagerConfig, SamplingParams  # noqa: E402
from kvtier.tiers.cuda import COPY_PATHS, CudaBackend, pinned_rows, unavailable_reason  # noqa: E402
from kvtier.tiers.errors import ConfigError  # noqa: E402

from .test_streams import BackendContract  # noqa: E402

needs_gpu = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_backend_says_what_is_missing():
    assert "sees no CUDA device" in str(unavailable_reason())
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        CudaBackend()


def test_an_unknown_copy_path_is_refused_first():
    with pytest.raises(ConfigError, match="copy_path='callback'"):
        CudaBackend("callback")


@pytest.mark.gpu
@needs_gpu
class TestCudaContract(BackendContract):
    """Every path of the ladder keeps the contract."""

    @pytest.fixture(autouse=True, params=COPY_PATHS)
    def path(self, request):
        try:
            CudaBackend(request.param).close(5)
        except ConfigError as error:
            pytest.skip(str(error))
        self.copy_path = request.param

    def make(self):
        return Unified(self.copy_path)


class Unified(CudaBackend):
    """For the contract, which reads and fills rows by numpy: device rows that are pinned host memory."""

    def alloc_device(self, rows, row_bytes):
        return pinned_rows(rows, row_bytes)


@pytest.mark.gpu
@needs_gpu
def test_all_paths_copy_the_same_bytes_both_ways():
    random = np.random.default_rng(0)
    results = []
    for path in COPY_PATHS:
        backend = CudaBackend(path)
        host, back, device = backend.alloc_host(5000, 48), backend.alloc_host(5000, 48), backend.alloc_device(5000, 48)
        host[:] = np.random.default_rng(1).integers(0, 256, host.shape, np.uint8)
        t, s = np.random.default_rng(2).permutation(5000), np.random.default_rng(3).permutation(5000)
        backend.promote.copy_rows(device, t, host, s)
        backend.demote.wait(backend.promote.record())
        backend.demote.copy_rows(back, s, device, t)
        assert backend.demote.record().wait(30)
        assert (back == host).all() and (device.cpu().numpy()[t] == host[s]).all()
        slices = backend.alloc_device(64, 16)
        rows = random.permutation(64)
        backend.promote.copy_rows(slices, np.arange(64), host[:, 16:32], rows)
        assert backend.promote.record().wait(30)
        assert (slices.cpu().numpy() == host[rows, 16:32]).all()
        results.append(device.cpu())
        backend.close(5)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.gpu
@needs_gpu
def test_the_slab_is_exact_and_page_locked():
    rows = pinned_rows(3, 1 << 20)
    assert rows.nbytes == 3 << 20 and torch.from_numpy(rows).is_pinned() and not rows.any()


@pytest.mark.gpu
@needs_gpu
def test_a_needle_chat_swaps_on_the_device_and_answers_exactly(tmp_path):
    from kvtier.engine.needle import NeedleSpec, build_needle_model, needle_prompt

    ids, needles = needle_prompt(NeedleSpec(), 8192, 8, num_values=4, seed=0)
    model = build_needle_model(dtype=torch.bfloat16).to("cuda")
    config = PagerConfig("1MiB", "3MiB", nvme_path=tmp_path / "s", nvme_bytes="64MiB", backend="cuda")
    for restarted in (False, True):
        with Engine.from_model(model, config, block_size=16) as engine:
            session = engine.session("chat")
            if not restarted:
                session.send(ids, SamplingParams(max_tokens=0))
            length = len(session.token_ids)
            for needle in needles:
                out = session.send([needle.key], SamplingParams(max_tokens=4))
                assert tuple(out.token_ids) == tuple(needle.values)
                session.rollback(length)
            session.park()
            assert engine.pager.status()["pinned_memory"]
