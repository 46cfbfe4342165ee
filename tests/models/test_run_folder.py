"""The output folder: one run at a time, its own settings, longer ones, signals, a full disk, damaged files."""

from __future__ import annotations

import json
import os
import resource
import signal

import pytest
import torch

from i2v_models import checkpoint, fit, run, signals
from i2v_models.fit import Trainer, learning_rate
from i2v_models.progress import Progress

from .conftest import ClipList
from .test_fit import assert_same_weights, config, losses, video_model


def settings(output, **changes):
    return config(output=str(output), **changes)


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(tmp_path):
    first = Trainer(video_model(), ClipList(), settings(tmp_path))
    for changes in ({}, {"lr": 0.5}):
        with pytest.raises(ValueError, match=f"output='{tmp_path}' is in use by process {os.getpid()} on .*; take another"):
            Trainer(video_model(), ClipList(), settings(tmp_path, **changes))
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.01
    first.run()
    assert fit(video_model(), ClipList(), settings(tmp_path)) == []
    assert not (tmp_path / ".lock").exists()


def test_a_run_that_cannot_start_lets_go_of_its_folder(tmp_path):
    fit(video_model(), ClipList(), settings(tmp_path, steps=2))
    kept = []  # the errors, whose tracebacks hold the runs
    for _ in range(2):
        with pytest.raises(ValueError, match="lr was") as error:
            Trainer(video_model(), ClipList(), settings(tmp_path, steps=2, lr=1.0))
        kept.append(error)


def test_kill_9_releases_the_lock_though_a_worker_lives_on(tmp_path):
    """A loader's worker is a fork: it has all that is open, and outlives a killed parent by seconds."""
    reader, writer = os.pipe()
    holder = os.fork()
    if holder == 0:
        held = run.hold(tmp_path)
        worker = os.fork()
        if worker == 0:
            os.write(writer, b"%d\n" % os.getpid())
        signal.pause()
        os._exit(held.fileno())
    worker = int(os.read(reader, 20))
    try:
        with pytest.raises(ValueError, match=f"in use by process {holder} on"):
            run.hold(tmp_path)
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        run.let_go(run.hold(tmp_path))
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_folder_that_cannot_be_written_is_said_first(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(OSError, match=f"output='{tmp_path}/{name}' cannot be written"):
            Trainer(video_model(), ClipList(), settings(tmp_path / name))


@pytest.mark.parametrize(("content", "text"), [(None, "no config.json"), ("{", "cannot be read"), ("[1]", "is not the record")])
def test_checkpoints_without_their_settings_do_not_resume(tmp_path, content, text):
    fit(video_model(), ClipList(), settings(tmp_path, steps=2))
    (tmp_path / "config.json").unlink()
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=text):
        fit(video_model(), ClipList(), settings(tmp_path, steps=2))


def test_a_state_of_another_version_is_refused(tmp_path):
    fit(video_model(), ClipList(), settings(tmp_path, steps=2))
    state = tmp_path / "checkpoint-00000002" / "state.pt"
    torch.save({"optimizer": {}}, state)
    with pytest.raises(ValueError, match=r"cannot resume .* from step 2: KeyError\('epoch'\)"):
        fit(video_model(), ClipList(), settings(tmp_path, steps=2))


def test_a_setting_that_an_older_version_did_not_have_is_its_default(tmp_path):
    fit(video_model(), ClipList(), settings(tmp_path, steps=2))
    record = json.loads((tmp_path / "config.json").read_text())
    assert record.pop("label_smoothing") == 0.0
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert fit(video_model(), ClipList(), settings(tmp_path, steps=2)) == []
    with pytest.raises(ValueError, match=r"label_smoothing was 0.0, is 0.5"):
        fit(video_model(), ClipList(), settings(tmp_path, steps=2, label_smoothing=0.5))


def test_a_finished_run_goes_on_with_more_epochs(tmp_path):
    fit(video_model(), ClipList(), settings(tmp_path, epochs=2))
    longer = settings(tmp_path, epochs=4)
    cut = Trainer(video_model(), ClipList(), longer)
    assert (cut.step, cut.steps) == (6, 12)
    save = cut.save

    def save_then_die():
        save()
        if cut.step == 8:
            raise KeyboardInterrupt

    cut.save = save_then_die
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    assert json.loads((tmp_path / "config.json").read_text())["extended"] == [6]
    log = fit(video_model(), ClipList(), longer)  # and what was extended resumes
    assert [line["step"] for line in log] == [9, 10, 11, 12]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[6]["lr"] == learning_rate(longer, 6, 12) and lines[5]["lr"] == learning_rate(longer, 5, 6)
    assert lines[6]["epoch"] == 2
    assert json.loads((tmp_path / "config.json").read_text())["extended"] == [6]
    for changes in ({"epochs": 2}, {"epochs": 8, "lr": 0.5}, {"steps": 7}):
        with pytest.raises(ValueError, match="cannot resume"):
            fit(video_model(), ClipList(), settings(tmp_path, **changes))
    assert Trainer(video_model(), ClipList(), settings(tmp_path, steps=13)).steps == 13


def test_a_run_that_has_not_ended_keeps_its_length(tmp_path):
    cut = Trainer(video_model(), ClipList(), settings(tmp_path, epochs=4))
    cut.optimizer.register_step_post_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT) if cut.step == 3 else None)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    with pytest.raises(ValueError, match=r"epochs was 4.0, is 8.0; .* with more epochs or steps, this is at step 4 of 12"):
        fit(video_model(), ClipList(), settings(tmp_path, epochs=8))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("broken", [False, True], ids=["alone", "its loader breaks too"])
def test_a_signal_saves_and_ends_with_its_code(tmp_path, number, broken, capsys):
    """A cluster that pre-empts tells the loader's workers too, so that the step at hand may not end."""
    whole = video_model()
    log = fit(whole, ClipList(), settings(tmp_path / "whole", save_every=100))

    class Told(ClipList):
        def __iter__(self):
            for batch in super().__iter__():
                if (self.epoch, self.yielded) == (1, 2):
                    os.kill(os.getpid(), number)
                    if broken:
                        raise RuntimeError("DataLoader worker is killed by signal: Terminated.")
                yield batch

    with pytest.raises(SystemExit) as end, signals.ending():
        fit(video_model(), Told(), settings(tmp_path / "cut", save_every=100))
    done = 4 if broken else 5
    assert end.value.code == 128 + number
    assert checkpoint.load(tmp_path / "cut").step == done
    assert f"{number.name}: step {done} of 12 is saved in" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.getsignal(signal.SIGINT) == signal.default_int_handler
    rest = video_model()
    assert losses(fit(rest, ClipList(), settings(tmp_path / "cut", save_every=100))) == losses(log)[done:]
    assert_same_weights(rest.trainable_state_dict(), whole.trainable_state_dict())


def test_without_a_signal_a_broken_loader_is_an_error(tmp_path):
    class Broken(ClipList):
        def __iter__(self):
            yield from list(super().__iter__())[:2]
            raise RuntimeError("worker died")

    with pytest.raises(RuntimeError, match="worker died"):
        fit(video_model(), Broken(), settings(tmp_path))


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_stays(tmp_path):
    fit(video_model(), ClipList(), settings(tmp_path, steps=2))
    before = sorted(path.name for path in tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (10_000, 100):  # not enough for the weights; not even for the record
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match=r"^.*(checkpoint-00000004|config.json) cannot be written: [^\n]*$"):
                fit(video_model(), ClipList(), settings(tmp_path, steps=4))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert checkpoint.load(tmp_path).step == 2
    assert len(fit(video_model(), ClipList(), settings(tmp_path, steps=4))) == 2


def test_a_full_disk_while_the_state_is_written_says_what_the_system_says(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint-00000001 cannot be written: \[Errno 27\] File too large"):
            checkpoint.save(tmp_path, 1, {"w": torch.zeros(10)}, {"optimizer": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_written_anew(tmp_path):
    fit(video_model(), ClipList(), settings(tmp_path))
    damaged = tmp_path / "checkpoint-00000012"
    (damaged / "state.pt").write_bytes(b"half")
    with pytest.warns(UserWarning, match="checkpoint-00000012 cannot be read"):
        fit(video_model(), ClipList(), settings(tmp_path))
    assert checkpoint.load(tmp_path).step == 12
    assert sorted(path.name for path in tmp_path.glob("*check*")) == ["checkpoint-00000010", "checkpoint-00000012"]


def test_other_names_and_long_numbers_are_no_riddle(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    for step in (99_999_999, 100_000_000):
        checkpoint.save(tmp_path, step, {"w": torch.ones(1)}, {}, keep=1)
    assert checkpoint.load(tmp_path).step == 100_000_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100000000", "checkpoint-best"]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_lines_unless_somebody_watches(terminal, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("i2v_models.progress.SECONDS", 0.0)
    with Progress(3, "step") as bar:
        for number in range(3):
            bar.update(f"loss {number}")
    said = capsys.readouterr().err
    assert ("\r" in said) == terminal
    if not terminal:
        assert [line.split(", ")[:2] for line in said.splitlines()] == [[f"step {n + 1} of 3", f"loss {n}"] for n in range(3)]
