"""Damage in a checkpoint: the file is named, or an older whole checkpoint is gone on from, or nothing has changed."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_soo.integrations.checkpoints import why_not_whole
from hf_soo.runs.resume import OutputFolder
from tests.ranks.fault_runs import warnings_of
from tests.trainer.test_saving import run, trainer_of

CHANGES = 300


def files_in(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def one_byte_changes(checkpoint: Path, seed: int) -> Iterator[tuple[Path, int, int]]:
    """Seeded (file, offset, what its byte is combined with), all files alike, however small."""
    chosen = random.Random(seed)
    files = files_in(checkpoint)
    for number in range(CHANGES):
        file = files[number % len(files)]
        yield file, chosen.randrange(file.stat().st_size), chosen.randrange(1, 256)


@contextmanager
def changed(file: Path, offset: int, mask: int) -> Iterator[None]:
    """One byte of a file is another one inside the block."""
    whole = file.read_bytes()
    file.write_bytes(whole[:offset] + bytes([whole[offset] ^ mask]) + whole[offset + 1 :])
    try:
        yield
    finally:
        file.write_bytes(whole)


def verdict(trainer: Any, newest: Path, file: Path, messages: list[str]) -> str:
    """What ``train`` decides of a damaged checkpoint, by True and by its name: "refused", or "taken".

    Args:
        trainer: whose ``train`` ends where Trainer's begins, with what it was asked to resume from.
        newest: the checkpoint.
        file: the one that is damaged in it.
        messages: what has been warned of.
    """
    messages.clear()
    taken, warned = trainer.train(resume_from_checkpoint=True), list(messages)
    assert trainer.train(resume_from_checkpoint="true") == taken, "as a command line says it"
    try:
        by_name = trainer.train(resume_from_checkpoint=str(newest))
    except ValueError as error:
        assert file.name in str(error) and "cannot be resumed from" in str(error) and "\n" not in str(error)
        assert Path(taken).name == "checkpoint-2", "the older one, which is whole"
        assert [said for said in warned if f"{newest.name} is passed over" in said and file.name in said]
        return "refused"
    assert by_name == str(newest) == taken
    return "taken"


@contextmanager
def only_decides() -> Iterator[None]:
    """Trainer's own ``train`` does nothing but say what it was given."""
    train = Trainer.train
    Trainer.train = lambda self, checkpoint, *args, **kwargs: checkpoint  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Trainer.train = train  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """Checkpoints 2 and 4 of a run of six steps, and where it ended."""
    folder = tmp_path_factory.mktemp("trained")
    whole = run(folder)
    shutil.rmtree(folder / "checkpoint-6")
    return folder, whole


@pytest.fixture
def folder(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def resumed(folder: Path, place: Path, **settings: Any) -> torch.Tensor:
    """The weights of a run that goes on in a copy of a folder by True."""
    return run(Path(shutil.copytree(folder, place)), resume=True, **settings)


def test_one_byte(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, whole = trained
    trainer, found, messages = trainer_of(folder), dict.fromkeys(("refused", "taken"), 0), warnings_of("hf_soo")
    for number, (file, *change) in enumerate(one_byte_changes(folder / "checkpoint-4", seed=18)):
        with changed(file, *change):  # type: ignore[arg-type]
            with only_decides():
                how = verdict(trainer, folder / "checkpoint-4", file, messages)
            found[how] += 1
            if how == "taken" or number % 30 == 0:  # the others go on from the same older checkpoint
                assert torch.equal(resumed(folder, tmp_path / str(number)), whole), (file, change)
    assert sum(found.values()) == CHANGES and found["taken"] <= CHANGES // 50  # spaces of a JSON


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "preconditioner.pt", "rng_state.pth", "scheduler.pt",
             "trainer_state.json", "training_args.bin", "manifest.json"]
)  # fmt: skip
def test_a_file_of_another_checkpoint(name: str, folder: Path, trained: tuple[Path, torch.Tensor]) -> None:
    same = (folder / "checkpoint-2" / name).read_bytes() == (folder / "checkpoint-4" / name).read_bytes()
    shutil.copy(folder / "checkpoint-2" / name, folder / "checkpoint-4" / name)
    reason = why_not_whole(folder / "checkpoint-4")
    assert reason is None if same else reason is not None and name in reason
    assert torch.equal(run(folder, resume=True), trained[1])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def turned_into_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def made_unreadable(file: Path) -> None:
    """For root too, who may read any file: a link to itself."""
    file.unlink()
    file.symlink_to(file)


DAMAGES: tuple[Callable[[Path], Any], ...] = (os.remove, emptied, cut, turned_into_a_folder, made_unreadable)
NAMES = (
    "model.safetensors", "optimizer.pt", "preconditioner.pt", "rng_state.pth", "scheduler.pt", "training_args.bin",
    "trainer_state.json", "manifest.json",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("optim", ["mkor", "adamw_torch"])
def test_a_file_that_cannot_be_read(
    optim: str, damage: Callable[[Path], Any], name: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder / "checkpoint-4" / name)
    with only_decides():
        trainer = trainer_of(folder, optim=optim)
        assert trainer.train(resume_from_checkpoint=True) == str(folder / "checkpoint-2")
        assert any("checkpoint-4 is passed over" in said and name in said for said in caplog.messages)
        with pytest.raises(ValueError, match=rf"checkpoint-4 cannot be resumed from: .*{name}") as refused:
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        assert "\n" not in str(refused.value)


JSONS = (
    b"", b"{", b"{}", b"[1]", b"null", b"7", b'"x"', b"\xff\xfe", b"\0" * 100, b"[" * 200_000, b"1" * 10_000,
    b'{"files": [], "strategy": "whole"}', b'{"files": {"model.safetensors": 1}, "strategy": "whole"}',
    b'{"files": {}, "strategy": 3}', b'{"files": {}, "strategy": "whole", "step": 4}', b'{"global_step": "4"}',
)  # fmt: skip


@pytest.mark.parametrize("content", JSONS, ids=lambda content: str(content[:40]))
@pytest.mark.parametrize("name", ["manifest.json", "trainer_state.json"])
def test_a_json_that_is_something_else(name: str, content: bytes, folder: Path) -> None:
    (folder / "checkpoint-4" / name).write_bytes(content)
    reason = why_not_whole(folder / "checkpoint-4")
    says = "model.safetensors has" if b"safetensors" in content and name == "manifest.json" else name
    assert reason is not None and says in reason and "\n" not in reason and len(reason) < 1000


@pytest.mark.parametrize("content", JSONS[:11], ids=lambda content: str(content[:40]))
def test_settings_that_are_something_else(content: bytes, folder: Path) -> None:
    (folder / "run_settings.json").write_bytes(content)
    output = object.__new__(OutputFolder)
    output.folder, output.settings, output._free = folder, {"seed": 1}, frozenset()
    with pytest.raises(ValueError, match=r"run_settings\.json|seed=None, now 1") as refused:
        output._check_same()
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000
