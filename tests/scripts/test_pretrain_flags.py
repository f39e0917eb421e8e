"""Trainer's own flags through scripts/pretrain_bert.py with mkor: precision, attention, compilation, tracking."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.scripts.launch_runs import TINY
from tests.scripts.script_runs import load_script, only_run, write_corpus

RUN = [
    *TINY, "--dropout", "0", "--optim", "mkor", "--learning_rate", "0.02", "--max_steps", "2", "--eval_strategy",
    "steps", "--eval_steps", "1", "--logging_steps", "1", "--save_strategy", "no", "--use_cpu", "true",
    "--vocab_size", "110", "--seq_length", "24",
]  # fmt: skip
COMPILED = ["--torch_compile", "true", "--torch_compile_backend", "aot_eager"]
# how far losses may lie from those of the plain run: fp32 sums in another order; bf16 has 8 bits
WAYS = {
    "sdpa": (["--attn_implementation", "sdpa"], 1e-5),
    "eager": (["--attn_implementation", "eager"], 1e-5),
    "checkpointing": (["--gradient_checkpointing", "true"], 1e-5),
    "compile": (COMPILED, 1e-5),
    "bf16": (["--bf16", "true"], 1e-2),
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("pretrain_bert")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_corpus(folder)
    return folder


def losses(script: ModuleType, folder: Path, *flags: str) -> list[float]:
    common = [
        "--corpus",
        str(folder / "text.txt"),
        "--output_dir",
        str(folder),
        "--results_dir",
        str(folder / flags[-1]),
    ]
    assert script.main([*RUN, *common, *flags]) == 0
    run = only_run(folder / flags[-1])
    assert run["steps"] == 2 and run["health"]["fallback_layers"] == 0
    return [point[key] for point in run["curve"] for key in ("train_loss", "eval_loss")]


@pytest.fixture(scope="module")
def plain(script: ModuleType, folder: Path) -> list[float]:
    return losses(script, folder, "--report_to", "none")


@pytest.mark.parametrize("way", WAYS)
def test_the_same_losses_in_every_way(script: ModuleType, folder: Path, plain: list[float], way: str) -> None:
    flags, tolerance = WAYS[way]
    found = losses(script, folder, *flags, "--report_to", "none", "--name", way)
    assert len(found) == 4 and found == pytest.approx(plain, rel=tolerance)
    assert way != "bf16" or found != plain


def test_tensorboard_has_evaluations_and_health(
    script: ModuleType, folder: Path, plain: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
    assert losses(script, folder, "--report_to", "tensorboard") == plain
    (file,) = (folder / "events").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("eval/loss")] == [
        (1, pytest.approx(plain[1])),
        (2, pytest.approx(plain[3])),
    ]
    assert [event.step for event in events.Scalars("eval/mlm_accuracy")] == [1, 2]
    cosines = [event.value for event in events.Scalars("train/soo/cos_median")]
    assert len(cosines) == 2 and all(0 < value < 0.9999 for value in cosines)
