"""What test_squad_script runs on several processes."""

from __future__ import annotations

from hf_soo.experiments import arguments
from hf_soo.experiments.pretrained import PretrainedArguments
from hf_soo.experiments.run_arguments import RunArguments, RunTrainingArguments
from hf_soo.experiments.squad import SquadTask
from hf_soo.experiments.squad_arguments import QaDataArguments
from hf_soo.experiments.training import Job, train


def run(rank: int, world: int, flags: list[str]) -> dict[str, float | None]:
    """The script's run on one of several processes, whose group stays; what its record says at the end."""
    classes = (PretrainedArguments, QaDataArguments, RunArguments, RunTrainingArguments)
    model, data, kept, training = arguments.parse(classes, flags)
    assert training.world_size == world
    (record,) = train(Job(kept, training), SquadTask(model, data, training))
    return record.final
