"""Cache the impact scores of all FFN segments for all requests (kmebench.editors.pac.impact)."""

from kmebench.forkserver import hand_over

hand_over("kmebench.pipelines.run")

import torch

from kmebench.data.records import read_requests
from kmebench.editors.pac.cache import cache_gradients
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
    cache_gradients(Parts.of_job(snakemake), model, asked)
