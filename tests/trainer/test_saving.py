"""A checkpoint folder is whole or not there: whatever a save is stopped by, whatever lay there before."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_soo.files import sha256_of, write_atomically
from hf_soo.integrations import checkpoints, resuming, saving
from hf_soo.integrations.checkpoints import last_whole_checkpoint, why_not_whole
from hf_soo.integrations.trainer import SecondOrderTrainer, SecondOrderTrainingArguments


class Regression(nn.Module):
    """Small enough that a run of six steps with three saves is a matter of a fifth of a second."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.hidden, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.out(torch.tanh(self.hidden(x)))
        return {"loss": ((output - labels) ** 2).mean(), "logits": output}


generator = torch.Generator().manual_seed(0)
DATA = [
    {"x": torch.randn(4, generator=generator), "labels": torch.randn(2, generator=generator)} for _ in range(64)
]  # fmt: skip


def trainer_of(folder: Path, cls: type[Trainer] = SecondOrderTrainer, seed: int = 0, **changed: Any) -> Any:
    """Six steps, of which 2, 4 and 6 are saved."""
    settings: dict[str, Any] = {
        "optim": "mkor", "learning_rate": 1e-2, "weight_decay": 0.01, "max_steps": 6, "save_steps": 2, "seed": seed,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    args = SecondOrderTrainingArguments(str(folder), **settings | changed)
    return cls(model=Regression(seed), args=args, train_dataset=DATA, eval_dataset=DATA[:8])  # type: ignore[arg-type]


def run(folder: Path, resume: Any = None, **changed: Any) -> torch.Tensor:
    """The final weights."""
    trainer = trainer_of(folder, **changed)
    trainer.train(resume_from_checkpoint=resume)
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


# ---- written twice, and stopped in between ---------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["mkor", "lamb", "adamw_torch"])
def test_a_checkpoint_that_is_written_twice_is_resumed_from(optim: str, tmp_path: Path) -> None:
    whole = run(tmp_path, optim=optim)
    settings = {"optim": optim, "restore_callback_states_from_checkpoint": True}
    run(tmp_path, resume=str(tmp_path / "checkpoint-2"), **settings)  # writes 4 and 6 again
    assert [why_not_whole(tmp_path / f"checkpoint-{step}") for step in (2, 4, 6)] == [None, None, None]
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert torch.equal(run(tmp_path, resume=True, optim=optim), whole)


class Stopped(BaseException):
    """As a kill: nothing catches it, nothing is tidied up."""


STOPS: dict[str, tuple[Any, str]] = {
    "before anything": (saving.shutil, "rmtree"),
    "before the weights": (Trainer, "save_model"),
    "after the weights": (Trainer, "_save_optimizer_and_scheduler"),
    "after the moments": (Trainer, "_save_scaler"),
    "before the random states": (Trainer, "_save_rng_state"),
    "before the hashes": (checkpoints, "_hashes"),
    "before the manifest": (checkpoints, "write_atomically"),
    "before it is on the disk": (saving, "force_tree_to_disk"),
    "before the old one moves": (saving.os.path, "lexists"),
    "after it has its name": (saving, "force_to_disk"),
    "before older ones go": (resuming, "rotate_checkpoints"),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_save_that_is_stopped_leaves_the_old_checkpoint_or_the_new(
    stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, max_steps=4)
    before = content(tmp_path / "checkpoint-4")

    class Stops(SecondOrderTrainer):
        def _save_checkpoint(self, *args: Any) -> None:
            if self.state.global_step == 4:
                monkeypatch.setattr(*STOPS[stop], stopped)
            super()._save_checkpoint(*args)

    def stopped(*args: Any, **kwargs: Any) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        trainer_of(tmp_path, Stops, seed=1, save_total_limit=2, max_steps=4).train()
    monkeypatch.undo()
    assert why_not_whole(tmp_path / "checkpoint-4") is None and why_not_whole(tmp_path / "checkpoint-2") is None
    renamed = stop in ("after it has its name", "before older ones go")
    assert (content(tmp_path / "checkpoint-4") == before) != renamed  # run 1's to the last byte, or run 2's
    run(tmp_path, resume=True, max_steps=6)  # the next save takes away what lies there
    assert not (tmp_path / "_saving").exists()


def test_between_the_two_names_an_older_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(tmp_path, max_steps=4)
    rename = Path.rename

    def stopped(self: Path, target: Path) -> Path:
        if target.name == "checkpoint-4":
            raise Stopped
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(Stopped):
        run(tmp_path, resume=str(tmp_path / "checkpoint-2"), max_steps=4)
    monkeypatch.undo()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "_saving/checkpoint-4 is passed over: its save did not end" in caplog.text
    assert torch.equal(run(tmp_path, resume=True, max_steps=4), whole)


def test_what_a_killed_deletion_left_is_not_another_trainers(tmp_path: Path) -> None:
    run(tmp_path, max_steps=2)
    for name in ("manifest.json", "optimizer.pt", "scheduler.pt"):
        os.remove(tmp_path / "checkpoint-2" / name)
    assert why_not_whole(tmp_path / "checkpoint-2") == "manifest.json is missing"


# ---- no space --------------------------------------------------------------------------------------------------------


@pytest.fixture
def little_space() -> Iterator[Callable[[int], None]]:
    """Writing past so many bytes fails, as on a full disk, in every library's own words."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 64, 800, 3000, 5000])
def test_a_disk_that_is_full_is_one_line_that_names_the_file(
    size: int, tmp_path: Path, little_space: Callable[[int], None]
) -> None:
    whole = run(tmp_path)

    class Full(SecondOrderTrainer):
        def _save_checkpoint(self, *args: Any) -> None:
            little_space(size if self.state.global_step == 4 else resource.RLIM_INFINITY)
            super()._save_checkpoint(*args)

    with pytest.raises(OSError, match=r"step 4 in .*_saving could not be written \(.*at or after the file \w") as error:
        trainer_of(tmp_path, Full).train()
    assert "\n" not in str(error.value)
    little_space(resource.RLIM_INFINITY)
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert torch.equal(run(tmp_path, resume=True), whole)


def test_another_error_of_a_save_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", fails)
    with pytest.raises(RuntimeError, match=r"^CUDA error"):
        run(tmp_path)


# ---- what Trainer does with checkpoints beside -----------------------------------------------------------------------


def test_the_best_checkpoint_has_its_own_name(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1,
        "learning_rate": 0.3,  # so large that the loss does not fall to the end
    }  # fmt: skip
    trainer = trainer_of(tmp_path, **settings)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.name == f"checkpoint-{trainer.state.best_global_step}"
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    for name, tensor in load_file(best / "model.safetensors").items():
        assert torch.equal(trainer.model.state_dict()[name], tensor)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [best.name]
    assert why_not_whole(best) is None
    (best / "optimizer.pt").unlink()  # of no use at the end
    trainer._load_best_model()
    weights = best / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"the weights of {best} cannot be loaded: model\.safetensors is damaged"):
        trainer._load_best_model()


def test_it_is_pushed_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(Trainer, "push_to_hub", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append((Path(folder).name, why_not_whole(folder)))
    )
    run(tmp_path, push_to_hub=True, hub_model_id="a/b")
    assert pushed == [(f"checkpoint-{step}", None) for step in (2, 4, 6)]


def test_a_checkpoint_without_hashes_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = run(tmp_path / "a")
    run(tmp_path / "b", hash_checkpoints=False)
    assert "sha256" in json.loads((tmp_path / "a" / "checkpoint-4" / "manifest.json").read_text())
    assert "sha256" not in json.loads((tmp_path / "b" / "checkpoint-4" / "manifest.json").read_text())
    assert torch.equal(run(tmp_path / "b", resume=str(tmp_path / "b" / "checkpoint-4")), whole)
    assert "checkpoint-4 has no hashes of its files: they cannot be checked against damage" in caplog.text
    shutil.copy(tmp_path / "a" / "checkpoint-2" / "preconditioner.pt", tmp_path / "a" / "checkpoint-4")
    with pytest.raises(ValueError, match=r"preconditioner\.pt is damaged"):
        run(tmp_path / "a", resume=str(tmp_path / "a" / "checkpoint-4"))
    with pytest.raises(ValueError, match=r"preconditioner\.pt is of step 2, trainer_state\.json of step 4"):
        run(tmp_path / "a", resume=str(tmp_path / "a" / "checkpoint-4"), hash_checkpoints=False)


def test_weights_in_shards_are_resumed_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = run(tmp_path)
    folder = tmp_path / "checkpoint-4"
    weights = load_file(folder / "model.safetensors")
    names = {name: f"model-0000{i + 1}-of-00002.safetensors" for i, name in enumerate(("hidden", "out"))}
    for part, file in names.items():
        save_file({k: v for k, v in weights.items() if k.startswith(part)}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: names[key.partition(".")[0]] for key in weights}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    os.remove(folder / "model.safetensors")
    assert torch.equal(run(tmp_path, resume=str(folder)), whole)
    assert "checkpoint-4 has other files of weights than were written" in caplog.text
    os.remove(folder / names["out"])
    assert (why_not_whole(folder) or "").startswith(f"{names['out']} is missing")


# ---- who writes ------------------------------------------------------------------------------------------------------


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        saving.hold(tmp_path)
        (tmp_path / "held").touch()
        signal.pause()
    while not (tmp_path / "held").exists():
        pass
    with pytest.raises(ValueError, match=f"is in use: process {child} on .* trains there"):
        run(tmp_path)
    run(tmp_path, save_strategy="no")  # writes no checkpoints
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    run(tmp_path)
    assert why_not_whole(tmp_path / "checkpoint-6") is None
    run(tmp_path)  # the lock of a run that has ended is not held


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refused)
    run(tmp_path, max_steps=2)
    assert "cannot be locked" in caplog.text and why_not_whole(tmp_path / "checkpoint-2") is None


def test_no_name_that_can_be_guessed_is_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("mine")
    output = tmp_path / "output"
    output.mkdir()
    (output / "_saving").symlink_to(victim)
    (output / "checkpoint-4").symlink_to(victim)
    (output / f"a.json.partial-{os.getpid()}").symlink_to(victim / "file")
    write_atomically(output / "a.json", "{}")
    run(output)
    assert (victim / "file").read_text() == "mine"
    assert [path.name for path in victim.iterdir()] == ["file"]
    assert not (output / "checkpoint-4").is_symlink() and why_not_whole(output / "checkpoint-4") is None
    (output / "_lock").unlink()
    (output / "_lock").symlink_to(victim / "file")
    with pytest.raises(OSError, match="_lock"):
        run(output)


# ---- those of others -------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_trainer_is_looked_into(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1,
        learning_rate=1e-2, weight_decay=0.01,
    )  # fmt: skip
    Trainer(model=Regression(0), args=args, train_dataset=DATA).train()  # type: ignore[arg-type]
    run(tmp_path, resume=str(tmp_path / "checkpoint-4"), optim="adamw_torch")
    assert "checkpoint-4 has no hashes of its files" in caplog.text
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"):
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "cut", dirs_exist_ok=True)
        file = tmp_path / "cut" / name
        file.write_bytes(file.read_bytes()[:-100])
        assert (why_not_whole(tmp_path / "cut") or "").startswith(f"{name} is damaged")
