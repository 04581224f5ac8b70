"""What this machine, or the control groups of a job, leave."""

from pathlib import Path

import pytest
import torch

from ssl_vit.errors import Failure
from ssl_vit_eval.memory import available_memory, place_for


def test_there_is_some() -> None:
    assert 2**20 < available_memory() < 2**50


def test_cached_files_count_as_available(tmp_path: Path) -> None:
    """Of the group as of the system, or what was read before would leave nothing."""

    def plant(file: str, text: str) -> None:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)

    plant("proc/meminfo", "MemTotal:  4096 kB\nMemAvailable:  2048 kB\nHugePages_Total:  0\n")
    assert available_memory(tmp_path) == 2048 * 1024
    # the limit is that of a job, above the group of its task; and in the first version, whose statistics count the groups below
    for group, job, limit, used, unlimited, prefix in (
        ("0::/job/task", "sys/fs/cgroup/job/memory.", "max", "current", "max", ""),
        ("3:cpu,memory:/job", "sys/fs/cgroup/memory/job/memory.", "limit_in_bytes", "usage_in_bytes", str(2**63 - 4096), "total_"),
    ):
        plant("proc/self/cgroup", f"1:name=systemd:/elsewhere\n{group}\n")
        plant(job + limit, f"{unlimited}\n")
        plant(job + used, "300000\n")
        plant(job + "stat", f"{prefix}inactive_file 0\n{prefix}active_file 0\n")
        assert available_memory(tmp_path) == 2048 * 1024
        plant(job + limit, "1000000\n")
        for inactive, active in ((0, 0), (200_000, 50_000)):  # before and after the images were read
            plant(job + used, f"{300_000 + inactive + active}\n")
            plant(job + "stat", f"anon 300000\n{prefix}inactive_file {inactive}\n{prefix}active_file {active}\n")
            assert available_memory(tmp_path) == 700_000


def test_the_processes_of_a_machine_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 4096 kB\n")
    assert available_memory(tmp_path) == 4096 * 1024
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # as torchrun sets it
    assert available_memory(tmp_path) == 1024 * 1024


def test_what_fits_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_vit_eval.memory.available_memory", lambda: 3 * 2**30)
    monkeypatch.setattr("ssl_vit_eval.memory.device", lambda: torch.device("cpu"))
    assert place_for(3 * 2**30, "it", "") == torch.device("cpu")
    with pytest.raises(Failure, match=r"it works on 4.0 GiB, 3.0 GiB of memory are available; take linear"):
        place_for(4 * 2**30, "it", "take linear")
    monkeypatch.setattr("ssl_vit_eval.memory.device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (5 * 2**30, 8 * 2**30))
    assert place_for(5 * 2**30, "it", "") == torch.device("cuda", 0)
    with pytest.raises(Failure, match=r"6.0 GiB, 3.0 GiB of memory, 5.0 GiB of the GPU are available"):
        place_for(6 * 2**30, "it", "")
    assert place_for(5 * 2**30, "it", "", held=3 * 2**30) == torch.device("cuda", 0)  # beside it, in memory
    with pytest.raises(Failure, match=r"9.0 GiB, 3.0 GiB of memory, 5.0 GiB of the GPU are available"):
        place_for(5 * 2**30, "it", "", held=4 * 2**30)
