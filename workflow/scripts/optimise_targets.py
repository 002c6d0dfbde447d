"""Targets of MEMIT's family for all requests on the unedited model (editors.locate.targets)."""

from kmebench.forkserver import hand_over

hand_over("kmebench.pipelines.run")

import torch

from kmebench.data.records import read_requests
from kmebench.editors.locate.target_store import cache_targets
from kmebench.editors.locate.targets import TargetSettings
from kmebench.evaluation.prompts import askable
from kmebench.io.logs import script_log
from kmebench.io.parts import Parts
from kmebench.models.editable import EditableModel, seed_everything

with script_log(snakemake):
    torch.set_num_threads(snakemake.threads)
    seed_everything(0)
    model = EditableModel.load(snakemake.input.model, **snakemake.params.load)
    requests = read_requests(snakemake.input.requests)
    asked = askable(model, requests, **snakemake.params.asked)
    settings = TargetSettings(**snakemake.params.settings)
    cache_targets(Parts.of_job(snakemake), model, asked, settings)
