"""Train what an editor learns from the development split (kmebench.editors.needs.Trained)."""

import importlib

from kmebench.forkserver import hand_over

hand_over("kmebench.pipelines.run")

import torch

from kmebench.data.records import read_requests
from kmebench.evaluation.prompts import askable
from kmebench.io.logs import script_log
from kmebench.models.editable import EditableModel, seed_everything

with script_log(snakemake):
    torch.set_num_threads(snakemake.threads)
    seed_everything(0)
    module, _, name = snakemake.params.stage["function"].partition(":")
    train = getattr(importlib.import_module(module), name)
    model = EditableModel.load(snakemake.input.model, **snakemake.params.load)
    requests = read_requests(snakemake.input.requests)
    asked = askable(model, requests, **snakemake.params.asked)
    further = {key: path for key, path in snakemake.input.items() if key == "encoder"}
    train(snakemake.output.trained, model, asked, snakemake.params.stage["settings"], **further)
