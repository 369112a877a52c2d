"""Checkpoint folders are complete or not there: kills, full disks, damage, foreign folders."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import save_file

from trainer.checkpoint import checkpoint
from trainer.checkpoint.checkpoint import CheckpointError, keep_last, latest, verify, writing


def write(target, text="x", files=1):
    with writing(target) as folder:
        (folder / "config.json").write_text("{}")
        for i in range(files):
            (folder / checkpoint.STATE / f"{i}.bin").write_text(text)
    return target


def test_a_written_checkpoint_is_there_and_verifies(tmp_path):
    target = write(tmp_path / "checkpoints" / "step-000001")
    verify(target)
    assert latest(target.parent) == target
    assert sorted(os.listdir(target.parent)) == ["step-000001"]


def test_latest_is_the_highest_step_and_none_without_any(tmp_path):
    assert latest(tmp_path / "absent") is None and latest(tmp_path) is None
    for step in (9, 10, 2):
        write(tmp_path / f"step-{step}")
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    assert latest(tmp_path).name == "step-10"


def test_a_failure_inside_leaves_what_was_there(tmp_path):
    write(tmp_path / "step-1", "old")
    with pytest.raises(KeyError), writing(tmp_path / "step-1") as folder:
        (folder / "config.json").write_text("new")
        raise KeyError
    verify(tmp_path / "step-1")
    assert (tmp_path / "step-1" / checkpoint.STATE / "0.bin").read_text() == "old"
    assert os.listdir(tmp_path) == ["step-1"]


def test_writing_the_same_step_again_replaces_it(tmp_path):
    write(tmp_path / "step-1", "old")
    write(tmp_path / "step-1", "new")
    verify(tmp_path / "step-1")
    assert (tmp_path / "step-1" / checkpoint.STATE / "0.bin").read_text() == "new"
    assert os.listdir(tmp_path) == ["step-1"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path):
    write(tmp_path / "step-1")
    (tmp_path / "step-1").rename(tmp_path / ".step-1.replaced")
    assert latest(tmp_path).name == "step-1"
    verify(tmp_path / "step-1")


def _write_for_ever(folder):
    step = 1
    while True:
        write(folder / f"step-{step}", "x" * 20_000, files=20)
        keep_last(folder, 2)
        step += 1


def test_a_sigkill_at_any_moment_leaves_only_whole_checkpoints(tmp_path):
    context = multiprocessing.get_context("fork")
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        process = context.Process(target=_write_for_ever, args=(folder,))
        process.start()
        while latest(folder) is None:
            time.sleep(0.002)
        time.sleep(0.013 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = latest(folder)
        assert found is not None
        for path in folder.glob("step-*"):
            verify(path)
        keep_last(folder, 1)
        assert os.listdir(folder) == [found.name]


def test_keep_last_deletes_the_oldest_by_number(tmp_path):
    for step in (8, 9, 10, 11):
        write(tmp_path / f"step-{step}")
    assert [path.name for path in keep_last(tmp_path, 2)] == ["step-8", "step-9"]
    assert sorted(os.listdir(tmp_path)) == ["step-10", "step-11"]
    with pytest.raises(ValueError, match="keep at least 1"):
        keep_last(tmp_path, 0)


def _write_large(target, how):
    with writing(target) as folder:
        if how == "safetensors":
            save_file({"a": torch.zeros(3_000_000)}, folder / "model.safetensors")
        else:
            (folder / "large.bin").write_bytes(b"0" * 12_000_000)


@pytest.mark.parametrize("how", ["plain", "safetensors"])
def test_a_full_disk_is_an_error_that_costs_nothing(tmp_path, how):
    mount = tmp_path / "disk"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mount], capture_output=True)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        write(mount / "step-1")
        if mounted.returncode:  # not allowed to mount: files may not grow beyond 4 MB instead
            resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, limit[1]))
        expected = "the disk is full|a file is too large"
        with pytest.raises(CheckpointError, match=f"({expected}).*Earlier checkpoints are intact") as error:
            _write_large(mount / "step-2", how)
        assert "step-2 was not written" in str(error.value)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        verify(mount / "step-1")
        assert os.listdir(mount) == ["step-1"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        if not mounted.returncode:
            subprocess.run(["umount", mount], check=True)


def test_an_error_that_is_no_full_disk_stays_what_it_is(tmp_path):
    with pytest.raises(OSError) as error, writing(tmp_path / "step-1"):
        raise OSError(errno.EIO, "input/output error")
    assert error.value.errno == errno.EIO


def test_damaged_files_are_all_named(tmp_path):
    target = write(tmp_path / "step-3", files=4)
    state = target / checkpoint.STATE
    (state / "0.bin").unlink()
    (state / "1.bin").write_text("longer")
    (state / "2.bin").write_text("y")
    with pytest.raises(CheckpointError) as error:
        verify(target)
    message = str(error.value)
    assert "0.bin is missing" in message and "1.bin has 6 bytes, 1 were written" in message
    assert "2.bin is not what was written (CRC-32)" in message and "3.bin" not in message
    assert "--resume last-good" in message and "delete step-3" in message


def test_a_folder_that_is_no_checkpoint_says_what_it_is(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        verify(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        verify(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="Hugging Face folder without a trainer's state.*policy.path"):
        verify(tmp_path)


def test_a_manifest_that_cannot_be_read_is_named(tmp_path):
    target = write(tmp_path / "step-1")
    manifest = target / checkpoint.MANIFEST
    text = manifest.read_text()
    manifest.write_text(text[:20])
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        verify(target)
    manifest.write_text(json.dumps({**json.loads(text), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this release reads 1"):
        verify(target)
