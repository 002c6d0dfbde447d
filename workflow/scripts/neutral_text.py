"""Neutral text by the unedited model, and what it says of it (kmebench.evaluation.health)."""

from kmebench.forkserver import hand_over

hand_over("kmebench.pipelines.run")

import torch

from kmebench.evaluation.health import NeutralSettings, NeutralText
from kmebench.io.logs import script_log
from kmebench.models.editable import EditableModel, seed_everything

with script_log(snakemake):
    torch.set_num_threads(snakemake.threads)
    seed_everything(0)  # the text is drawn by a generator of its own: the flags count
    model = EditableModel.load(snakemake.input.model, **snakemake.params.load)
    settings = NeutralSettings(**snakemake.params.settings)
    neutral = NeutralText.written_by(model, settings, snakemake.params.batch_size)
    neutral.save(snakemake.output.text)
