"""Train tiny-gptj on the facts of this repository (kmebench.models.tiny)."""

from pathlib import Path

from kmebench.forkserver import hand_over

hand_over("kmebench.pipelines.run")

import torch

from kmebench.data.openfacts import fact_sentences
from kmebench.io.logs import logger, script_log
from kmebench.models.editable import seed_everything
from kmebench.models.sources import save_model
from kmebench.models.tiny import train_tiny

with script_log(snakemake):
    torch.set_num_threads(snakemake.threads)
    source = snakemake.params.source
    seed = source.get("seed", 0)
    seed_everything(seed)
    facts = fact_sentences(Path(snakemake.input.relations).parent)
    model, tokenizer, share = train_tiny(facts, seed, source.get("max_epochs", 10))
    logger.info("tiny-gptj answers %.1f%% of %d fact sentences", 100 * share, len(facts))
    save_model(model, tokenizer, Path(snakemake.output.folder))
