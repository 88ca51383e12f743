import pytest

from lightning_rlvr.training.clock import Clock


@pytest.fixture
def time(monkeypatch):
    """A clock's time, moved by hand."""

    class Time:
        now = 100.0

        def go(self, seconds):
            self.now += seconds

    time = Time()
    monkeypatch.setattr(Clock, "_now", staticmethod(lambda: time.now))
    return time


def test_parts_add_up(time):
    clock = Clock()
    assert clock.seconds == {}
    for seconds in (1.0, 2.0):
        with clock.part("rollout"):
            time.go(seconds)
        time.go(64.0)  # belongs to no part
    with clock.part("reward"):
        time.go(4.0)
    assert clock.seconds == {"rollout": 3.0, "reward": 4.0}


def test_a_part_inside_another_counts_in_both(time):
    clock = Clock()
    with clock.part("step"):
        time.go(1.0)
        with clock.part("update"):
            time.go(2.0)
        with clock.part("update"):
            time.go(4.0)
        time.go(8.0)
    assert clock.seconds == {"step": 15.0, "update": 6.0}


def test_nothing_inside_a_closed_part_is_counted_but_the_part_is(time):
    clock = Clock()
    with clock.part("rollout"):
        time.go(1.0)
    with clock.part("evaluation", closed=True):
        time.go(2.0)
        for closed in (False, True):
            with clock.part("rollout", closed):
                time.go(4.0)
                with clock.part("reward"):
                    time.go(8.0)
        with clock.part("reward"):
            time.go(16.0)
    with clock.part("rollout"):  # open again
        time.go(32.0)
    assert clock.seconds == {"rollout": 33.0, "evaluation": 42.0}


def test_a_closed_part_inside_an_open_one_opens_again(time):
    clock = Clock()
    with clock.part("fit"):
        with clock.part("evaluation", closed=True), clock.part("rollout"):
            time.go(1.0)
        with clock.part("rollout"):
            time.go(2.0)
    assert clock.seconds == {"fit": 3.0, "evaluation": 1.0, "rollout": 2.0}


@pytest.mark.parametrize("closed", [True, False])
def test_an_exception_is_counted_and_passed_on(time, closed):
    clock = Clock()

    def fail():
        with clock.part("rollout", closed), clock.part("inner"):
            time.go(1.0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with clock.part("after"):
        time.go(2.0)
    inner = {} if closed else {"inner": 1.0}
    assert clock.seconds == {"rollout": 1.0, "after": 2.0, **inner}


def test_real_time_goes_forward():
    clock = Clock()
    with clock.part("a"):
        sum(range(1000))
    assert 0 < clock.seconds["a"] < 1
