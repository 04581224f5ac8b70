"""What this machine, or the control groups of a job, leave."""

from pathlib import Path

from ssl_vit_eval.memory import available_memory


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
