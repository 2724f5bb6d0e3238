"""Workers that crash, hang or eat memory cost their own task and nothing else."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.data.guarded import Failure, map_in_order, run_guarded


def act(task):
    """Do what the task says, in a worker."""
    if isinstance(task, int):
        return 10 * task
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "hang":
        time.sleep(60)
    if task == "eat":
        return len(bytearray(3 << 30))
    if task == "raise":
        raise KeyError("no such thing")
    path = Path(task)  # dies the first time
    if not path.exists():
        path.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return "second time"


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers):
    assert list(run_guarded(act, range(30), workers=workers)) == [(n, 10 * n) for n in range(30)]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("bad", "reason", "detail"),
    [("die", "crash", "SIGKILL"), ("raise", "error", "KeyError: 'no such thing'")],
)
def test_a_task_that_fails_costs_only_itself(workers, bad, reason, detail):
    results = dict(run_guarded(act, [1, bad, 2, 3], workers=workers))
    failure = results.pop(bad)
    assert isinstance(failure, Failure)
    assert failure.reason == reason
    assert detail in failure.detail
    assert results == {1: 10, 2: 20, 3: 30}


def test_a_task_that_hangs_is_given_up():
    results = dict(run_guarded(act, [1, "hang", 2], seconds=lambda task: 0.5))
    assert results["hang"] == Failure("time", "took longer than 0.5 s")
    assert results[2] == 20


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_memory_has_a_bound():
    results = dict(run_guarded(act, [1, "eat", 2], memory=1 << 30))
    assert results == {1: 10, "eat": Failure("memory", "needs more than 1 GiB"), 2: 20}


def test_a_killed_worker_is_replaced_and_its_task_done_again(tmp_path):
    flag = str(tmp_path / "flag")
    assert list(run_guarded(act, [1, flag, 2])) == [(1, 10), (flag, "second time"), (2, 20)]


def test_tasks_are_taken_no_faster_than_results_are():
    taken = []

    def tasks():
        for number in range(100):
            taken.append(number)
            yield number

    results = run_guarded(act, tasks(), workers=1, ahead=4)
    next(results)
    time.sleep(0.1)
    assert len(taken) <= 6
    results.close()


def test_skipped_tasks_are_not_begun():
    assert list(run_guarded(act, [1, "die", 2], skip=lambda task: task == "die")) == [(1, 10), ("die", None), (2, 20)]


def test_workers_do_not_outlive_the_run_that_was_killed(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from training.data import guarded\n"
        "guarded.PARENT_CHECK = 0.05\n"
        "results = guarded.run_guarded(lambda task: os.getpid(), range(5))\n"
        "print(next(results)[1], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    worker = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists() or "State:\tZ" in Path(f"/proc/{worker}/status").read_text():
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker lives on")


@pytest.mark.parametrize("workers", [1, 3])
def test_results_of_batches_come_one_by_one_in_order(workers):
    assert list(map_in_order(act, iter(range(50)), workers=workers, batch=7)) == [10 * n for n in range(50)]
    assert list(map_in_order(act, [], workers=workers)) == []


def test_a_killed_worker_costs_no_result_and_no_wait(tmp_path):
    tasks = [1, 2, str(tmp_path / "once"), 3, 4]
    assert list(map_in_order(act, tasks, workers=2, batch=2)) == [10, 20, "second time", 30, 40]


def test_work_that_fails_in_a_worker_is_an_error_that_names_it():
    with pytest.raises(RuntimeError, match=r"'raise' \.\.\. 3: KeyError: 'no such thing'"):
        list(map_in_order(act, [1, 2, "raise", 3], workers=2, batch=2))
