"""Run one cell of the grid: edit a model, predict with it, record how (kmebench.pipelines)."""

from kmebench.forkserver import hand_over

hand_over("kmebench.pipelines.run")

import torch

from kmebench.data.records import read_requests
from kmebench.editors.needs import EVERY_RUN
from kmebench.io.logs import script_log
from kmebench.models.editable import EditableModel, seed_everything
from kmebench.pipelines.run import run_cell

with script_log(snakemake):
    torch.set_num_threads(snakemake.threads)
    settings = snakemake.params.run | {
        "checkpoint_every": snakemake.resources.checkpoint_every,
        "on_failed_edit": snakemake.resources.on_failed_edit,
    }
    seed_everything(settings["seed"])
    run_cell(
        lambda: EditableModel.load(snakemake.input.model, **settings["load"]),
        read_requests(snakemake.input.requests),
        settings,
        assets={k: v for k, v in snakemake.input.items() if k not in EVERY_RUN},
        original=snakemake.input.original,
        neutral=snakemake.input.get("neutral"),
        inputs={k: [v] if isinstance(v, str) else v for k, v in snakemake.input.items()},
        output=dict(snakemake.output.items()),
    )
