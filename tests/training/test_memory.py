"""Memory that runs out: the work is done again in smaller parts and comes to the same."""

import ctypes
import os
import warnings
from pathlib import Path

import pytest
import torch
from support import train, weights

from lightning_rlvr.models.memory import give_back, in_smaller_parts, out_of_memory
from lightning_rlvr.objectives import GRPO
from lightning_rlvr.types import UserError

CPU = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError(CPU), True),
        (RuntimeError("std::bad_alloc"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_what_counts_as_memory(error, expected):
    assert out_of_memory(error) is expected


def test_a_cpu_that_is_asked_for_too_much_says_so_in_words_that_are_known():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(error.value)


def test_a_size_is_halved_until_it_fits_and_each_halving_said():
    tried = []

    def work(size):
        tried.append(size)
        if size > 3:
            raise MemoryError
        return "done"

    with pytest.warns(UserWarning, match="key is halved from 6 to 3") as said:
        assert in_smaller_parts(work, 12, 1, "key", "others") == ("done", 3)
    assert tried == [12, 6, 3]
    assert len(said) == 2


def test_what_does_not_fit_at_the_least_size_is_one_error():
    def never(size):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(UserError, match=r"key 2 .*2 GiB.*others"), pytest.warns(UserWarning, match="halved"):
        in_smaller_parts(never, 4, 2, "key", "others")


def test_other_errors_are_left_as_they_are():
    def work(size):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        in_smaller_parts(work, 4, 1, "key", "others")


@pytest.fixture(scope="module")
def fitting(tmp_path_factory):
    """A run that has the memory."""
    return train(tmp_path_factory.mktemp("whole"), updates=1, micro_batch_size=24, rollout_rows=24)


def limited(monkeypatch, place, name, rows_of, most):
    """Let a function of the program run out of memory when it is given more rows than that."""
    function = getattr(place, name)

    def of(*args, **kwargs):
        if rows_of(*args) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return function(*args, **kwargs)

    monkeypatch.setattr(place, name, of)


def same(module, fitting):
    for name, weight in weights(fitting[0]).items():
        torch.testing.assert_close(weights(module)[name], weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pass_", ["response_loss", "batch_logp"])
def test_an_update_that_does_not_fit_is_done_again(tmp_path, monkeypatch, fitting, pass_):
    from lightning_rlvr.training import module as module_room
    from lightning_rlvr.training import update

    if pass_ == "response_loss":
        limited(monkeypatch, update, pass_, lambda model, rollouts, *rest: len(rollouts.mask), 7)
    else:
        limited(monkeypatch, module_room, pass_, lambda *args: max(map(len, args[3])), 7)
    with pytest.warns(UserWarning, match=r"model\.micro_batch_size is halved") as said:
        module, trainer = train(tmp_path, updates=1, micro_batch_size=24)
    sizes = sum("micro_batch_size" in str(w.message) for w in said)
    assert sizes == {24: 0, 12: 1, 6: 2, 3: 3}[module.micro_batch_size] > 0
    assert trainer.logged_metrics["train/micro_batch_size"] == module.micro_batch_size
    same(module, fitting)


def test_an_update_that_fails_in_its_midst_leaves_nothing_behind(tmp_path, monkeypatch, fitting):
    """The gradient and the metrics of the micro-batches before are dropped with it."""
    from lightning_rlvr.training import update

    compute, calls = update.response_loss, []

    def third_fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError(CPU)
        return compute(*args, **kwargs)

    monkeypatch.setattr(update, "response_loss", third_fails)
    with pytest.warns(UserWarning, match="halved from 4 to 2"):
        module, trainer = train(tmp_path, updates=1, micro_batch_size=4)
    same(module, fitting)
    for name in ("loss", "grad_norm", "logp_gap", "clip_fraction", "grad_share/policy", "kl/all"):
        wanted = float(fitting[1].logged_metrics[f"train/{name}"])
        assert float(trainer.logged_metrics[f"train/{name}"]) == pytest.approx(wanted, abs=1e-9), name


def test_a_rollout_that_does_not_fit_is_done_again(tmp_path, monkeypatch, fitting):
    from lightning_rlvr.rollout import transformers_engine as engine

    class Limited(engine._Batch):
        def read(self, decoder, prompts):
            if len(prompts) > 2:
                raise RuntimeError("std::bad_alloc")
            return super().read(decoder, prompts)

    monkeypatch.setattr(engine, "_Batch", Limited)
    with pytest.warns(UserWarning, match="rollout_rows is halved from 24 to 12") as said:
        module, trainer = train(tmp_path, updates=1)
    assert sum("halved" in str(w.message) for w in said) == 2  # to 6, which is one group: once for the whole run
    assert trainer.logged_metrics["train/rollout_rows"] == module.rollout_rows == 6
    same(module, fitting)


def test_a_run_that_fits_says_nothing_and_keeps_its_sizes(tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        module, _ = train(tmp_path, objective=GRPO(), updates=1)
    assert not [w for w in said if "memory" in str(w.message)]
    assert (module.micro_batch_size, module.rollout_rows) == (32, 256)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_what_lay_between_other_things_is_given_back():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    blocks = [bytearray(b"x") * 2**16 for _ in range(2**11)]  # less than what malloc maps by itself, 128 MiB in all
    between = blocks[:: 2**5]
    held = resident()
    del blocks
    give_back()
    assert resident() < held - 2**26
    assert len(between) == 2**6
