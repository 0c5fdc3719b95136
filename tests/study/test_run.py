"""What is finished stays, what is not leaves nothing, and nothing is run twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from probsae.study import GroupsFailedError
from probsae.study.classical import PCA, Classical
from probsae.study.execute import PROVENANCE, execute
from probsae.study.folder import StudyFolder
from probsae.study.group import RESULT
from probsae.study.run import run_groups
from tests.study.tiny import DATA, TINY, Marked, starts


@pytest.fixture
def folder(tmp_path):
    return StudyFolder(tmp_path / "study", TINY, 0)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def wait_for_start(log, number: int) -> int:
    """Return the process in which a group was started."""
    for _ in range(3_000):
        for started, process in starts(log):
            if started == number:
                return process
        time.sleep(0.1)
    raise AssertionError(f"group {number} was never started")


def names(folder: StudyFolder) -> set[str]:
    return {path.name for path in folder.groups.iterdir() if path.name[0] != "."}


def test_nothing_runs_twice(folder, log):
    groups = [Marked(number, log) for number in (1, 2, 3)]
    run_groups(folder, groups[:2], progress=False)
    run_groups(folder, groups, progress=False)
    run_groups(folder, groups, progress=False)
    assert [number for number, _ in starts(log)] == [1, 2, 3]
    files = {path.name for path in (folder.groups / "marked-3").iterdir()}
    assert files == {RESULT, "more.bin", PROVENANCE}
    assert (folder.groups / "marked-3" / "more.bin").read_bytes() == b"\3"


@pytest.mark.slow
def test_processes_share_the_groups(folder, log):
    groups = [Marked(number, log) for number in range(6)]
    run_groups(folder, groups, n_processes=2, progress=False)
    assert sorted(number for number, _ in starts(log)) == list(range(6))
    assert os.getpid() not in {process for _, process in starts(log)}
    assert names(folder) == {f"marked-{number}" for number in range(6)}
    for number in range(6):
        folder_of_group = folder.groups / f"marked-{number}"
        assert (folder_of_group / "more.bin").read_bytes() == bytes([number])
        assert json.loads((folder_of_group / PROVENANCE).read_text())["threads"] == 1


@pytest.mark.slow
def test_what_raises_in_a_process_of_its_own_ends_no_other(folder, log):
    groups = [Marked(n, log, is_broken=n == 2) for n in range(1, 6)]
    with pytest.raises(GroupsFailedError, match="group 2 is broken"):
        run_groups(folder, groups, n_processes=2, progress=False)
    assert names(folder) == {f"marked-{n}" for n in (1, 3, 4, 5)}
    run_groups(folder, [Marked(n, log) for n in (1, 2)], n_processes=2, progress=False)
    assert names(folder) == {f"marked-{n}" for n in range(1, 6)}


def test_a_group_that_raises_leaves_nothing_and_the_others_go_on(folder, log, capsys):
    groups = [Marked(n, log, is_broken=n in (2, 4)) for n in range(1, 6)]
    with pytest.raises(GroupsFailedError, match="2 groups failed") as stop:
        run_groups(folder, groups, progress=False)
    assert list(stop.value.failures) == ["marked-2", "marked-4"]
    assert "in run" in stop.value.failures["marked-4"]
    assert "marked-2 failed: ValueError: group 2 is broken" in capsys.readouterr().err
    assert names(folder) == {"marked-1", "marked-3", "marked-5"}
    run_groups(folder, [Marked(n, log) for n in range(1, 6)], progress=False)
    assert [number for number, _ in starts(log)] == [1, 2, 3, 4, 5, 2, 4]


def test_an_interrupt_is_no_failure_of_a_group(folder, log):
    class Interrupted(Marked):
        def run(self, device):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_groups(folder, [Interrupted(1, log), Marked(2, log)], progress=False)
    assert names(folder) == set()


def test_an_error_while_writing_leaves_nothing(folder, log):
    group = Marked(1, log)
    with pytest.raises(FileNotFoundError):
        folder.write(group, {RESULT: b"{}", "no/such/folder": b""})
    assert not folder.is_done(group)
    assert list(folder.groups.iterdir()) == []


def test_a_folder_keeps_to_its_study(folder):
    StudyFolder(folder.path, TINY, 0)
    with pytest.raises(FileExistsError, match="choose another folder"):
        StudyFolder(folder.path, TINY, 1)


@pytest.mark.slow
def test_a_killed_study_goes_on(tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tests.study.kill_me", str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    try:
        assert wait_for_start(log, 2) == process.pid
    finally:
        process.kill()
        process.wait()
    folder = StudyFolder(tmp_path, TINY, 0)
    assert names(folder) == {"marked-1"}
    before = (folder.groups / "marked-1" / RESULT).stat().st_mtime_ns
    run_groups(folder, [Marked(number, log) for number in (1, 2, 3)], progress=False)
    assert [number for number, _ in starts(log)] == [1, 2, 2, 3]
    assert (folder.groups / "marked-1" / RESULT).stat().st_mtime_ns == before


@pytest.mark.slow
def test_ray_loses_nothing_and_runs_nothing_twice_when_a_worker_is_killed(folder, log, monkeypatch):
    import ray  # seconds, for this test alone

    # Without it ray warns of what it will do to a GPU's variables one day.
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's workers are nice (15): beside another test on every processor they would hardly start.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        killer = threading.Thread(
            target=lambda: os.kill(wait_for_start(log, 1), signal.SIGKILL), daemon=True
        )
        killer.start()
        real = Classical(DATA, PCA, 64)
        groups = [Marked(1, log, waits_first=True), real, *(Marked(n, log) for n in range(2, 6))]
        run_groups(folder, groups, ray=True, progress=False)
        killer.join()
        started = [number for number, _ in starts(log)]
        assert sorted(started) == [1, 1, 2, 3, 4, 5]
        (first, second) = [process for number, process in starts(log) if number == 1]
        assert first != second
        assert os.getpid() not in {process for _, process in starts(log)}
        assert names(folder) == {group.name for group in groups}
        here = execute(real, None)[RESULT]
        assert (folder.groups / real.name / RESULT).read_bytes() == here
        run_groups(folder, groups, ray=True, progress=False)
        assert len(starts(log)) == len(started)
        with pytest.raises(GroupsFailedError, match="group 6 is broken"):
            run_groups(folder, [Marked(6, log, is_broken=True), Marked(7, log)], ray=True)
        assert "marked-7" in names(folder)
        assert "marked-6" not in names(folder)
    finally:
        ray.shutdown()
