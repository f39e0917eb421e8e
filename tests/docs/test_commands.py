"""Every command of README and docs, page by page, as a reader would give them: with small data, models and steps."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from tokenizers import BertWordPieceTokenizer

from hf_soo import cli
from hf_soo.bench.jobs import SUITES
from hf_soo.search import worker
from tests.data.squad_data import colour_questions, write
from tests.docs.test_documentation import PAGES, ROOT, SCRIPTS
from tests.scripts.script_runs import write_corpus
from tests.search.work import Fork
from tests.tasks.glue_cases import make_model, write_archive

# What needs a GPU, Slurm, Docker or several machines, by how it begins.
NOT_HERE = (
    "hf-soo bench --suite gpu",
    "hf-soo report results/bench/pretraining",
    "accelerate launch --config_file configs/accelerate/ddp_8.yaml",
    "accelerate launch --config_file configs/accelerate/fsdp2_8.yaml",
    "accelerate launch --config_file configs/accelerate/zero2_8.yaml",
    "accelerate launch --config_file configs/accelerate/multi_node_64.yaml",
    "sbatch ",
    "docker ",
)
# What other tests run as it stands -> the test.
ELSEWHERE = {
    "accelerate launch --config_file configs/accelerate/cpu.yaml": "tests/scripts/test_launch_kit.py::two_processes",
    'accelerate launch --config_file "$(hf-soo recipes cpu --path)"': "tests/scripts/test_launch_kit.py::two_processes",
    "hf-soo run train.py": "tests/unmodified/test_run.py::test_the_commands_of_the_guide",
    "torchrun --nproc_per_node 2 -m hf_soo.run": "tests/unmodified/test_run.py::test_the_commands_of_the_guide",
    "python examples/": "tests/examples/test_examples.py::test_trains_and_goes_on",
    "hf-soo plan --model bert-large-uncased --optim mkor --base lamb --gpus 64 --strategy fsdp2 --seq 512 "
    "--batch 32768 --dry-run": "tests/scripts/test_plan_dry_run.py::test_row_shards_on_64_ranks",
}
# What makes an environment, which the tests run in.
ENVIRONMENT = ("pip ", "DS_ACCELERATOR=cpu pip ", "python -m pytest", "git worktree ", "cd ")

_MODEL = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2"
_RUN = "--use_cpu true --max_steps 2 --disable_tqdm true --dataloader_pin_memory false"
_BATCH = "--per_device_train_batch_size 4 --per_device_eval_batch_size 8"
# How a command begins -> flags after those of the page, which win: the size, and a folder for a model of the hub.
SMALL = {
    "pretrain": f"{_RUN} {_BATCH} --max_eval_samples 8",
    "pretrain --config bert_large_phase2": f"{_MODEL} --global_batch_size 4 --dataloader_num_workers 0",
    "glue": f"{_RUN} {_BATCH} --task_name MRPC --max_seq_length 24 --model_name_or_path tiny",
    "squad --config": f"{_RUN} {_BATCH} --max_seq_length 24 --doc_stride 4 --max_query_length 8 "
    "--model_name_or_path tiny",
    "vision": f"{_RUN} --max_train_samples 64 --max_eval_samples 64 {_MODEL}",
    "prepare --source": "--eval_documents 0.2 --num_proc 1",
    "bench --suite": "--scale tiny",
    "reproduce": "--dry_run true",
    "search configs/search/muon.yaml --workload configs/workloads/byte_gpt.yaml --trials": "--trials 6",
    "search configs/search/muon.yaml --workload configs/workloads/byte_gpt.yaml --stage": "--trials 1 --seed 5",
    "search --queue configs/search/first_table.queue.yaml --hours": "--hours 0.0005",
}
# What a page takes for granted.
BEFORE = {
    "docs/quickstart.md": (
        "hf-soo prepare --source text --vocab vocab.txt --max_seq_length 128 --output data/phase2",
        f"hf-soo pretrain --data_dir data/phase2 --output_dir out/bert_large/phase1_lamb --optim lamb {_MODEL}",
    )
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a reader has who has come to a page: a clone, text, GLUE, SQuAD, a vocabulary."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("scripts", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "text").mkdir()
    text = write_corpus(tmp_path / "text")
    (tmp_path / "data" / "wikipedia").mkdir(parents=True)
    (tmp_path / "data" / "wikipedia" / "text").symlink_to(tmp_path / "text")
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train([str(text)], vocab_size=200, show_progress=False)
    tokenizer.save_model(str(tmp_path))
    make_model(tmp_path / "tiny")
    write_archive(tmp_path / "glue")
    questions = colour_questions(8, 0)
    for part in ("train-v1.1.json", "dev-v1.1.json"):
        write(tmp_path / part, questions)
    asked = [qa for article in questions["data"] for each in article["paragraphs"] for qa in each["qas"]]
    write(tmp_path / "predictions.json", {qa["id"]: qa["answers"][0]["text"] for qa in asked})
    return tmp_path


def commands_of(page: str) -> list[str]:
    """Its shell lines, each cut at "&&"; a comment and what goes on in the next line are none."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGES[page], re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines if not line.startswith("#") for part in line.split(" && ") if part.strip()]


PAGES_WITH_COMMANDS = [page for page in PAGES if commands_of(page)]


def test_the_lists_name_what_is_there() -> None:
    every = [command for page in PAGES_WITH_COMMANDS for command in commands_of(page)]
    for start in (*NOT_HERE, *ELSEWHERE):
        assert any(command.startswith(start) for command in every), f"{start!r} is on no page any more"
    for test in ELSEWHERE.values():
        file, _, name = test.partition("::")
        assert re.search(rf"^def {name}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), test


def words_of(line: str) -> list[str]:
    """The words of `hf-soo`: a launcher, a script's name, `nice` and an environment's variables are put into them."""
    words = shlex.split(line)
    while "=" in words[0] or words[0] == "nice":
        words.pop(0)
    for start in (["accelerate", "launch", "-m"], ["accelerate", "launch"], ["python", "-m"], ["python"]):
        if words[: len(start)] == start:
            words = words[len(start) :]
            break
    if words[0].startswith("scripts/"):
        return [SCRIPTS[Path(words[0]).name], *words[1:]]
    command, _, name = words[0].partition(".")
    assert command in ("hf-soo", "hf_soo"), line
    return words[1:] if name in ("", "cli") else [name, *words[1:]]


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS)
def test_the_commands_of_a_page(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Fork}))
    monkeypatch.setitem(SUITES, "cpu", SUITES["cpu"][:1])
    monkeypatch.setattr(datasets, "load_dataset", no_hub(datasets.load_dataset))
    if "results/bench" in PAGES[page]:
        shutil.copytree(ROOT / "results" / "bench", folder / "results" / "bench")
    if page == "docs/guides/evidence.md":
        shutil.copytree(ROOT / "results" / "evidence", folder / "results" / "evidence")
    if page == "docs/guides/report.md":
        for name in ("bert_mini_wiki", "reproduce_mini"):
            shutil.copytree(ROOT / "results" / name, folder / "results" / name)
    if "hf-soo recipes --copy configs" in PAGES[page]:  # there is no clone
        (folder / "configs").unlink()
        (folder / "scripts").unlink()
    for line in (*BEFORE.get(page, ()), *commands_of(page)):
        if line.startswith((*NOT_HERE, *ELSEWHERE, *ENVIRONMENT)):
            continue
        words = words_of(line)
        more = " ".join(flags for start, flags in SMALL.items() if shlex.join(words).startswith(start))
        assert cli.main([*words, *shlex.split(more)]) == 0, line


def no_hub(load: Callable[..., Any]) -> Callable[..., Any]:
    """`load_dataset` of local files; for SQuAD's name on the hub, questions made here."""
    rows = [
        {"id": name, "context": "w1 red w2", "question": "which ?", "answers": {"text": ["red"], "answer_start": [3]}}
        for name in ("a", "b", "c")
    ]

    def local(path: str, *args: Any, **kwargs: Any) -> Any:
        if path == "rajpurkar/squad":
            return datasets.DatasetDict({part: datasets.Dataset.from_list(rows) for part in ("train", "validation")})
        assert os.path.exists(path) or path in ("json", "csv", "text", "parquet"), f"{path} is on the hub"
        return load(path, *args, **kwargs)

    return local
