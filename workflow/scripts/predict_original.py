"""Predict every prompt of a data set with the unedited model (kmebench.evaluation.predict)."""

from kmebench.forkserver import hand_over

hand_over("kmebench.pipelines.run")

import torch

from kmebench.data.records import read_requests
from kmebench.evaluation.frames import write_original
from kmebench.evaluation.predict import Settings
from kmebench.evaluation.prompts import askable
from kmebench.io.logs import script_log
from kmebench.io.parts import Parts
from kmebench.models.editable import EditableModel, seed_everything

with script_log(snakemake):
    torch.set_num_threads(snakemake.threads)
    seed_everything(0)  # greedy throughout: the seed decides nothing, the flags do
    model = EditableModel.load(snakemake.input.model, **snakemake.params.load)
    requests = read_requests(snakemake.input.requests)
    settings = Settings(**snakemake.params.evaluation)
    asked = askable(model, requests, settings.wild_max_tokens, snakemake.params.on_bad_record)
    write_original(Parts.of_job(snakemake), model, asked, settings)
