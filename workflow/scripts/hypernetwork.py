"""Train the network of an editor on the training split (kmebench.editors.hyper.training)."""

from kmebench.forkserver import hand_over

hand_over("kmebench.pipelines.run")

import torch

from kmebench.data.records import read_requests
from kmebench.editors.base import build_editor
from kmebench.editors.hyper.training import train
from kmebench.evaluation.prompts import askable
from kmebench.io.files import sha256_of
from kmebench.io.logs import script_log
from kmebench.models.editable import EditableModel, seed_everything
from kmebench.preemption import noted_signals

with script_log(snakemake), noted_signals() as stopped_by:
    torch.set_num_threads(snakemake.threads)
    seed_everything(0)  # what training draws has a seed of its own: the flags count
    model = EditableModel.load(snakemake.input.model, **snakemake.params.load)
    requests = read_requests(snakemake.input.requests)
    need = snakemake.params.need
    train(
        snakemake.output.network,
        snakemake.output.history,
        model,
        askable(model, requests, **snakemake.params.asked),
        build_editor(need["editor"], need["settings"], {}),
        code={path: sha256_of(path) for path in snakemake.input.code},
        stopped_by=stopped_by,
    )
