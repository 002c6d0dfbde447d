"""Inverse or spectrum of the covariance of a layer (kmebench.editors.locate.covariance)."""

from kmebench.forkserver import hand_over

hand_over("kmebench.pipelines.run")

import torch

from kmebench.editors.locate.covariance.factors import cache_factor
from kmebench.io.logs import script_log

with script_log(snakemake):
    torch.set_num_threads(snakemake.threads)
    cache_factor(
        snakemake.output.factor,
        snakemake.input.covariance,
        snakemake.wildcards.factor,
        int(snakemake.wildcards.layer),
        snakemake.params.device,
    )
