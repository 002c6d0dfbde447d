"""Moments of the FFN over text that the model writes (kmebench.editors.pac.neutral)."""

from kmebench.forkserver import hand_over

hand_over("kmebench.pipelines.run")

import torch

from kmebench.editors.needs import NeutralMetric
from kmebench.editors.pac.neutral import write_metric
from kmebench.io.logs import script_log
from kmebench.models.editable import EditableModel, seed_everything

with script_log(snakemake):
    torch.set_num_threads(snakemake.threads)
    seed_everything(0)  # the text is drawn by a generator of its own: the flags count
    model = EditableModel.load(snakemake.input.model, **snakemake.params.load)
    need = NeutralMetric.parse(snakemake.wildcards.metric)
    write_metric(snakemake.output.metric, model, need)
