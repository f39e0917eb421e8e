"""What test_squad_script runs on several processes."""

from __future__ import annotations

from hf_soo.runs import arguments
from hf_soo.runs.pretrained import PretrainedArguments
from hf_soo.runs.run_arguments import RunArguments, RunTrainingArguments
from hf_soo.runs.training import Job, train
from hf_soo.squad.inputs import QaDataArguments
from hf_soo.squad.task import SquadTask


def run(rank: int, world: int, flags: list[str]) -> dict[str, float | None]:
    """The script's run on one of several processes, whose group stays; what its record says at the end."""
    classes = (PretrainedArguments, QaDataArguments, RunArguments, RunTrainingArguments)
    model, data, kept, training = arguments.parse(classes, flags)
    assert training.world_size == world
    (record,) = train(Job(kept, training), SquadTask(model, data, training))
    return record.final
