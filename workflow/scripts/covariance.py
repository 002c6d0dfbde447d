"""Covariance of W2's inputs over generic text (kmebench.editors.locate.covariance)."""

from kmebench.forkserver import hand_over

hand_over("kmebench.pipelines.run")

import torch

from kmebench.editors.locate.covariance.stage import measure_covariance
from kmebench.editors.locate.covariance.texts import TextSettings
from kmebench.io import origins
from kmebench.io.files import sha256_of
from kmebench.io.logs import script_log
from kmebench.models.editable import EditableModel, seed_everything

with script_log(snakemake):
    torch.set_num_threads(snakemake.threads)
    seed_everything(0)  # texts are drawn by generators of their own: the flags count
    settings = dict(snakemake.params.settings)
    measure_covariance(
        snakemake.output.covariance,
        EditableModel.load(snakemake.input.model, **snakemake.params.load),
        snakemake.params.layers,
        TextSettings(**{k: v for k, v in settings.items() if k != "force"}),
        force=settings.get("force", False),
        code={path: sha256_of(path) for path in snakemake.input.code},
    )
    content = snakemake.params.content
    origins.write_note(snakemake.output.origin, content, content)
