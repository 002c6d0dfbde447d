"""Second moments of W2's inputs over generic text (kmebench.moments)."""

import torch

from kmebench import origins
from kmebench.files import sha256_of
from kmebench.logs import script_log
from kmebench.models.editable import EditableModel, seed_everything
from kmebench.moments.stage import second_moments
from kmebench.moments.texts import TextSettings

with script_log(snakemake):
    torch.set_num_threads(snakemake.threads)
    seed_everything(0)  # texts are drawn by generators of their own: the flags count
    settings = dict(snakemake.params.settings)
    second_moments(
        snakemake.output.moments,
        EditableModel.load(snakemake.input.model, **snakemake.params.load),
        snakemake.params.layers,
        TextSettings(**{k: v for k, v in settings.items() if k != "force"}),
        force=settings.get("force", False),
        code={path: sha256_of(path) for path in snakemake.input.code},
    )
    content = snakemake.params.content
    origins.write_note(snakemake.output.origin, content, content)
